"""``build`` and ``compile`` as a user calls them, with the real TPU-MLIR on a tiny checkout."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden.eras import make_checkout
from qwen_surgery.building.step_assemble import differences
from qwen_surgery.packing.container import Bmodel, Region
from tests.twin.forks import FORKS
from tests.twin.test_twin import checkout as fork_checkout

ROOT = Path(__file__).parents[2]


def cli(*args: object, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen_surgery", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **more)
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}: {done.stderr[-3000:]}")
    return done


def build(checkout: Path, out: Path, *more: object) -> dict[str, Any]:
    flags = ("--seq-length", 32, "--trust-remote-code", "--json", "--name", "tiny", "--verify", "contract")
    return json.loads(cli("build", checkout, "--out", out, *flags, *more).stdout)


def make(path: Path) -> Path:
    """Three layers, a shard each and some."""
    return make_checkout(path, layers=3, hidden=128, heads=2, vocab=320, shards=3, seed=0)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("build") / "Qwen-tiny")


@pytest.fixture(scope="module")
def first(checkout: Path) -> tuple[dict[str, Any], Path, dict[str, str]]:
    """A finished build: its result, its folder, and what the checkout held before."""
    before = contents(checkout)
    out = checkout.parent / "out"
    return build(checkout, out, "--prove", 1), out, before


@pytest.mark.tpu
def test_a_build_makes_the_contracts_bmodel(first: tuple[dict[str, Any], Path, dict[str, str]]) -> None:
    result, out, _ = first
    bmodel = out / "BM1684X/tiny_int4_seq32_1dev.bmodel"
    assert result["bmodels"] == [str(bmodel)]
    assert result["passed"]
    assert result["unpacked"] == {}, "every kind of net must be packable"
    with Bmodel(bmodel) as opened:
        names = [net["name"] for net in opened.nets]
    layers = [name for i in range(3) for name in (f"block_{i}", f"block_cache_{i}")]
    assert names == ["embedding", "embedding_cache", "lm_head", "greedy_head", "penalty_sample_head", *layers]


@pytest.mark.tpu
def test_one_net_of_each_kind_is_compiled_and_the_proof_ran(
    first: tuple[dict[str, Any], Path, dict[str, str]],
) -> None:
    ran = first[0]["tasks"]
    compiled = {name.split(":")[1] for name in ran if name.startswith("deploy:")}
    layer = {
        name.removeprefix("compare:block_").removeprefix("cache_")
        for name in ran
        if name.startswith("compare:")
    }
    assert len(layer) == 1, "--prove 1 compares one layer, both its nets"
    proven = {f"block_{i}" for i in layer} | {f"block_cache_{i}" for i in layer}
    heads = {"embedding", "embedding_cache", "lm_head", "greedy_head", "penalty_sample_head"}
    assert compiled == heads | {"block_0", "block_cache_0"} | proven


@pytest.mark.tpu
def test_the_checkout_is_never_written(
    checkout: Path, first: tuple[dict[str, Any], Path, dict[str, str]]
) -> None:
    assert contents(checkout) == first[2]


@pytest.mark.tpu
def test_logs_are_kept_per_tool_run(first: tuple[dict[str, Any], Path, dict[str, str]]) -> None:
    log = (first[1] / ".build/logs/block_0.deploy.log").read_text()
    assert "--quantize W4BF16 --q_group_size 64 --quant_input --quant_output --chip bm1684x" in log


@pytest.mark.tpu
def test_a_second_build_runs_nothing(
    checkout: Path, first: tuple[dict[str, Any], Path, dict[str, str]]
) -> None:
    bmodel = Path(first[0]["bmodels"][0])
    stamp = bmodel.stat().st_mtime_ns
    again = build(checkout, first[1], "--prove", 1)
    assert not [name for name, task in again["tasks"].items() if task["ran"]]
    assert bmodel.stat().st_mtime_ns == stamp


@pytest.mark.tpu
def test_a_plan_writes_nothing(checkout: Path, tmp_path: Path) -> None:
    flags = ("--seq-length", 32, "--trust-remote-code", "--dry-run", "--json")
    plan = json.loads(cli("build", checkout, "--out", tmp_path / "new", *flags).stdout)
    assert not (tmp_path / "new").exists()
    tasks = {row["task"]: row for row in plan["tasks"]}
    assert {"export", "clean", "transform:block_0", "prove:block_cache_0"} <= set(tasks)
    assert "--addr_mode io_alone" in tasks["deploy:block_cache_0"]["command"]
    assert plan["disk"] > 0 and plan["memory"] > 0 and plan["seconds"] > 0


@pytest.mark.tpu
def test_a_plan_says_what_a_verification_in_the_vendors_runtime_costs(checkout: Path, tmp_path: Path) -> None:
    rows = {}
    for depth, length in (("contract", 32), ("full", 32), ("full", 512)):
        flags = ("--seq-length", length, "--name", "tiny", "--trust-remote-code", "--dry-run", "--json")
        plan = json.loads(cli("build", checkout, "--out", tmp_path, "--verify", depth, *flags).stdout)
        rows[depth, length] = next(row for row in plan["tasks"] if row["task"].startswith("verify:"))
    assert "the vendor's runtime: 10 conversations" in rows["full", 32]["command"]
    assert "vendor" not in rows["contract", 32]["command"]
    seconds = [row["seconds"] for row in rows.values()]
    assert seconds == sorted(set(seconds)), "contract, a short length, a long one"


@pytest.mark.tpu
def test_one_layers_new_weights_pack_that_layer_alone(
    checkout: Path, first: tuple[dict[str, Any], Path, dict[str, str]]
) -> None:
    """And the result is what a build from nothing makes of the new weights."""
    from qwen_surgery.weights import WeightIndex

    ref = WeightIndex.open(checkout)["transformer.h.2.mlp.w1.weight"]
    with ref.file.open("r+b") as stream:
        stream.seek(ref.offset)
        data = stream.read(ref.nbytes)
        stream.seek(ref.offset)
        stream.write(data[2:] + data[:2])
    again = build(checkout, first[1])
    ran = {name for name, task in again["tasks"].items() if task["ran"]}
    assert not [name for name in ran if name.startswith(("transform:", "deploy:", "prove:"))], (
        "compiled again"
    )
    (record,) = (first[1] / ".build/store").glob("*/tiny_int4_seq32_1dev.bmodel")
    assert json.loads((record.parent / "done.json").read_text())["info"]["packed"] == [
        "block_2",
        "block_cache_2",
    ]
    fresh = build(checkout, checkout.parent / "fresh")
    assert Path(again["bmodels"][0]).read_bytes() == Path(fresh["bmodels"][0]).read_bytes()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, exported raw."""
    folder = tmp_path_factory.mktemp("compile")
    make_checkout(folder / "Qwen-two", layers=2, hidden=128, heads=2, vocab=320, seed=5)
    cli(
        "export",
        folder / "Qwen-two",
        "--onnx-path",
        folder / "onnx",
        "--seq-length",
        32,
        "--trust-remote-code",
    )
    return folder / "onnx"


