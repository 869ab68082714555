"""The two input products of the MLP as one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.framework.base import WEIGHT_PREFIX, GraphPass
from graph_passes.framework.graphs import constant_of, made_by, make, nodes, replace_tensor, shape


class JointMlp(GraphPass):
    name = "joint-mlp"
    summary = "computes w1 and w2 of the MLP as one product with a joint weight"
    why = (
        "every product ends with one tile whose arithmetic no load hides: one long product has one such end "
        "where two have two (1.8B, int4, one token: 230,567 cycles against 235,802)"
    )
    precondition = "two products of one tensor with two weights of one shape, even in width, without bias"
    undivided = True

    def rewrite(self, graph: Any) -> list[str]:
        sites = []
        for node in nodes(graph, "Mul"):
            pair = _pair(node)
            if pair is not None:
                _join(graph, *pair)
                sites += [product.name for product in pair]
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
        return sites


def _pair(gate: Any) -> tuple[Any, Any] | None:
    """The two products under ``a * (b * Sigmoid(b))``, in the order in which they are written."""
    for i in (0, 1):
        plain, silu = made_by(gate.inputs[i], "MatMul"), made_by(gate.inputs[1 - i], "Mul")
        if plain is None or silu is None:
            continue
        gated = next((m for t in silu.inputs if (m := made_by(t, "MatMul")) is not None), None)
        sigmoid = next((s for t in silu.inputs if (s := made_by(t, "Sigmoid")) is not None), None)
        if gated is None or sigmoid is None or sigmoid.inputs[0] is not gated.outputs[0]:
            continue
        if _joinable(plain, gated):
            return plain, gated
    return None


def _joinable(a: Any, b: Any) -> bool:
    weights = _stored_weight(a), _stored_weight(b)
    same = weights[0] is not None and weights[1] is not None and shape(weights[0]) == shape(weights[1])
    even = same and (shape(weights[0]) or (1,))[0] % 2 == 0
    return even and a.inputs[0] is b.inputs[0] and len(shape(a.inputs[0]) or ()) == 3


def _stored_weight(product: Any) -> Any | None:
    """The weight input [out, in] whose transpose this product multiplies with."""
    transpose = made_by(product.inputs[1], "Transpose")
    if transpose is None or list(transpose.attrs.get("perm", [1, 0])) != [1, 0]:
        return None
    weight = transpose.inputs[0]
    return weight if weight.name.startswith(WEIGHT_PREFIX) else None


def _join(graph: Any, first: Any, second: Any) -> None:
    x, weights = first.inputs[0], [_stored_weight(first), _stored_weight(second)]
    batch, length, _ = shape(x) or ()
    width, depth = shape(weights[0]) or ()
    base = first.name.rsplit("/", 2)[0] + "/joint"
    joint = gs.Variable(f"{base}/weight", dtype=np.float32, shape=[2 * width, depth])
    graph.nodes.append(gs.Node("Concat", f"{base}/Concat", {"axis": 0}, inputs=weights, outputs=[joint]))
    turned = make(
        graph, "Transpose", [joint], f"{base}/Transpose", (depth, 2 * width), np.float32, {"perm": [1, 0]}
    )
    product = make(graph, "MatMul", [x, turned], f"{base}/MatMul", (batch, length, 2 * width), np.float32)
    # Two reshapes that differ: TPU-MLIR takes one product apart again when all it sees behind it is one
    # reshape with slices.
    for part, (old, rows) in enumerate(zip((first, second), (1, 2), strict=True)):
        layout = (batch, length, 2 * rows, width // rows)
        wide = _reshape(graph, product, layout, f"{base}/{part}/Reshape")
        sliced = _slice(graph, wide, layout, part * rows, (part + 1) * rows, f"{base}/{part}/Slice")
        result = _reshape(graph, sliced, (batch, length, width), f"{base}/{part}/part")
        replace_tensor(graph, old.outputs[0], result)


def _reshape(graph: Any, x: Any, to: tuple[int, ...], name: str) -> Any:
    wanted = constant_of(graph, f"{name}/shape", np.asarray([to[0], -1, *to[2:]], np.int64))
    return make(graph, "Reshape", [x, wanted], name, to, np.float32)


def _slice(graph: Any, x: Any, layout: tuple[int, ...], start: int, stop: int, name: str) -> Any:
    """Rows *start* to *stop* of axis 2."""
    vectors = (("starts", start), ("ends", stop), ("axes", 2), ("steps", 1))
    inputs = [constant_of(graph, f"{name}/{what}", np.asarray([v], np.int64)) for what, v in vectors]
    return make(graph, "Slice", [x, *inputs], name, (*layout[:2], stop - start, layout[3]), np.float32)
