"""Models that several devices share, compiled by the real TPU-MLIR; the emulator runs each device's part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_surgery.errors import ToolFailed, Usage
from qwen_surgery.packing import report
from qwen_surgery.packing.container import Bmodel, Region, head_size, write_at, write_head
from qwen_surgery.runtime.several import DevicesEngine, open_chip
from tests.families.test_decoders import cli
from tests.families.tiny import make

pytestmark = pytest.mark.tpu

SEQ_LENGTH = 32
#: The least sizes whose matrices TPU-MLIR splits (from 4,194,304 numbers on).
SIZES: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4352, "vocab_size": 4352}


def v1(path: Path, heads: int = 4, layers: int = 1) -> Path:
    cli("demo-checkout", path, "--random", "--layers", layers, "--hidden", 512, "--heads", heads,
        "--intermediate", 16896, "--vocab", 8448)  # fmt: skip
    return path


def decoder(path: Path, kind: str, **config: Any) -> Path:
    return make(path, kind, **(SIZES | {"num_hidden_layers": 1, "num_attention_heads": 8} | config))


def build(checkout: Path, out: Path, *flags: object) -> dict[str, Any]:
    common = ("--seq-length", SEQ_LENGTH, "--steps", 2, "--trust-remote-code", "--json")
    found: dict[str, Any] = json.loads(cli("build", checkout, "--out", out, *common, *flags).stdout)
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of Qwen v1 on two devices, bf16."""
    folder = tmp_path_factory.mktemp("several")
    flags = ("--num-device", 2, "--mode", "bf16", "--verify", "contract")
    made = build(v1(folder / "model", layers=2), folder / "out", *flags)
    assert made["report"]["passed"]
    return Path(made["bmodels"][0])


def rewritten(source: Path, out: Path, keep: Any) -> Path:
    """*source* without the nets that *keep* says no to."""
    with Bmodel(source) as opened:
        model = {**opened.model, "net": [net for net in opened.nets if keep(net)]}
        base = head_size(model, paged=opened.paged)
        with out.open("wb", buffering=0) as file:
            write_head(file, model, base, opened.size)
            write_at(file, opened.read(Region(0, opened.size)), base)
    return out


def test_each_device_holds_its_half_and_gets_every_input(shared: Path) -> None:
    found = report.inspect(shared)
    assert (found.devices, found.layers, found.contract) == (2, 2, ())
    nets = {net.name: net for net in found.nets}
    numbers = 4 * 512 * 512 + 3 * 512 * 8448
    assert nets["block_0"].weight_bytes < 1.02 * numbers, "half a layer of two bytes a number"
    cache = nets["block_cache_0"]
    for device in (0, 1):
        given, gives = cache.on(device)
        assert [tensor.shape for tensor in given[3:]] == [(1, SEQ_LENGTH, 2, 128)] * 2, "two of four heads"
        assert [tensor.name for tensor in given[:3]] == ["input_states", "position_ids", "attention_mask"]
        assert gives[0].shape == (1, 1, 512) and gives[1].share
    assert cache.whole_inputs[3] == (1, SEQ_LENGTH, 4, 128)
    assert [len(side) for side in (nets["lm_head"].inputs, nets["lm_head"].outputs)] == [1, 1]


def test_only_demos_that_open_several_devices_can_run_it(shared: Path) -> None:
    runs = {one.generation for one in report.inspect(shared).runtimes if not one.refusal}
    assert runs == {"demo_parallel", "qwen.py-2024-08"}
    assert report.inspect(shared, "llm-tpu").contract == ()
    assert report.inspect(shared, "sophon-demo").contract == ()
    (why,) = report.inspect(shared, "llm-tpu-generic").contract
    assert why == "generic: it opens one device, and the file is for several"


def test_inspect_shows_each_kind_once(shared: Path) -> None:
    lines = cli("inspect", shared).stdout
    assert "2 device(s), 2 layers, 7 nets" in lines
    assert "history_k  bfloat16 [1, 32, 2, 128], each device's share" in lines
    assert "on device 1" not in lines and "contract with the runtimes: kept" in lines
    regions = cli("inspect", shared, "--regions").stdout
    assert "out past_v" in regions and ",000,000,000" not in regions and "step 3" in regions


def test_a_net_that_the_first_device_begins_alone_breaks_the_contract(shared: Path, tmp_path: Path) -> None:
    """Demos hand every device all inputs: such a net would be launched with more than it takes."""

    def keep(net: dict[str, Any]) -> bool:
        cascade = net["cascade"]
        return cascade["main_name"] != "block_0" or cascade["device_id"] == 0

    alone = rewritten(shared, tmp_path / "alone.bmodel", keep)
    assert "block_0 is on devices (0,), block_cache_0 on (0, 1)" in report.inspect(alone).contract


def test_what_needs_one_device_says_so(shared: Path, tmp_path: Path) -> None:
    done = cli("inspect", shared, "--bundle", tmp_path / "bundle", code=2)
    assert "--bundle is for one device" in done.stderr
    model = shared.parents[2] / "model"
    options = ("--level", "runtime", "--mode", "bf16", "--trust-remote-code")
    done = cli("verify", model, "--bmodel", shared, *options, code=2)
    assert "is for several devices, and the vendor's runtime finds one emulated chip" in done.stderr
    done = cli("refit", shared, model, code=3)
    assert "it cannot be refitted" in done.stderr


