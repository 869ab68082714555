"""Random inputs that a net could really get: right shapes, in-range indices, a mask that is a mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from graph_passes.framework.base import WEIGHT_PREFIX

#: Stands for -10000 in bfloat16, what a closed mask position holds in the vendor's runtimes.
MASKED = -9984.0
_PASSES_INDEX_ON = {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Transpose", "Concat"}


def random_feed(tensor: Any, rng: np.random.Generator, name: str) -> np.ndarray:
    """Values for one input of a graph (an ``onnx_graphsurgeon`` Variable with a static shape); *name* is what
    the net calls it.
    """
    shape, dtype = tuple(tensor.shape), np.dtype(tensor.dtype)
    if dtype.kind in "iu":
        return rng.integers(0, index_bound(tensor), shape).astype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if name == "attention_mask":
        mask = np.where(rng.random(shape) < 0.3, MASKED, 0.0)
        mask[..., 0] = 0.0  # a row that is closed everywhere says nothing
        return mask.astype(dtype)
    if len(shape) == 1 and shape[0] == 1:
        return rng.uniform(0.5, 1.5, shape).astype(dtype)  # top_p, temperature, penalty
    values = rng.standard_normal(shape, dtype=np.float32)
    if name.startswith(WEIGHT_PREFIX) and len(shape) > 1:
        values *= shape[-1] ** -0.5  # products of the size a trained layer gives
    return values.astype(dtype)


def index_bound(tensor: Any) -> int:
    """How large an integer input may get: the smallest dimension that a Gather or Scatter indexes by it."""
    bounds: list[int] = []
    todo, seen = [tensor], set()
    while todo:
        current = todo.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for node in current.outputs:
            if node.op in ("Gather", "GatherElements", "ScatterElements") and node.inputs[1] is current:
                data, axis = node.inputs[0], node.attrs.get("axis", 0)
                shape = data.shape if data.shape is not None else ()
                if len(shape) > axis:
                    bounds.append(int(shape[axis]))
            elif node.op in _PASSES_INDEX_ON:
                todo += node.outputs
    return min(bounds, default=2)
