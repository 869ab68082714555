"""Families whose code is part of transformers, from config.json to a bmodel, against the unpatched model."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_surgery import families
from qwen_surgery.checkout import Checkout
from qwen_surgery.errors import Refused, Usage
from qwen_surgery.families.decoder import rope_of
from qwen_surgery.nets import NetKind
from tests.families.tiny import SIZES, make

ROOT = Path(__file__).parents[2]
#: What each kind is made with beside its sizes: other sizes of heads than the hidden size gives, tied or not.
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 64, "tie_word_embeddings": True},
}


def cli(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen_surgery", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def opened(config: dict[str, Any], folder: Path) -> Checkout:
    """A checkout that is nothing but *config*, over the tiny sizes."""
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **SIZES, **config}))
    return Checkout.open(folder)


@pytest.fixture(scope="module", params=KINDS)
def checkout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind: str = request.param
    return make(tmp_path_factory.mktemp("families") / kind, kind, **KINDS[kind])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "qwen3_moe"}, "says model_type qwen3_moe, not"),
        ({"model_type": "qwen2_vl"}, "says model_type qwen2_vl, not"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rotary scaling 'longrope'"),
        ({"rope_scaling": {"type": "mrope"}}, "rotary scaling 'mrope'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "above the trained length 256"),
        (
            {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1},
            "slides a window of 512",
        ),
        (
            {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
            "a window of 8 tokens",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_a_model_that_static_nets_cannot_follow_is_refused(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=said):
        found = opened(config, tmp_path)
        found.family.refuse(found.facts, found.geometry(512))


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"use_sliding_window": True, "sliding_window": 300, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"use_sliding_window": False, "sliding_window": 8},
    ],
)
def test_a_model_that_is_the_same_at_every_length_is_not_refused(
    config: dict[str, Any], tmp_path: Path
) -> None:
    found = opened(config, tmp_path)
    found.family.refuse(found.facts, found.geometry(256))


def test_angles_are_told_in_every_spelling() -> None:
    older = {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    newer = {"rope_parameters": {"rope_theta": 1000000, "rope_type": "yarn", "factor": 4.0}}
    assert rope_of(older) == rope_of(newer) == {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    assert rope_of({"rope_scaling": None}) == {"rope_type": "default", "rope_theta": 10000.0}


def test_sizes_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    for config, said in (
        ({"num_key_value_heads": 3}, "not a multiple of 3 heads of keys and values"),
        ({"num_attention_heads": 6}, "hidden size 128 is not a multiple of 6 heads"),
    ):
        with pytest.raises(Refused, match=said):
            opened(config, tmp_path).geometry(64)


def test_heads_of_a_size_of_their_own_and_biases_decide_the_weights(tmp_path: Path) -> None:
    found = opened({"model_type": "qwen3", "head_dim": 64, "attention_bias": True}, tmp_path)
    geometry = found.geometry(64)
    assert (geometry.head_dim, geometry.kv_heads, geometry.mlp_width) == (64, 2, 192)
    shapes = found.family.weight_shapes(NetKind.BLOCK, geometry, found.facts)
    assert shapes["self_attn.q_proj.weight"] == (256, 128) and shapes["self_attn.o_proj.bias"] == (128,)
    assert shapes["self_attn.k_norm.weight"] == (64,)


def test_the_patched_copy_appears_beside_the_weights_and_goes_again(tmp_path: Path) -> None:
    """The installed package's file must never change: every other program on the machine uses it."""
    family = families.of({"model_type": "qwen2"})
    installed = family.installed_code()
    assert installed is not None
    before = hashlib.sha256(installed.read_bytes()).hexdigest()
    path = opened({}, tmp_path).path
    shown = cli("patch", path, "--diff").stdout
    assert "+    return q_embed.transpose(1, 2), k_embed.transpose(1, 2)" in shown
    assert not (path / family.modeling).exists()
    assert str(installed) in cli("patch", path).stderr
    assert (path / family.modeling).read_bytes() != installed.read_bytes()
    assert cli("patch", path, "--check").returncode == 0
    cli("restore", path)
    assert [p.name for p in path.iterdir()] == ["config.json"]
    assert hashlib.sha256(installed.read_bytes()).hexdigest() == before


def test_code_that_is_not_installed_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"no transformers\.models\.qwen2 is installed") as caught:
        opened({}, tmp_path)
    assert "qwen-surgery[verify]" in caught.value.hint


def test_leaving_all_edits_out_takes_the_copy_away(tmp_path: Path) -> None:
    path = opened({}, tmp_path).path
    cli("patch", path)
    cli("patch", path, "--skip", "rotary-heads-last", "--skip", "repeat-kv-heads-last")
    assert [p.name for p in path.iterdir()] == ["config.json"]


