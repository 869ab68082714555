"""Recipe files: which passes run.

A recipe is a TOML file::

    [passes]
    joint-mlp = false        # off by name; what is not named stays as it is
    bounded-mask = true      # on by name: it is off unasked

    only = ["fold-constants", "rotary"]   # instead of the above: these and no others
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from graph_passes.framework import registry

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class BadRecipe(ValueError):
    """A recipe file that does not say what it should."""


def read(path: str | Path) -> tuple[str, ...]:
    """Names of the passes that run under the recipe at *path*, in running order.

    Raises :class:`BadRecipe` for bad TOML, an unknown pass or a value that is not true or false; OSError as
    usual.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRecipe(f"{path}: not a TOML file: {error}") from error
    extra = set(data) - {"passes", "only"}
    if extra:
        raise BadRecipe(
            f"{path}: unknown table {sorted(extra)[0]!r}; a recipe holds [passes] or only = [...]"
        )
    if "only" in data and "passes" in data:
        raise BadRecipe(f"{path}: give [passes] or only = [...], not both")
    try:
        if "only" in data:
            return _only(path, data["only"])
        return _switched(path, data.get("passes", {}))
    except registry.UnknownPass as error:
        raise BadRecipe(f"{path}: {error}; known: {', '.join(error.known)}") from error


def _only(path: Path, names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise BadRecipe(f"{path}: only must be a list of pass names")
    registry.require_known(names)
    return tuple(p.name for p in registry.all_passes() if p.name in names)


def _switched(path: Path, switches: Any) -> tuple[str, ...]:
    if not isinstance(switches, dict):
        raise BadRecipe(f"{path}: [passes] must be a table of name = true or false")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise BadRecipe(f"{path}: pass {name} must be true or false, not {value!r}")
    registry.require_known(switches)
    off, on = ([name for name, value in switches.items() if value is wanted] for wanted in (False, True))
    return without(off, also=on)


def without(names: Iterable[str], also: Iterable[str] = ()) -> tuple[str, ...]:
    """Every pass that runs unasked and those of *also*, but *names*, in running order.

    Raises UnknownPass for a name that no pass has.
    """
    names, also = set(names), set(also)
    registry.require_known(names | also)
    chosen = (p.name for p in registry.all_passes() if not p.optional or p.name in also)
    return tuple(name for name in chosen if name not in names)