@pytest.mark.tpu
@pytest.mark.parametrize("flags", [("--mode", "int8"), ("--mode", "bf16", "--target", "cv186x")])
def test_packing_equals_compiling_every_layer(exported: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Net by net: every byte of every region and every field, from the tools' own --combine."""
    packed = json.loads(cli("compile", exported, "--out", tmp_path / "a", *flags, "--json").stdout)
    whole = json.loads(
        cli("compile", exported, "--out", tmp_path / "b", *flags, "--no-pack", "--json").stdout
    )
    left, right = Path(packed["bmodels"][0]), Path(whole["bmodels"][0])
    assert left.name == right.name
    with Bmodel(left) as one, Bmodel(right) as other:
        names = [net["name"] for net in one.nets]
        assert names == [net["name"] for net in other.nets]
    assert [name for name in names if differences(left, name, right, name)] == []


def failing_toolchain(folder: Path) -> Path:
    """An environment whose model_transform fails for the embedding and works for nothing else either."""
    tools = folder / "lib/python3.10/site-packages/tpu_mlir/python/tools"
    tools.mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin/python").symlink_to(sys.executable)
    (folder / "lib/python3.10/site-packages/tpu_mlir-1.30.2.dist-info").mkdir()
    (tools / "model_transform.py").write_text(
        '"--do_onnx_sim"\nprint("unsupported op: Frobnicate")\nraise SystemExit(1)\n'
    )
    (tools / "model_deploy.py").write_text('"--addr_mode"\n')
    return folder


def test_a_failing_tool_says_which_net_the_command_and_the_last_words(exported: Path, tmp_path: Path) -> None:
    env = {**os.environ, "QWEN_SURGERY_TOOLCHAIN": str(failing_toolchain(tmp_path / "env"))}
    done = cli("compile", exported, "--out", tmp_path / "out", check=False, env=env)
    assert done.returncode == 4
    assert "model_transform failed with status 1" in done.stderr
    assert "--model_name" in done.stderr
    assert "unsupported op: Frobnicate" in done.stderr
    assert not list((tmp_path / "out").glob("BM1684X/*"))


def test_no_toolchain_is_said_before_anything_is_written(exported: Path, tmp_path: Path) -> None:
    env = {**os.environ, "QWEN_SURGERY_HOME": str(tmp_path / "home")}
    for name in ("QWEN_SURGERY_TOOLCHAIN", "TPUC_ROOT"):
        env.pop(name, None)
    done = cli("compile", exported, "--out", tmp_path / "out", check=False, env=env)
    assert done.returncode == 4
    assert "toolchain install" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.tpu
def test_a_full_disk_ends_cleanly_and_the_build_resumes(exported: Path, tmp_path: Path) -> None:
    """No file may grow past a limit: the tools fail as on a full disk; nothing half made is taken for
    whole.
    """

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    done = cli(
        "compile", exported, "--out", tmp_path / "out", "--name", "t", check=False, preexec_fn=small_files
    )
    assert done.returncode == 4, done.stderr
    assert not list((tmp_path / "out").glob("BM1684X/*.bmodel"))
    result = json.loads(cli("compile", exported, "--out", tmp_path / "out", "--name", "t", "--json").stdout)
    fresh = json.loads(cli("compile", exported, "--out", tmp_path / "fresh", "--name", "t", "--json").stdout)
    assert Path(result["bmodels"][0]).read_bytes() == Path(fresh["bmodels"][0]).read_bytes()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--mode", "bf16", "--symmetric"), 2, "--symmetric has no effect"),
        (("--num-core", "2"), 2, "--num-core 2 needs bm1688"),
        (("--dynamic",), 2, "needs cleaned nets"),
        (("--num-device", "2"), 2, "too small for --num-device"),
        (("--runtime", "sophon-demo-2024.1"), 3, "lacks net lm_head (lm_head_topk)"),
        (("--runtime", "llm-tpu-generic"), 3, "lacks net sample_head (sample_head)"),
        (("--scheduler", "tcp://127.0.0.1:1"), 4, "no Dask scheduler answers"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    exported: Path, tmp_path: Path, flags: tuple[str, ...], code: int, message: str
) -> None:
    done = cli("compile", exported, "--out", tmp_path / "out", *flags, check=False)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert not (tmp_path / "out/BM1684X").exists()


def test_without_trust_nothing_of_the_checkout_runs(checkout: Path, tmp_path: Path) -> None:
    done = cli("build", checkout, "--out", tmp_path / "out", check=False)
    assert done.returncode in (2, 3)
    assert "--trust-remote-code" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.tpu
def test_a_build_that_ends_in_the_contract_says_so_to_a_person(
    checkout: Path, first: tuple[dict[str, Any], Path, dict[str, str]]
) -> None:
    flags = ("--seq-length", 32, "--trust-remote-code", "--name", "tiny", "--verify", "contract")
    done = cli("build", checkout, "--out", first[1], *flags)
    assert "11 nets as the runtimes count them" in done.stdout
    assert "tiny_int4_seq32_1dev.bmodel" in done.stdout


@pytest.mark.tpu
def test_a_sampled_build_compares_the_first_and_the_last_layer(
    checkout: Path, first: tuple[dict[str, Any], Path, dict[str, str]]
) -> None:
    """What a build of a big model proves by default: a wrong table there passes the contract."""
    report = build(checkout, first[1], "--verify", "sample")["report"]
    assert report["passed"] and report["nets"] == 11 and report["problems"] == []
    levels = report["sampled"]["levels"]
    assert [level["level"] for level in levels] == ["source", "onnx"]
    compared = {"block_0", "block_2", "block_cache_0", "block_cache_2"}
    assert all({check["net"] for check in level["checks"]} == compared for level in levels)


@pytest.mark.tpu
def test_a_sampled_build_misses_a_layer_that_is_not_what_its_net_is(tmp_path: Path) -> None:
    """The bmodel is there, the exit code and the line say that it is wrong."""
    fork = next(fork for fork in FORKS if fork.name == "layers changed after they were made")
    wrong = fork_checkout(tmp_path / "Qwen-fork", fork)
    flags = ("--seq-length", 16, "--trust-remote-code", "--no-twin", "--mode", "bf16")
    asked = ("--recipe", "documented", "--verify", "sample")
    done = cli("build", wrong, "--out", tmp_path / "out", *flags, *asked, check=False)
    assert done.returncode == 1, done.stderr
    assert "block_2" in done.stderr and "verification missed" in done.stderr
    assert list((tmp_path / "out").rglob("*.bmodel"))


@pytest.mark.tpu
def test_a_bmodel_that_was_written_into_is_made_again(
    checkout: Path, first: tuple[dict[str, Any], Path, dict[str, str]]
) -> None:
    """The finished file and the store's are one file: what is done to one is noticed in the other."""
    bmodel = Path(build(checkout, first[1])["bmodels"][0])
    whole = bmodel.read_bytes()
    with bmodel.open("r+b") as stream:
        stream.seek(len(whole) // 2)
        stream.write(bytes(64))
    assert bmodel.read_bytes() != whole
    again = build(checkout, first[1])
    assert Path(again["bmodels"][0]).read_bytes() == whole


def test_a_second_build_into_the_same_folder_waits_for_nobody(checkout: Path, tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "out"
    (out / ".build").mkdir(parents=True)
    with (out / ".build/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        flags = ("--seq-length", 32, "--trust-remote-code")
        done = cli("build", checkout, "--out", out, *flags, check=False)
    assert done.returncode == 3
    assert "another build is running" in done.stderr


@pytest.mark.tpu
def test_damaged_notes_of_earlier_builds_only_cost_time(
    checkout: Path, first: tuple[dict[str, Any], Path, dict[str, str]]
) -> None:
    for name, text in (("finals.json", "[]"), ("digests.json", '{"a": 1}'), ("unfinished.json", "7")):
        (first[1] / ".build" / name).write_text(text)
    assert build(checkout, first[1])["passed"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--name", "../evil"), 2, "is no file name"),
        (("--memory", "much"), 2, "is not a size"),
        (("--recipe", "nope"), 2, "nope"),
        (("--scheduler", "nonsense"), 2, "is no address"),
        (("--no-pack", "--prove", "1"), 2, "has no use with --no-pack"),
    ],
)
def test_options_that_mean_nothing_are_refused_at_once(
    checkout: Path, tmp_path: Path, flags: tuple[str, ...], code: int, message: str
) -> None:
    done = cli("build", checkout, "--out", tmp_path / "o", "--trust-remote-code", *flags, check=False)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr


def test_an_export_remembers_the_config_that_its_bmodel_is_made_with(exported: Path) -> None:
    """A checkout may move or change before its export is compiled; a refit compares with what was."""
    from qwen_surgery.exporting.manifest import Manifest

    config = json.loads((exported.parent / "Qwen-two/config.json").read_text())
    assert Manifest.load(exported).config == config


def test_steps_that_do_not_fit_are_refused_before_anything_is_built(checkout: Path, tmp_path: Path) -> None:
    """Told after the compile, the wrong word costs a user the whole build."""
    done = cli(
        "build", checkout, "--out", tmp_path / "out", "--seq-length", 8, "--trust-remote-code", check=False
    )
    assert done.returncode == 2 and "8 steps do not fit in an export length of 8" in done.stderr
    assert not list(tmp_path.rglob("*.bmodel")) and not list(tmp_path.rglob("*.onnx"))


@pytest.mark.tpu
def test_a_build_with_another_quantizer_is_the_refit_with_it(
    checkout: Path, first: tuple[dict[str, Any], Path, dict[str, str]], tmp_path: Path
) -> None:
    """Layer 0 and the lm_head too, which the compiler has rounded: nothing but integers differs."""
    rounded = Path(first[0]["bmodels"][0])
    searched = Path(build(checkout, first[1], "--quantizer", "search")["bmodels"][0])
    assert searched == rounded
    refitted = tmp_path / "refitted.bmodel"
    cli("refit", searched, checkout, "--out", refitted)
    assert refitted.read_bytes() == searched.read_bytes()
    plain = tmp_path / "plain.bmodel"
    cli("refit", searched, checkout, "--quantizer", "rtn", "--out", plain)
    again = Path(build(checkout, first[1], "--prove", 1)["bmodels"][0])
    assert again.read_bytes() == plain.read_bytes() != refitted.read_bytes()
    done = cli("build", checkout, "--out", first[1], "--quantizer", "search", "--no-pack",
               "--trust-remote-code", check=False)  # fmt: skip
    assert done.returncode == 2
    assert "--no-pack does not go with --quantizer search" in done.stderr


def _holds(bmodel: Path, net: str, integers: Path) -> bool:
    """Whether every row of 4-bit codes in the file *integers* is among the weights of *net*, as bytes."""
    with Bmodel(bmodel) as opened, np.load(integers) as kept:
        section = opened.read(Region.of(opened.net(net)["parameter"][0]["coeff_mem"]["binary_coeff"]))
        codes = [kept[name] for name in kept.files if name.endswith("/codes")]
    return bool(codes) and all(row.tobytes() in section for matrix in codes for row in matrix)


@pytest.mark.tpu
def test_a_build_by_a_text_holds_what_its_tasks_chose(
    checkout: Path, first: tuple[dict[str, Any], Path, dict[str, str]], tmp_path: Path
) -> None:
    """A refit does the same in one go, and what is done is not done again."""
    out, text = first[1], ("--quantizer", "gptq", "--calibration-tokens", 128)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = ("--seq-length", 32, "--trust-remote-code", "--json", "--name", "tiny", "--verify", "contract")
    made = json.loads(cli("build", checkout, "--out", out, *flags, *text, env=env).stdout)
    assert made["integers"].endswith("chosen by gptq")
    ran = {name for name, task in made["tasks"].items() if task["ran"]}
    layers = {f"block_{i}" for i in range(3)}
    chosen = {name.partition(":")[2] for name in ran if name.startswith("quantise:")}
    assert chosen == {*layers, "lm_head"}
    assert not [name for name in ran if name.startswith(("transform:", "deploy:"))], "compiled again"
    bmodel = Path(made["bmodels"][0])
    files = {len(np.load(file).files): file for file in (out / ".build/store").glob("*/integers.npz")}
    assert _holds(bmodel, "lm_head", files[min(files)])
    again = json.loads(cli("build", checkout, "--out", out, *flags, *text, env=env).stdout)
    assert not [name for name, task in again["tasks"].items() if task["ran"]]
    refitted = tmp_path / "refitted.bmodel"
    cli("refit", bmodel, checkout, "--quantizer", "rtn", "--out", refitted)
    assert refitted.read_bytes() != bmodel.read_bytes()
    cli("refit", refitted, checkout, *text, "--trust-remote-code", env=env)
    assert refitted.read_bytes() == bmodel.read_bytes()


@pytest.mark.tpu
def test_a_plan_has_a_task_for_each_layer_that_a_text_decides(checkout: Path, tmp_path: Path) -> None:
    flags = ("--seq-length", 32, "--trust-remote-code", "--dry-run", "--json", "--quantizer", "gptq")
    plan = json.loads(cli("build", checkout, "--out", tmp_path / "new", *flags).stdout)
    tasks = [row["task"] for row in plan["tasks"]]
    order = [name for name in tasks if name.startswith(("calibrate:", "quantise:"))]
    steps = [f"{verb}:block_{i}" for i in range(3) for verb in ("calibrate", "quantise")]
    assert order == [*steps, "calibrate:lm_head", "quantise:lm_head"]
    wide = cli("build", checkout, "--out", tmp_path / "new", *flags, "--lm-head-mode", "bf16").stdout
    assert not {"calibrate:lm_head", "quantise:lm_head"} & {row["task"] for row in json.loads(wide)["tasks"]}


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--quantizer", "gptq", "--no-pack"), 2, "--no-pack does not go with --quantizer gptq"),
        (("--quantizer", "gptq", "--prove", "1"), 2, "--prove does not go with --quantizer gptq"),
        (("--quantizer", "gptq", "--mode", "bf16"), 2, "--quantizer gptq has no effect"),
        (("--calibration", "config.json"), 2, "--calibration has no effect on --quantizer rtn"),
        (("--quantizer", "gptq", "--calibration", "none.txt"), 3, "none.txt cannot be read"),
    ],
)
@pytest.mark.tpu
def test_what_a_text_cannot_decide_is_said_at_once(
    options: tuple[str, ...], code: int, said: str, checkout: Path, tmp_path: Path
) -> None:
    done = cli("build", checkout, "--out", tmp_path / "out", "--trust-remote-code", *options, check=False)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.tpu
def test_an_exported_folder_is_not_enough_for_a_text(
    first: tuple[dict[str, Any], Path, dict[str, str]], tmp_path: Path
) -> None:
    (folder,) = {file.parent for file in (first[1] / ".build/store").glob("*/onnx/manifest.json")
                 if json.loads(file.read_text())["passes"]}  # fmt: skip
    done = cli("compile", folder, "--out", tmp_path / "out", "--quantizer", "gptq", check=False)
    assert done.returncode == 2
    assert "an exported folder is not all of it" in done.stderr
