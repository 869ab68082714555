"""Recipes: ordered lists of codemods and config edits, as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
GROUP = "qwen_surgery.recipes"


@dataclass(frozen=True)
class Recipe:
    """An ordered list of source codemods and of config edits, by name."""

    name: str
    codemods: tuple[str, ...]
    config: tuple[str, ...]
    summary: str = ""


DOCUMENTED = Recipe(
    "documented",
    (
        "disable-torch2",
        "scalar-divide",
        "drop-causal-mask",
        "drop-upcast-causal-mask",
        "early-present",
    ),
    ("seq-length", "max-position-embeddings", "precision"),
    "the vendor guide's five edits and its config, no more",
)

STATIC = Recipe(
    "static",
    (
        "disable-torch2",
        "scalar-divide",
        "add-attention-mask",
        "drop-causal-mask",
        "drop-upcast-causal-mask",
        "early-present",
        "model-forward",
    ),
    (
        "seq-length",
        "max-position-embeddings",
        "precision",
        "logn-attention",
        "dynamic-ntk",
        "flash-attention",
        "cache-quantization",
    ),
    "documented, and what exactness at every position below the export length needs",
)

HEADS_LAST = Recipe(
    "heads-last",
    ("rotary-heads-last", "repeat-kv-heads-last"),
    (),
    "the layers of transformers' own decoders, laid out as the chip keeps keys and values",
)

BUILTIN = {recipe.name: recipe for recipe in (STATIC, DOCUMENTED, HEADS_LAST)}
DEFAULT = STATIC.name


class UnknownRecipe(LookupError):
    """No built-in recipe and no entry point has this name."""


def load(name: str = DEFAULT) -> Recipe:
    """The recipe called ``name``. Raises :class:`UnknownRecipe` for a name nobody provides."""
    if name in BUILTIN:
        return BUILTIN[name]
    for entry in _provided():
        if entry.name == name:
            recipe = entry.load()
            if not isinstance(recipe, Recipe):
                raise UnknownRecipe(f"{name}: {entry.value} is not a codemods.framework.recipes.Recipe")
            return recipe
    raise UnknownRecipe(f"no recipe is called {name!r}; known: {', '.join(names())}")


def names() -> list[str]:
    """Every recipe's name, the default first."""
    return [*BUILTIN, *sorted(e.name for e in _provided() if e.name not in BUILTIN)]


def _provided() -> Iterable[EntryPoint]:
    """What installed packages add under :data:`GROUP`; importlib.metadata is loaded only when asked for."""
    from importlib.metadata import entry_points

    return entry_points(group=GROUP)
