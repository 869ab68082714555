"""What ``build`` and ``compile`` have in common around a run: the display, the executor, the plan."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from qwen_surgery import console, extras
from qwen_surgery.building import resources
from qwen_surgery.building.display import Display, clock, size
from qwen_surgery.building.graph import Graph, Store, duration, peak_disk, stale
from qwen_surgery.building.request import RunRequest
from qwen_surgery.building.runner import MEMORY_SHARE, Watcher
from qwen_surgery.building.step_export import CLEAN, EXPORT
from qwen_surgery.errors import ToolFailed, Usage


@dataclass(frozen=True)
class Running:
    """How to run: what was asked for, and an executor with its number of workers (None: this machine).

    ``watch`` sees tasks start and end, ``say`` gets notes, ``progress`` how much of the weights is read.
    """

    request: RunRequest = field(default_factory=RunRequest)
    executor: Executor | None = None
    workers: int | None = None
    watch: Watcher = lambda progress, event: None
    say: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None

    @property
    def jobs(self) -> int:
        """How many tasks run side by side. (Whether two fit in memory is looked at as they start.)"""
        return self.request.jobs or self.workers or resources.cores()

    @property
    def memory(self) -> int:
        """Bytes that tasks may take together. Elsewhere only the user knows."""
        if self.request.memory is not None:
            return self.request.memory
        return 1 << 62 if self.workers else int(resources.free_memory() * MEMORY_SHARE)


@contextmanager
def running(request: RunRequest) -> Iterator[Running]:
    """How to run as *request* says, with a display that is up while the block runs."""
    with executor(request.scheduler) as (chosen, workers), Display() as display:
        yield Running(request, chosen, workers, display, display.say, display.reading)


@contextmanager
def executor(scheduler: str | None) -> Iterator[tuple[Executor | None, int | None]]:
    """A Dask cluster's executor and its number of workers; nothing for this machine."""
    if scheduler is None:
        yield None, None
        return
    if not re.fullmatch(r"[a-z]+://.+:\d+", scheduler):
        raise Usage(f"--scheduler {scheduler} is no address", hint="it looks like tcp://host:8786")
    extras.need("--scheduler", "cluster")
    from distributed import Client

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


def plan_of(graph: Graph, store: Store, jobs: int) -> dict[str, Any]:
    """What a run of *graph* would do, as JSON: a row per task to run, and totals in bytes and seconds."""
    todo = sorted(stale(graph, store), key=lambda name: name not in (EXPORT, CLEAN))
    tasks = [graph.tasks[name] for name in todo]
    memory = sorted((task.cost.memory for task in tasks), reverse=True)[:jobs]
    rows = [
        {"task": task.name, **asdict(replace(task.cost, seconds=round(task.cost.seconds, 1)))}
        | {"command": task.command}
        for task in tasks
    ]
    return {
        "tasks": rows,
        "up_to_date": len(graph.order) - len(todo),
        "jobs": jobs,
        "memory": sum(memory),
        "disk": peak_disk(graph, todo),
        "seconds": round(duration(graph, {task.name: task.cost.seconds for task in tasks}, jobs), 1),
    }


def show_plan(plan: dict[str, Any], as_json: bool) -> None:
    """Print a plan to stdout."""
    if as_json:
        console.print_json(plan)
        return
    for note in plan.get("notes", ()):
        console.line(f"note: {note}", err=True)
    out = console.out()
    width = max((len(row["task"]) for row in plan["tasks"]), default=0)
    for row in plan["tasks"]:
        cells = f"{size(row['memory']):>8}  {size(row['disk']):>7}  {clock(row['seconds']):>6}"
        out.print(f"{row['task']:{width}}  {cells}  {row['command']}", soft_wrap=True)
    out.print(
        f"{len(plan['tasks'])} tasks to run, {plan['up_to_date']} up to date; {plan['jobs']} side by side: "
        f"about {clock(plan['seconds'])}, {size(plan['memory'])} of memory and {size(plan['disk'])} of disk",
        soft_wrap=True,
    )
