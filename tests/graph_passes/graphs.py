"""Small hand-made graphs for passes that the real nets do not need, and passes that are wrong on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graph_passes import GraphPass


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Mapping[str, Sequence[int]],
    constants: dict[str, np.ndarray] | None = None,
    *,
    opset: int = 15,
    ir_version: int = 8,
) -> onnx.ModelProto:
    """A float32 model; inputs whose name ends in ``_ids`` are int32."""

    def value(name: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
        kind = TensorProto.INT32 if name.endswith("_ids") else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, list(shape))

    graph = helper.make_graph(
        list(nodes),
        "test",
        [value(n, s) for n, s in inputs.items()],
        [value(n, s) for n, s in outputs.items()],
        [numpy_helper.from_array(v, n) for n, v in (constants or {}).items()],
    )
    result = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    result.ir_version = ir_version
    return result


def node(op: str, inputs: Sequence[str], output: str, **attrs: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [output], name=output, **attrs)


class _Probe(GraphPass):
    why = precondition = summary = "a pass made for a test"


class DropsMask(_Probe):
    """Reads the scores before the mask was added."""

    name = "drops-mask"

    def rewrite(self, graph: Any) -> list[str]:
        for found in [n for n in graph.nodes if n.op == "Softmax"]:
            masked = found.inputs[0].inputs[0]
            scores = next(t for t in masked.inputs if t.name != "attention_mask")
            if masked.op == "Add" and scores.inputs:
                found.inputs[0] = scores
                return [found.name]
        return []


class SwapsHalves(_Probe):
    """Takes w2's part for w1's: shapes agree, numbers do not."""

    name = "swaps-products"

    def rewrite(self, graph: Any) -> list[str]:
        found = [n for n in graph.nodes if n.op == "MatMul" and "/mlp/w1" in n.name + n.inputs[1].name]
        other = [n for n in graph.nodes if n.op == "MatMul" and "/mlp/w2" in n.name + n.inputs[1].name]
        if len(found) != 1 or len(other) != 1:
            return []
        first, second = found[0], other[0]
        first.inputs[1], second.inputs[1] = second.inputs[1], first.inputs[1]
        graph.toposort()
        return [first.name]


class RenamesOutput(_Probe):
    name = "renames-output"

    def rewrite(self, graph: Any) -> list[str]:
        graph.outputs[0].name += "_renamed"
        return [graph.outputs[0].name]


class LeavesHole(_Probe):
    """Deletes a node that is needed."""

    name = "leaves-hole"

    def rewrite(self, graph: Any) -> list[str]:
        doomed = next(n for n in graph.nodes if n.op == "Softmax")
        graph.nodes.remove(doomed)
        return [doomed.name]


class NeverContent(_Probe):
    """Toggles a node's name for ever."""

    name = "never-content"

    def rewrite(self, graph: Any) -> list[str]:
        graph.nodes[0].name += "x"
        return [graph.nodes[0].name]


class Crashes(_Probe):
    name = "crashes"

    def rewrite(self, graph: Any) -> list[str]:
        raise IndexError("off the end")
