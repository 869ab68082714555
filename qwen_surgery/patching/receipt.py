"""Receipts: what a patch did to a checkout, kept in CHECKOUT/.qwen-surgery/ with the original bytes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codemods.framework.base import Outcome, Status
from qwen_surgery.errors import Refused
from qwen_surgery.files import digest, read_regular
from qwen_surgery.patching.journal import (
    LARGEST,
    RECEIPT,
    STATE,
    foreign,
    is_hash,
    is_patched_name,
    refuse_foreign_state,
)

FORMAT = 1


@dataclass(frozen=True)
class FileRecord:
    """One patched file: sha256 of its bytes before and after, and the permission bits before.

    ``symlink`` is the text of the symbolic link that stood there, empty where there was a file. ``created``
    says that nothing stood there: the bytes before are those of the file that was lent.
    """

    before: str
    after: str
    mode: int
    symlink: str = ""
    created: bool = False

    def to_json(self, name: str) -> dict[str, Any]:
        data: dict[str, Any] = {
            "before": self.before,
            "after": self.after,
            "mode": f"{self.mode:04o}",
            "original": self.stored(name),
        }
        data |= {"created": True} if self.created else {}
        return data | ({"symlink": self.symlink} if self.symlink else {})

    @classmethod
    def from_json(cls, name: str, data: dict[str, Any]) -> FileRecord:
        """Raises ValueError for a record that this program did not write."""
        if not is_patched_name(name):
            raise ValueError(f"{name!r} is no file that this program patches")
        mode, symlink = int(data["mode"], 8), data.get("symlink", "")
        if not (is_hash(data["before"]) and is_hash(data["after"])):
            raise ValueError(f"a digest of {name} is none")
        if not 0 <= mode <= 0o777:
            raise ValueError(f"{name} has mode {mode:o}")
        if not isinstance(symlink, str) or "\0" in symlink:
            raise ValueError(f"{name} has a link that is none")
        if not isinstance(data.get("created", False), bool):
            raise ValueError(f"whether {name} was created is neither true nor false")
        return cls(data["before"], data["after"], mode, symlink, data.get("created", False))

    def stored(self, name: str) -> str:
        """Where the original bytes lie, relative to the state directory."""
        return f"originals/{self.before[:16]}-{name}"


@dataclass(frozen=True)
class Receipt:
    """What a patch did. ``files`` maps a name in the checkout to its record, ``outcomes`` to its sites."""

    recipe: str
    seq_length: int
    skip: tuple[str, ...]
    files: dict[str, FileRecord]
    outcomes: dict[str, tuple[Outcome, ...]]
    versions: dict[str, str] = field(default_factory=dict)
    time: str = ""
    revision: str = ""

    def to_bytes(self) -> bytes:
        data: dict[str, Any] = {
            "format": FORMAT,
            "recipe": self.recipe,
            "seq_length": self.seq_length,
            "skip": list(self.skip),
            "time": self.time,
            "revision": self.revision,
            "versions": self.versions,
            "files": {name: record.to_json(name) for name, record in self.files.items()},
            "outcomes": {name: [outcome_json(o) for o in found] for name, found in self.outcomes.items()},
        }
        return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Receipt:
        """Raises ValueError, KeyError, TypeError or AttributeError for what is no receipt of this program."""
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"receipt format {data['format']}, this program knows {FORMAT}")
        return cls(
            recipe=_text(data["recipe"]),
            seq_length=int(data["seq_length"]),
            skip=tuple(_text(name) for name in data["skip"]),
            files={name: FileRecord.from_json(name, record) for name, record in data["files"].items()},
            outcomes={
                name: tuple(outcome_from_json(o) for o in found) for name, found in data["outcomes"].items()
            },
            versions={name: _text(version) for name, version in data["versions"].items()},
            time=_text(data["time"]),
            revision=_text(data["revision"]),
        )

    @classmethod
    def load(cls, checkout: Path) -> Receipt | None:
        """The receipt of *checkout*, None when it has none; Refused when damaged or not this program's."""
        refuse_foreign_state(checkout)
        text = read_regular(checkout / STATE / RECEIPT, LARGEST)
        if text is None:
            return None
        try:
            return cls.from_bytes(text)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise foreign(checkout, f"{RECEIPT} is damaged ({error})") from error

    def original(self, checkout: Path, name: str) -> bytes:
        """The original bytes of *name*; Refused when they are lost or damaged."""
        record = self.files[name]
        path = checkout / STATE / record.stored(name)
        data = read_regular(path, LARGEST) or b""
        if digest(data) != record.before:
            raise Refused(
                f"{path} does not hold the original {name} any more", hint="download the file again"
            )
        return data


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    value.encode()  # raises ValueError for half a character, which could not be written again
    return value


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain JSON values."""
    return {**dataclasses.asdict(outcome), "status": outcome.status.value}


def outcome_from_json(data: dict[str, Any]) -> Outcome:
    """The inverse of :func:`outcome_json`. Raises TypeError for a field of another type."""
    outcome = Outcome(**{**data, "status": Status(data["status"])})
    for text in (outcome.codemod, outcome.reason, outcome.where):
        _text(text)
    if not all(line is None or isinstance(line, int) for line in (outcome.line, outcome.end_line)):
        raise TypeError("an outcome has a line that is no number")
    return outcome
