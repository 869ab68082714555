"""A narrow vocabulary and its extension: what is replaced, and what is refused because it is not clear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from qwen_surgery.vocabulary import lowered, narrow, probe
from qwen_surgery.vocabulary.lowered import Steps
from qwen_surgery.vocabulary.narrow import CannotExtend, Vocabulary

SIZES = Vocabulary(full=4000, narrow=1440)

LOWERED = """
module @lm_head attributes {module.weight_file = "w.npz"} {
    %1 = "top.Weight"() : () -> tensor<1x128xbf16> loc(#loc1)
    %2 = "top.Weight"() : () -> tensor<1440x64xui8> loc(#loc2)
    %3 = "tpu.A16MatMul"(%0, %2) {q_group_size = 64 : i64} : (tensor<1440x64xui8>) -> tensor<1x1440xbf16>
}
#loc1 = loc("gamma")
#loc2 = loc("codes")
"""


@given(st.integers(1, 300_000), st.sets(st.integers(1, 5000), max_size=200))
def test_a_narrow_size_is_no_other_size_and_falls_into_lanes_alike(full: int, taken: set[int]) -> None:
    found = narrow.narrow_vocabulary(full, taken)
    if found is not None:
        assert found.narrow not in taken
        assert found.narrow % 256 == full % 256
        assert found.narrow < full / 2


def test_only_types_are_widened() -> None:
    text = lowered.extend_text(LOWERED, SIZES)
    assert "tensor<4000x64xui8>" in text and "tensor<1x4000xbf16>" in text
    assert "1440" not in text and "tensor<1x128xbf16>" in text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (LOWERED.replace("q_group_size = 64", "axis = 1440"), "an attribute"),
        (LOWERED.replace("1440", "640"), "nothing in the lowered net"),
    ],
)
def test_text_that_leaves_it_open_what_depends_on_the_vocabulary_is_refused(text: str, why: str) -> None:
    with pytest.raises(CannotExtend, match=why):
        lowered.extend_text(text, SIZES)


def test_weights_get_their_real_size_and_a_probe_also_where_the_file_keeps_them_flat(tmp_path: Path) -> None:
    codes = np.arange(1440 * 64, dtype=np.uint8)
    gamma = np.arange(128, dtype=np.uint16).reshape(1, 128)
    np.savez(tmp_path / "narrow.npz", codes=codes, gamma=gamma)
    shapes = lowered.weight_shapes(LOWERED)
    assert shapes == {"gamma": (1, 128), "codes": (1440, 64)}
    (array,) = probe.extend_weights(tmp_path / "narrow.npz", tmp_path / "full.npz", shapes, SIZES)
    full = np.load(tmp_path / "full.npz")
    assert (full["gamma"] == gamma).all()
    assert full["codes"].shape == array.shape == (4000, 64)
    assert full["codes"].tobytes() == b"".join(probe.probe(array.index, array.nbytes))


def test_a_large_probe_takes_little_room_and_differs_everywhere() -> None:
    size = (1 << 24) + 100
    pieces = list(probe.probe(5, size))
    assert sum(map(len, pieces)) == size
    assert all(any(piece) for piece in pieces[:-1]) and len(set(pieces)) == len(pieces)
    assert sum(byte != 0 for byte in b"".join(pieces[:16])) < 16 * (1 << 12) + 1


def test_a_constant_of_the_vocabularys_size_is_refused() -> None:
    def value(name: str, *shape: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    shape = helper.make_tensor("shape", TensorProto.INT64, (2,), [1, 4000])
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    graph = helper.make_graph([node], "g", [value("x", 4000)], [value("y", 1, 4000)], [shape])
    with pytest.raises(CannotExtend, match="constant shape"):
        narrow.narrow_model(helper.make_model(graph), SIZES)


def test_a_log_that_names_no_steps_is_refused() -> None:
    with pytest.raises(CannotExtend, match="does not say"):
        Steps.read("[Success]: done\n")
    log = (
        '[Running]: tpuc-opt a.mlir --convert-top-to-tpu="x=1 y=2" -o a_tpu.mlir\n'
        "[Running]: tpuc-opt a_tpu.mlir --address-assign -o a_final.mlir --debug_cmd=\n"
        '[Running]: tpuc-opt a_final.mlir --codegen="model_file=a.bmodel" -o /dev/null\n'
    )
    steps = Steps.read(log)
    assert steps.lowered == "a_tpu.mlir"
    assert steps.lower[2] == "--convert-top-to-tpu=x=1 y=2"
    joined = "tpuc-opt a_tpu.mlir --address-assign --codegen=model_file=a.bmodel -o a_final.mlir --debug_cmd="
    assert " ".join(steps.place_and_emit) == joined
    with pytest.raises(CannotExtend, match="does not say"):
        Steps.read(log + "[Running]: tpuc-opt a.mlir --something-new\n")
