"""The same graph on a Dask cluster over a shared folder, one of its two workers killed in the middle."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from distributed import Client, LocalCluster

from qwen_surgery.building import session
from qwen_surgery.building.graph import Graph, Store, Task
from qwen_surgery.building.runner import Runner
from tests.building.actions import Write


def make_graph() -> Graph:
    tasks = [Task(f"t{i}", Write(str(i), sleep=0.7)) for i in range(8)]
    return Graph([*tasks, Task("all", Write("all"), needs=tuple(t.name for t in tasks), keep=True)])


def test_a_build_survives_the_death_of_a_worker(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    graph, store = make_graph(), Store(tmp_path / "store")
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, env={"PYTHONPATH": root},
        local_directory=str(tmp_path / "dask"),
    ) as cluster, Client(cluster) as watching:  # fmt: skip
        pids = list(watching.run(os.getpid).values())
        killed: list[int] = []

        def kill_one() -> None:
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)

        timer = threading.Timer(1.5, kill_one)
        with session.executor(cluster.scheduler_address) as (executor, workers):
            assert workers == 2
            timer.start()
            Runner(graph, store, tmp_path / "logs", jobs=workers, memory=1 << 40, executor=executor).run()
        timer.join()
        assert killed, "the build was over before a worker was killed"
    text = (store.folder(graph.keys["all"]) / "out.txt").read_text()
    assert text == "all+" + "+".join(str(i) for i in range(8))
