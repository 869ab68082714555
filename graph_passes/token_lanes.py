"""One token's activations spread over the chip's lanes."""

from __future__ import annotations

from typing import Any

import numpy as np

from graph_passes.framework.base import GraphPass
from graph_passes.framework.graphs import constant_of, made_by, make, nodes, replace_tensor, shape

#: Lanes of a bm1684x; a multiple of the 32 that smaller chips have.
LANES = 64


class TokenLanes(GraphPass):
    name = "token-lanes"
    summary = "computes the MLP's activation of a single token as 64 rows instead of one"
    why = (
        "rows are what the chip spreads over its lanes; [1, 1, w] keeps one of 64 busy (1.8B, one token: "
        "2,000 cycles)"
    )
    precondition = "a * (b * Sigmoid(b)) on [1, 1, w] with w a multiple of 64"
    undivided = True

    def rewrite(self, graph: Any) -> list[str]:
        sites = []
        for node in nodes(graph, "Mul"):
            found = _match(node)
            if found is None:
                continue
            _spread(graph, node, *found)
            sites.append(node.name)
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
        return sites


def _match(gate: Any) -> tuple[Any, Any] | None:
    """(a, b) of ``a * (b * Sigmoid(b))`` on one row."""
    dims = shape(gate.outputs[0])
    if dims is None or len(dims) != 3 or dims[:2] != (1, 1) or dims[2] % LANES:
        return None
    for i in (0, 1):
        silu = made_by(gate.inputs[i], "Mul")
        if silu is None:
            continue
        for j in (0, 1):
            sigmoid, b = made_by(silu.inputs[j], "Sigmoid"), silu.inputs[1 - j]
            if (
                sigmoid is not None
                and sigmoid.inputs[0] is b
                and shape(gate.inputs[1 - i]) == shape(b) == dims
            ):
                return gate.inputs[1 - i], b
    return None


def _spread(graph: Any, gate: Any, a: Any, b: Any) -> None:
    width = (shape(b) or ())[2]
    rows = (1, LANES, width // LANES)

    def reshape(x: Any, to: tuple[int, ...], name: str) -> Any:
        wanted = constant_of(graph, f"{name}/shape", np.asarray(to, np.int64))
        return make(graph, "Reshape", [x, wanted], name, to, np.float32)

    base = f"{gate.name}/lanes"
    a_rows, b_rows = reshape(a, rows, f"{base}/a"), reshape(b, rows, f"{base}/b")
    sigmoid = make(graph, "Sigmoid", [b_rows], f"{base}/sigmoid", rows, np.float32)
    silu = make(graph, "Mul", [b_rows, sigmoid], f"{base}/silu", rows, np.float32)
    gated = make(graph, "Mul", [a_rows, silu], f"{base}/gated", rows, np.float32)
    replace_tensor(graph, gate.outputs[0], reshape(gated, (1, 1, width), f"{base}/row"))
