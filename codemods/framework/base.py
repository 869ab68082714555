"""What every codemod shares: sites, edits, outcomes, examples and the base class of a rule.

A rule reads a :class:`~codemods.analysis.source.Source` (parsed, never executed), names each place it could
act on (a :class:`Site`) and says what should happen there. The runner applies the edits with LibCST, parses
the result again and lets every rule prove its postcondition. Each site ends in exactly one :class:`Outcome`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from codemods.analysis.source import Source
from codemods.framework import prose

if TYPE_CHECKING:
    from codemods.analysis.model_parts import ModelSizes


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
    suppressed: bool = False  #: declined because the user asked for it; not an error for exit codes
    required: bool = True  #: declining it means the patched file may not be used (exit 3)


@dataclass(frozen=True)
class Example:
    """A worked example for tests, docs and ``explain``. ``after`` is None where nothing changes."""

    name: str
    before: str
    after: str | None
    status: Status


@dataclass(frozen=True)
class Drop:
    """Remove one statement."""

    target: ast.stmt


@dataclass(frozen=True)
class Insert:
    """Put new statements (source text, unindented) right before a statement."""

    before: ast.stmt
    text: str


@dataclass(frozen=True)
class Move:
    """Take a statement, with its comments, to right before another one of the same block."""

    target: ast.stmt
    before: ast.stmt


@dataclass(frozen=True)
class Rewrite:
    """Replace a statement by what ``make`` returns for its LibCST node."""

    target: ast.stmt
    make: Callable[[Any], Any]


Edit = Drop | Insert | Move | Rewrite


class EditError(ValueError):
    """The edit cannot be made on this layout (two statements on one line, a one-line suite)."""


@dataclass(frozen=True)
class Site:
    """One place a rule could act on, what it decided there, and the edits that would do it."""

    status: Status
    reason: str
    line: int | None = None
    end_line: int | None = None
    where: str = ""
    edits: tuple[Edit, ...] = ()
    required: bool = True  #: False where nothing calls the code in question: declining it harms nobody


@dataclass
class Decisions:
    """What is decided so far in this run, by codemod; a later rule may build on an earlier one's.

    ``sizes`` are the real model's; None where they are not known.
    """

    sites: dict[str, list[Site]] = field(default_factory=dict)
    sizes: ModelSizes | None = None

    def applies(self, codemod: str, where: str) -> bool:
        """True when ``codemod`` is going to edit the function ``where``."""
        return any(
            site.where == where and site.status is Status.APPLIED for site in self.sites.get(codemod, ())
        )


class Documented:
    """A codemod as its readers see it: a name, worked examples, and prose in the class's docstring."""

    name: ClassVar[str]  #: kebab-case, unique
    examples: ClassVar[tuple[Example, ...]] = ()

    @cached_property
    def prose(self) -> prose.Prose:
        """The docstring's parts; see :mod:`codemods.framework.prose`."""
        return prose.read(type(self))


class Rule(Documented):
    """Base class of a source codemod. Subclasses fill the class attributes and :meth:`sites`."""

    absent: ClassVar[str]  #: the reason given when no site is found
    required: ClassVar[bool] = True
    edits: ClassVar[bool] = True  #: False for a rule that reads and never applies anything

    def sites(self, source: Source, decided: Decisions) -> Iterable[Site]:
        """Every place in ``source`` this rule could act on, with its decision; empty means absent."""
        raise NotImplementedError
