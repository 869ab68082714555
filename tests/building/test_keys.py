"""What decides a task's result is part of its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_surgery.building import step_compile, step_prove
from qwen_surgery.building.builder import Builder
from qwen_surgery.building.graph import Graph, Task
from qwen_surgery.building.inputs import Inputs, code_digest
from qwen_surgery.building.outputs import Outputs
from qwen_surgery.building.runner import Runner
from qwen_surgery.building.session import Running
from qwen_surgery.building.step_compile import compile_tasks
from qwen_surgery.building.step_prove import prove_task
from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.errors import ToolFailed
from qwen_surgery.nets import Geometry
from qwen_surgery.toolchain import Toolchain
from tests.building.actions import Write

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
    inputs = Inputs(tmp_path, GEOMETRY, ("rotary", "kv-join"), options, toolchain, tmp_path / "logs")
    nets = inputs.first_nets
    return Graph(
        [*compile_tasks(inputs, nets, keep=True), *(prove_task(inputs, net, 1) for net in nets)]
    ).keys


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
    for module in (step_compile, step_prove):
        monkeypatch.setattr(
            module,
            "code_digest",
            lambda *names: code_digest(*names) + ("changed" if package in names else ""),
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
        Builder(tmp_path / "out", GEOMETRY, CompileOptions().resolved(GEOMETRY), toolchain, Running())


def test_a_finished_build_leaves_what_an_unfinished_one_has_done(tmp_path: Path) -> None:
    def run(mode: str) -> tuple[Outputs, str]:
        outputs = Outputs(tmp_path / "out", f"build of {mode}")
        graph = Graph([Task(f"one-{mode}", Write(mode), keep=True)])
        grown = lambda grown: outputs.want(grown.keys.values())  # noqa: E731
        Runner(graph, outputs.store, outputs.logs, jobs=1, grown=grown).run()
        return outputs, graph.keys[f"one-{mode}"]

    int8, key = run("int8")  # and is interrupted before it is done
    int4, _ = run("int4")
    int4.retire()
    assert int8.store.has_outputs(key)
    int8.retire()
    assert not int8.store.has_outputs(key), "no bmodel of it is there"


def test_a_result_stays_as_long_as_the_bmodel_that_was_made_of_it(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "out", "build")
    graph = Graph([Task("one", Write("one"), keep=True)])
    Runner(graph, outputs.store, outputs.logs, jobs=1).run()
    key = graph.keys["one"]
    bmodel = outputs.place(Path("CHIP/out.txt"), key, {"net": "signature"}, [key])
    outputs.retire()
    assert outputs.store.has_outputs(key)
    assert outputs.previous()["out.txt"].nets == {"net": "signature"}
    bmodel.unlink()
    outputs.retire()
    assert outputs.previous() == {}
    assert not outputs.store.folder(key).exists()
