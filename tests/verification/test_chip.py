"""Compiled blocks on the chip emulator and in TPU-MLIR's Top dialect, fed with the reference's inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden.eras import ERAS
from golden.speaking.model import HERE, make_chat_checkout
from qwen_surgery.compiling.one import NetJob, combine, deploy, transform
from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.nets import Net
from qwen_surgery.packing import sidefile
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.toolchain.emulator import ChipEngine
from qwen_surgery.verification.cases import CaseMaker, Selection
from qwen_surgery.verification.engines import OrtEngine
from qwen_surgery.verification.levels import check_contract, check_nets
from qwen_surgery.verification.mlir import MlirEngine
from tests.verification.conftest import Bench
from tests.verification.mutants import Fed, one_input
from tests.verification.test_verify_command import run

SELECTION = Selection((6,), layers=(0,), names=("block", "block_cache"))
NETS = ("block_0", "block_cache_0")
#: The cosine that every block's hidden states must reach.
BARS = {"bf16": 0.9999, "int8": 0.999, "int4": 0.98}
LevelJson = dict[str, Any]
HELD_OUT = HERE / "heldout.txt"

pytestmark = pytest.mark.tpu


def compile_blocks(bench: Bench, mode: str, work: Path) -> Path:
    toolchain = Toolchain.find()
    manifest = OrtEngine(bench.folder).manifest
    options = CompileOptions(mode=mode).resolved(bench.geometry)
    compiled = []
    for name in NETS:
        entry = manifest.net(name)
        job = NetJob(Net(name, entry.kind, entry.layer), bench.folder / entry.file, cleaned=False)
        (work / name).mkdir()
        transform(job, toolchain, work / name, work / "logs")
        compiled.append(deploy(job, options, 1, toolchain, work / name, work / "logs")[0])
    out = work / f"blocks_{mode}.bmodel"
    combine(compiled, out, toolchain, work / "logs")
    return out


#: What a compiler could do to the two nets: which nets, and what they then read.
WRONG = {
    "dropped mask": (("block", "block_cache"), one_input(2, np.zeros_like)),
    "stale history open": (("block_cache",), one_input(2, np.zeros_like)),
    "decode position one early": (("block_cache",), one_input(1, lambda position: position - 1)),
    "history of K and V exchanged": (("block_cache",), lambda inputs: [*inputs[:3], *inputs[:2:-1]]),
    "heads of the history exchanged": (("block_cache",), one_input(3, lambda history: history[:, :, ::-1])),
    "positions all zero": (("block",), one_input(1, np.zeros_like)),
}


@pytest.mark.parametrize("mode", ["bf16", "int8", "int4"])
def test_compiled_blocks_hold_their_tolerance_and_wrong_ones_do_not(
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
        for name, (kinds, edit) in WRONG.items():
            spoilt = check_nets(Fed(chip, kinds, edit), cases, bench.geometry, limits, NETS)
            missed = {check.net for check in spoilt if not check.passed}
            assert missed == {f"{kind}_0" for kind in kinds}, f"{name} must show in every mode"


def test_the_top_dialect_computes_what_onnxruntime_does(bench: Bench) -> None:
    cases = list(CaseMaker(bench.reference, bench.geometry, SELECTION).cases())
    folder = OrtEngine(bench.folder)
    limits = bench.limits("mlir")
    with MlirEngine(folder, Toolchain.find(), bench.geometry) as engine:
        checks = check_nets(engine, cases, bench.geometry, limits, NETS, expected_by=folder)
        assert len(checks) == 6 and not [check for check in checks if not check.passed]
        for name, (kinds, edit) in WRONG.items():
            wrong = Fed(engine, kinds, edit)
            spoilt = check_nets(wrong, cases, bench.geometry, limits, NETS, expected_by=folder)
            missed = {check.net for check in spoilt if not check.passed}
            assert missed == {f"{kind}_0" for kind in kinds}, name


def chip_report(era: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> LevelJson:
    """The chip level of ``build --verify full`` of a trained checkout of *era*, with questions and a text."""
    checkout = make_chat_checkout(tmp_path / "checkout", era)
    args = ("--out", tmp_path / "out", "--mode", mode, "--seq-length", 96, "--verify", "full")
    words = ("--ask", "So what is a bmodel?", "--ask", "What is 2 + 7?", "--text", HELD_OUT)
    code, out, _ = run(capsys, "build", checkout, *args, *words, "--trust-remote-code", "--json")
    made = json.loads(out)
    report = made["report"]
    assert code == 0 and report["passed"]
    (bmodel,) = made["bmodels"]
    assert sidefile.load(Path(bmodel)).notes["measured"].startswith("perplexity "), "inspect says it"
    followed = {check["net"] for check in report["levels"][-1]["checks"]}
    assert followed == {"chat-2024", "chat-2025", "generic"}, "the demos of the default runtime"
    return next(level for level in report["levels"] if level["level"] == "chip")


@pytest.mark.parametrize(
    ("era", "mode"),
    [
        pytest.param(era, mode, marks=() if (era, mode) == ("registered-mask", "bf16") else pytest.mark.slow)
        for era in ERAS
        for mode in BARS
    ],
)
def test_the_chip_computes_what_the_unpatched_model_does(
    era: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the product's own command: every block within its bar, and the same answers in words."""
    level = chip_report(era, mode, tmp_path, capsys)
    cosines = [check["values"]["cosine"] for check in level["checks"] if check["output"] == "hidden_states"]
    assert len(cosines) == 6, "two layers, two prompts in prefill, one of them in decode"
    assert min(cosines) >= BARS[mode]
    answers = level["answers"]
    assert [answer["equal"] for answer in answers] == [True, True]
    assert answers[0]["candidate_text"].startswith("A bmodel is the file that a Sophgo chip runs")
    text = next(check["values"] for check in level["checks"] if check["label"] == "text")
    assert text["reference_perplexity"] < 3 and text["tokens"] > 100
