"""What every codemod shares: sites, outcomes, examples and the base class.

A codemod finds its sites on a parsed tree, checks each site's precondition, edits, and checks its
postcondition; every site ends in exactly one :class:`Outcome`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Status(str, Enum):
    """What became of one site."""

    APPLIED = "applied"  #: the edit was made
    ALREADY = "already"  #: upstream, or someone before us, has done it
    ABSENT = "absent"  #: the construct is not in this revision
    DECLINED = "declined"  #: found, but the rewrite cannot be shown safe; the reason says why
    FAILED = "failed"  #: an error; nothing is written


@dataclass(frozen=True)
class Outcome:
    """One site's outcome. Lines are 1-based, in the source as it was before any edit."""

    codemod: str  #: kebab-case name, e.g. ``disable-torch2``; config edits are ``config:<key>``
    status: Status
    reason: str
    line: int | None = None
    end_line: int | None = None
    where: str = ""  #: qualified function, e.g. ``QWenAttention._attn``


@dataclass(frozen=True)
class Example:
    """A worked example; feeds the tests, the docs and ``explain``. ``after`` is None where nothing changes."""

    name: str
    before: str
    after: str | None
    status: Status
