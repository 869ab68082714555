"""Products with one, sums with zero."""

from __future__ import annotations

from typing import Any

import numpy as np

from graph_passes.framework.base import GraphPass
from graph_passes.framework.graphs import broadcast_neutral, constant, made_by, nodes, replace_tensor

_NEUTRAL = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0}


class NeutralArithmetic(GraphPass):
    name = "neutral-arithmetic"
    summary = "drops x*1, x/1, x+0 and x-0"
    why = (
        "under the recipe documented, LogN attention multiplies the query by a table that is all ones below "
        "the trained length, and the chip would do that"
    )
    precondition = "the constant is 1 (0) everywhere and does not broadcast the other side to a larger shape"

    def rewrite(self, graph: Any) -> list[str]:
        sites = []
        for op, neutral in _NEUTRAL.items():
            for node in nodes(graph, op):
                # Only the second operand of a difference or quotient may be dropped.
                for i in (1, 0) if op in ("Mul", "Add") else (1,):
                    values, kept = constant(node.inputs[i]), node.inputs[1 - i]
                    if values is None or not np.all(values == neutral) or _is_bias(kept, values):
                        continue
                    if broadcast_neutral(kept, node.outputs[0]) and replace_tensor(
                        graph, node.outputs[0], kept
                    ):
                        sites.append(node.name)
                        node.outputs.clear()
                        break
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
        return sites


def _is_bias(kept: Any, values: np.ndarray) -> bool:
    """A zero bias of a product stays: it is there for a reason (the pass zero-bias)."""
    return values.ndim == 1 and values.size > 1 and made_by(kept, "MatMul") is not None