def test_the_emulator_wants_what_the_net_takes(shared: Path) -> None:
    with open_chip(shared) as chip:
        assert isinstance(chip, DevicesEngine)
        given, gives = chip.describe("block_cache_0")
        assert [tensor.shape for tensor in given[3:]] == [(1, SEQ_LENGTH, 4, 128)] * 2
        assert [tensor.shape for tensor in gives[1:]] == [(1, 1, 4, 128)] * 2
        with pytest.raises(Usage, match="takes 5 inputs, 1 were given"):
            chip.run("block_cache_0", [np.zeros((1, 1, 512), np.float32)])
        for heads in (2, 8):
            cache = [np.zeros((1, SEQ_LENGTH, heads, 128), np.float32)] * 2
            rest = [np.zeros(tensor.shape, np.float32) for tensor in given[:3]]
            with pytest.raises(Usage, match=r"history_k of shape .*, wanted \[1, 32, 4, 128\]"):
                chip.run("block_cache_0", [*rest, *cache])
        with pytest.raises(Usage, match="has no net block_9"):
            chip.run("block_9", [])
        states = chip.run("embedding_cache", [np.array([[7]], np.int32)])[0]
        assert states.shape == (1, 1, 512)


def test_devices_that_differ_are_no_result(shared: Path, tmp_path: Path) -> None:
    """A file whose devices have different embeddings: what the first one says is not what the model says."""
    other = tmp_path / "other.bmodel"
    with Bmodel(shared) as opened:
        nets = opened.nets
        second = next(
            n for n in nets if n["name"].startswith("embedding_cache") and n["cascade"]["device_id"]
        )
        weights = second["parameter"][0]["coeff_mem"]["binary_coeff"]
        # Its own copy of the table, one row further on.
        weights["start"], weights["size"] = weights["start"] + 1024, weights["size"] - 1024
        model = {**opened.model, "net": nets}
        base = head_size(model, paged=opened.paged)
        with other.open("wb", buffering=0) as file:
            write_head(file, model, base, opened.size)
            write_at(file, opened.read(Region(0, opened.size)), base)
    with open_chip(other) as chip, pytest.raises(ToolFailed, match="the devices differ in embedding_states"):
        chip.run("embedding_cache", [np.array([[7]], np.int32)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "flags"),
    [
        (2, ("--mode", "bf16")),
        (2, ("--mode", "int4")),
        (2, ("--mode", "int4", "--lm-head-mode", "int8")),
        (2, ("--mode", "f16", "--runtime", "sophon-demo")),
        (4, ("--mode", "bf16")),
        (4, ("--mode", "int4")),
        (8, ("--mode", "bf16")),
        (8, ("--mode", "int4")),
    ],
)
def test_devices_together_compute_what_the_unpatched_model_does(
    devices: int, flags: tuple[str, ...], tmp_path: Path
) -> None:
    checkout = v1(tmp_path / "model", heads=8)
    made = build(checkout, tmp_path / "out", "--num-device", devices, "--verify", "full", *flags)
    chip = next(level for level in made["report"]["levels"] if level["level"] == "chip")
    assert made["report"]["passed"] and {c["net"] for c in chip["checks"]} >= {
        "block_0",
        "block_cache_0",
        "lm_head",
    }


@pytest.mark.slow
def test_six_devices_share_six_heads(tmp_path: Path) -> None:
    path = tmp_path / "model"
    cli("demo-checkout", path, "--random", "--layers", 1, "--hidden", 768, "--heads", 6,
        "--intermediate", 11520, "--vocab", 5888)  # fmt: skip
    assert build(path, tmp_path / "out", "--num-device", 6, "--verify", "full")["report"]["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bf16", "int4"])
@pytest.mark.parametrize(
    ("devices", "kind", "config"),
    [
        (2, "qwen2", {"num_key_value_heads": 8}),
        (2, "qwen2", {"num_key_value_heads": 2}),
        (4, "qwen2", {"num_attention_heads": 16, "num_key_value_heads": 4}),
        (2, "qwen3", {"num_key_value_heads": 2, "head_dim": 128}),
    ],
)
def test_devices_share_a_decoder(
    devices: int, kind: str, config: dict[str, Any], mode: str, tmp_path: Path
) -> None:
    """Groups of heads with their keys stay on one device."""
    checkout = decoder(tmp_path / "model", kind, **config)
    (bmodel,) = build(
        checkout, tmp_path / "out", "--num-device", devices, "--verify", "none", "--mode", mode
    )["bmodels"]
    assert report.inspect(Path(bmodel)).contract == ()
    command = [
        sys.executable,
        "-m",
        "qwen_surgery",
        "verify",
        checkout,
        "--bmodel",
        bmodel,
        "--level",
        "chip",
    ]
    # Not its exit code: of an untrained model's words two may be as good as each other in bf16.
    done = subprocess.run([*map(str, command), "--steps", "2", "--json"], capture_output=True, check=False)
    (chip,) = json.loads(done.stdout)["levels"]
    layers = [check for check in chip["checks"] if check["net"].startswith("block")]
    assert {check["net"] for check in layers} == {"block_0", "block_cache_0"}
    assert all(check["passed"] for check in layers)
    assert min(check["values"]["cosine"] for check in layers) >= {"bf16": 0.9999, "int4": 0.98}[mode]
    words = [check["passed"] for check in chip["checks"] if check["net"] == "lm_head"]
    assert words and words.count(False) <= len(words) // 2
