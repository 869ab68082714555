"""Source and config edits for Qwen v1 modeling code, one per file.

Python source is parsed and edited, never imported or executed. Nothing here imports torch, ONNX or
``qwen_surgery``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from codemods.analysis.identity import Era, identify, refusal
from codemods.analysis.model_parts import ModelSizes
from codemods.analysis.source import SourceError
from codemods.framework.base import Example, Outcome, Status
from codemods.framework.recipes import Recipe
from codemods.framework.runner import SourceResult, run_rules

__all__ = [
    "Era",
    "Example",
    "ModelSizes",
    "Outcome",
    "Recipe",
    "SourceError",
    "SourceResult",
    "Status",
    "identify",
    "refusal",
    "run",
]


def run(
    source: bytes | str, recipe: Recipe | str, *, skip: Iterable[str] = (), sizes: ModelSizes | None = None
) -> SourceResult:
    """Apply a recipe's codemods to one modeling file.

    ``source`` is the file's bytes (or text, taken as UTF-8); ``recipe`` a :class:`Recipe` or its name;
    ``skip`` names codemods to leave out (their sites end as ``declined``, marked ``suppressed``); ``sizes``
    say what the real model is (upstream's defaults, and any length up to the trained one, without). The
    result's ``code`` equals the input byte for byte outside the lines its outcomes report. Raises
    :class:`SourceError` when the source does not parse, and :class:`LookupError` for an unknown recipe or
    codemod name.
    """
    from codemods.framework import recipes, registry

    chosen = recipes.load(recipe) if isinstance(recipe, str) else recipe
    data = source.encode() if isinstance(source, str) else source
    for name in skip:
        registry.get(name)
    return run_rules(data, [registry.get(name) for name in chosen.codemods], skip, sizes)


if "libcst.codemod" in sys.modules:  # LibCST's tool is running: give it a command for each rule
    from codemods import libcst_commands as libcst_commands
