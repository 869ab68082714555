"""The same families on the emulated chip in every precision, and over the releases of transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.families.release import unpacked
from tests.families.speaking import add_tokenizer
from tests.families.test_decoders import ROOT, cli
from tests.families.tiny import make

pytestmark = pytest.mark.slow

#: The least cosine of any output of a net with what the unpatched model computes there.
COSINES = {"bf16": 0.9999, "int8": 0.999, "int4": 0.98}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen1.5": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2.5": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2.5-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2.5-yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "qwen3-tied": ("qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
}
#: The oldest release of each family, one of each year since, the newest of those that come from elsewhere.
RELEASES = {
    "qwen2": ("4.37.2", "4.45.2", "4.48.3", "4.57.1", "5.0.0"),
    "qwen3": ("4.51.3", "4.57.1", "5.0.0"),
}


@pytest.fixture(scope="module", params=MODELS)
def checkout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, config = MODELS[request.param]
    return make(tmp_path_factory.mktemp("models") / request.param, kind, **config)


@pytest.mark.tpu
@pytest.mark.parametrize("mode", COSINES)
def test_the_emulated_chip_computes_what_the_unpatched_model_does(
    checkout: Path, mode: str, tmp_path: Path
) -> None:
    flags = ("--seq-length", 48, "--mode", mode, "--verify", "none", "--json")
    made = json.loads(cli("build", checkout, "--out", tmp_path / "out", *flags).stdout)
    options = ("--bmodel", made["bmodels"][0], "--level", "chip", "--steps", 32, "--json")
    report = json.loads(cli("verify", checkout, *options).stdout)
    (chip,) = [level for level in report["levels"] if level["level"] == "chip"]
    checks = [check for check in chip["checks"] if "cosine" in check["values"]]
    blocks = [check for check in checks if check["net"].startswith("block")]
    assert report["passed"] and blocks
    assert min(check["values"]["cosine"] for check in blocks) >= COSINES[mode]
    if mode == "bf16":
        wanted, found = chip["greedy_tokens"].values()
        apart = sum(one != other for one, other in zip(wanted, found, strict=True))
        assert len(wanted) == 33 and apart <= 2, "untrained: two words may be as good as each other in bf16"


@pytest.mark.tpu
@pytest.mark.parametrize("mode", ["bf16", "int4"])
@pytest.mark.parametrize(("kind", "config"), [("qwen2", {}), ("qwen3", {"head_dim": 64})])
def test_the_generic_demo_samples_from_a_file_for_it(
    kind: str, config: dict[str, Any], mode: str, tmp_path: Path
) -> None:
    """Greedily and drawing, in bmruntime with shared memory; and every net against the unpatched model."""
    path = make(tmp_path / "model", kind, **config)
    flags = ("--seq-length", 48, "--mode", mode, "--runtime", "llm-tpu-generic", "--dynamic", "--json")
    report = json.loads(cli("build", path, "--out", tmp_path, *flags, "--verify", "full").stdout)["report"]
    assert report["passed"]
    levels = {level["level"]: level["checks"] for level in report["levels"]}
    assert "sample_head" in {check["net"] for check in levels["chip"]}
    demos = {(check["net"], check["label"].split()[0]) for check in levels["runtime"]}
    assert demos == {("generic", "greedy"), ("generic", "sampling")}


@pytest.mark.tpu
@pytest.mark.parametrize(
    "flags",
    [
        ("--mode", "f16", "--runtime", "sophon-demo"),
        ("--mode", "int4", "--target", "bm1688"),
        ("--mode", "bf16", "--target", "bm1688"),
        ("--mode", "int4", "--target", "cv186x"),
        ("--mode", "f16", "--runtime", "llm-tpu-generic"),
        ("--mode", "int8", "--runtime", "llm-tpu-generic"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(("kind", "config"), [("qwen2", {}), ("qwen3", {"head_dim": 64})])
def test_other_precisions_and_chips(
    kind: str, config: dict[str, Any], flags: tuple[str, ...], tmp_path: Path
) -> None:
    """Every net within its tolerance on the emulator, and the demos that run there; of two cores' file the
    emulator, which is one core, runs nothing.
    """
    path = make(tmp_path / "model", kind, **config)
    given = ("--seq-length", 48, "--verify", "full", "--json", *flags)
    made = json.loads(cli("build", path, "--out", tmp_path, *given).stdout)
    assert made["report"]["passed"]
    levels = {level["level"]: level["checks"] for level in made["report"]["levels"]}
    nets = [check for check in levels["chip"] if check["net"].startswith("block")]
    assert nets and min(check["values"]["cosine"] for check in nets) >= COSINES.get(flags[1], 0.9999)
    assert len(made["bmodels"]) == (2 if "bm1688" in flags else 1)


@pytest.mark.tpu
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_integers_that_a_text_chose_reach_the_chip(kind: str, tmp_path: Path) -> None:
    """Heads of keys are fewer than those of queries, and weights have other names than Qwen v1's."""
    path = add_tokenizer(make(tmp_path / "model", kind))
    flags = ("--seq-length", 48, "--mode", "int4", "--verify", "contract", "--json", "--quantizer")
    made = [
        json.loads(cli("build", path, "--out", tmp_path / name, *flags, name).stdout)
        for name in ("rtn", "gptq")
    ]
    assert made[1]["integers"].endswith("chosen by gptq")
    rounded, chosen = (Path(each["bmodels"][0]).read_bytes() for each in made)
    assert len(rounded) == len(chosen) and rounded != chosen
    # Not its tokens: what a random model prefers by next to nothing is no matter of how it is rounded.
    asked = ("--bmodel", made[1]["bmodels"][0], "--level", "chip", "--steps", 0, "--json")
    (chip,) = json.loads(cli("verify", path, *asked).stdout)["levels"]
    nets = [check for check in chip["checks"] if check["net"].startswith("block")]
    assert nets and min(check["values"]["cosine"] for check in nets) >= COSINES["int4"]


@pytest.mark.tpu
def test_a_dynamic_build_runs_at_a_prompt_s_own_length(tmp_path: Path) -> None:
    """Keys and values are repeated for groups of heads: at a fixed length that ended the vendor's runtime."""
    path = make(tmp_path / "model", "qwen2")
    flags = ("--seq-length", 32, "--mode", "bf16", "--dynamic", "--verify", "full", "--json")
    report = json.loads(cli("build", path, "--out", tmp_path / "out", *flags).stdout)["report"]
    runtimes = [level for level in report["levels"] if level["level"] == "runtime"]
    assert report["passed"] and any(level["checks"] for level in runtimes)


@pytest.fixture(scope="session")
def release(pytestconfig: pytest.Config) -> Callable[[str], Path]:
    """An unpacked release of transformers, by version; its wheel is downloaded once, without dependencies."""

    def fetch(version: str) -> Path:
        return unpacked(version, Path(pytestconfig.cache.mkdir(f"transformers-{version}")))

    return fetch


@pytest.mark.parametrize(("kind", "version"), [(k, v) for k, versions in RELEASES.items() for v in versions])
def test_the_patched_layer_equals_the_unpatched_one_in_every_release(
    kind: str, version: str, release: Callable[[str], Path]
) -> None:
    command = [sys.executable, str(Path(__file__).with_name("release.py")), str(release(version)), kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["release"] == version
    assert found["layer"] == 0.0 and found["passed"] and found["worst"] < 1e-5
