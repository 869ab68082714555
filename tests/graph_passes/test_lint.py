"""The preflight lint: each form it names is one TPU-MLIR really refuses or miscompiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from graph_passes import clean, lint
from qwen_surgery.errors import Refused, ToolFailed
from qwen_surgery.exporting.template import Template
from qwen_surgery.nets import NetKind
from qwen_surgery.toolchain import Toolchain
from tests.graph_passes.graphs import model, node

Templates = Callable[[str], dict[NetKind, Template]]
SHAPE = (1, 4, 2, 8)


def negation(**changes: int) -> onnx.ModelProto:
    return model([node("Neg", ["x"], "y")], {"x": (1, 8)}, {"y": (1, 8)}, **changes)  # type: ignore[arg-type]


def half_split() -> onnx.ModelProto:
    """Rotary over halves, written with Unsqueeze, Concat and Reshape; the cosine product comes first."""
    constants = {k: np.asarray([v], np.int64) for k, v in (("zero", 0), ("half", 4), ("end", 8), ("axis", 3))}
    constants |= {"one": np.asarray([1], np.int64), "pair": np.asarray([3], np.int64)}
    constants |= {"whole": np.asarray(SHAPE, np.int64)}
    nodes = [
        node("Slice", ["x", "zero", "half", "axis", "one"], "lower"),
        node("Slice", ["x", "half", "end", "axis", "one"], "upper"),
        node("Neg", ["upper"], "negative"),
        node("Unsqueeze", ["negative", "pair"], "first"),
        node("Unsqueeze", ["lower", "pair"], "second"),
        node("Concat", ["first", "second"], "stacked", axis=3),
        node("Reshape", ["stacked", "whole"], "rotated"),
        node("Mul", ["x", "cos"], "a"),
        node("Mul", ["rotated", "sin"], "b"),
        node("Add", ["a", "b"], "y"),
    ]
    tables = {"cos": (1, 4, 1, 8), "sin": (1, 4, 1, 8)}
    return model(nodes, {"x": SHAPE, **tables}, {"y": SHAPE}, constants)


def identity_of_weight() -> onnx.ModelProto:
    nodes = [node("Identity", ["w"], "v"), node("MatMul", ["x", "v"], "y")]
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    return model(nodes, {"x": (1, 8)}, {"y": (1, 8)}, {"w": weight})


def swish() -> onnx.ModelProto:
    return model([node("Swish", ["x"], "y")], {"x": (1, 8)}, {"y": (1, 8)}, opset=24)


def axes_input() -> onnx.ModelProto:
    axes = {"axes": np.asarray([1], np.int64)}
    nodes = [node("Neg", ["x"], "n"), node("ReduceMean", ["n", "axes"], "y", keepdims=1)]
    return model(nodes, {"x": (1, 4, 8)}, {"y": (1, 1, 8)}, axes, opset=18)


REFUSED = {
    "opset": negation(opset=21),
    "ir-version": negation(ir_version=10),
    "identity-of-weight": identity_of_weight(),
    "unknown-op": swish(),
    "axes-as-input": axes_input(),
}


@pytest.mark.parametrize("rule", [*REFUSED, "half-split-rotary"])
def test_a_form_is_named_with_its_remedy(rule: str) -> None:
    found = {f.rule: f for f in lint.check(REFUSED.get(rule) or half_split())}
    assert rule in found
    assert found[rule].remedy and found[rule].message in str(found[rule])


def test_dynamic_shapes_are_named() -> None:
    dynamic = model([node("Neg", ["x"], "y")], {"x": (1, "length")}, {"y": (1, 8)})
    (finding,) = lint.check(dynamic)
    assert finding.rule == "dynamic-shape" and "x" in str(finding)


def test_interleaved_pairs_are_not_blamed() -> None:
    """The same operators with stride-2 slices are what TPU-MLIR really means by its rotary pattern."""
    good = half_split()
    for tensor in good.graph.initializer:
        if tensor.name == "one":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray([2], np.int64), "one"))
    assert not [f for f in lint.check(good) if f.rule == "half-split-rotary"]


@pytest.mark.parametrize("cleaned", [False, True])
def test_real_nets_pass(templates: Templates, cleaned: bool) -> None:
    for kind, template in templates("sdpa").items():
        proto = clean(template.model, check="off").model if cleaned else template.model
        assert lint.check(proto) == (), kind


def test_clean_refuses_a_template_that_the_compiler_would_miscompile() -> None:
    from qwen_surgery.exporting.cleaning import clean_template

    with pytest.raises(Refused, match="half-split-rotary") as caught:
        clean_template(Template(NetKind.BLOCK, half_split()), ["rotary"])
    assert "Concat" in caught.value.hint


def test_compiling_an_export_that_was_never_cleaned_is_refused_before_tpu_mlir_starts(tmp_path: Path) -> None:
    """With its own simplification off or on, TPU-MLIR would take this and compute something else."""
    from qwen_surgery.building.step_compile import Transform
    from qwen_surgery.exporting.manifest import Manifest, NetEntry
    from qwen_surgery.nets import Geometry, Net

    onnx.save(half_split(), str(tmp_path / "block_0.onnx"))
    entry = NetEntry("block_0", NetKind.BLOCK, 0, "block_0.onnx", "", {})
    geometry = Geometry(1, 64, 2, 32, 320, 128, 64)
    Manifest("Qwen", "static", 64, geometry, {}, {}, {}, (entry,), {}).write(tmp_path)
    step = Transform(
        net=Net("block_0", NetKind.BLOCK, 0),
        passes=(),
        code="",
        onnx=tmp_path / "block_0.onnx",
        toolchain=Toolchain(tmp_path / "no-python", tmp_path, "1.30.2"),
        logs=tmp_path,
    )
    with pytest.raises(Refused, match="block_0: node y: rotary over half-split") as caught:
        step.run({}, tmp_path)
    assert "Concat" in caught.value.hint


@pytest.mark.tpu
@pytest.mark.parametrize("rule", sorted(set(REFUSED) - {"opset"}))
def test_the_compiler_does_refuse(rule: str, toolchain: Toolchain, tmp_path: Path) -> None:
    """A rule that TPU-MLIR does not need would only stand in the user's way. (Of newer opsets single forms
    fail, such as axes given as an input.)"""
    onnx.save(REFUSED[rule], str(tmp_path / "net.onnx"))
    shapes = [[d.dim_value for d in i.type.tensor_type.shape.dim] for i in REFUSED[rule].graph.input]
    args = [
        "--model_name",
        "net",
        "--model_def",
        "net.onnx",
        "--input_shapes",
        str(shapes),
        "--mlir",
        "net.mlir",
    ]
    if rule == "identity-of-weight":  # its own simplification would hide it; cleaned nets go without
        args.append("--do_onnx_sim=")
    tool = "model_transform"
    if rule == "ir-version":  # read by the front end, refused by the onnxruntime that checks its work
        np.savez(tmp_path / "in.npz", x=np.ones((1, 8), np.float32))
        tool, args = "model_runner", ["--input", "in.npz", "--model", "net.onnx", "--output", "out.npz"]
    with pytest.raises(ToolFailed):
        toolchain.run(tool, args, tmp_path, tmp_path / "log", net="net")
