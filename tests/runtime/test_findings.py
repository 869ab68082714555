"""What files of the vendor's documented flow, and this project's first ones, do in the vendor's runtimes; and
that today's do not. Each of these was found with the vendor's own demos.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from golden.eras import make_checkout
from tests.runtime.older import OlderNets, older_nets
from tests.runtime.test_runtimes import SEQ_LENGTH, build, in_runtime, inspected, missed

pytestmark = [pytest.mark.tpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer; large enough in its vocabulary that the heads' memory reaches into the logits."""
    folder = tmp_path_factory.mktemp("findings") / "Qwen-tiny"
    return make_checkout(folder, layers=1, hidden=128, heads=2, vocab=4096)


@pytest.fixture(scope="module")
def older(checkout: Path) -> OlderNets:
    return older_nets(checkout, checkout.parent / "older", SEQ_LENGTH)


def hazards(bmodel: Path) -> dict[str, str]:
    """What `inspect` says that a generation overwrites, all in one text."""
    return {one["generation"]: " ".join(one["hazards"]) for one in inspected(bmodel)["runtimes"]}


def test_a_dynamic_file_with_constant_shapes_ends_the_process(
    checkout: Path, older: OlderNets, tmp_path: Path
) -> None:
    old = older.bmodel("bf16", dynamic=True)
    level = in_runtime(checkout, old)
    crashed = {check["net"] for check in level["checks"] if "does not run" in str(check["missed"])}
    assert crashed == {"generic", "qwen.py-2024-08"}
    assert "decode nets are dynamic" in hazards(old)["generic"]
    assert not missed(in_runtime(checkout, build(checkout, tmp_path, "--mode", "bf16", "--dynamic")))


def test_heads_that_share_memory_sample_from_damaged_logits(
    checkout: Path, older: OlderNets, tmp_path: Path
) -> None:
    old = older.bmodel("int4")
    told = hazards(old)
    assert all("are penalty_sample_head.input_ids" in told[name] for name in ("chat-2024", "chat-2025"))
    assert {("chat-2024", "sampling"), ("chat-2025", "sampling")} <= missed(in_runtime(checkout, old))
    new = build(checkout, tmp_path, "--mode", "int4")
    assert not "".join(hazards(new).values())
    assert not missed(in_runtime(checkout, new))


def test_float16_masks_leave_no_number_in_bf16_nets(checkout: Path, tmp_path: Path) -> None:
    flags = ("--mode", "int4", "--runtime", "sophon-demo-2024.1")
    nets = older_nets(checkout, tmp_path / "older", SEQ_LENGTH, "--multi-device")
    old = nets.bmodel("int4", runtime="sophon-demo-2024.1")
    assert ("qwen.py-2024-03", "greedy") in missed(in_runtime(checkout, old))
    new = build(checkout, tmp_path / "new", *flags)
    assert not missed(in_runtime(checkout, new))
    assert inspected(new, "--runtime", "sophon-demo-2024.1")["contract"] == []


def test_embeddings_are_copied_over_themselves(checkout: Path, older: OlderNets, tmp_path: Path) -> None:
    """Prompts that reach into the half that is overwritten first."""
    old = older.bmodel("bf16")
    told = hazards(old)
    assert all("block_0 as its input_states" in told[name] for name in ("chat-2024", "chat-2025"))
    level = in_runtime(checkout, old)
    wrong = {check["label"] for check in level["checks"] if check["net"] == "chat-2025" and check["missed"]}
    assert "greedy shared 61+3" in wrong and "greedy shared 22+3" not in wrong
    new = build(checkout, tmp_path, "--mode", "bf16")
    assert not "".join(hazards(new).values())
    assert not missed(in_runtime(checkout, new))
