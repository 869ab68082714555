"""What is overwritten before it is read: each error of a layout is found, by name, and nothing else is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen_surgery.nets import NetKind
from qwen_surgery.runtime import flows
from qwen_surgery.runtime.generations import FUSED, GENERATIONS, GENERIC, HEADS, conversations, suits
from qwen_surgery.runtime.generations import LOGITS as LOGITS_ALONE
from qwen_surgery.runtime.hazards import hazards
from qwen_surgery.runtime.memory import NetMemory, Place
from tests.runtime.nets import first_layout, made, place

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


def test_the_generic_demo_s_copy_of_the_logits_may_be_nobody_else_s() -> None:
    """It writes tokens and settings first, copies the logits last, and both must be there at the launch."""
    generic = {"sampler": NetKind.SAMPLE_HEAD}
    assert hazards(made(**generic), flows.OwnLength) == ()
    nets = {net.name: net for net in made(**generic)}
    logits = nets["sample_head"].inputs[0].memory
    (found,) = hazards(made(**generic, moved={"sample_head.top_k": logits.address + 8}), flows.OwnLength)
    assert found.startswith("sample_head as its top_k reads 4 bytes, of which 4 are")
    keys = nets["block_cache_0"].inputs[3].memory
    found = hazards(made(**generic, moved={"sample_head.input_ids": keys.address}), flows.OwnLength)
    assert any("block_cache_0 as its history_k" in one for one in found)


def test_heads_of_the_generic_demo_are_for_demos_that_know_them() -> None:
    nets = made(sampler=NetKind.SAMPLE_HEAD)
    said = {one.name: one.refuses(nets) for one in GENERATIONS}
    assert {name for name, why in said.items() if not why} == {"generic", "qwen.py-2024-08"}
    assert "penalty_sample_head, which this file does not have" in said["chat-2025"]
    assert "segmentation fault" in said["demo_parallel"]
    assert conversations("llm-tpu-generic", GENERIC) == 2
    assert conversations("llm-tpu", HEADS) == 5, "the generic demo cannot sample from a file of Qwen v1's"


def test_every_demo_has_a_reason_for_every_kind_of_file_that_it_cannot_read() -> None:
    """Or inspect ends in an error of its own, as once for chips without heads."""

    def with_token(net: NetMemory) -> NetMemory:
        return replace(net, outputs=(replace(net.outputs[0], dtype="i32"),)) if net.name == "lm_head" else net

    logits = made(heads=False)
    files = {
        HEADS: made(),
        GENERIC: made(sampler=NetKind.SAMPLE_HEAD),
        LOGITS_ALONE: logits,
        FUSED: tuple(map(with_token, logits)),
    }
    for one in GENERATIONS:
        assert {kind for kind, nets in files.items() if not one.refuses(nets)} == {*one.heads}, one.name


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


HEAD, LOGITS = "penalty_sample_head as its m_logits reads", "penalty_sample_head.input_ids"


@pytest.mark.parametrize(
    ("file", "flow", "said"),
    [
        ("int4", flows.Copying, (HEAD, LOGITS)),
        ("int4 wide", flows.CopyingAlone, (HEAD, LOGITS, "penalty_sample_head.temperature")),
        ("int4 wide", flows.Copying, ("greedy_head as its m_logits reads 607,744 bytes, of which 4,096",)),
        ("bf16", flows.CopyingAlone, ("block_0 as its input_states reads 16,384 bytes, of which 8,192",)),
        ("bf16 token", flows.CopyingToken, ("block_0 as its input_states", "overwrote in its own source")),
        ("bf16 dynamic", flows.OwnLength, ("greedy_head as its m_logits", "overwrote in its own source")),
    ],
)
def test_what_the_first_files_overwrote_is_found_in_their_layouts(
    file: str, flow: type[flows.DataFlow], said: tuple[str, ...]
) -> None:
    """All but the generic flow's: a copy over its own source that the emulator happened to do rightly."""
    found = hazards(first_layout(file), flow)
    assert any(all(part in sentence for part in said) for sentence in found), found


@pytest.mark.parametrize("file", ["int4", "int4 wide", "bf16"])
def test_the_first_files_suited_demos_with_buffers_of_their_own(file: str) -> None:
    for flow in BUFFERED:
        assert hazards(first_layout(file), flow) == ()


def judged(file: str, passes: tuple[str, ...] | None) -> dict[str, str]:
    """What is said of each generation for a first file whose nets went through *passes*."""
    nets = first_layout(file)
    found = [suits(one, {True: nets, False: nets}, passes) for one in GENERATIONS]
    return {one.generation: " ".join([one.refusal, *one.hazards]) for one in found}


def test_dynamic_nets_that_keep_the_whole_length_are_named() -> None:
    """Launches at a prompt's own length ended the process; with free shapes, decode nets were still wrong."""
    crash, wrong = "ends the process", "decode nets are dynamic"
    for name in ("generic", "qwen.py-2024-08"):
        assert crash in judged("bf16 dynamic", ())[name]
        assert crash not in judged("bf16 dynamic", ("free-length",))[name]
        assert crash not in judged("bf16", ())[name], "a static net has one length"
    assert wrong in judged("bf16 dynamic", ("free-length",))["generic"]
    assert wrong in judged("bf16 dynamic", None)["generic"], "seen without any record"
    for name in ("chat-2024", "chat-2025"):
        assert crash not in judged("bf16 dynamic", ())[name], "it always launches the whole length"


def test_float16_masks_for_bf16_nets_need_a_floor_on_record() -> None:
    name, numbers = "qwen.py-2024-03", "give no numbers"
    assert numbers in judged("bf16 token", ())[name]
    assert numbers not in judged("bf16 token", ("bounded-mask",))[name]
    assert numbers not in judged("bf16 token", None)[name], "nothing is known of a file without a record"
    assert numbers not in judged("bf16 token", ())["demo_parallel"], "it writes bf16's own bits"


def test_a_demo_of_files_without_heads_is_said_to_crash_on_one_with_heads() -> None:
    for name in ("demo.cpp-2024-02", "qwen.py-2024-03", "demo_parallel"):
        assert "segmentation fault" in judged("int4", None)[name]
