"""Preflight: forms that TPU-MLIR refuses or miscompiles, found in the graph before the compiler starts.

:func:`check` works on any exported net, cleaned or not, template or bound. Every rule was seen to fail (or to
give wrong numbers) with TPU-MLIR 1.30.2; each finding names the node and says what to do instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graph_passes.lint.finding import LintFinding

if TYPE_CHECKING:
    import onnx

__all__ = ["LintFinding", "check"]


def check(model: onnx.ModelProto) -> tuple[LintFinding, ...]:
    """Every finding in *model*, in the graph's order; empty when TPU-MLIR may have it."""
    from graph_passes.lint.rules import RULES

    return tuple(finding for rule in RULES for finding in rule(model))
