"""``qwen-surgery clean`` from the outside: folders, recipes, third-party passes, errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from golden import cycles
from golden.eras import make_checkout
from qwen_surgery.checkout import Checkout
from qwen_surgery.commands.clean import command
from qwen_surgery.errors import Refused, ToolFailed, Usage
from qwen_surgery.exporting.export import export
from qwen_surgery.exporting.manifest import Manifest
from qwen_surgery.patching.sources import Sources
from qwen_surgery.weights import WeightIndex
from tests.graph_passes.conftest import tiny

PLUGIN = """
from graph_passes import GraphPass

class Namer(GraphPass):
    name, summary, why, precondition = "namer", "renames nodes", "a test", "none"

    def rewrite(self, graph):
        old = [n for n in graph.nodes if not n.name.startswith("mine/")]
        for node in old:
            node.name = "mine/" + node.name
        return [n.name for n in old]

class Breaker(Namer):
    name = "breaker"

    def rewrite(self, graph):
        found = [n for n in graph.nodes if n.op == "Softmax" and n.attrs.get("axis") != 0]
        for node in found:
            node.attrs["axis"] = 0
        return [n.name for n in found]
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer export, weights linked."""
    folder = tmp_path_factory.mktemp("clean")
    g = tiny(32)
    make_checkout(
        folder / "checkout",
        layers=2,
        hidden=g.hidden,
        heads=g.heads,
        intermediate=g.intermediate,
        vocab=g.vocab,
    )
    checkout = Checkout.open(folder / "checkout")
    sources = Sources.of(checkout, recipe="static", seq_length=g.seq_length)
    index = WeightIndex.open(folder / "checkout")
    export(sources, index, checkout.geometry(g.seq_length), folder / "onnx", trust_remote_code=True)
    return folder / "onnx"


def clean(*args: object) -> str:
    done = CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_nets_are_bound_again_and_the_manifest_says_what_ran(exported: Path, tmp_path: Path) -> None:
    answer = json.loads(clean(exported, "--out", tmp_path / "cleaned", "--json"))
    manifest = Manifest.load(tmp_path / "cleaned")
    manifest.check(tmp_path / "cleaned")
    assert list(manifest.passes) == answer["passes"]
    assert {"fold-constants", "joint-mlp", "kv-join", "top-rope"} <= set(manifest.passes)
    assert [n.name for n in manifest.nets] == [n.name for n in Manifest.load(exported).nets]
    block = next(k for k in answer["kinds"] if k["kind"] == "block")
    assert block["nodes"][1] < block["nodes"][0] and block["ops_after"].get("Cast", 0) == 0
    assert Manifest.load(exported).passes == ()  # the source is left as it was


def test_every_layers_net_computes_what_it_did(exported: Path, tmp_path: Path) -> None:
    """With its own weights, through the files that the compiler will read."""
    import numpy as np
    import onnxruntime as ort

    clean(exported, "--out", tmp_path / "cleaned", "--json")
    rng = np.random.default_rng(5)
    for net in ("block_0", "block_1", "block_cache_1", "lm_head"):
        sessions = [ort.InferenceSession(str(d / f"{net}.onnx")) for d in (exported, tmp_path / "cleaned")]
        feeds = {
            i.name: np.zeros(i.shape, np.int32)
            if "int" in i.type
            else rng.standard_normal(i.shape, np.float32)
            for i in sessions[0].get_inputs()
        }
        before, after = (s.run(None, feeds) for s in sessions)
        for x, y in zip(before, after, strict=True):
            np.testing.assert_allclose(y, x, atol=1e-5 * max(1.0, float(np.abs(x).max())))


def test_cleaning_in_place_replaces_the_folder(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "onnx", copy_function=os.link)
    clean(tmp_path / "onnx", "--json")
    assert "joint-mlp" in Manifest.load(tmp_path / "onnx").passes
    assert list(tmp_path.iterdir()) == [tmp_path / "onnx"]


_MEASURED = """\
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_maxrss * 1024, used.ru_utime + used.ru_stime)
"""


def test_a_7b_export_is_cleaned_in_little_memory_and_time(tmp_path: Path) -> None:
    """All 69 nets with the equality check on: passes see templates, and no product runs at its real size."""
    sizes = cycles.GEOMETRIES["7B"]
    vocab, heads, inner = sizes.vocab, sizes.heads, sizes.intermediate
    make_checkout(
        tmp_path / "checkout",
        layers=32, hidden=sizes.hidden, heads=heads, intermediate=inner, vocab=vocab, sparse=True,
    )  # fmt: skip
    checkout = Checkout.open(tmp_path / "checkout")
    sources = Sources.of(checkout, recipe="static", seq_length=2048)
    index = WeightIndex.open(tmp_path / "checkout")
    export(sources, index, checkout.geometry(2048), tmp_path / "onnx", trust_remote_code=True)
    line = [sys.executable, "-m", "qwen_surgery", "clean", str(tmp_path / "onnx"), "--json"]
    # A small process between: until it is another program, a child counts as large as the one it comes from.
    said = subprocess.run(
        [sys.executable, "-c", _MEASURED, *line], check=True, capture_output=True, text=True
    )
    memory, seconds = map(float, said.stdout.split())
    assert len(Manifest.load(tmp_path / "onnx").nets) == 69
    assert memory < 1e9
    assert seconds < 10


def test_skip_and_a_file_switch_passes_off(exported: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[passes]\njoint-mlp = false\n")
    clean(exported, "--out", tmp_path / "cleaned", "--passes", recipe, "--skip", "kv-join", "--json")
    passes = Manifest.load(tmp_path / "cleaned").passes
    assert "joint-mlp" not in passes and "kv-join" not in passes and "rotary" in passes
    recipe.write_text('only = ["fold-constants"]\n')
    clean(exported, "--out", tmp_path / "cleaned", "--passes", recipe, "--json")
    assert Manifest.load(tmp_path / "cleaned").passes == ("fold-constants",)


def test_an_older_toolchain_loses_the_passes_it_cannot_take(exported: Path, tmp_path: Path) -> None:
    clean(exported, "--out", tmp_path / "cleaned", "--for-toolchain", "1.6", "--json")
    passes = Manifest.load(tmp_path / "cleaned").passes
    assert "top-rope" not in passes and "fold-constants" in passes


@pytest.mark.parametrize(
    "recipe",
    ["passes = 3", "[passes]\nno-such = false", "[passes]\ncasts = 1", "only = [1]", "[other]", "= broken"],
)
def test_a_bad_recipe_is_a_usage_error(exported: Path, tmp_path: Path, recipe: str) -> None:
    (tmp_path / "recipe.toml").write_text(recipe)
    with pytest.raises(Usage, match=r"recipe\.toml"):
        clean(exported, "--out", tmp_path / "cleaned", "--passes", tmp_path / "recipe.toml")
    assert not (tmp_path / "cleaned").exists()


def test_errors_leave_nothing_behind(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(Usage, match="no-such"):
        clean(exported, "--skip", "no-such")
    with pytest.raises(Usage, match="ONNX_DIR is missing"):
        clean()
    with pytest.raises(Refused, match="not an exported folder"):
        clean(tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(exported, damaged)
    template = damaged / "templates" / "block.onnx"
    template.write_bytes(template.read_bytes()[:-1])
    with pytest.raises(Refused, match="not the file"):
        clean(damaged, "--out", tmp_path / "cleaned")
    assert not (tmp_path / "cleaned").exists()


def test_explain_says_what_and_why(exported: Path, tmp_path: Path) -> None:
    text = clean(exported, "--out", tmp_path / "cleaned", "--explain")
    assert "rotary: 2 site(s)" in text and "why: " in text and "kv-join" in text
    about = clean("--explain")
    assert "only where: " in about
    assert "-x[half:], x[:half]" in " ".join(about.split())  # brackets are text here, not markup


def run_with_plugin(tmp_path: Path, entry: str, *args: object) -> subprocess.CompletedProcess[str]:
    """The command in a process that has a distribution with an entry point ``entry``."""
    site = tmp_path / "site"
    info = site / "probe-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "probe_passes.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: probe\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[qwen_surgery.passes]\n{entry}\n")
    line = [sys.executable, "-m", "qwen_surgery", "clean", *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(line, env=env, capture_output=True, text=True, check=False)


def test_third_party_passes_run_after_the_built_in_ones(exported: Path, tmp_path: Path) -> None:
    done = run_with_plugin(
        tmp_path, "namer = probe_passes:Namer", exported, "--out", tmp_path / "cleaned", "--json"
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert "namer" in answer["passes"]
    block = next(k for k in answer["kinds"] if k["kind"] == "block")
    assert [p["pass"] for p in block["passes"]][-1] == "namer"
    assert len(block["passes"][-1]["sites"]) >= block["nodes"][1]


def test_a_third_party_pass_that_changes_numbers_is_caught(exported: Path, tmp_path: Path) -> None:
    done = run_with_plugin(tmp_path, "b = probe_passes:Breaker", exported, "--out", tmp_path / "cleaned")
    assert done.returncode == ToolFailed.exit_code
    assert "pass breaker: changed what the net computes" in done.stderr and "--skip breaker" in done.stderr
    assert not (tmp_path / "cleaned").exists()
