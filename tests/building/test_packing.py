"""Which tasks follow from what was found out: of a kind that cannot be packed every layer is compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_surgery.building import step_narrow
from qwen_surgery.building.builder import Packing
from qwen_surgery.building.graph import Graph, Store
from qwen_surgery.building.inputs import Inputs
from qwen_surgery.building.step_assemble import Assemble, Row
from qwen_surgery.building.step_prove import finding
from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.nets import Geometry, NetKind
from qwen_surgery.toolchain import Toolchain

GEOMETRY = Geometry(3, 128, 2, 64, 768, 512, 32)


class Build:
    """A build of three layers, none of whose tasks runs: a test says what they found."""

    def __init__(self, folder: Path, compared: tuple[int, ...] = ()) -> None:
        tools = folder / "tpu_mlir/python/tools"
        tools.mkdir(parents=True)
        (tools / "model_transform.py").write_text('"--do_onnx_sim"')
        (tools / "model_deploy.py").write_text('"--addr_mode"')
        toolchain = Toolchain(folder / "python", folder / "tpu_mlir", "1.30.2")
        options = CompileOptions().resolved(GEOMETRY)
        inputs = Inputs(folder, GEOMETRY, ("rotary",), options, toolchain, folder / "logs")
        self.notes: list[str] = []
        self.store = Store(folder / "store")
        self.graph = Graph(Packing(inputs, {}, {}, compared, self.notes.append).tasks())
        self.graph.grow(self.store)

    def found(self, task: str, kind: NetKind, reason: str) -> None:
        key = self.graph.keys[task]
        self.store.commit(key, self.store.begin(key), finding(kind, reason), 1.0, 0)

    def rows(self) -> dict[str, Row]:
        """The rows of the bmodel, if all that is not known yet goes as expected."""
        self.graph.grow(self.store, plan=True)
        (assemble,) = (task.step for task in self.graph.tasks.values() if isinstance(task.step, Assemble))
        return {row.net: row for row in assemble.nets}

    def done(self, verb: str) -> set[str]:
        """The nets that tasks of *verb* are for."""
        names = (name.split(":") for name in self.graph.tasks)
        return {name[1] for name in names if name[0] == verb}


FIRST = {"embedding", "embedding_cache", "lm_head", "block_0", "block_cache_0"}
HEADS = {"greedy_head", "penalty_sample_head"}


def test_one_net_of_each_kind_is_compiled_and_the_other_layers_are_packed(tmp_path: Path) -> None:
    build = Build(tmp_path)
    assert build.done("assemble") == set(), "nothing is proven yet"
    rows = build.rows()
    assert build.done("deploy") == FIRST | HEADS
    assert build.done("prove") == FIRST
    assert {net for net, row in rows.items() if row.pack} == {
        "block_1", "block_2", "block_cache_1", "block_cache_2"
    }  # fmt: skip
    assert build.notes == []


def test_every_layer_of_a_kind_that_is_not_proven_is_compiled(tmp_path: Path) -> None:
    build = Build(tmp_path, compared=(2,))
    build.found("prove:block_0", NetKind.BLOCK, "no plan fits")
    rows = build.rows()
    assert build.done("deploy") == FIRST | HEADS | {"block_1", "block_2", "block_cache_2"}
    assert {net for net, row in rows.items() if row.pack} == {"block_cache_1", "block_cache_2"}
    assert (rows["block_1"].task, rows["block_1"].source) == ("deploy:block_1", "block_1")
    assert build.done("compare") == {"block_2", "block_cache_2"}
    assert build.notes == [
        "block: packing is not proven (no plan fits); every layer of it is compiled instead"
    ]


def test_a_table_that_cannot_be_widened_is_compiled_whole_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_narrow, "WORTHWHILE", 0)
    build = Build(tmp_path)
    tables = {"embedding", "embedding_cache", "lm_head"}
    assert build.done("narrow") == tables
    assert build.done("deploy") == FIRST - tables | HEADS
    build.found("narrow:embedding", NetKind.EMBEDDING, "too short")
    rows = build.rows()
    assert build.done("deploy") == FIRST - tables | HEADS | {"embedding"}
    assert (rows["embedding"].task, rows["embedding"].pack) == ("deploy:embedding", False)
    assert rows["embedding"].plan == "prove:embedding"
    assert (rows["embedding_cache"].task, rows["embedding_cache"].pack) == ("narrow:embedding_cache", True)
    assert build.notes == ["embedding: compiled at its full size, which takes longer (too short)"]
