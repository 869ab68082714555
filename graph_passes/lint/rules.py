"""The rules of the preflight lint, one function each: model -> findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from graph_passes.framework.base import WEIGHT_PREFIX
from graph_passes.lint.finding import LintFinding

#: The newest opset and IR version that TPU-MLIR 1.30.2 (onnx 1.14) reads.
NEWEST_OPSET, NEWEST_IR = 17, 9

#: Ops the front end has no converter for, and what to export instead.
_REMEDIES = {
    "RMSNormalization": "write it as Pow, ReduceMean, Add, Sqrt, Div(1, .), Mul, Mul; that is one op again",
    "RotaryEmbedding": "write it as Mul, Slice, Neg, Concat, Mul, Add",
    "Attention": "write it as MatMul, Mul, Add, Softmax, MatMul; that becomes one op again",
    "Gelu": "write it with Erf",
    "Swish": "write it as Mul(x, Sigmoid(x)); that becomes one op again",
    "SimplifiedLayerNormalization": "do not export through onnxruntime's optimizer",
}

# fmt: off
#: Standard ONNX ops that TPU-MLIR 1.30.2's ONNX front end has a converter for.
CONVERTED = frozenset((
    "Abs", "Acos", "Add", "And", "ArgMax", "ArgMin", "Atan", "Atanh", "AveragePool", "BatchNormalization",
    "Cast", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "Cosh",
    "CumSum", "DepthToSpace", "DequantizeLinear", "Div", "Dropout", "Einsum", "Elu", "Equal", "Erf", "Exp",
    "Expand", "Flatten", "Floor", "GRU", "Gather", "GatherElements", "GatherND", "Gemm",
    "GlobalAveragePool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample", "GroupNormalization",
    "HardSigmoid", "HardSwish", "Identity", "If", "InstanceNormalization", "LRN", "LSTM",
    "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "Loop", "MatMul", "Max",
    "MaxPool", "Min", "Mod", "Mul", "Neg", "NonMaxSuppression", "NonZero", "Not", "OneHot", "Or", "PRelu",
    "Pad", "Pow", "QuantizeLinear", "RandomNormalLike", "Range", "Reciprocal", "ReduceL1", "ReduceL2",
    "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Relu", "Reshape",
    "Resize", "ReverseSequence", "RoiAlign", "Round", "ScatterElements", "ScatterND", "Shape", "Sigmoid",
    "Sign", "Sin", "Sinh", "Slice", "Softmax", "Softplus", "Softsign", "Split", "Sqrt", "Squeeze", "Sub",
    "Sum", "Tan", "Tanh", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Upsample", "Where", "Xor",
))
# fmt: on


def _name(node: onnx.NodeProto) -> str:
    return node.name or (node.output[0] if node.output else node.op_type)


def opset(model: onnx.ModelProto) -> Iterator[LintFinding]:
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > NEWEST_OPSET:
            yield LintFinding(
                "opset",
                "",
                f"opset {entry.version}: TPU-MLIR reads up to {NEWEST_OPSET} (from 18 on, axes are inputs it "
                f"ignores)",
                "export with opset 15",
            )


def ir_version(model: onnx.ModelProto) -> Iterator[LintFinding]:
    if model.ir_version > NEWEST_IR:
        yield LintFinding(
            "ir-version",
            "",
            f"IR version {model.ir_version}: the onnxruntime inside TPU-MLIR reads up to {NEWEST_IR}",
            "export with opset 15 and IR version 8",
        )


def unknown_op(model: onnx.ModelProto) -> Iterator[LintFinding]:
    for node in model.graph.node:
        standard = node.domain in ("", "ai.onnx")
        if not standard or node.op_type not in CONVERTED:
            yield LintFinding(
                "unknown-op",
                _name(node),
                f"{node.domain + '.' if not standard else ''}{node.op_type} has no converter in TPU-MLIR",
                _REMEDIES.get(node.op_type) or "express it with other operators",
            )


def identity_of_weight(model: onnx.ModelProto) -> Iterator[LintFinding]:
    fixed = {i.name for i in model.graph.initializer} | {
        i.name for i in model.graph.input if i.name.startswith(WEIGHT_PREFIX)
    }
    for node in model.graph.node:
        if node.op_type in ("Identity", "Dropout") and node.input[0] in fixed:
            yield LintFinding(
                "identity-of-weight",
                _name(node),
                f"{node.op_type} of the weight {node.input[0]}: TPU-MLIR loses weights behind an Identity",
                "let the readers read the weight itself (the pass fold-constants does that)",
            )


def dynamic_shape(model: onnx.ModelProto) -> Iterator[LintFinding]:
    for value in [*model.graph.input, *model.graph.output]:
        dims = value.type.tensor_type.shape.dim
        if not value.type.tensor_type.HasField("shape") or any(not d.HasField("dim_value") for d in dims):
            yield LintFinding(
                "dynamic-shape",
                value.name,
                f"{value.name} has no static shape",
                "export without dynamic_axes; --dynamic is a flag of the compiler, not of the graph",
            )


def axes_as_input(model: onnx.ModelProto) -> Iterator[LintFinding]:
    for node in model.graph.node:
        if node.op_type in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd") and len(node.input) > 1:
            yield LintFinding(
                "axes-as-input",
                _name(node),
                f"{node.op_type} takes its axes as an input, TPU-MLIR reads them from the attribute only",
                "export with opset 15",
                miscompiled=True,
            )


def half_split_rotary(model: onnx.ModelProto) -> Iterator[LintFinding]:
    """x*cos + Reshape(Concat(Unsqueeze(-x2), Unsqueeze(x1)))*sin: taken for interleaved pairs whatever x1
    and x2 are.
    """
    producers = {out: node for node in model.graph.node for out in node.output}
    constants = _constants(model)
    for node in model.graph.node:
        if node.op_type != "Add":
            continue
        products = [producers.get(name) for name in node.input]
        if any(p is None or p.op_type != "Mul" for p in products):
            continue
        for product in products:
            assert product is not None
            stacked = next(
                (s for name in product.input if (s := _stacked(producers, name)) is not None), None
            )
            if stacked is not None and any(_is_half(producers, constants, name) for name in stacked):
                yield LintFinding(
                    "half-split-rotary",
                    _name(node),
                    "rotary over half-split channels written with Unsqueeze, Concat and Reshape: TPU-MLIR "
                    "compiles it as interleaved pairs and the numbers are wrong",
                    "concatenate the halves directly, Concat(-x2, x1), as upstream's own code traces",
                    miscompiled=True,
                )


def _stacked(producers: dict[str, onnx.NodeProto], name: str) -> list[str] | None:
    """[a, b] when *name* is Reshape(Concat(Unsqueeze(a), Unsqueeze(b))), signs peeled off."""
    reshape = producers.get(name)
    concat = producers.get(reshape.input[0]) if reshape is not None and reshape.op_type == "Reshape" else None
    if concat is None or concat.op_type != "Concat" or len(concat.input) != 2:
        return None
    result = []
    for part in concat.input:
        node = producers.get(part)
        if node is None or node.op_type != "Unsqueeze":
            return None
        source = producers.get(node.input[0])
        while source is not None and source.op_type in ("Neg", "Mul"):
            node, source = source, producers.get(source.input[0])
        result.append(node.input[0])
    return result


def _is_half(producers: dict[str, onnx.NodeProto], constants: dict[str, np.ndarray], name: str) -> bool:
    """Whether *name* is a contiguous part of its source's channels; a stride-2 slice is not."""
    node = producers.get(name)
    if node is None:
        return False
    if node.op_type in ("Split", "Squeeze", "Gather"):
        return True
    if node.op_type != "Slice":
        return False
    steps = constants.get(node.input[4]) if len(node.input) > 4 else None
    return steps is None or bool(np.all(steps == 1))


def _constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Small constants by name: what indices, axes and steps are given as."""
    result = {
        t.name: numpy_helper.to_array(t)
        for t in model.graph.initializer
        if t.data_location != onnx.TensorProto.EXTERNAL and np.prod(t.dims, dtype=np.int64) <= 16
    }
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value" and np.prod(attribute.t.dims, dtype=np.int64) <= 16:
                    result[node.output[0]] = numpy_helper.to_array(attribute.t)
    return result


RULES: tuple[Callable[[onnx.ModelProto], Iterator[LintFinding]], ...] = (
    opset,
    ir_version,
    unknown_op,
    identity_of_weight,
    dynamic_shape,
    axes_as_input,
    half_split_rotary,
)
