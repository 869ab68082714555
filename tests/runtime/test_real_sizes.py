"""A file of the 1.8B model's own sizes in a demo: half an hour and more, most of it one prefill block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from golden.eras import make_checkout
from qwen_surgery.packing.report import geometry_of
from qwen_surgery.runtime.device import Device
from qwen_surgery.runtime.flows import CopyingAlone
from qwen_surgery.runtime.host import Sampling
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.toolchain.emulator import ChipEngine
from qwen_surgery.verification.on_runtime import net_by_net
from tests.runtime.test_runtimes import build, inspected

pytestmark = [pytest.mark.tpu, pytest.mark.slow]
STEPS = 2


def test_a_file_of_real_sizes_gives_its_nets_tokens_and_candidates(tmp_path: Path) -> None:
    """Two layers of 1.8B, S = 512, 151,936 tokens: the sizes at which addresses used to overlap."""
    sizes = {"hidden": 2048, "heads": 16, "intermediate": 11008, "vocab": 151936}
    checkout = make_checkout(tmp_path / "Qwen-1.8B-2", layers=2, trained_length=8192, **sizes)
    bmodel = build(checkout, tmp_path / "out", "--mode", "int4", "--seq-length", 512)
    assert inspected(bmodel)["contract"] == []
    prompt = np.random.default_rng(0).integers(0, sizes["vocab"], 20).tolist()
    with ChipEngine(bmodel, Toolchain.find()) as chip:
        meant = net_by_net(chip, geometry_of(bmodel), prompt, STEPS, Sampling())
    with Device(bmodel, Toolchain.find(), shared=True) as device:
        demo = CopyingAlone(device)
        for step, token in enumerate(meant.tokens):
            if step:
                demo.decode(meant.tokens[step - 1])
            else:
                demo.prefill(prompt)
            assert demo.greedy() == token
            candidates = demo.candidates(Sampling())
            assert all(map(np.array_equal, candidates, meant.candidates[step]))
            assert np.array_equal(demo.logits(), meant.logits[step])
