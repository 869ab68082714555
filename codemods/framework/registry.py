"""Which codemods exist: the built-in ones by name, third parties' through an entry-point group.

Modules are imported when a rule is asked for, entry points when a name is not built in.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from codemods.framework.base import Rule

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "qwen_surgery.codemods"

#: name -> module that holds ``RULE``, in documentation order
BUILTIN: dict[str, str] = {
    "disable-torch2": "codemods.disable_torch2",
    "scalar-divide": "codemods.scalar_divide",
    "add-attention-mask": "codemods.add_attention_mask",
    "drop-causal-mask": "codemods.drop_causal_mask",
    "drop-upcast-causal-mask": "codemods.drop_upcast_causal_mask",
    "early-present": "codemods.early_present",
}


class UnknownCodemod(LookupError):
    """No built-in codemod and no entry point has this name."""


@cache
def get(name: str) -> Rule:
    """The rule called ``name``. Raises :class:`UnknownCodemod` for a name nobody provides."""
    if name in BUILTIN:
        return importlib.import_module(BUILTIN[name]).RULE
    for entry in _provided():
        if entry.name == name:
            provided = entry.load()
            rule = provided() if isinstance(provided, type) else provided
            if not isinstance(rule, Rule):
                raise UnknownCodemod(f"{name}: {entry.value} is not a codemods.framework.base.Rule")
            return rule
    raise UnknownCodemod(f"no codemod is called {name!r}; known: {', '.join(names())}")


def names() -> list[str]:
    """Every codemod's name: the built-in ones in order, then third parties'."""
    return [*BUILTIN, *sorted(e.name for e in _provided() if e.name not in BUILTIN)]


def _provided() -> Iterable[EntryPoint]:
    """What installed packages add under :data:`GROUP`; importlib.metadata is loaded only when asked for."""
    from importlib.metadata import entry_points

    return entry_points(group=GROUP)
