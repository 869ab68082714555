"""Quantised releases: what is read of their integers, and what is refused with the reason.

If these fail, a GPTQ or AWQ checkpoint is read as another model, or one that the chip cannot keep is taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden.releases import Rounded, Scheme, stored, write_tensors
from qwen_surgery.cli import main
from qwen_surgery.errors import Refused
from qwen_surgery.exporting.placement import WeightMode
from qwen_surgery.verification.engines import OrtEngine
from qwen_surgery.weights import QuantisedRef, Release, WeightIndex
from tests.exporting.conftest import Tiny, small_checkout
from tests.exporting.test_weights import rewrite_header
from tests.releases import quantised

GROUP = 16
SCHEMES = {
    "gptq-4": Scheme(4, GROUP),
    "gptq-4-asymmetric": Scheme(4, GROUP, symmetric=False),
    "gptq-4-v2": Scheme(4, GROUP, symmetric=False, v2=True),
    "gptq-8": Scheme(8, GROUP),
    "gptq-8-rows": Scheme(8, -1, symmetric=False),
    "awq": Scheme(4, GROUP, symmetric=False, awq=True),
}
LAYER = "transformer.h.0.mlp.w1"

#: sha256 (its first half) of what the published packers made of :func:`_known`: AutoGPTQ 0.7.1's QuantLinear
#: (cuda_old) and AutoAWQ 0.2.9's WQLinear_GEMM.
PUBLISHED = {
    ("gptq", 4): {
        "qweight": "5376485908923a4af2b74f0a9b4b4e70",
        "qzeros": "c7d2f8aa4d8e6ef184344927be5d4583",
    },
    ("gptq", 8): {
        "qweight": "33543f34e1400ec513bc64bbddcf818e",
        "qzeros": "cb88a7e965aeaa8728633bffd21b60b5",
    },
    ("awq", 4): {
        "qweight": "128253bdb4f7069cdf74d600868bb9c3",
        "qzeros": "cec3966f73dc7c2d65557864b708ed0b",
    },
}


def _known(bits: int) -> Rounded:
    """A layer [32, 64] in groups of 16, made of a rule."""
    top = (1 << bits) - 1
    row, column, group = np.arange(32)[:, None], np.arange(64)[None], np.arange(4)[None]
    codes = ((row * 7 + column * 3 + row * column % 5) % (top + 1)).astype(np.uint32)
    return Rounded(codes, (row * 5 + group * 3) % top + 1, (2.0 ** -((row + group) % 4)).astype("<f2"))


@pytest.mark.parametrize(("method", "bits"), PUBLISHED)
def test_releases_are_packed_as_the_published_packers_pack(method: str, bits: int) -> None:
    """So what the reader is held against below is the published format."""
    tensors = stored("x", _known(bits), Scheme(bits, GROUP, symmetric=False, awq=method == "awq"))
    for ending, digest in PUBLISHED[method, bits].items():
        packed = np.ascontiguousarray(tensors[f"x.{ending}"]).tobytes()
        assert hashlib.sha256(packed).hexdigest()[:32] == digest


def _release(folder: Path, scheme: Scheme, shards: int = 2) -> dict[str, Rounded]:
    """A quantised release in *folder*, and the integers of each layer's matrices by name."""
    small_checkout(folder, shards=shards)
    return quantised(folder, scheme)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_integer_and_every_value_is_read_as_it_was_stored(scheme: Scheme, tmp_path: Path) -> None:
    expected = _release(tmp_path, scheme)
    index = WeightIndex.open(tmp_path)
    assert {name for name, ref in index.items() if isinstance(ref, QuantisedRef)} == set(expected)
    for name, one in expected.items():
        ref = index[name]
        assert isinstance(ref, QuantisedRef)
        found = ref.integers()
        np.testing.assert_array_equal(found.codes, one.codes)
        np.testing.assert_array_equal(found.zero, one.zeros)
        np.testing.assert_array_equal(found.scale, one.scales)
        np.testing.assert_array_equal(ref.read_raw(), one.values())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_an_exported_net_makes_the_weights_of_the_stored_integers(scheme: Scheme, tmp_path: Path) -> None:
    """Linked to the shards' own integers, a net computes what it does with the values written inside."""
    _release(tmp_path / "checkout", scheme)
    tiny = Tiny.open(tmp_path / "checkout")
    rng = np.random.default_rng(0)
    states, positions = rng.standard_normal((1, 24, 32), np.float32), np.arange(24, dtype=np.int32)[None]
    results = {}
    for mode in (WeightMode.LINK, WeightMode.INLINE):
        folder = tmp_path / mode.value
        tiny.export(folder, mode=mode, wanted=("block_1",))
        mask = np.triu(np.full((24, 24), -10000, np.float32), 1)[None, None]
        results[mode] = OrtEngine(folder).run("block_1", [states, positions, mask])
    for linked, inside in zip(results[WeightMode.LINK], results[WeightMode.INLINE], strict=True):
        np.testing.assert_array_equal(linked, inside)


