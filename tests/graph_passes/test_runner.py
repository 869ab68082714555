"""The runner and its equality check: a wrong pass is caught, by name, whatever way it is wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from graph_passes import PassError, clean, find_breaking_pass
from graph_passes.framework import equality, registry
from graph_passes.framework.base import GraphPass
from graph_passes.framework.runner import infer_shapes
from qwen_surgery.exporting.template import Template
from qwen_surgery.nets import NetKind
from tests.graph_passes import graphs
from tests.graph_passes.graphs import model, node

Templates = Callable[[str], dict[NetKind, Template]]


@pytest.fixture
def block(templates: Templates) -> onnx.ModelProto:
    return templates("sdpa")[NetKind.BLOCK].model


def good(*names: str) -> list[GraphPass]:
    return list(registry.select(registry.onnx_passes(), names))


@pytest.mark.parametrize("wrong", [graphs.DropsMask(), graphs.SwapsHalves()], ids=lambda p: p.name)
@pytest.mark.parametrize("check", ["each", "end"])
def test_a_pass_that_changes_numbers_is_named(block: onnx.ModelProto, wrong: GraphPass, check: str) -> None:
    """Region by region, and by bisection over whole runs: both must find the one culprit among good
    passes.
    """
    passes = [*good("fold-constants"), wrong, *good("rotary")]
    with pytest.raises(PassError, match="changed what the net computes") as caught:
        clean(block, passes, check=check)
    assert caught.value.pass_name == wrong.name


def test_debug_mode_says_nothing_about_good_passes(block: onnx.ModelProto) -> None:
    assert find_breaking_pass(block, good("fold-constants", "rotary")) is None
    error = find_breaking_pass(block, [*good("fold-constants"), graphs.DropsMask()])
    assert error is not None and error.pass_name == "drops-mask"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (graphs.RenamesOutput(), "the outputs changed"),
        (graphs.LeavesHole(), "invalid graph"),
        (graphs.Crashes(), "IndexError: off the end"),
        (graphs.NeverContent(), "still changing"),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_a_pass_that_breaks_the_graph_is_named(block: onnx.ModelProto, wrong: GraphPass, words: str) -> None:
    with pytest.raises(PassError, match=words) as caught:
        clean(block, [wrong])
    assert caught.value.pass_name == wrong.name


def test_reports_count_what_happened(block: onnx.ModelProto) -> None:
    result = clean(block, check="off")
    folded = next(r for r in result.reports if r.name == "fold-constants")
    assert folded.nodes_before == len(block.graph.node)
    assert folded.ops["Constant"][1] == 0
    assert [r.name for r in result.reports] == [p.name for p in registry.onnx_passes()]
    assert result.reports[-1].nodes_after == len(result.model.graph.node)


def test_unknown_names_are_refused(block: onnx.ModelProto) -> None:
    with pytest.raises(registry.UnknownPass, match="no-such-pass"):
        clean(block, ["rotary", "no-such-pass"])


def scaled(factor: float, name: str = "y") -> onnx.ModelProto:
    constants = {"factor": np.asarray(factor, np.float32)}
    return model([node("Mul", ["x", "factor"], name)], {"x": (4, 64)}, {name: (4, 64)}, constants)


def test_small_differences_count_and_rounding_does_not() -> None:
    assert equality.compare_regions(scaled(1.0), scaled(1.0 + 1e-7)) is None
    difference = equality.compare_regions(scaled(1.0), scaled(1.001))
    assert difference is not None and difference.relative == pytest.approx(1e-3, rel=0.1)


def test_results_that_are_not_finite_are_no_proof() -> None:
    """inf - inf on both sides would compare nothing."""
    difference = equality.compare_regions(scaled(np.inf), scaled(-np.inf))
    assert difference is not None and "finite" in difference.reason


def test_other_outputs_are_a_difference() -> None:
    difference = equality.compare_regions(scaled(1.0), scaled(1.0, "z"))
    assert difference is not None and "outputs changed" in difference.reason


def test_only_what_was_rewritten_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over a norm must not cost a run over gigabytes of weights: they are not even fed."""
    weights = {"x": (2, 8), "weight/big": (8, 4096)}
    head = [node("Mul", ["x", "two"], "n"), node("MatMul", ["n", "weight/big"], "y")]
    before = model(
        [*head, node("Neg", ["y"], "z")], weights, {"z": (2, 4096)}, {"two": np.asarray(2, np.float32)}
    )
    rewritten = [node("Add", ["x", "x"], "n"), node("MatMul", ["n", "weight/big"], "y")]
    after = model([*rewritten, node("Neg", ["y"], "z")], weights, {"z": (2, 4096)})
    fed: list[str] = []
    original = equality.run

    def watch(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        fed.extend(str(values.shape) for values in feeds.values())
        assert not any(n.op_type == "MatMul" for n in proto.graph.node)
        return original(proto, feeds)

    monkeypatch.setattr(equality, "run", watch)
    assert equality.compare_regions(infer_shapes(before), infer_shapes(after)) is None
    assert fed and "(8, 4096)" not in fed
