"""Bmodels in the vendor's own bmruntime, on the emulated chip, through the product's commands."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden.eras import make_checkout
from qwen_surgery.errors import ToolFailed
from qwen_surgery.packing.report import geometry_of
from qwen_surgery.runtime.device import Device
from qwen_surgery.runtime.flows import InPlace, own
from qwen_surgery.runtime.host import Sampling
from qwen_surgery.runtime.memory import Memory, NetMemory, layout
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.toolchain.emulator import ChipEngine
from qwen_surgery.verification.on_runtime import follow, net_by_net
from tests.building.test_build import cli

SEQ_LENGTH = 64
#: The generations that read files with heads, and files whose lm_head gives the token.
HEADS = {"chat-2024", "chat-2025", "generic", "qwen.py-2024-08"}
FUSED = {"generic", "qwen.py-2024-08", "qwen.py-2024-03", "demo_parallel", "demo.cpp-2024-02"}
pytestmark = pytest.mark.tpu


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough in its vocabulary that the heads' memory reaches into the logits."""
    folder = tmp_path_factory.mktemp("runtime") / "Qwen-tiny"
    return make_checkout(folder, layers=2, hidden=128, heads=2, vocab=4096)


def built(checkout: Path, out: Path, *flags: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A build without verification."""
    base = ("--out", out, "--seq-length", SEQ_LENGTH, "--verify", "none", "--name", "tiny")
    return cli("build", checkout, *base, "--trust-remote-code", "--json", *flags, check=check)


def build(checkout: Path, out: Path, *flags: object, check: bool = True) -> Path:
    """The first bmodel of :func:`built`."""
    return Path(json.loads(built(checkout, out, *flags, check=check).stdout)["bmodels"][0])


def inspected(bmodel: Path, *flags: object) -> dict[str, Any]:
    return json.loads(cli("inspect", bmodel, "--json", *flags, check=False).stdout)


def inspected_nets(bmodel: Path) -> list[str]:
    return [net["name"] for net in inspected(bmodel)["nets"]]


def in_runtime(checkout: Path, bmodel: Path, steps: int = 3) -> dict[str, Any]:
    """The level ``runtime`` of a verification."""
    flags = ("--level", "runtime", "--steps", steps, "--trust-remote-code", "--json")
    done = cli("verify", checkout, "--bmodel", bmodel, *flags, check=False)
    return json.loads(done.stdout)["levels"][0]


def missed(level: dict[str, Any]) -> set[tuple[str, str]]:
    """(generation, greedy or sampling) of what missed."""
    return {(check["net"], check["label"].split()[0]) for check in level["checks"] if not check["passed"]}


def generations(level: dict[str, Any]) -> set[str]:
    return {check["net"] for check in level["checks"]}


@pytest.fixture(scope="module")
def bf16(checkout: Path) -> Path:
    return build(checkout, checkout.parent / "bf16", "--mode", "bf16", "--dynamic")


def relative(nets: tuple[NetMemory, ...]) -> dict[str, list[int]]:
    """Every tensor's address from its net's first one on."""
    found = {}
    for net in nets:
        places = [place.memory.address for place in (*net.inputs, *net.outputs)]
        found[net.name] = [address - min(places) for address in places]
    return found


def test_the_addresses_that_inspect_shows_are_bmruntimes(bf16: Path) -> None:
    with Device(bf16, Toolchain.find(), shared=True) as device:
        real = tuple(device.nets.values())
    ours = layout(bf16, shared=True)
    assert relative(ours) == relative(real)
    blocks = [{net.name: net for net in nets}["block_1"] for nets in (ours, real)]
    first = [{net.name: net for net in nets}["block_0"] for nets in (ours, real)]
    for one, other in zip(first, blocks, strict=True):
        assert [p.memory for p in one.inputs] == [p.memory for p in other.inputs], "layers share their places"


def test_regions_are_plain_lines_in_a_pipe(bf16: Path) -> None:
    """A net's name, and below it where each input and output lies; nothing of how a terminal shows it."""
    said = cli("inspect", bf16, "--regions").stdout.partition("memory of each net")[2].splitlines()
    lines = dict.fromkeys(line.split("  ")[0] for line in said[1:] if not line.startswith(" "))
    assert list(lines) == [name for name in inspected_nets(bf16) if not name.endswith("_1")]
    assert any(line.startswith("  in  history_k  ") for line in said)


def test_a_dynamic_bf16_model_gives_every_demo_the_right_tokens(checkout: Path, bf16: Path) -> None:
    """Copies between nets, heads fed in place, prefill launched at the prompt's own length."""
    assert inspected(bf16)["contract"] == []
    level = in_runtime(checkout, bf16)
    assert level["passed"], missed(level)
    assert generations(level) == HEADS
    labels = {check["label"] for check in level["checks"] if check["net"] == "chat-2025"}
    assert labels == {f"{how} shared {n}+3" for how in ("greedy", "sampling") for n in (22, 61)}


def test_inspect_goes_by_the_passes_on_record(bf16: Path, tmp_path: Path) -> None:
    """Addresses do not show whether a dynamic net's shapes are free: the side file does."""
    copy = Path(shutil.copy(bf16, tmp_path))
    assert inspected(copy)["contract"] == [], "without a record, addresses alone judge"
    side = json.loads(bf16.with_name(f"{bf16.name}.side.json").read_text())
    side["notes"]["passes"] = side["notes"]["passes"].replace("free-length", "zero-bias")
    copy.with_name(f"{copy.name}.side.json").write_text(json.dumps(side))
    done = cli("inspect", copy, check=False)
    assert done.returncode == 1
    assert "generic: the prefill nets reshape to the whole length" in done.stdout
    assert "qwen.py-2024-08: the prefill nets reshape to the whole length" in done.stdout


def test_a_crash_of_the_runtime_is_a_reported_failure(bf16: Path) -> None:
    with Device(bf16, Toolchain.find(), shared=True) as device:
        states = device.nets["embedding"].outputs[0].memory
        with pytest.raises(ToolFailed, match=r"the vendor's runtime (was killed|ended)"):
            device.copy(Memory(0xB000000000, states.size), states)


def test_a_bundle_replays_in_the_runtime(bf16: Path, tmp_path: Path) -> None:
    """Byte for byte what a board's tool would read and compare."""
    cli("inspect", bf16, "--bundle", tmp_path / "bundle")
    given, expected = (
        (tmp_path / f"bundle/{name}_ref_data.dat").read_bytes() for name in ("input", "output")
    )
    with Device(bf16, Toolchain.find(), shared=True) as device:
        for net in device.nets.values():
            for place in net.inputs:
                data, given = given[: place.memory.size], given[place.memory.size :]
                device.write(place.memory, np.frombuffer(data, np.uint8))
            device.launch(net.name, [own(p) for p in net.inputs], [own(p) for p in net.outputs])
            for place in net.outputs:
                data, expected = expected[: place.memory.size], expected[place.memory.size :]
                assert device.read(place.memory).tobytes() == data, f"{net.name}: {place.name}"
    assert not given and not expected
    assert cli("inspect", bf16, "--bundle", tmp_path / "bundle", check=False).returncode == 3


#: What a build with ``--addr-mode basic`` says.
UNSUITED = "--addr-mode basic does not suit LLM-TPU's chat.cpp"


def test_a_plan_says_whom_shared_addresses_do_not_suit(checkout: Path, tmp_path: Path) -> None:
    """Before hours are spent on it; the build says it again."""
    shared = built(checkout, tmp_path, "--mode", "bf16", "--addr-mode", "basic", "--dry-run")
    assert any(note.startswith(UNSUITED) for note in json.loads(shared.stdout)["notes"])
    own = built(checkout, tmp_path, "--mode", "bf16", "--dry-run")
    assert json.loads(own.stdout)["notes"] == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bf16", "int4"])
def test_what_inspect_says_of_shared_addresses_is_what_happens(
    checkout: Path, tmp_path: Path, mode: str
) -> None:
    """Nets in one another's memory: the demos that the addresses condemn are those that go wrong."""
    made = built(checkout, tmp_path, "--mode", mode, "--addr-mode", "basic")
    assert UNSUITED in made.stderr
    bmodel = Path(json.loads(made.stdout)["bmodels"][0])
    report = inspected(bmodel)
    condemned = {one["generation"] for one in report["runtimes"] if one["hazards"]}
    assert {"chat-2024", "chat-2025"} <= condemned
    assert report["contract"]
    wrong = {name for name, _ in missed(in_runtime(checkout, bmodel))}
    assert wrong and wrong <= condemned


#: What is built for the demos: every mode, profile and chip, and --dynamic.
FILES: tuple[tuple[object, ...], ...] = (
    *(("--mode", mode) for mode in ("bf16", "f16", "int8", "int4")),
    *(("--mode", mode, "--dynamic") for mode in ("f16", "int8", "int4")),
    *(("--mode", mode, "--runtime", "sophon-demo-2024.1") for mode in ("bf16", "int8", "int4")),
    ("--mode", "int8", "--runtime", "sophon-demo"),
    *(("--mode", mode, "--runtime", "llm-tpu-generic") for mode in ("bf16", "int8", "int4")),
    *(("--mode", mode, "--runtime", "llm-tpu-generic", "--dynamic") for mode in ("bf16", "f16", "int4")),
    *(
        ("--mode", mode, "--target", *chip)
        for chip in (("cv186x",), ("bm1688", "--num-core", 1))
        for mode in ("bf16", "f16", "int8", "int4")
    ),
)
#: Of these, those that the ordinary suite builds beside the fixture: other demos than the fixture's.
QUICK = (
    ("--mode", "int4", "--runtime", "sophon-demo-2024.1"),
    ("--mode", "int4", "--runtime", "llm-tpu-generic", "--dynamic"),
)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(flags, id=" ".join(map(str, flags)), marks=() if flags in QUICK else pytest.mark.slow)
        for flags in FILES
    ],
)
def test_every_demo_that_can_read_a_file_gives_its_nets_tokens(
    checkout: Path, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    bmodel = build(checkout, tmp_path, *flags)
    assert inspected(bmodel)["contract"] == []
    level = in_runtime(checkout, bmodel)
    assert level["passed"], missed(level)
    expected = HEADS
    if "--target" in flags:
        expected = {"qwen.py-2024-08"}
    elif "f16" in flags or "llm-tpu-generic" in flags:
        expected = {"generic", "qwen.py-2024-08"}
    elif "sophon-demo-2024.1" in flags:
        expected = FUSED
    assert generations(level) == expected
    if "llm-tpu-generic" in flags:
        labels = {check["label"] for check in level["checks"] if check["net"] == "generic"}
        assert labels == {f"{how} shared {n}+3" for how in ("greedy", "sampling") for n in (22, 61)}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bf16", "int4"])
def test_masks_of_another_format_give_the_right_tokens_where_promised(
    checkout: Path, tmp_path: Path, mode: str
) -> None:
    """float16's -10000, bf16's least number and minus infinity, to a file of the runtime that writes the
    first: one token, a short prompt and a long one. A file of another runtime goes wrong with the first.
    """
    masks = (0xF0E2, 0xFF7F, 0xFF80)
    safe = build(checkout, tmp_path / "safe", "--mode", mode, "--runtime", "sophon-demo-2024.1")
    assert answers_with(safe, masks) == dict.fromkeys(masks, "equal")
    other = build(checkout, tmp_path / "other", "--mode", mode, "--runtime", "sophon-demo")
    assert answers_with(other, (0xC61C, 0xF0E2)) == {0xC61C: "equal", 0xF0E2: "other"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bf16", "int8", "int4"])
def test_a_full_build_gives_the_demo_of_float16_masks_the_nets_tokens(
    checkout: Path, tmp_path: Path, mode: str
) -> None:
    """`build --verify full`, through the demo that writes 0xF0E2 whatever the nets' type is."""
    flags = ("--mode", mode, "--runtime", "sophon-demo-2024.1", "--verify", "full", "--steps", 3, "--json")
    size = ("--out", tmp_path, "--seq-length", SEQ_LENGTH, "--trust-remote-code")
    report = json.loads(cli("build", checkout, *size, *flags).stdout)["report"]
    assert report["passed"]
    (level,) = (one for one in report["levels"] if one["level"] == "runtime")
    assert missed(level) == set()
    followed = {check["label"] for check in level["checks"] if check["net"] == "qwen.py-2024-03"}
    assert followed == {f"greedy {memory} {n}+3" for memory in ("shared", "apart") for n in (22, 61)}


def answers_with(bmodel: Path, masks: tuple[int, ...]) -> dict[int, str]:
    """Whether qwen.py's flow gives the nets' own tokens and logits when it closes with these bits."""
    prompts = [np.random.default_rng(n).integers(0, 4096, n).tolist() for n in (1, 20, 60)]
    with ChipEngine(bmodel, Toolchain.find()) as chip:
        meant = [net_by_net(chip, geometry_of(bmodel), prompt, 3, Sampling()) for prompt in prompts]
    answers = {}
    for bits in masks:
        with Device(bmodel, Toolchain.find(), shared=True) as device:
            flow = type("Written", (InPlace,), {"mask_bits": bits})(device)
            found = [follow(flow, one, None) for one in meant]
        equal = [
            one.tokens == other.tokens and all(map(np.array_equal, one.logits, other.logits))
            for one, other in zip(meant, found, strict=True)
        ]
        answers[bits] = "equal" if all(equal) else "other"
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["llm-tpu", "llm-tpu-generic"])
def test_the_whole_vocabulary_is_sampled_from_undamaged_logits(tmp_path: Path, runtime: str) -> None:
    """151,936 tokens: the heads' inputs used to lie inside the logits. Sampling once takes the emulator a
    minute at this size.
    """
    checkout = make_checkout(tmp_path / "wide", layers=1, hidden=128, heads=2, vocab=151936)
    bmodel = build(checkout, tmp_path / "out", "--mode", "int4", "--runtime", runtime)
    assert inspected(bmodel)["contract"] == []
    level = in_runtime(checkout, bmodel, steps=1)
    assert level["passed"], missed(level)