def _config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """An edit of config.json's quantisation."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config["quantization_config"])
        path.write_text(json.dumps(config))

    return edit


def _tensor(ending: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Path], None]:
    """An edit of one tensor of the layer, or its removal."""

    def edit(folder: Path) -> None:
        shard = folder / "model.safetensors"
        tensors = {name: ref.read_raw() for name, ref in _stored(shard).items()}
        changed = change(tensors.pop(LAYER + ending).copy())
        write_tensors(shard, tensors if changed is None else {**tensors, LAYER + ending: changed})

    return edit


def _stored(shard: Path) -> dict[str, Any]:
    from qwen_surgery.weights.safetensors_header import read_header

    return dict(read_header(shard))


def _put(values: np.ndarray, place: int, value: int) -> np.ndarray:
    values.reshape(-1)[place] = value
    return values


def _nothing_said(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


REFUSED = {
    "desc_act": (_config(lambda said: said.update(desc_act=True)), "desc_act: inputs of one scale lie apart"),
    "inputs moved": (_tensor(".g_idx", lambda values: _put(values, 0, 1)), r"w1.g_idx is not in order"),
    "zero of 16": (
        _tensor(".qzeros", lambda values: _put(values, 0, 0x7777777F)),
        "zero of 16 is out of",
    ),
    "3 bits": (_config(lambda said: said.update(bits=3)), "GPTQ with 3 bits: the chip has 4 and 8"),
    "bits as text": (_config(lambda said: said.update(bits="4")), "its quantisation cannot be read"),
    "another method": (_config(lambda said: said.update(quant_method="hqq")), "hqq checkpoints are not supp"),
    "marlin": (_config(lambda said: said.update(checkpoint_format="marlin")), "GPTQ weights in marlin order"),
    "other groups": (_config(lambda said: said.update(group_size=32)), "is not GPTQ, 4 bits, groups of 32"),
    "no scales": (_tensor(".scales", lambda values: None), "w1.scales is missing beside"),
    "no codes": (_tensor(".qweight", lambda values: None), "w1.qzeros has no .*qweight beside it"),
    "nothing said": (_nothing_said, "w1?.*qweight is quantised, and .* does not say how"),
}


@pytest.mark.parametrize(("edit", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_kept_is_refused_with_the_reason(
    edit: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    _release(tmp_path, Scheme(4, GROUP), shards=1)
    edit(tmp_path)
    with pytest.raises(Refused, match=said):
        WeightIndex.open(tmp_path)


def test_settings_without_integers_are_refused(tmp_path: Path) -> None:
    small_checkout(tmp_path)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": GROUP}))
    with pytest.raises(Refused, match="it says GPTQ, 4 bits, groups of 16, and no tensor of it is quantised"):
        WeightIndex.open(tmp_path)


def test_a_bias_of_a_layer_without_one_must_be_zero(tmp_path: Path) -> None:
    _release(tmp_path / "checkout", Scheme(4, GROUP), shards=1)
    Tiny.open(tmp_path / "checkout").export(tmp_path / "zero", wanted=("embedding",))
    _tensor(".bias", lambda values: _put(values, 3, 1))(tmp_path / "checkout")
    with pytest.raises(Refused, match=r"w1.bias is not zero, and config.json \(no_bias\) says"):
        Tiny.open(tmp_path / "checkout").export(tmp_path / "other", wanted=("embedding",))


def test_a_layer_that_is_quantised_in_part_is_refused(tmp_path: Path) -> None:
    _release(tmp_path / "checkout", Scheme(4, GROUP), shards=1)
    shard = tmp_path / "checkout/model.safetensors"
    tensors = {name: ref.read_raw() for name, ref in _stored(shard).items()}
    for ending in (".qweight", ".qzeros", ".scales", ".g_idx", ".bias"):
        del tensors[LAYER + ending]
    write_tensors(shard, {**tensors, f"{LAYER}.weight": np.zeros((64, 32), "<f2")})
    with pytest.raises(Refused, match=r"w1\.weight is F16 among quantised ones"):
        Tiny.open(tmp_path / "checkout").export(tmp_path / "onnx")


def test_a_damaged_dtype_is_refused_not_read(tmp_path: Path) -> None:
    _release(tmp_path, Scheme(4, GROUP), shards=1)

    def as_floats(header: dict[str, Any]) -> None:
        header[f"{LAYER}.qweight"]["dtype"] = "F32"

    rewrite_header(tmp_path / "model.safetensors", as_floats)
    with pytest.raises(Refused, match=r"w1.qweight: F32 \[4, 64\] is no I32 matrix"):
        WeightIndex.open(tmp_path)


def test_demo_checkout_makes_a_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo-checkout", str(tmp_path / "demo"), "--gptq", "int8"])
    assert stop.value.code == 0
    assert Release.of(tmp_path / "demo") == Release("gptq", 8, 128, less_one=True)
    assert sum(isinstance(ref, QuantisedRef) for ref in WeightIndex.open(tmp_path / "demo").values()) == 10
    with pytest.raises(SystemExit) as stop:
        main(["demo-checkout", str(tmp_path / "wide"), "--gptq", "int4", "--dtype", "f32"])
    assert stop.value.code == 2
    assert "--gptq quantises bf16 weights" in capsys.readouterr().err
    assert not (tmp_path / "wide").exists()
