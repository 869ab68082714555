"""Smaller copies of two regions that must be equal, for regions whose arithmetic is too much to run.

A region with a 7B model's products takes a minute and gigabytes at its real size. Its shapes are rational in
the model's dimensions, so one dimension (a length, a width) can be replaced by a small one everywhere: in the
inputs, in the shapes that Reshape, Expand and Slice are given, in tables that both regions hold. Whether that
is allowed is not assumed but checked: with shapes inferred anew, *every* tensor of both regions must have its
old shape with only that dimension replaced. A rewrite that counts on the real size (half of it, say, or a
table of its own) does not pass that check, and that dimension keeps its size.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

#: Elements of all tensors of a region, and multiply-adds of its products, that are run as they are.
ELEMENTS, PRODUCTS = 12_000_000, 1_000_000_000
#: What a dimension is replaced by: the first of these that is no dimension of the regions.
SHORT = (24, 40, 56, 72, 88, 104)
#: Which inputs of an operation hold sizes or positions.
_SIZES = {"Reshape": (1,), "Expand": (1,), "Slice": (1, 2), "ConstantOfShape": (0,), "Split": (1,)}

Shapes = dict[str, tuple[int, ...]]
Pair = tuple[onnx.ModelProto, onnx.ModelProto]


def shorten(pair: Pair) -> Pair:
    """The two regions with their largest dimensions made small, until they are cheap to run; the same pair
    when they are cheap as they are, or when no dimension can be replaced.
    """
    known = [_shapes(model) for model in pair]
    refused: set[int] = set()
    while any(_is_costly(model, shapes) for model, shapes in zip(pair, known, strict=True)):
        dims = {d for shapes in known for shape in shapes.values() for d in shape}
        short = next((s for s in SHORT if s not in dims), None)
        todo = _candidates(pair, refused)
        if short is None or not todo:
            break
        if (found := _replaced(pair, known, todo[0], short)) is None:
            refused.add(todo[0])
        else:
            pair, known = found
    return pair


def _candidates(pair: Pair, refused: set[int]) -> list[int]:
    """Dimensions of the regions' inputs that are worth replacing, those in most elements first."""
    weight: Counter[int] = Counter()
    for model in pair:
        for value in model.graph.input:
            shape = _dims(value)
            for d in set(shape):
                weight[d] += int(np.prod(shape, dtype=np.int64))
    return [d for d, _ in weight.most_common() if d > max(SHORT) and d not in refused]


def _is_costly(model: onnx.ModelProto, shapes: Shapes) -> bool:
    elements = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    products = 0
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.output[0] in shapes and node.input[0] in shapes:
            products += int(np.prod(shapes[node.output[0]], dtype=np.int64)) * shapes[node.input[0]][-1]
    return elements > ELEMENTS or products > PRODUCTS


def _replaced(pair: Pair, known: list[Shapes], old: int, new: int) -> tuple[Pair, list[Shapes]] | None:
    """Both regions with dimension *old* as *new*, and their shapes; None where that is not the same graph."""
    if _tables(pair[0], old) != _tables(pair[1], old):
        return None
    models, shapes = [], []
    for model, before in zip(pair, known, strict=True):
        try:
            changed = _with_dimension(model, old, new)
            after = _shapes(changed)
        except (onnx.shape_inference.InferenceError, ValueError):
            return None
        expected = {name: tuple(new if d == old else d for d in shape) for name, shape in before.items()}
        if after != expected:
            return None
        models.append(changed)
        shapes.append(after)
    return (models[0], models[1]), shapes


def _tables(model: onnx.ModelProto, size: int) -> Counter[str]:
    """Constants with a dimension of *size*, by content; a table of one value says the same at any size."""
    return Counter(
        f"{list(t.dims)}{hashlib.sha256(values.tobytes()).hexdigest()}"
        for t in model.graph.initializer
        if size in t.dims and np.ptp(values := numpy_helper.to_array(t)) > 0
    )


def _with_dimension(model: onnx.ModelProto, old: int, new: int) -> onnx.ModelProto:
    """A copy in which inputs, sizes and tables have *new* for *old*; raises ValueError for a table of
    indices, which say nothing about another size.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for value in [*copy.graph.input, *copy.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value == old:
                dim.dim_value = new
    sizes = set(_size_inputs(copy))
    for tensor in copy.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.name in sizes:
            tensor.CopyFrom(numpy_helper.from_array(np.where(values == old, new, values), tensor.name))
        elif old in values.shape:
            if values.dtype.kind != "f":
                raise ValueError(f"{tensor.name} holds indices")
            cut = values[tuple(slice(new) if d == old else slice(None) for d in values.shape)]
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(cut), tensor.name))
    return copy


def _size_inputs(model: onnx.ModelProto) -> Iterator[str]:
    for node in model.graph.node:
        for slot in _SIZES.get(node.op_type, ()):
            if slot < len(node.input):
                yield node.input[slot]


def _shapes(model: onnx.ModelProto) -> Shapes:
    """Tensor -> shape, inferred anew from the inputs; raises InferenceError when shapes contradict."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(
        bare, check_type=True, strict_mode=True, data_prop=True
    ).graph
    return {v.name: _dims(v) for v in [*inferred.input, *inferred.value_info, *inferred.output]}


def _dims(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
