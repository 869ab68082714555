"""What ``build`` and ``compile`` have in common around a run: the display, the executor, interrupts, the
plan.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from qwen_surgery import console
from qwen_surgery.building.display import Display, clock, size
from qwen_surgery.building.drive import Running
from qwen_surgery.building.graph import Graph, Store, peak_disk, stale
from qwen_surgery.errors import ToolFailed, Usage


def planned(given: Mapping[str, Any]) -> Running:
    """How a run with a command's parameters would go: for plans, which start nothing."""
    if given["no_pack"] and given["prove"]:
        raise Usage("--prove has no use with --no-pack: every layer is compiled")
    return Running(
        jobs=given["jobs"], memory=given["memory"], pack=not given["no_pack"], prove=given["prove"]
    )


@contextmanager
def running(given: dict[str, Any]) -> Iterator[tuple[Running, Display]]:
    """How to run, from a command's parameters, with a display that is up while the block runs."""
    with executor(given["scheduler"]) as (chosen, workers), Display() as display:
        run = replace(
            planned(given),
            executor=chosen,
            workers=workers,
            watch=display,
            say=display.say,
            progress=display.reading,
        )
        yield run, display


@contextmanager
def executor(scheduler: str | None) -> Iterator[tuple[Any, int | None]]:
    """A Dask cluster's executor and its number of workers; nothing for this machine."""
    if scheduler is None:
        yield None, None
        return
    if not re.fullmatch(r"[a-z]+://.+:\d+", scheduler):
        raise Usage(f"--scheduler {scheduler} is no address", hint="it looks like tcp://host:8786")
    try:
        from distributed import Client
    except ImportError as error:
        raise Usage("--scheduler needs Dask", hint="pip install 'qwen-surgery[cluster]'") from error
    try:
        client = Client(scheduler, timeout="20s", set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise ToolFailed(f"no Dask scheduler answers at {scheduler}: {error}") from error
    with client:
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
        if not workers:
            raise ToolFailed(
                f"the Dask cluster at {scheduler} has no workers", hint="start `dask worker` on a machine"
            )
        # Tasks are idempotent: one whose worker dies runs again elsewhere. They are not pure in Dask's sense.
        yield client.get_executor(pure=False, retries=2), workers


def plan_of(graph: Graph, store: Store, targets: list[str], jobs: int) -> dict[str, Any]:
    """What a run of *targets* would do, as JSON: a row per task that must run, and totals in bytes and
    seconds.
    """
    todo = sorted(stale(graph, store, targets), key=lambda name: name not in ("export", "clean"))
    tasks = [graph.tasks[name] for name in todo]
    memory = sorted((task.memory for task in tasks), reverse=True)[:jobs]
    return {
        "tasks": [
            {
                "task": task.name,
                "memory": task.memory,
                "disk": task.disk,
                "seconds": round(task.seconds, 1),
                "command": task.command,
            }
            for task in tasks
        ],
        "up_to_date": len(graph.order) - len(todo),
        "jobs": jobs,
        "memory": sum(memory),
        "disk": peak_disk(graph, todo),
        "seconds": round(sum(task.seconds for task in tasks) / max(1, jobs), 1),
    }


def show_plan(plan: dict[str, Any], as_json: bool) -> None:
    """Print a plan to stdout."""
    if as_json:
        console.print_json(plan)
        return
    out = console.out()
    width = max((len(row["task"]) for row in plan["tasks"]), default=0)
    for row in plan["tasks"]:
        cells = f"{size(row['memory']):>8}  {size(row['disk']):>7}  {clock(row['seconds']):>6}"
        out.print(f"{row['task']:{width}}  {cells}  {row['command']}", markup=False, soft_wrap=True)
    out.print(
        f"{len(plan['tasks'])} tasks to run, {plan['up_to_date']} up to date; {plan['jobs']} side by side: "
        f"about {clock(plan['seconds'])}, {size(plan['memory'])} of memory and {size(plan['disk'])} of disk",
        soft_wrap=True,
    )