def test_another_release_s_file_is_patched_where_it_is_asked_for(tmp_path: Path) -> None:
    family = families.of({"model_type": "qwen2"})
    installed = family.installed_code()
    assert installed is not None
    older = tmp_path / "older.py"
    older.write_bytes(b"# another release's\n" + installed.read_bytes())
    (tmp_path / "model").mkdir()
    path = opened({}, tmp_path / "model").path
    cli("patch", path, "--modeling", older)
    assert (path / family.modeling).read_bytes().startswith(b"# another release's\n")
    assert "is there" in cli("patch", path, "--modeling", installed, code=2).stderr


def test_edits_and_options_of_other_code_are_refused(tmp_path: Path) -> None:
    path = opened({}, tmp_path).path
    assert "is not for Qwen1.5" in cli("patch", path, "--recipe", "documented", code=2).stderr
    with pytest.raises(Usage, match="comes with its own"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen"}))
        Checkout.open(tmp_path, tmp_path / "config.json")


def test_code_of_the_checkout_itself_needs_trust(tmp_path: Path) -> None:
    """What transformers itself would run needs none; a file beside the weights may hold anything."""
    path = opened({}, tmp_path).path
    cli("patch", path)
    assert "--trust-remote-code" in cli("export", path, "--onnx-path", tmp_path / "o", code=2).stderr


@pytest.fixture(scope="module")
def exported(checkout: Path) -> Path:
    out = checkout.with_name(checkout.name + "-onnx")
    cli("export", checkout, "--onnx-path", out, "--seq-length", 24)
    return out


def test_nets_compute_what_the_unpatched_model_does(checkout: Path, exported: Path) -> None:
    done = cli("verify", checkout, "--onnx", exported, "--level", "source", "--level", "onnx", "--json")
    report = json.loads(done.stdout)
    levels = {level["level"]: level for level in report["levels"]}
    assert report["passed"] and set(levels) == {"source", "onnx"}
    for name, limit in (("source", 1e-5), ("onnx", 1e-4)):
        layers = [check for check in levels[name]["checks"] if check["net"].startswith("block")]
        assert max(check["values"]["max_abs"] for check in layers) < limit
        tokens = list(levels[name]["greedy_tokens"].values())
        assert all(one == tokens[0] for one in tokens) and tokens


def test_the_twin_runs_the_model_s_own_code(exported: Path) -> None:
    twin = json.loads((exported / "manifest.json").read_text())["twin"]
    assert twin["transformers"] and twin["passes"] > 10 and twin["worst"] < twin["limit"]


def test_a_text_shows_the_inputs_of_every_matrix(checkout: Path) -> None:
    """What ``--quantizer gptq`` goes by: projections of one input share what is known of it."""
    import numpy as np
    import torch

    from qwen_surgery.exporting.planning import bind
    from qwen_surgery.nets import nets
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.quantising.calibration import Layers
    from qwen_surgery.weights import WeightIndex

    model = Checkout.open(checkout)
    sources, geometry = Sources.of(model, seq_length=24), model.geometry(24)
    _, refs = bind(sources, WeightIndex.open(checkout), geometry, nets(geometry.layers))
    weights = refs["block_1"]
    matrices = [slot for slot, ref in weights.items() if len(ref.shape) == 2]
    floats = {slot: torch.from_numpy(ref.read()) for slot, ref in weights.items()}
    states = np.random.default_rng(0).standard_normal((2, 24, geometry.hidden)).astype(np.float32)
    found = Layers(sources, geometry, 24).hessians(floats, states, matrices)
    short = {frozenset(slot.split(".")[1].removesuffix("_proj") for slot in slots) for slots in found}
    assert short == {frozenset("qkv"), frozenset("o"), frozenset({"gate", "up"}), frozenset({"down"})}


@pytest.mark.tpu
def test_a_build_keeps_keys_and_values_in_their_own_heads(checkout: Path, tmp_path: Path) -> None:
    """Runtimes size the cache by the net's shapes: with the queries' heads it would be twice as large."""
    flags = ("--seq-length", 16, "--mode", "int4", "--no-twin", "--verify", "contract", "--json")
    done = json.loads(cli("build", checkout, "--out", tmp_path / "out", *flags).stdout)
    assert done["report"]["passed"]
    width = KINDS[checkout.name].get("head_dim", 32)
    nets = {
        net["name"]: net for net in json.loads(cli("inspect", done["bmodels"][0], "--json").stdout)["nets"]
    }
    history = nets["block_cache_1"]["inputs"][3:]
    assert [tensor["shape"] for tensor in history] == [[1, 16, 2, width]] * 2
