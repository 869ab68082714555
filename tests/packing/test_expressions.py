"""Weight expressions: a template's constant subgraph gives the same numbers as onnxruntime would.

If these fail, layers other than the first get weights that a graph pass did not mean.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qwen_surgery.packing.coverage import Coverage
from qwen_surgery.packing.expressions import Placed, Stored, evaluate, read_template, slots

A, B = "weight/a", "weight/b"


def _ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def _model(nodes: list[Any], constants: list[Any], output: str) -> onnx.ModelProto:
    shapes = {A: [8, 6], B: [4, 6]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        [*nodes, helper.make_node("Mul", ["x", output], ["y"])], "g", [x, *inputs], [y], constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)


CASES: dict[str, tuple[list[Any], list[Any], str]] = {
    "transposed twice": (
        [helper.make_node("Transpose", [A], ["t"], perm=[1, 0]), helper.make_node("Transpose", ["t"], ["w"])],
        [], "w",
    ),
    "joined and cut": (
        [helper.make_node("Concat", [A, B], ["c"], axis=0),
         helper.make_node("Slice", ["c", "s", "e", "ax", "st"], ["w"])],
        [_ints("s", -1), _ints("e", 2), _ints("ax", 0), _ints("st", -3)], "w",
    ),
    "permuted inside heads": (
        [helper.make_node("Reshape", [A, "s1"], ["r"]),
         helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1, 3]),
         helper.make_node("Reshape", ["t", "s2"], ["w"])],
        [_ints("s1", 2, 2, 2, -1), _ints("s2", 0, 4, 6)], "w",
    ),
    "rows picked": ([helper.make_node("Gather", [A, "i"], ["w"], axis=0)], [_ints("i", 3, -1, 0)], "w"),
    "split": (
        [helper.make_node("Split", [A, "n"], ["v", "w"], axis=0)], [_ints("n", 5, 3)], "w",
    ),
    "scaled": (
        [helper.make_node("Mul", [A, "k"], ["m"]), helper.make_node("Neg", ["m"], ["w"])],
        [numpy_helper.from_array(np.array(0.088388346, np.float32), "k")], "w",
    ),
    "shape computed from constants": (
        [helper.make_node("Concat", ["p", "q"], ["s"], axis=0), helper.make_node("Reshape", [A, "s"], ["w"])],
        [_ints("p", 6), _ints("q", 8)], "w",
    ),
    "widened": (
        [helper.make_node("Unsqueeze", [A, "ax"], ["u"]), helper.make_node("Squeeze", ["u", "ax"], ["w"])],
        [_ints("ax", 1)], "w",
    ),
}  # fmt: skip


def _weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"a": rng.standard_normal((8, 6), np.float32), "b": rng.standard_normal((4, 6), np.float32)}


@pytest.mark.parametrize("case", CASES)
def test_expression_equals_onnxruntime(case: str) -> None:
    model = _model(*CASES[case])
    found = read_template(model)
    ((_, expression),) = [item for item in found.frontier.items() if item[0] == CASES[case][2]]
    weights = _weights()
    again = json.loads(json.dumps(expression))
    value = evaluate(again, lambda name: Stored(weights[name], "F32"))
    model.graph.output.append(helper.make_tensor_value_info(CASES[case][2], TensorProto.FLOAT, None))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"x": np.ones(1, np.float32), A: weights["a"], B: weights["b"]}
    (want,) = session.run([CASES[case][2]], feeds)
    np.testing.assert_array_equal(value.array, want)


def test_two_transposes_leave_the_tensor_as_it_lies() -> None:
    """So that it is read from its shard block by block instead of whole."""
    found: Placed = read_template(_model(*CASES["transposed twice"]))
    assert ["slot", "a"] in found.frontier.values()


def test_an_op_without_an_expression_leaves_its_weight_unexplained() -> None:
    model = _model([helper.make_node("Tanh", [A], ["w"])], [], "w")
    found = read_template(model)
    assert "w" not in found.frontier
    assert "w" not in found.inner


def test_moves_keep_bfloat16_bits() -> None:
    bits = np.arange(48, dtype=np.uint16).reshape(8, 6)
    expression = ["slice", [[0, 4, 1], [0, 6, 1]], ["transpose", [1, 0], ["slot", "a"]]]
    expression[1] = [[0, 6, 1], [0, 4, 1]]
    value = evaluate(expression, lambda _: Stored(bits, "BF16"))
    assert value.dtype == "BF16"
    np.testing.assert_array_equal(value.array, bits.T[:, :4])


def test_coverage_finds_the_rows_that_nothing_uses() -> None:
    coverage = Coverage({"a": (8, 6), "b": (4,)})
    coverage.add(["slot", "a"], 0, 5)
    coverage.add(["reshape", [4, 1], ["slot", "b"]], 0, 4)
    assert coverage.unused() == ["a"]
    coverage.add(["slice", [[5, 8, 1], [0, 6, 1]], ["slot", "a"]], 0, 2)
    assert coverage.unused() == ["a"]
    coverage.add(["transpose", [1, 0], ["slice", [[7, 8, 1], [0, 6, 1]], ["slot", "a"]]], 0, 6)
    assert coverage.unused() == []


def test_slots_are_found_inside_lists() -> None:
    expression = ["mul", ["concat", 0, [["slot", "a"], ["neg", ["slot", "b"]]]], ["const", [], [2.0]]]
    assert slots(expression) == {"a", "b"}


@pytest.mark.parametrize("name", [9, None, ["a"]])
def test_a_slot_without_a_name_is_refused_when_it_is_read(name: Any) -> None:
    """In a damaged side file: later it would end the program where the name is printed."""
    with pytest.raises(ValueError, match="is no slot"):
        slots(["neg", ["concat", 0, [["slot", "a"], ["slot", name]]]])
