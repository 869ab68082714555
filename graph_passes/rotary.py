"""Rotary embedding in one compact form."""

from __future__ import annotations

from typing import Any

import numpy as np

from graph_passes.framework.base import GraphPass
from graph_passes.framework.graphs import constant, constant_of, made_by, make, nodes, producer, shape


class Rotary(GraphPass):
    name = "rotary"
    summary = "writes the rotation of channel halves as Concat(-x[half:], x[:half]), cosine product first"
    why = (
        "upstream's reshape, unbind, squeeze and stack are ten operations for each of Q and K; in this one "
        "form the pass top-rope can hand them to the chip's rotary operation"
    )
    precondition = "x*cos + r*sin where r holds the negated upper and the lower half of x's last axis"

    def rewrite(self, graph: Any) -> list[str]:
        sites = []
        for node in nodes(graph, "Add"):
            found = _match(node)
            if found is None:
                continue
            x, cos_product, sin_product, concat = found
            if _is_canonical(node, cos_product, concat, x):
                continue
            _rewrite(graph, node, x, cos_product, sin_product, concat)
            sites.append(node.name)
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
        return sites


def _match(add: Any) -> tuple[Any, Any, Any, Any] | None:
    """(x, x*cos, rotated*sin, the Concat that rotates) when *add* ends a rotary embedding."""
    for i in (0, 1):
        cos_product, sin_product = made_by(add.inputs[i], "Mul"), made_by(add.inputs[1 - i], "Mul")
        if cos_product is None or sin_product is None:
            continue
        for rotated in sin_product.inputs:
            concat = made_by(rotated, "Concat")
            if concat is None or len(concat.inputs) != 2 or not _on_last_axis(concat):
                continue
            negated = _negated(concat.inputs[0])
            if negated is None:
                continue
            for x in cos_product.inputs:
                dims = shape(x)
                if dims is None or dims[-1] % 2:
                    continue
                half = dims[-1] // 2
                if _part_of(negated, x) == (half, 2 * half) and _part_of(concat.inputs[1], x) == (0, half):
                    return x, cos_product, sin_product, concat
    return None


def _on_last_axis(concat: Any) -> bool:
    dims = shape(concat.outputs[0])
    return dims is not None and concat.attrs["axis"] in (-1, len(dims) - 1)


def _negated(tensor: Any) -> Any | None:
    """y when *tensor* is -y."""
    node = producer(tensor)
    if node is None:
        return None
    if node.op == "Neg":
        return node.inputs[0]
    if node.op == "Mul":
        for i in (0, 1):
            values = constant(node.inputs[i])
            if values is not None and np.all(values == -1):
                return node.inputs[1 - i]
    return None


def _part_of(tensor: Any, x: Any) -> tuple[int, int] | None:
    """(start, stop) when *tensor* is that range of *x*'s last axis, with all other axes whole."""
    width = (shape(x) or (0,))[-1]
    if tensor is x:
        return 0, width
    node = producer(tensor)
    if node is None:
        return None
    if node.op == "Slice":
        return _sliced(node, x)
    if node.op == "Split":
        return _split(node, tensor, x)
    if node.op in ("Squeeze", "Reshape"):
        return _unbound(tensor, node, x)
    return None


def _sliced(node: Any, x: Any) -> tuple[int, int] | None:
    dims = shape(node.inputs[0])
    given = [constant(t) for t in node.inputs[1:]]
    if (
        node.inputs[0] is not x
        or dims is None
        or any(g is None or g.size != 1 for g in given)
        or len(given) < 3
    ):
        return None
    start, stop, axis, step = (int(g.reshape(-1)[0]) for g in [*given, np.ones(1)][:4])  # type: ignore[union-attr]
    if axis % len(dims) != len(dims) - 1 or step != 1:
        return None
    start, stop, _ = slice(start, stop).indices(dims[-1])
    return start, stop


def _split(node: Any, tensor: Any, x: Any) -> tuple[int, int] | None:
    dims = shape(x)
    if node.inputs[0] is not x or dims is None or node.attrs.get("axis", 0) % len(dims) != len(dims) - 1:
        return None
    start = 0
    for out in node.outputs:
        width = (shape(out) or (0,))[-1]
        if out is tensor:
            return start, start + width
        start += width
    return None


def _unbound(tensor: Any, node: Any, x: Any) -> tuple[int, int] | None:
    """The half of x that *tensor* is: x as [..., 2, half], split (or gathered) on the last axis but one."""
    dims, out = shape(x), shape(tensor)
    split = made_by(node.inputs[0], "Split")
    if split is None or dims is None or out is None:
        return None
    half = dims[-1] // 2
    reshape = made_by(split.inputs[0], "Reshape")
    paired = (*dims[:-1], 2, half)
    if reshape is None or shape(split.inputs[0]) != paired or out != (*dims[:-1], half):
        return None
    if split.attrs.get("axis", 0) % len(paired) != len(paired) - 2 or not _same_values(reshape.inputs[0], x):
        return None
    index = next(i for i, t in enumerate(split.outputs) if t is node.inputs[0])
    return index * half, (index + 1) * half


def _same_values(a: Any, b: Any) -> bool:
    """Whether *a* and *b* are one tensor, or reshapes of one tensor (elements in one order)."""

    def root(tensor: Any) -> Any:
        while (node := made_by(tensor, "Reshape")) is not None:
            tensor = node.inputs[0]
        return tensor

    return root(a) is root(b)


def _is_canonical(add: Any, cos_product: Any, concat: Any, x: Any) -> bool:
    slices = [made_by(_negated(concat.inputs[0]), "Slice"), made_by(concat.inputs[1], "Slice")]
    direct = all(s is not None and s.inputs[0] is x for s in slices)
    return direct and add.inputs[0] is cos_product.outputs[0]


def _rewrite(graph: Any, add: Any, x: Any, cos_product: Any, sin_product: Any, concat: Any) -> None:
    dims = shape(x) or ()
    half, axis = dims[-1] // 2, len(dims) - 1
    base = concat.name or concat.outputs[0].name

    def part(start: int, stop: int, what: str) -> Any:
        vectors = [("starts", start), ("ends", stop), ("axes", axis), ("steps", 1)]
        inputs = [constant_of(graph, f"{base}/{what}/{n}", np.asarray([v], np.int64)) for n, v in vectors]
        return make(graph, "Slice", [x, *inputs], f"{base}/{what}", (*dims[:-1], stop - start), x.dtype)

    upper = part(half, 2 * half, "upper")
    negative = make(graph, "Neg", [upper], f"{base}/negative", (*dims[:-1], half), x.dtype)
    concat.inputs = [negative, part(0, half, "lower")]
    add.inputs = [cos_product.outputs[0], sin_product.outputs[0]]
