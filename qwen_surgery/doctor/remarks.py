"""What the doctor says: one remark for each thing looked at."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qwen_surgery.errors import SurgeryError


class Health(str, Enum):
    """How a thing is: fine, worth knowing, or something that will fail."""

    OK = "ok"
    NOTE = "note"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Remark:
    """What was looked at and what was found; ``mend`` is what to do about it, a command if any does."""

    what: str
    health: Health
    found: str
    mend: str = ""


def ok(what: str, found: str) -> Remark:
    return Remark(what, Health.OK, found)


def note(what: str, found: str, mend: str = "") -> Remark:
    return Remark(what, Health.NOTE, found, mend)


def fail(what: str, found: str, mend: str) -> Remark:
    return Remark(what, Health.FAIL, found, mend)


def failed(what: str, error: SurgeryError) -> Remark:
    """What *error*, which the program would end with, says."""
    return fail(what, str(error), error.hint)
