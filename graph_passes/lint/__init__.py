"""Preflight: forms that TPU-MLIR refuses or miscompiles, found in the graph before the compiler starts.

:func:`check` works on any exported net, cleaned or not, template or bound. Every rule was seen to fail (or to
give wrong numbers) with TPU-MLIR 1.30.2; each finding names the node and says what to do instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Finding:
    """One form the compiler cannot take. ``node`` is a node's name, or "" for the model as a whole.

    ``miscompiled`` is true where TPU-MLIR would accept the form and compute something else.
    """

    rule: str
    node: str
    message: str
    remedy: str
    miscompiled: bool = False

    def __str__(self) -> str:
        where = f"node {self.node}: " if self.node else ""
        return f"{where}{self.message} [{self.rule}]"


def check(model: onnx.ModelProto) -> tuple[Finding, ...]:
    """Every finding in *model*, in the graph's order; empty when TPU-MLIR may have it."""
    from graph_passes.lint.rules import RULES

    return tuple(finding for rule in RULES for finding in rule(model))
