"""Exported nets go through the real TPU-MLIR unchanged, and mean there what a plain torch export means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_surgery.exporting.model_code import ModelCode
from qwen_surgery.exporting.modules import ModuleFactory
from qwen_surgery.exporting.template import make_binding, resolve
from qwen_surgery.nets import Net, NetKind, inputs, outputs
from qwen_surgery.packing.container import Bmodel, Region
from qwen_surgery.runtime.host import decode_mask, prefill_mask, prefill_positions
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.toolchain.emulator import ChipEngine
from tests.exporting.conftest import LENGTH, Tiny, small_checkout

pytestmark = pytest.mark.tpu

BLOCKS = {"block_1": NetKind.BLOCK, "block_cache_1": NetKind.BLOCK_CACHE}


def plain_export(tiny: Tiny, name: str, target: Path) -> None:
    """Layer 1 as anyone would export it: weights loaded, torch.onnx.export, everything in one file."""
    code = [ModelCode.load(files) for files in (tiny.sources.patched, tiny.sources.reference)]
    kind = BLOCKS[name]
    built = ModuleFactory(*code, tiny.geometry).build(kind)
    binding = make_binding(Net(name, kind, 1), built.slots, code[0].family.anatomy, tied=False)
    refs = resolve(binding, built.shapes(), tiny.index)
    module = built.load({slot: torch.from_numpy(ref.read()) for slot, ref in refs.items()})
    arguments = tuple(
        torch.zeros(t.shape, dtype=torch.int32 if t.dtype == "int" else torch.float32)
        for t in inputs(kind, tiny.geometry)
    )
    torch.onnx.export(
        module,
        arguments,
        str(target),
        input_names=[t.name for t in inputs(kind, tiny.geometry)],
        output_names=[t.name for t in outputs(kind, tiny.geometry)],
        opset_version=15,
        dynamo=False,
    )


def compile_onnx(toolchain: Toolchain, model: Path, folder: Path, name: str, *flags: str) -> Path:
    folder.mkdir()
    transform = ["--model_name", name, "--model_def", str(model), "--mlir", f"{name}.mlir"]
    toolchain.run("model_transform", transform, folder, folder / "transform.log")
    deploy = ["--mlir", f"{name}.mlir", *flags, "--chip", "bm1684x", "--model", f"{name}.bmodel"]
    toolchain.run("model_deploy", deploy, folder, folder / "deploy.log")
    return folder / f"{name}.bmodel"


def coefficients(bmodel: Path, name: str) -> bytes:
    """The weights as the chip gets them."""
    with Bmodel(bmodel) as opened:
        memory = opened.net(name)["parameter"][0]["coeff_mem"]
        return opened.read(Region.of(memory["binary_coeff"]))


def feed_of(kind: NetKind, tiny: Tiny) -> list[np.ndarray]:
    """Seven tokens: a padded prefill, or the seventh's decode step."""
    generator = np.random.default_rng(0)
    geometry = tiny.geometry
    rows = LENGTH if kind is NetKind.BLOCK else 1
    states = generator.standard_normal((1, rows, geometry.hidden), dtype=np.float32)
    if kind is NetKind.BLOCK:
        return [states, prefill_positions(7, LENGTH), prefill_mask(7, LENGTH)]
    history = generator.standard_normal((2, 1, LENGTH, geometry.heads, geometry.head_dim), dtype=np.float32)
    return [states, np.array([[6]], np.int32), decode_mask(7, LENGTH), *history]


@pytest.mark.parametrize("name", list(BLOCKS))
def test_a_bound_layer_compiles_to_what_its_plain_export_compiles_to(name: str, tmp_path: Path) -> None:
    tiny = Tiny.open(small_checkout(tmp_path / "checkout", hidden=128))
    tiny.export(tmp_path / "onnx", wanted=[name])
    plain_export(tiny, name, tmp_path / "plain.onnx")
    toolchain = Toolchain.find()
    flags = ["--quantize", "W4BF16", "--q_group_size", "64", "--quant_input", "--quant_output"]
    ours = compile_onnx(toolchain, tmp_path / "onnx" / f"{name}.onnx", tmp_path / "ours", name, *flags)
    plain = compile_onnx(toolchain, tmp_path / "plain.onnx", tmp_path / "plain", name, *flags)
    assert coefficients(ours, name) == coefficients(plain, name)

    feed = feed_of(BLOCKS[name], tiny)
    results = []
    for bmodel in (ours, plain):
        with ChipEngine(bmodel, toolchain) as chip:
            results.append(chip.run(name, feed))
    for mine, theirs in zip(*results, strict=True):
        assert np.abs(mine).max() > 0
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", ["greedy_head", "penalty_sample_head"])
def test_the_heads_compute_on_the_chip_what_they_compute_in_torch(
    tiny: Tiny, exported: Path, tmp_path: Path, name: str
) -> None:
    toolchain = Toolchain.find()
    bmodel = compile_onnx(toolchain, exported / f"{name}.onnx", tmp_path / "out", name, "--quantize", "F32")
    kind = NetKind(name)
    logits = np.random.default_rng(5).standard_normal((1, tiny.geometry.vocab), dtype=np.float32)
    seen = np.argsort(-logits[0])[:LENGTH].astype(np.int32)[None]
    feed = [logits, seen, *(np.array([x], np.float32) for x in (0.7, 0.9, 1.2))][
        : len(inputs(kind, tiny.geometry))
    ]
    code = [ModelCode.load(files) for files in (tiny.sources.patched, tiny.sources.reference)]
    module = ModuleFactory(*code, tiny.geometry).build(kind).module
    with torch.no_grad():
        result = module(*(torch.from_numpy(a) for a in feed))
    expected = [t.numpy() for t in (result if isinstance(result, tuple) else (result,))]
    with ChipEngine(bmodel, toolchain) as chip:
        actual = chip.run(name, feed)
    assert actual[-1].astype(np.int64).reshape(-1).tolist() == expected[-1].reshape(-1).tolist()
    np.testing.assert_allclose(actual[0].reshape(-1), expected[0].reshape(-1), atol=1e-5)
