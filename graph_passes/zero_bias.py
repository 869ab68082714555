"""A bias of zeros where a product has none."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.framework.base import WEIGHT_PREFIX, GraphPass
from graph_passes.framework.graphs import constant_of, nodes, producer, shape


class ZeroBias(GraphPass):
    name = "zero-bias"
    summary = "gives products that widen or keep their input a bias of zeros"
    why = (
        "with a bias TPU-MLIR cuts a quantised product into tiles whose last one is smaller, and nothing "
        "hides the last tile's arithmetic (attn.c_proj of 1.8B, int4, one token: 46,034 cycles, not 47,604)"
    )
    precondition = "a product with a two-dimensional weight, at least as many outputs as inputs, no bias yet"
    undivided = True

    def rewrite(self, graph: Any) -> list[str]:
        sites = []
        for node in nodes(graph, "MatMul"):
            dims = shape(node.inputs[1])
            if not _is_weight(node.inputs[1]) or dims is None or len(dims) != 2 or dims[1] < dims[0]:
                continue
            if len(shape(node.inputs[0]) or ()) != 3 or _has_bias(node):
                continue
            _add_bias(graph, node, dims[1])
            sites.append(node.name)
        graph.toposort()
        return sites


def _is_weight(tensor: Any) -> bool:
    """Whether *tensor* follows from weights alone."""
    node = producer(tensor)
    if node is None:
        return bool(tensor.name.startswith(WEIGHT_PREFIX))
    return all(isinstance(t, gs.Constant) or _is_weight(t) for t in node.inputs)


def _has_bias(product: Any) -> bool:
    result = product.outputs[0]
    for user in result.outputs:
        other = next((t for t in user.inputs if t is not result), None) if user.op == "Add" else None
        if other is not None and len(shape(other) or ()) == 1:
            return True
    return False


def _add_bias(graph: Any, product: Any, width: int) -> None:
    result = product.outputs[0]
    bare = gs.Variable(f"{result.name}/bare", dtype=np.float32, shape=list(result.shape))
    product.outputs[0] = bare
    zeros = constant_of(graph, f"{result.name}/zeros", np.zeros(width, np.float32))
    graph.nodes.append(gs.Node("Add", f"{product.name}/zero_bias", inputs=[bare, zeros], outputs=[result]))
