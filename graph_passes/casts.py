"""Identities and casts that change nothing."""

from __future__ import annotations

from typing import Any

from graph_passes.framework.base import GraphPass
from graph_passes.framework.graphs import made_by, nodes, replace_tensor

# Source dtypes whose every value the middle dtype holds exactly, so that a chain of two casts is one.
_EXACT_IN = {
    "float16": {"float32", "float64"},
    "float32": {"float64"},
    "int32": {"int64", "float64"},
    "int64": set(),
    "bool": {"int32", "int64", "float16", "float32", "float64"},
}


class Casts(GraphPass):
    name = "casts"
    summary = (
        "drops Identity, Dropout in inference, casts to the type already there, and joins chains of casts"
    )
    why = "TPU-MLIR refuses Identity on a weight, and every leftover Cast is an op of its own on the chip"
    precondition = "the value passes unchanged; a chain is joined only when the middle type loses nothing"

    def rewrite(self, graph: Any) -> list[str]:
        sites = []
        for op in ("Identity", "Dropout"):
            for node in nodes(graph, op):
                if replace_tensor(graph, node.outputs[0], node.inputs[0]):
                    sites.append(node.name)
                    node.outputs.clear()
        for node in nodes(graph, "Cast"):
            source, target = node.inputs[0], node.outputs[0]
            if source.dtype is None or target.dtype is None:
                continue
            inner = made_by(source, "Cast")
            if source.dtype == target.dtype:
                if replace_tensor(graph, target, source):
                    sites.append(node.name)
                    node.outputs.clear()
            elif inner is not None and _exact(inner.inputs[0].dtype, source.dtype):
                node.inputs[0] = inner.inputs[0]
                sites.append(node.name)
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
        return sites


def _exact(inner: Any, middle: Any) -> bool:
    import numpy as np

    if inner is None or middle is None:
        return False
    if inner == middle:
        return True
    return np.dtype(middle).name in _EXACT_IN.get(np.dtype(inner).name, set())
