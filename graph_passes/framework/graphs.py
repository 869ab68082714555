"""Small questions passes ask about onnx-graphsurgeon graphs, and the edits they share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

Tensor = Any  # gs.Variable | gs.Constant; the library ships no types
Node = Any  # gs.Node


def producer(tensor: Tensor) -> Node | None:
    """The node that makes *tensor*; None for inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def made_by(tensor: Tensor, op: str) -> Node | None:
    """The node that makes *tensor* when it is an *op*."""
    node = producer(tensor)
    return node if node is not None and node.op == op else None


def constant(tensor: Tensor) -> np.ndarray | None:
    """The values of a constant, whether an initializer or a Constant node."""
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    node = made_by(tensor, "Constant")
    if node is not None and "value" in node.attrs:
        return np.asarray(node.attrs["value"].values)
    return None


def shape(tensor: Tensor) -> tuple[int, ...] | None:
    """A fully static shape, or None."""
    if isinstance(tensor, gs.Constant):
        return tuple(int(d) for d in tensor.values.shape)
    dims = tensor.shape
    if dims is None or not all(isinstance(d, int) for d in dims):
        return None
    return tuple(dims)


def nodes(graph: Any, op: str) -> Iterator[Node]:
    """The nodes of one op type, safe against edits while iterating."""
    return iter([n for n in graph.nodes if n.op == op])


def replace_tensor(graph: Any, old: Tensor, new: Tensor) -> bool:
    """Let every reader of *old* read *new*. A graph output keeps its name: *new*'s maker then makes *old*.

    False, and nothing changed, when that is impossible: *old* is a graph output and *new* is an input, a
    constant or itself an output.
    """
    is_output = any(old is o for o in graph.outputs)
    maker = producer(new)
    if is_output and (maker is None or any(new is o for o in graph.outputs)):
        return False
    for node in list(old.outputs):
        for i, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[i] = new
    if not is_output or maker is None:
        return True
    old.inputs.clear()
    for user in list(new.outputs):
        for i, tensor in enumerate(user.inputs):
            if tensor is new:
                user.inputs[i] = old
    slot = next(i for i, tensor in enumerate(maker.outputs) if tensor is new)
    maker.outputs[slot] = old
    return True


def make(
    graph: Any,
    op: str,
    inputs: list[Tensor],
    name: str,
    out_shape: tuple[int, ...],
    dtype: Any,
    attrs: dict[str, Any] | None = None,
) -> Tensor:
    """Add a node with one output of the given shape and dtype, and return that output."""
    out = gs.Variable(unique(graph, name), dtype=dtype, shape=list(out_shape))
    graph.nodes.append(gs.Node(op, name=out.name, attrs=attrs or {}, inputs=inputs, outputs=[out]))
    return out


def constant_of(graph: Any, name: str, values: np.ndarray) -> Tensor:
    """A new constant."""
    return gs.Constant(unique(graph, name), values)


def unique(graph: Any, name: str) -> str:
    """*name*, or *name* with a number where the graph already has it."""
    taken = set(graph.tensors()) | {n.name for n in graph.nodes}
    if name not in taken:
        return name
    number = 2
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"
