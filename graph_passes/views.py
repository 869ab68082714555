"""Reshapes, slices, squeezes, transposes and concats that only look at the same values again."""

from __future__ import annotations

from typing import Any

import numpy as np

from graph_passes.framework.base import GraphPass
from graph_passes.framework.graphs import constant, constant_of, made_by, nodes, replace_tensor, shape

_RESHAPING = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")


class Views(GraphPass):
    name = "views"
    summary = "drops slices of everything, reshapes to the same shape, concats of one part, pairs that cancel"
    why = (
        "upstream slices 128 of 128 rotary channels and concatenates an empty rest, for each of Q and K; on "
        "the chip "
        "a Slice or Concat that is not seen through is a copy through memory"
    )
    precondition = "shapes are static and the result has the same elements in the same order"

    def rewrite(self, graph: Any) -> list[str]:
        sites: list[str] = []
        for rule in (_drop_empty_parts, _drop_same_shape, _join_reshapes, _join_transposes):
            sites += rule(graph)
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
        return sites


def _drop(graph: Any, node: Any, source: Any) -> bool:
    if not replace_tensor(graph, node.outputs[0], source):
        return False
    node.outputs.clear()
    return True


def _drop_empty_parts(graph: Any) -> list[str]:
    sites = []
    for node in nodes(graph, "Concat"):
        parts = [t for t in node.inputs if 0 not in (shape(t) or ())]
        if parts and len(parts) < len(node.inputs):
            node.inputs = parts
            sites.append(node.name)
        if len(node.inputs) == 1 and _drop(graph, node, node.inputs[0]):
            sites.append(node.name)
    return sites


def _drop_same_shape(graph: Any) -> list[str]:
    """Same number of dimensions and elements per dimension in and out: the op only passes the tensor on."""
    sites = []
    for op in (*_RESHAPING, "Slice", "Split", "Expand", "Transpose"):
        for node in nodes(graph, op):
            if len(node.outputs) != 1:
                continue
            source, result = node.inputs[0], node.outputs[0]
            if shape(source) is None or shape(source) != shape(result):
                continue
            if op == "Slice" and not _forward(node):
                continue
            if op == "Transpose" and list(node.attrs.get("perm", [1, 0])) != list(
                range(len(shape(source) or ()))
            ):
                continue
            if _drop(graph, node, source):
                sites.append(node.name)
    return sites


def _forward(node: Any) -> bool:
    """Whether a Slice walks forwards; one that reverses an axis keeps the shape but not the order."""
    if len(node.inputs) < 5:
        return True
    steps = constant(node.inputs[4])
    return steps is not None and bool((steps > 0).all())


def _join_reshapes(graph: Any) -> list[str]:
    sites = []
    for node in [n for n in graph.nodes if n.op in _RESHAPING]:
        source, target = node.inputs[0], shape(node.outputs[0])
        inner = next((n for op in _RESHAPING if (n := made_by(source, op)) is not None), None)
        if inner is None or target is None:
            continue
        node.op = "Reshape"
        node.attrs = {}
        wanted = constant_of(graph, f"{node.outputs[0].name}/shape", np.asarray(target, np.int64))
        node.inputs = [inner.inputs[0], wanted]
        sites.append(node.name)
    return sites


def _join_transposes(graph: Any) -> list[str]:
    sites = []
    for node in nodes(graph, "Transpose"):
        inner = made_by(node.inputs[0], "Transpose")
        if inner is None or "perm" not in node.attrs or "perm" not in inner.attrs:
            continue
        node.attrs["perm"] = [inner.attrs["perm"][i] for i in node.attrs["perm"]]
        node.inputs[0] = inner.inputs[0]
        sites.append(node.name)
    return sites
