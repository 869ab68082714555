"""The catalogue of known upstream revisions of Qwen v1 modeling code: facts only, never a line of the code.

``revisions.json`` beside this file holds, per content hash: where the file came from, its date, its era and
the outcomes every recipe is expected to have. ``patch`` looks a file up here to say whether it is known;
the tests compare the expected outcomes with what the codemods do today.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from golden.damaged import reading, require

#: Names another catalogue file to read and record to, instead of the one that ships with the program.
VARIABLE = "QWEN_SURGERY_CATALOGUE"

#: codemod -> the status of each of its sites, in source order.
Outcomes = dict[str, list[str]]


@dataclass(frozen=True)
class Revision:
    """One known content of a modeling file. ``date`` is the commit's, ISO 8601; '' where there is none."""

    sha256: str
    origin: str
    revision: str
    path: str
    date: str
    era: str
    expected: dict[str, Outcomes] = field(default_factory=dict)  #: recipe name -> outcomes

    def __str__(self) -> str:
        day = f" of {self.date[:10]}" if self.date else ""
        return f"{self.revision[:7] or self.sha256[:7]}{day}, era {self.era} ({self.origin})"


def path() -> Path:
    """The catalogue in use."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path(__file__).with_name("revisions.json")


def load(file: Path | None = None) -> dict[str, Revision]:
    """The catalogue by sha256; empty when *file* does not exist. Raises ValueError when it is not one."""
    chosen = file or path()
    try:
        with reading(chosen, "is not a catalogue of revisions"):
            entries = json.loads(chosen.read_bytes())["revisions"]
            return {entry["sha256"]: _revision(entry) for entry in entries}
    except FileNotFoundError:
        return {}


def _revision(entry: dict[str, Any]) -> Revision:
    found = Revision(**entry)
    require("a revision", str, *(vars(found)[name] for name in vars(found) if name != "expected"))
    require("a revision", dict, found.expected, *found.expected.values())
    return found


def find(sha256: str) -> Revision | None:
    """The known revision with this content, None when there is none."""
    return load().get(sha256)


def merge(known: dict[str, Revision], new: Iterable[Revision]) -> tuple[dict[str, Revision], int]:
    """The catalogue with *new* added, and how many contents were not in it before.

    A known content keeps where it came from; its expected outcomes become the new ones.
    """
    result = dict(known)
    added = 0
    for revision in new:
        old = result.get(revision.sha256)
        if old is None:
            added += 1
            result[revision.sha256] = revision
        else:
            expected = {**old.expected, **revision.expected}
            result[revision.sha256] = Revision(
                old.sha256, old.origin, old.revision, old.path, old.date, revision.era, expected
            )
    return result, added


def dump(catalogue: dict[str, Revision]) -> bytes:
    """The catalogue as the text of its file, oldest revision first; the inverse of :func:`load`."""
    ordered = sorted(catalogue.values(), key=lambda r: (r.origin, r.date, r.revision, r.sha256))
    return (
        json.dumps({"revisions": [vars(r) for r in ordered]}, indent=1, ensure_ascii=False) + "\n"
    ).encode()
