"""A process that runs a small graph, to be killed: ``python -m tests.building.run_graph FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from qwen_surgery.building.graph import Graph, Store, Task
from qwen_surgery.building.run import Runner


def graph() -> Graph:
    """Six chains of three tasks, joined."""
    tasks = []
    for i in range(6):
        for step in range(3):
            needs = (f"t{i}.{step - 1}",) if step else ()
            params = {"text": f"{i}.{step}", "sleep": 0.05}
            tasks.append(Task(f"t{i}.{step}", "tests.building.actions:write", params, needs=needs))
    ends = tuple(f"t{i}.2" for i in range(6))
    tasks.append(Task("all", "tests.building.actions:write", {"text": "all"}, needs=ends, keep=True))
    return Graph(tasks)


def run(folder: Path) -> str:
    """Run it in *folder*; the final output."""
    made = graph()
    store = Store(folder / "store")
    Runner(made, store, folder / "logs", jobs=2, memory=1 << 40).run(["all"])
    return (store.folder(made.keys["all"]) / "out.txt").read_text()


if __name__ == "__main__":
    print(run(Path(sys.argv[1])))
