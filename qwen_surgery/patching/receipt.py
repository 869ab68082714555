"""Receipts: what a patch did to a checkout, kept in CHECKOUT/.qwen-surgery/ with the original bytes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codemods.framework.base import Outcome, Status
from qwen_surgery.atomic import digest
from qwen_surgery.errors import Refused

STATE = ".qwen-surgery"
RECEIPT = "receipt.json"
FORMAT = 1


@dataclass(frozen=True)
class FileRecord:
    """One patched file: sha256 of its bytes before and after, and the permission bits before."""

    before: str
    after: str
    mode: int

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
            "files": {
                name: {
                    "before": record.before,
                    "after": record.after,
                    "mode": f"{record.mode:04o}",
                    "original": record.stored(name),
                }
                for name, record in self.files.items()
            },
            "outcomes": {name: [outcome_json(o) for o in found] for name, found in self.outcomes.items()},
        }
        return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Receipt:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"receipt format {data['format']}, this program knows {FORMAT}")
        return cls(
            recipe=data["recipe"],
            seq_length=int(data["seq_length"]),
            skip=tuple(data["skip"]),
            files={
                name: FileRecord(record["before"], record["after"], int(record["mode"], 8))
                for name, record in data["files"].items()
            },
            outcomes={
                name: tuple(outcome_from_json(o) for o in found) for name, found in data["outcomes"].items()
            },
            versions=data["versions"],
            time=data["time"],
            revision=data["revision"],
        )

    @classmethod
    def load(cls, checkout: Path) -> Receipt | None:
        """The receipt of *checkout*, None when it has none; Refused when the file is damaged."""
        path = checkout / STATE / RECEIPT
        try:
            return cls.from_bytes(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(
                f"{path} is damaged ({error})",
                hint=f"the original files lie in {path.parent / 'originals'}; move {STATE} away to go on",
            ) from error

    def original(self, checkout: Path, name: str) -> bytes:
        """The original bytes of *name*; Refused when they are lost or damaged."""
        record = self.files[name]
        path = checkout / STATE / record.stored(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        if digest(data) != record.before:
            raise Refused(
                f"{path} does not hold the original {name} any more", hint="download the file again"
            )
        return data


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain JSON values."""
    return {**dataclasses.asdict(outcome), "status": outcome.status.value}


def outcome_from_json(data: dict[str, Any]) -> Outcome:
    """The inverse of :func:`outcome_json`."""
    return Outcome(**{**data, "status": Status(data["status"])})
