"""Compiled blocks on the chip emulator and in TPU-MLIR's Top dialect, fed with the reference's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from qwen_surgery.compiling.one import NetJob, combine, compile_net
from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.nets import Net
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.toolchain.emulator import ChipEngine
from qwen_surgery.verification.cases import CaseMaker, Selection
from qwen_surgery.verification.engines import OrtEngine
from qwen_surgery.verification.levels import check_contract, check_nets
from qwen_surgery.verification.mlir import MlirEngine
from tests.verification.conftest import Bench
from tests.verification.mutants import Tampered

SELECTION = Selection((6,), layers=(0,), names=("block", "block_cache"))
NETS = ("block_0", "block_cache_0")

pytestmark = pytest.mark.tpu


def compile_blocks(bench: Bench, mode: str, work: Path) -> Path:
    toolchain = Toolchain.find()
    manifest = OrtEngine(bench.folder).manifest
    options = CompileOptions(mode=mode).resolved(bench.geometry)
    compiled = []
    for name in NETS:
        entry = manifest.net(name)
        job = NetJob(Net(name, entry.kind, entry.layer), bench.folder / entry.file, cleaned=False)
        compiled += compile_net(job, options, toolchain, work / name, work / "logs")
    out = work / f"blocks_{mode}.bmodel"
    combine(compiled, out, toolchain, work / "logs")
    return out


class MaskForgotten(Tampered):
    """What a compiler that dropped the mask's addition would compute."""

    def run(self, net: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self._engine.run(net, [*inputs[:2], np.zeros_like(inputs[2]), *inputs[3:]])


@pytest.mark.parametrize("mode", ["bf16", "int8", "int4"])
def test_compiled_blocks_hold_their_tolerance_and_a_dropped_mask_does_not(
    mode: str, bench: Bench, tmp_path: Path
) -> None:
    cases = list(CaseMaker(bench.reference, bench.geometry, SELECTION).cases())
    limits = bench.limits("chip", mode)
    with ChipEngine(compile_blocks(bench, mode, tmp_path), Toolchain.find()) as chip:
        checks = check_nets(chip, cases, bench.geometry, limits, NETS)
        assert len(checks) == 6, "hidden states, K and V of prefill and decode"
        assert not [check for check in checks if not check.passed]
        # Two nets alone are no model: the runtimes count nets.
        assert not check_contract(chip, bench.geometry)[0].passed
        spoilt = check_nets(MaskForgotten(chip), cases, bench.geometry, limits, NETS)
    missed = {check.net for check in spoilt if not check.passed}
    assert missed == set(NETS), "a dropped mask must show in every mode"


def test_the_top_dialect_computes_what_onnxruntime_does(bench: Bench) -> None:
    cases = list(CaseMaker(bench.reference, bench.geometry, SELECTION).cases())
    folder = OrtEngine(bench.folder)
    limits = bench.limits("mlir")
    with MlirEngine(folder, Toolchain.find(), bench.geometry) as engine:
        checks = check_nets(engine, cases, bench.geometry, limits, NETS, expected_by=folder)
        assert len(checks) == 6 and not [check for check in checks if not check.passed]
        spoilt = check_nets(MaskForgotten(engine), cases, bench.geometry, limits, NETS, expected_by=folder)
    assert {check.net for check in spoilt if not check.passed} == set(NETS)
