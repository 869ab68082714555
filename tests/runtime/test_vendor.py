"""The vendor's demos themselves, from their clone: every generation that speaks to Qwen v1.

pytest -m vendor --vendor LLM_TPU_CLONE tests/runtime/test_vendor.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from golden.eras import make_checkout
from qwen_surgery.nets import NetKind
from qwen_surgery.packing.report import geometry_of
from qwen_surgery.runtime.generations import FUSED, GENERIC, HEADS
from qwen_surgery.runtime.host import Sampling, padded, sampler_knobs
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.toolchain.emulator import ChipEngine
from qwen_surgery.verification.on_runtime import Conversation, net_by_net
from tests.runtime.demos import DEMOS, Demo, Workshop
from tests.runtime.test_runtimes import build

pytestmark = [pytest.mark.vendor, pytest.mark.tpu]
MODES = ("bf16", "int8", "int4")
STEPS = 3
#: How the generic demos are told to sample.
FEW = Sampling(top_k=20)
#: One demo of each generation that samples, and the generic one.
WIDE = tuple(
    demo
    for demo in DEMOS
    if demo.heads == HEADS
    and demo.path.endswith("python_demo/chat.cpp")
    and demo.commit in ("81bb6f1", "1e8f264", "1cf8611")
)


@pytest.fixture(scope="module")
def workshop(vendor: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(vendor, Toolchain.find(), tmp_path_factory.mktemp("demos"))


@pytest.fixture(scope="module", params=MODES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One bmodel for each kind of demo, in one mode."""
    folder = tmp_path_factory.mktemp("models")
    checkout = make_checkout(folder / "tiny", layers=2, hidden=128, heads=2, vocab=4096)
    return {
        HEADS: build(checkout, folder / "heads", "--mode", request.param),
        GENERIC: build(checkout, folder / "generic", "--mode", request.param, "--runtime", "llm-tpu-generic"),
        FUSED: build(checkout, folder / "fused", "--mode", request.param, "--runtime", "sophon-demo-2024.1"),
    }


@pytest.fixture(scope="module")
def meant(models: dict[str, Path]) -> dict[str, list[Conversation]]:
    """What the nets one by one say: a short prompt, and one that nearly fills the export length."""
    return {
        kind: conversations(bmodel, (20, 60), STEPS, FEW if kind == GENERIC else Sampling())
        for kind, bmodel in models.items()
    }


def conversations(
    bmodel: Path, lengths: tuple[int, ...], steps: int, sampling: Sampling
) -> list[Conversation]:
    geometry = geometry_of(bmodel)
    prompts = [np.random.default_rng(n).integers(0, geometry.vocab, n).tolist() for n in lengths]
    with ChipEngine(bmodel, Toolchain.find()) as chip:
        return [net_by_net(chip, geometry, prompt, steps, sampling) for prompt in prompts]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Conversation]]:
    """A bmodel with Qwen's own vocabulary, and what its nets one by one say: two tokens, as sampling one
    takes the emulator a minute.
    """
    folder = tmp_path_factory.mktemp("wide")
    checkout = make_checkout(folder / "wide", layers=2, hidden=128, heads=2, vocab=151936)
    bmodel = build(checkout, folder / "out", "--mode", "int4")
    return bmodel, conversations(bmodel, (60,), 1, Sampling())


@pytest.mark.parametrize("demo", DEMOS, ids=[demo.name for demo in DEMOS])
def test_the_vendors_own_demo_gives_the_nets_tokens(
    demo: Demo, workshop: Workshop, models: dict[str, Path], meant: dict[str, list[Conversation]]
) -> None:
    expected = meant[demo.heads]
    if not demo.window:
        expected = [looking_back_on_everything(models[demo.heads], one) for one in expected]
    compare(demo, workshop, models[demo.heads], expected)


def looking_back_on_everything(bmodel: Path, one: Conversation) -> Conversation:
    """*one* with the candidates of a demo that hands its sampling head all tokens, then zeros."""
    seq_length, candidates = geometry_of(bmodel).seq_length, []
    with ChipEngine(bmodel, Toolchain.find()) as chip:
        for step, logits in enumerate(one.logits):
            ids = padded([*one.prompt, *one.tokens[:step]], seq_length)
            knobs = sampler_knobs(NetKind.SAMPLE_HEAD, FEW)
            shares, tokens = chip.run("sample_head", [logits[None], ids, *knobs])
            candidates.append((shares, tokens))
    return replace(one, candidates=candidates)


def compare(demo: Demo, workshop: Workshop, bmodel: Path, meant: list[Conversation]) -> None:
    """Every conversation of *meant*, greedily and, where the demo samples, what it draws from."""
    for one in meant:
        tokens, _ = workshop.run(demo, bmodel, one.prompt, one.tokens, "greedy")
        assert tokens == one.tokens
        if not demo.samples:
            continue
        chosen, drawn = workshop.run(demo, bmodel, one.prompt, one.tokens, demo.samples)
        for step, (found, expected) in enumerate(zip(drawn, one.candidates, strict=True)):
            assert np.array_equal(found[1], expected[1]), f"candidates differ at step {step}"
            assert np.array_equal(found[0], expected[0]), f"shares differ at step {step}"
            assert chosen[step] in expected[1][expected[0] > 0], f"drawn from elsewhere at step {step}"


@pytest.mark.parametrize("demo", WIDE, ids=[demo.name for demo in WIDE])
def test_the_vendors_own_demo_reads_the_whole_vocabulary(
    demo: Demo, workshop: Workshop, wide: tuple[Path, list[Conversation]]
) -> None:
    """151,936 tokens: the heads' inputs used to lie inside the logits."""
    compare(demo, workshop, *wide)
