"""Which codemods exist: every module of the package, and third parties' through an entry-point group.

Modules are imported when a rule is asked for, entry points when a name is not built in.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from codemods.framework.base import Rule
from codemods.framework.discovery import defined, modules

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "qwen_surgery.codemods"

#: name -> module that defines the rule
BUILTIN: dict[str, str] = modules("codemods", [str(Path(__file__).resolve().parents[1])])


class UnknownCodemod(LookupError):
    """No built-in codemod and no entry point has this name."""


@cache
def get(name: str) -> Rule:
    """The rule called ``name``. Raises :class:`UnknownCodemod` for a name nobody provides."""
    if name in BUILTIN and (built_in := defined(BUILTIN[name], Rule)) is not None:
        return built_in
    for entry in _provided():
        if entry.name == name:
            provided = entry.load()
            rule = provided() if isinstance(provided, type) else provided
            if not isinstance(rule, Rule):
                raise UnknownCodemod(f"{name}: {entry.value} is not a {Rule.__module__}.Rule")
            return rule
    raise UnknownCodemod(f"no codemod is called {name!r}; known: {', '.join(names())}")


def names() -> list[str]:
    """Every codemod's name: the built-in ones, then third parties'."""
    return [*BUILTIN, *sorted(e.name for e in _provided() if e.name not in BUILTIN)]


def _provided() -> Iterable[EntryPoint]:
    """What installed packages add under :data:`GROUP`; importlib.metadata is loaded only when asked for."""
    from importlib.metadata import entry_points

    return entry_points(group=GROUP)
