"""What decides a task's result is part of its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_surgery.building import roadmap
from qwen_surgery.building.drive import Builder, Running
from qwen_surgery.building.graph import Graph, Store, Task
from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.errors import ToolFailed
from qwen_surgery.nets import Geometry
from qwen_surgery.toolchain import Toolchain

GEOMETRY = Geometry(2, 128, 2, 64, 768, 512, 32)


@pytest.fixture
def toolchain(tmp_path: Path) -> Toolchain:
    """A folder with as much of a toolchain as planning looks at."""
    tools = tmp_path / "tpu_mlir/python/tools"
    tools.mkdir(parents=True)
    (tools / "model_transform.py").write_text('"--do_onnx_sim"')
    (tools / "model_deploy.py").write_text('"--addr_mode" "--high_precision"')
    return Toolchain(tmp_path / "python", tmp_path / "tpu_mlir", "1.30.2")


def keys(tmp_path: Path, toolchain: Toolchain) -> dict[str, str]:
    options = CompileOptions().resolved(GEOMETRY)
    manifest = roadmap.planned_manifest(tmp_path, GEOMETRY, options, "static", ("rotary", "kv-join"))
    digests = {net.name: "" for net in manifest.nets}
    compiling = roadmap.Compiling(tmp_path, manifest, options, toolchain, digests, tmp_path / "logs")
    nets = roadmap.first_nets(compiling)
    tasks = [*roadmap.compile_tasks(compiling, nets, keep=True), *roadmap.prove_tasks(compiling)]
    return Graph(tasks).keys


@pytest.mark.parametrize(
    ("package", "stale"),
    [
        ("graph_passes", {"transform", "deploy", "prove"}),
        ("qwen_surgery.compiling", {"transform", "deploy", "prove"}),
        ("qwen_surgery.packing", {"prove"}),
    ],
)
def test_changed_code_makes_stale_what_it_made(
    tmp_path: Path, toolchain: Toolchain, package: str, stale: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(tmp_path, toolchain)
    real = roadmap.code_digest
    monkeypatch.setattr(
        roadmap, "code_digest", lambda *names: real(*names) + ("changed" if package in names else "")
    )
    after = keys(tmp_path, toolchain)
    assert {name.split(":")[0] for name in before if before[name] != after[name]} == stale


def test_another_compiler_of_the_same_version_shares_nothing(tmp_path: Path, toolchain: Toolchain) -> None:
    before = keys(tmp_path, toolchain)
    (toolchain.root / "bin").mkdir()
    (toolchain.root / "bin/tpuc-opt").write_bytes(b"another")
    after = keys(tmp_path, toolchain)
    assert all(before[name] != after[name] for name in before)


def test_a_toolchain_without_its_scripts_is_said_to_be_incomplete(
    tmp_path: Path, toolchain: Toolchain
) -> None:
    (toolchain.root / "python/tools/model_deploy.py").unlink()
    with pytest.raises(ToolFailed, match="is incomplete"):
        Builder(tmp_path / "out", CompileOptions().resolved(GEOMETRY), toolchain, Running())


def test_a_finished_build_leaves_what_an_unfinished_one_has_done(
    tmp_path: Path, toolchain: Toolchain
) -> None:
    def builder(mode: str) -> Builder:
        return Builder(
            tmp_path / "out", CompileOptions(mode=mode).resolved(GEOMETRY), toolchain, Running(jobs=1)
        )

    def graph(mode: str) -> Graph:
        return Graph([Task(f"one-{mode}", "tests.building.actions:write", {"text": mode}, keep=True)])

    int8, int4 = builder("int8"), builder("int4")
    int8._run(graph("int8"), ["one-int8"])  # and is interrupted before it is done
    int4._run(graph("int4"), ["one-int4"])
    int4._retire()
    store = Store(tmp_path / "out/.build/store")
    assert store.has_outputs(graph("int8").keys["one-int8"])
    int8._retire()
    assert not store.has_outputs(graph("int8").keys["one-int8"]), "no bmodel of it is there"
