"""What is overwritten before it is read: each error of a layout is found, by name, and nothing else is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen_surgery.runtime import flows
from qwen_surgery.runtime.generations import GENERATIONS
from qwen_surgery.runtime.hazards import hazards
from qwen_surgery.runtime.memory import Place
from tests.runtime.nets import made, place

SHARING = (flows.Copying, flows.CopyingAlone, flows.OwnLength)
BUFFERED = (flows.InPlace, flows.InPlaceFloat16)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("flow", [*SHARING, *BUFFERED])
def test_tensors_in_places_of_their_own_are_never_flagged(
    flow: type[flows.DataFlow], heads: bool, dynamic: bool
) -> None:
    assert hazards(made(heads=heads, dynamic=dynamic), flow) == ()


def test_every_generation_is_judged_by_one_of_these() -> None:
    assert {one.flow for one in GENERATIONS} == {*SHARING, *BUFFERED, flows.Parallel, flows.CopyingToken}


def test_float16_masks_are_not_for_demos_that_always_write_bf16s_bits() -> None:
    """0xC61C is -9984 in bf16 and -6.1 in float16: such a demo would see every masked token."""

    def half(one: Place) -> Place:
        return replace(one, dtype="f16") if one.dtype == "bf16" else one

    nets = made()
    halves = [replace(net, inputs=tuple(map(half, net.inputs))) for net in nets]
    readers, safe = ({one.name for one in GENERATIONS if not one.refuses(n)} for n in (nets, halves))
    assert readers - safe == {"chat-2024", "chat-2025"}
    assert safe == {"generic", "qwen.py-2024-08"}


@pytest.mark.parametrize("flow", [flows.Copying, flows.CopyingAlone])
def test_a_heads_input_inside_the_logits_is_named(flow: type[flows.DataFlow]) -> None:
    logits = place("lm_head", "m_logits")
    (found,) = hazards(made(moved={"penalty_sample_head.top_p": logits.address + 8}), flow)
    assert found == (
        "penalty_sample_head as its m_logits reads 256 bytes, of which 4 are penalty_sample_head.top_p"
    )


@pytest.mark.parametrize("distance", [-16, 16])
def test_a_copy_over_its_own_source_is_found_in_both_directions(distance: int) -> None:
    source = place("embedding", "embedding_states")
    moved = {f"block_{i}.input_states": source.address + distance for i in (0, 1)}
    (found,) = hazards(made(moved=moved), flows.Copying)
    assert found.startswith("block_0 as its input_states reads 256 bytes, of which 240 are what the copy")


def test_demos_that_write_the_mask_once_need_shared_memory() -> None:
    apart = made(shared=False)
    for flow in SHARING:
        assert any("block_1 as its position_ids" in one for one in hazards(apart, flow))
    for flow in BUFFERED:
        assert hazards(apart, flow) == ()


def test_a_cache_that_another_net_works_in_is_found() -> None:
    keys = place("block_0", "input_states").address
    found = hazards(made(moved={"block_cache_1.history_k": keys}), flows.CopyingAlone)
    assert any("block_cache_1 as its history_k" in one for one in found)


def test_a_dynamic_block_may_not_read_where_it_works() -> None:
    """LLM-TPU's demo_parallel keeps the hidden states in the first block's own output."""
    assert hazards(made(heads=False), flows.Parallel) == ()
    (found,) = hazards(made(heads=False, dynamic=True), flows.Parallel)
    assert "an intermediate result of block_0" in found
