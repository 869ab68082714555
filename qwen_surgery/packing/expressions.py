"""Weight expressions: how a compiled net's array follows from checkpoint tensors, as plain JSON values.

Graph passes may permute, concatenate or scale weights; in a template that is a constant subgraph per layer
behind the ``weight/<slot>`` inputs. Here such a subgraph becomes a nested list that needs neither ONNX nor
TPU-MLIR to be evaluated again for another layer or another fine-tune::

    ["slot", name]                    a checkpoint tensor
    ["const", shape, [numbers]]       a float32 constant
    ["transpose", perm, x]            ["reshape", shape, x]
    ["slice", [[start, stop, step], ... one per axis], x]
    ["gather", axis, [indices], x]    ["concat", axis, [x, ...]]
    ["mul" | "div" | "add" | "sub", x, y]      ["neg", x]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_surgery.packing.formats import to_float32

if TYPE_CHECKING:
    import onnx

Expression = list[Any]
Shape = tuple[int, ...]
ARITHMETIC: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mul": np.multiply,
    "div": np.divide,
    "add": np.add,
    "sub": np.subtract,
}
_WEIGHT = "weight/"
_MAX_CONSTANT = 1 << 20  # elements of a constant that may stand inside an expression
_MAX_TABLE = 1 << 24  # elements of a table that is compared with what was compiled


@dataclass(frozen=True)
class Stored:
    """Values as a checkpoint stores them: *array* (BF16 as uint16 bits, float16, float32) of *dtype*."""

    array: np.ndarray
    dtype: str

    def float32(self) -> Stored:
        return self if self.dtype == "F32" else Stored(to_float32(self.array, self.dtype), "F32")


def evaluate(expression: Expression, slot: Callable[[str], Stored]) -> Stored:
    """The value of *expression*; *slot* gives a checkpoint tensor. Moves keep the stored dtype (and are views
    where numpy can), arithmetic is float32."""
    kind = expression[0]
    if kind == "slot":
        return slot(expression[1])
    if kind == "const":
        return Stored(np.array(expression[2], np.float32).reshape(expression[1]), "F32")
    if kind in ARITHMETIC:
        left, right = (evaluate(part, slot).float32().array for part in expression[1:3])
        return Stored(ARITHMETIC[kind](left, right), "F32")
    if kind == "neg":
        return Stored(-evaluate(expression[1], slot).float32().array, "F32")
    if kind == "concat":
        parts = [evaluate(part, slot) for part in expression[2]]
        if len({part.dtype for part in parts}) > 1:
            parts = [part.float32() for part in parts]
        return Stored(np.concatenate([part.array for part in parts], axis=expression[1]), parts[0].dtype)
    inner = evaluate(expression[-1], slot)
    return Stored(move(expression, inner.array), inner.dtype)


def move(expression: Expression, array: np.ndarray) -> np.ndarray:
    kind = expression[0]
    if kind == "transpose":
        return array.transpose(expression[1])
    if kind == "reshape":
        return array.reshape(expression[1])
    if kind == "slice":
        return array[tuple(slice(*bounds) for bounds in expression[1])]
    if kind == "gather":
        return np.take(array, expression[2], axis=expression[1])
    raise ValueError(f"unknown weight expression {kind!r}")


def transpose(perm: list[int], inner: Expression) -> Expression:
    """Transpose, with two in a row made one and an idle one dropped."""
    if inner[0] == "transpose":
        perm, inner = [inner[1][axis] for axis in perm], inner[2]
    return inner if perm == sorted(perm) else ["transpose", perm, inner]


def slots(expression: Expression) -> set[str]:
    """The checkpoint slots that *expression* reads. Raises ValueError where one has no name."""
    if expression[0] == "slot":
        if not isinstance(expression[1], str):
            raise ValueError(f"{expression[1]!r:.100} is no slot")
        return {expression[1]}
    if expression[0] == "const":
        return set()
    inner = expression[2] if expression[0] == "concat" else [p for p in expression[1:] if _is_expression(p)]
    return set().union(*(slots(part) for part in inner)) if inner else set()


def _is_expression(part: Any) -> bool:
    return isinstance(part, list) and bool(part) and isinstance(part[0], str)


@dataclass(frozen=True)
class Placed:
    """What a template says about its weights.

    ``frontier``: expressions that the graph proper consumes; ``inner``: those on the way there.
    ``constants``: tables that depend on no weight, as float32. ``shapes``: of every slot and of every tensor
    named here.
    """

    frontier: dict[str, Expression]
    inner: dict[str, Expression]
    constants: dict[str, np.ndarray]
    shapes: dict[str, Shape]


class _UnknownExpression(Exception):
    """A node that this module has no expression for."""


class _ExpressionReader:
    """Walks a template's nodes in order, keeping expressions and constants by tensor name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import numpy_helper

        self.values: dict[str, Expression] = {}
        self.shapes: dict[str, Shape] = {}
        self.constants: dict[str, np.ndarray] = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer
        }
        for value in model.graph.input:
            if value.name.startswith(_WEIGHT):
                self.values[value.name] = ["slot", value.name[len(_WEIGHT) :]]
                self.shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)

    def visit(self, node: onnx.NodeProto) -> bool:
        """Take in *node* if it only transforms weights or constants; whether it does."""
        names = [name for name in node.input if name]
        if any(name not in self.values and name not in self.constants for name in names):
            return False
        if not any(name in self.values for name in names):
            return self._fold(node)
        try:
            results = self._weight_node(node)
        except _UnknownExpression:
            return False
        for name, (expression, shape) in zip(node.output, results, strict=True):
            self.values[name], self.shapes[name] = expression, shape
        return True

    def _fold(self, node: onnx.NodeProto) -> bool:
        """Evaluate a node on constants alone (shapes, axes, tables)."""
        from onnx.reference import ReferenceEvaluator

        feeds = {name: self.constants[name] for name in node.input if name}
        if sum(array.size for array in feeds.values()) > _MAX_TABLE:
            return False
        try:
            results = ReferenceEvaluator(_single_node_model(node, feeds)).run(None, feeds)
        except Exception:  # an op the evaluator lacks: then its result is simply not known here
            return False
        self.constants.update({k: np.asarray(v) for k, v in zip(node.output, results, strict=True)})
        return True

    def _constant(self, node: onnx.NodeProto, index: int, attribute: str) -> list[int] | None:
        """Integers given as input *index* or, in older opsets, as *attribute*; None when neither is there."""
        for entry in node.attribute:
            if entry.name == attribute:
                return list(entry.ints)
        if len(node.input) > index and node.input[index]:
            if node.input[index] not in self.constants:
                raise _UnknownExpression(node.op_type)
            return [int(v) for v in self.constants[node.input[index]].ravel()]
        return None

    def _attribute(self, node: onnx.NodeProto, name: str, default: int) -> int:
        return next((int(entry.i) for entry in node.attribute if entry.name == name), default)

    def _operand(self, name: str) -> tuple[Expression, Shape]:
        if name in self.values:
            return self.values[name], self.shapes[name]
        array = self.constants[name]
        if array.size > _MAX_CONSTANT or array.dtype != np.float32:
            raise _UnknownExpression("constant")
        return ["const", list(array.shape), [float(v) for v in array.ravel()]], array.shape

    def _weight_node(self, node: onnx.NodeProto) -> list[tuple[Expression, Shape]]:
        op = node.op_type
        if op.lower() in ARITHMETIC:
            (left, a), (right, b) = self._operand(node.input[0]), self._operand(node.input[1])
            return [([op.lower(), left, right], np.broadcast_shapes(a, b))]
        if op == "Concat":
            parts = [self._operand(name) for name in node.input]
            axis = self._attribute(node, "axis", 0) % len(parts[0][1])
            shape = list(parts[0][1])
            shape[axis] = sum(part[1][axis] for part in parts)
            return [(["concat", axis, [part[0] for part in parts]], tuple(shape))]
        inner, shape_ = self._operand(node.input[0])
        if node.input[0] not in self.values:
            raise _UnknownExpression(op)
        return self._moved(node, inner, shape_)

    def _moved(self, node: onnx.NodeProto, inner: Expression, shape: Shape) -> list[tuple[Expression, Shape]]:
        op, rank = node.op_type, len(shape)
        if op == "Identity" or (op == "Cast" and self._attribute(node, "to", 0) == 1):
            return [(inner, shape)]
        if op == "Neg":
            return [(["neg", inner], shape)]
        if op == "Transpose":
            perm = self._constant(node, 9, "perm") or list(range(rank))[::-1]
            return [(transpose(perm, inner), tuple(shape[axis] for axis in perm))]
        if op in ("Reshape", "Squeeze", "Unsqueeze", "Flatten"):
            new = self._new_shape(node, shape)
            return [(["reshape", list(new), inner], new)]
        if op == "Gather":
            axis = self._attribute(node, "axis", 0) % rank
            indices = self.constants.get(node.input[1])
            if indices is None or indices.ndim != 1:
                raise _UnknownExpression(op)
            new = (*shape[:axis], len(indices), *shape[axis + 1 :])
            return [(["gather", axis, [int(i) % shape[axis] for i in indices], inner], new)]
        if op == "Slice":
            return [self._slice(node, inner, shape)]
        if op == "Split":
            return self._split(node, inner, shape)
        raise _UnknownExpression(op)

    def _new_shape(self, node: onnx.NodeProto, shape: Shape) -> Shape:
        op = node.op_type
        if op == "Reshape":
            wanted = self._constant(node, 1, "shape") or []
            sizes = [shape[i] if size == 0 else size for i, size in enumerate(wanted)]
            known = math.prod(size for size in sizes if size != -1)
            return tuple(math.prod(shape) // known if size == -1 else size for size in sizes)
        if op == "Flatten":
            axis = self._attribute(node, "axis", 1)
            return math.prod(shape[:axis]), math.prod(shape[axis:])
        axes = self._constant(node, 1, "axes")
        if op == "Squeeze":
            drop = (
                {a % len(shape) for a in axes} if axes else {i for i, size in enumerate(shape) if size == 1}
            )
            return tuple(size for i, size in enumerate(shape) if i not in drop)
        rank = len(shape) + len(axes or [])
        added, rest = {a % rank for a in axes or []}, iter(shape)
        return tuple(1 if i in added else next(rest) for i in range(rank))

    def _slice(self, node: onnx.NodeProto, inner: Expression, shape: Shape) -> tuple[Expression, Shape]:
        starts, stops = self._constant(node, 1, "starts"), self._constant(node, 2, "ends")
        if starts is None or stops is None:
            raise _UnknownExpression("Slice")
        axes = self._constant(node, 3, "axes") or list(range(len(starts)))
        steps = self._constant(node, 4, "steps") or [1] * len(starts)
        bounds: list[list[int | None]] = [[0, size, 1] for size in shape]
        for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
            first, last, step = slice(start, stop, step).indices(shape[axis])
            bounds[axis % len(shape)] = [first, None if last < 0 else last, step]
        new = tuple(len(range(*slice(*b).indices(size))) for b, size in zip(bounds, shape, strict=True))
        return ["slice", bounds, inner], new

    def _split(self, node: onnx.NodeProto, inner: Expression, shape: Shape) -> list[tuple[Expression, Shape]]:
        axis = self._attribute(node, "axis", 0) % len(shape)
        count = len(node.output)
        sizes = self._constant(node, 1, "split") or [shape[axis] // count] * count
        results: list[tuple[Expression, Shape]] = []
        start = 0
        for size in sizes:
            bounds = [[0, extent, 1] for extent in shape]
            bounds[axis] = [start, start + size, 1]
            results.append((["slice", bounds, inner], (*shape[:axis], size, *shape[axis + 1 :])))
            start += size
        return results


def read_template(model: onnx.ModelProto) -> Placed:
    """The weight expressions and constants of a template (weights are the inputs ``weight/<slot>``)."""
    reader = _ExpressionReader(model)
    consumed = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if not reader.visit(node):
            consumed.update(node.input)
    frontier = {name: value for name, value in reader.values.items() if name in consumed}
    inner = {name: value for name, value in reader.values.items() if name not in consumed}
    tables = {
        name: array.astype(np.float32)
        for name, array in reader.constants.items()
        if array.dtype.kind in "fiu" and 0 < array.size <= _MAX_TABLE
    }
    return Placed(frontier, inner, tables, reader.shapes)


def _single_node_model(node: onnx.NodeProto, feeds: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A model (opset 15) of *node* alone, with an input for each array of *feeds*, for ONNX's evaluator."""
    import onnx
    from onnx import helper

    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
    graph = helper.make_graph([node], "single", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
