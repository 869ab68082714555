"""A one-node ONNX model, for evaluating a node on constants with ONNX's own reference evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx


def model_of(node: onnx.NodeProto, feeds: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A model (opset 15) of *node* alone, with an input for each array of *feeds*."""
    import onnx
    from onnx import helper

    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
    graph = helper.make_graph([node], "single", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
