"""A process that runs a small graph, to be killed: ``python -m tests.building.run_graph FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from qwen_surgery.building.graph import Answer, Expansion, Graph, Store, Task
from qwen_surgery.building.runner import Runner
from tests.building.actions import Write


def graph() -> Graph:
    """Six chains of three tasks, joined. A chain's end is known when its middle is done, the join when all
    middles are."""

    def link(i: int, step: int) -> Task:
        needs = (f"t{i}.{step - 1}",) if step else ()
        return Task(f"t{i}.{step}", Write(f"{i}.{step}", sleep=0.05), needs=needs, keep=step == 1)

    def end(i: int, answers: Mapping[str, Answer]) -> list[Task]:
        assert answers[f"t{i}.1"].info == {"length": 2}
        return [link(i, 2)]

    def join(answers: Mapping[str, Answer]) -> list[Task | Expansion]:
        ends = tuple(f"t{i}.2" for i in range(6))
        return [Task("all", Write("all"), needs=ends, keep=True)]

    middles = tuple(f"t{i}.1" for i in range(6))
    tasks = [link(i, step) for i in range(6) for step in range(2)]
    return Graph(
        [*tasks, *(Expansion((f"t{i}.1",), partial(end, i)) for i in range(6)), Expansion(middles, join)]
    )


def run(folder: Path) -> str:
    """Run it in *folder*; the final output."""
    made = graph()
    store = Store(folder / "store")
    Runner(made, store, folder / "logs", jobs=2, memory=1 << 40).run()
    return (store.folder(made.keys["all"]) / "out.txt").read_text()


if __name__ == "__main__":
    print(run(Path(sys.argv[1])))
