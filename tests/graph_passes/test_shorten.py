"""Regions made small: only where every shape allows it, and never so that a wrong rewrite goes through."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graph_passes.framework import equality
from graph_passes.framework.runner import infer_shapes
from graph_passes.framework.shorten import PRODUCTS, shorten
from tests.graph_passes.graphs import model, node

LENGTH, DEPTH, WIDTH = 512, 2048, 3000
LONG = 8192
INPUTS = {"x": (1, LENGTH, DEPTH), "weight/a": (DEPTH, WIDTH), "weight/b": (DEPTH, WIDTH)}
RESULT = {"y": (1, LENGTH, WIDTH)}


def gated() -> onnx.ModelProto:
    """Two products, one gating the other: 6e9 multiply-adds at their real size."""
    nodes = [
        node("MatMul", ["x", "weight/a"], "a"),
        node("MatMul", ["x", "weight/b"], "b"),
        node("Sigmoid", ["b"], "c"),
        node("Mul", ["a", "c"], "y"),
    ]
    return infer_shapes(model(nodes, INPUTS, RESULT))


def joint(first: str = "weight/a") -> onnx.ModelProto:
    """The same from one product with a joint weight."""
    second = "weight/b" if first == "weight/a" else "weight/a"
    ends = {"zero": 0, "stop": WIDTH, "end": 2 * WIDTH, "axis": 2}
    nodes = [
        node("Concat", [first, second], "ab", axis=1),
        node("MatMul", ["x", "ab"], "both"),
        node("Slice", ["both", "zero", "stop", "axis"], "a"),
        node("Slice", ["both", "stop", "end", "axis"], "b"),
        node("Sigmoid", ["b"], "c"),
        node("Mul", ["a", "c"], "y"),
    ]
    constants = {k: np.asarray([v], np.int64) for k, v in ends.items()}
    return infer_shapes(model(nodes, INPUTS, RESULT, constants))


def sizes(proto: onnx.ModelProto) -> dict[str, list[int]]:
    return {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in proto.graph.input}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The multiply-adds of every run that the comparison makes."""
    seen: list[int] = []
    original = equality.run

    def watch(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        results = original(proto, feeds)
        rows = max((v.size for v in feeds.values()), default=0)
        seen.append(rows)
        return results

    monkeypatch.setattr(equality, "run", watch)
    return seen


def test_large_products_are_compared_small(products: list[int]) -> None:
    """A 7B template's regions would take minutes and gigabytes."""
    assert LENGTH * DEPTH * WIDTH > PRODUCTS
    assert equality.compare_regions(gated(), joint()) is None
    assert products and max(products) < DEPTH * WIDTH / 10


def twice(worked_out: bool) -> onnx.ModelProto:
    """Twice the input at a size that constants tell, or that is worked out from them."""
    size = np.asarray([1, LONG, WIDTH], np.int64)
    counted = [
        node("Constant", [], "half", value=numpy_helper.from_array(size // 2)),
        node("Constant", [], "odd", value=numpy_helper.from_array(size % 2)),
        node("Add", ["half", "half"], "even"),
        node("Add", ["even", "odd"], "size"),
    ]
    nodes = [
        *(counted if worked_out else []),
        node("Reshape", ["x", "size"], "b"),
        node("Mul", ["b", "two"], "y") if worked_out else node("Add", ["b", "b"], "y"),
    ]
    constants = {"two": np.asarray(2, np.float32)} if worked_out else {"size": size}
    return infer_shapes(model(nodes, {"x": (LONG, WIDTH)}, {"y": (1, LONG, WIDTH)}, constants))


def test_a_length_that_constants_work_out_is_made_small_too(products: list[int]) -> None:
    """Repeated keys as torch writes them: a prompt of 8,192 tokens was compared whole, in 17 GB."""
    assert equality.compare_regions(twice(worked_out=True), twice(worked_out=False)) is None
    assert products and max(products) < LONG * WIDTH / 10


def test_what_differs_small_is_run_as_it_is(products: list[int]) -> None:
    """So that a length that counts (a mean, say) raises no false alarm, and no wrong rewrite passes."""
    assert equality.compare_regions(gated(), joint(first="weight/b")) is not None
    assert max(products) == DEPTH * WIDTH


def test_a_length_that_the_values_depend_on_is_no_false_alarm() -> None:
    shape = {"x": (1, LENGTH, DEPTH), "weight/a": (DEPTH, WIDTH)}
    out = {"y": (1, LENGTH, 1)}
    product = node("MatMul", ["x", "weight/a"], "a")
    mean = infer_shapes(model([product, node("ReduceMean", ["a"], "y", axes=[2], keepdims=1)], shape, out))
    total = [
        product,
        node("ReduceSum", ["a", "axis"], "sum", keepdims=1),
        node("Div", ["sum", "width"], "y"),
    ]
    constants = {"axis": np.asarray([2], np.int64), "width": np.asarray(WIDTH, np.float32)}
    assert equality.compare_regions(mean, infer_shapes(model(total, shape, out, constants))) is None


def test_small_regions_keep_their_size() -> None:
    pair = (gated(), gated())
    tiny = model([node("Neg", ["x"], "y")], {"x": (1, 300, 64)}, {"y": (1, 300, 64)})
    assert shorten((tiny, tiny))[0] is tiny
    assert shorten(pair)[0] is not pair[0]


def test_a_dimension_that_a_rewrite_counts_on_keeps_its_size() -> None:
    """Half of it is not a small dimension's half."""
    ends = {"zero": 0, "half": WIDTH // 2, "end": WIDTH, "axis": 2}
    nodes = [
        node("MatMul", ["x", "weight/a"], "a"),
        node("Slice", ["a", "zero", "half", "axis"], "lower"),
        node("Slice", ["a", "half", "end", "axis"], "upper"),
        node("Concat", ["upper", "lower"], "y", axis=2),
    ]
    constants = {k: np.asarray([v], np.int64) for k, v in ends.items()}
    inputs = {"x": (1, LENGTH, DEPTH), "weight/a": (DEPTH, WIDTH)}
    swapped = infer_shapes(model(nodes, inputs, RESULT, constants))
    left, right = shorten((swapped, swapped))
    assert sizes(left) == sizes(right)
    assert sizes(right)["weight/a"][1] == WIDTH
    assert sizes(left)["x"][1:] != [LENGTH, DEPTH]


def test_a_table_of_ones_own_is_not_cut() -> None:
    """It may be wrong only in the part that would be cut away."""
    table = np.zeros((1, 1, WIDTH), np.float32)
    table[..., -1] = 1
    nodes = [
        node("MatMul", ["x", "weight/a"], "a"),
        node("MatMul", ["x", "weight/b"], "b"),
        node("Sigmoid", ["b"], "n"),
        node("Add", ["n", "table"], "c"),
        node("Mul", ["a", "c"], "y"),
    ]
    wrong = infer_shapes(model(nodes, INPUTS, RESULT, {"table": table}))
    left, right = shorten((gated(), wrong))
    assert sizes(left)["weight/a"][1] == sizes(right)["weight/a"][1] == WIDTH
    assert equality.compare_regions(gated(), wrong) is not None
