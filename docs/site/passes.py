"""A page per graph pass, from what the pass says about itself."""

from __future__ import annotations

from graph_passes.framework import registry
from graph_passes.framework.base import BasePass, MlirPass

FOLDER = "passes"


def pages() -> dict[str, str]:
    """The page of every pass; the figures of all of them stand on the page written by hand."""
    return {f"{FOLDER}/{one.name}.md": _page(one) for one in registry.all_passes()}


def _page(one: BasePass) -> str:
    works_on = "the Top dialect's text, inside the compiler" if isinstance(one, MlirPass) else "ONNX graphs"
    parts = [
        f"# {one.name}",
        f"{_sentence(one.summary)} Works on {works_on}.",
        f"**Why.** {_sentence(one.why)}",
        f"**Where.** {_sentence(one.precondition)} Anything else is left alone.",
    ]
    if one.not_for:
        parts.append(f"**Not with** TPU-MLIR {', '.join(one.not_for)}, which cannot take its result.")
    if one.optional:
        parts.append("**Only where asked for:** by a runtime profile that needs it, or by name.")
    parts.append(
        f"Leave it out: `clean DIR --skip {one.name}`. [What it is worth on the chip](../passes.md)."
    )
    return "\n\n".join(parts) + "\n"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."
