"""Run a graph: everything that must run, side by side as far as cores and memory go, resumable at any
moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_surgery.building import resources, worker
from qwen_surgery.building.graph import Done, Graph, Store, peak_disk, require_disk, stale
from qwen_surgery.errors import ToolFailed
from qwen_surgery.toolchain import environment

#: Share of the free memory that is planned with.
MEMORY_SHARE = 0.9
#: How often a running build's display is refreshed, in seconds.
TICK = 0.25


@dataclass
class State:
    """One task's place in a run; ``state`` is ``waiting``, ``running``, ``done`` or ``failed``."""

    name: str
    state: str = "waiting"
    started: float = 0.0
    seconds: float = 0.0
    peak_rss: int = 0


@dataclass
class Progress:
    """What a display shows. ``expected``: task -> estimated seconds."""

    states: dict[str, State]
    expected: dict[str, float] = field(default_factory=dict)
    jobs: int = 1

    def eta(self) -> float:
        """Seconds to go: what is left by estimate, corrected by how finished tasks went, over the jobs."""
        done = [state for state in self.states.values() if state.state == "done"]
        spent = sum(state.seconds for state in done)
        planned = sum(self.expected[state.name] for state in done)
        pace = spent / planned if planned > 0 and spent > 0 else 1.0
        now = time.monotonic()
        left = 0.0
        for state in self.states.values():
            if state.state == "waiting":
                left += self.expected[state.name] * pace
            elif state.state == "running":
                left += max(0.0, self.expected[state.name] * pace - (now - state.started))
        return left / max(1, self.jobs)


Watcher = Callable[[Progress, str], None]


def silent(progress: Progress, event: str) -> None:
    """Watch and say nothing."""


class Runner:
    """Runs the tasks of a graph on an executor.

    *jobs* bounds how many run at one time; *memory* (bytes) what they may take together by their own
    footprints: a task that is larger than all of it runs alone. *executor* is any
    ``concurrent.futures.Executor``; threads of this process by default. *watch* is called with the progress
    and what just happened.
    """

    def __init__(
        self,
        graph: Graph,
        store: Store,
        logs: Path,
        *,
        jobs: int,
        memory: int | None = None,
        executor: Executor | None = None,
        watch: Watcher = silent,
    ) -> None:
        self.graph, self.store, self.logs = graph, store, logs
        self.jobs = jobs
        self.memory = int(resources.free_memory() * MEMORY_SHARE) if memory is None else memory
        self.executor = executor
        self.watch = watch

    def run(self, targets: Iterable[str]) -> dict[str, Done]:
        """Bring *targets* up to date; the record of every task of the graph that is done.

        Raises the error of the first task that fails, after stopping the others; what was done stays done.
        """
        targets = tuple(targets)
        todo = stale(self.graph, self.store, targets)
        self.store.root.mkdir(parents=True, exist_ok=True)
        self.store.sweep()
        require_disk(self.store.root, peak_disk(self.graph, todo))
        progress = Progress(
            {name: State(name) for name in todo},
            {name: self.graph.tasks[name].seconds for name in todo},
            self.jobs,
        )
        if todo:
            self._all(todo, progress)
        self._drop_unneeded(targets, ())
        found = {name: self.store.done(self.graph.keys[name]) for name in self.graph.order}
        return {name: done for name, done in found.items() if done is not None}

    def _all(self, todo: tuple[str, ...], progress: Progress) -> None:
        own = ThreadPoolExecutor(self.jobs) if self.executor is None else None
        executor = self.executor or own
        assert executor is not None
        running: dict[Future[dict[str, Any]], str] = {}
        try:
            while any(state.state in ("waiting", "running") for state in progress.states.values()):
                self._start_ready(executor, progress, running)
                finished, _ = wait(running, timeout=TICK, return_when=FIRST_COMPLETED)
                if not finished:
                    self.watch(progress, "")
                for future in finished:
                    self._finish(running.pop(future), future, progress)
                    self._drop_unneeded(todo, progress.states)
        except BaseException:
            for future in running:
                future.cancel()
            environment.stop_all()
            raise
        finally:
            if own is not None:
                own.shutdown(wait=True, cancel_futures=True)

    def _start_ready(
        self, executor: Executor, progress: Progress, running: dict[Future[dict[str, Any]], str]
    ) -> None:
        """Start what can start: the longest tasks first, as far as jobs and memory go."""
        ready = [
            name
            for name, state in progress.states.items()
            if state.state == "waiting"
            and all(
                progress.states[need].state == "done"
                for need in self.graph.tasks[name].needs
                if need in progress.states
            )
        ]
        for name in sorted(ready, key=lambda name: -self._tail(name, progress)):
            if len(running) >= self.jobs:
                return
            taken = sum(self.graph.tasks[other].memory for other in running.values())
            if running and taken + self.graph.tasks[name].memory > self.memory:
                continue
            state = progress.states[name]
            state.state, state.started = "running", time.monotonic()
            running[executor.submit(worker.run, self._spec(name))] = name
            self.watch(progress, f"start {name}")

    def _tail(self, name: str, progress: Progress) -> float:
        """Estimated seconds from the start of *name* to the end of the longest chain behind it."""
        users = [user for user in self.graph.users(name) if user in progress.states]
        return self.graph.tasks[name].seconds + max(
            (self._tail(user, progress) for user in users), default=0.0
        )

    def _spec(self, name: str) -> dict[str, Any]:
        task = self.graph.tasks[name]
        return {
            "name": name,
            "key": self.graph.keys[name],
            "action": task.action,
            "params": dict(task.params),
            "places": dict(task.places),
            "needs": {need: str(self.store.folder(self.graph.keys[need]).absolute()) for need in task.needs},
            "store": str(self.store.root.absolute()),
            "logs": str(self.logs.absolute()),
        }

    def _finish(self, name: str, future: Future[dict[str, Any]], progress: Progress) -> None:
        state = progress.states[name]
        state.seconds = time.monotonic() - state.started
        try:
            answer = future.result()
        except Exception as error:  # the executor itself failed: a lost cluster, a broken pool
            state.state = "failed"
            raise ToolFailed(f"{name} could not be run: {type(error).__name__}: {error}") from error
        if "error" in answer:
            state.state = "failed"
            self.watch(progress, f"failed {name}")
            worker.raise_error(answer["error"])
        state.state, state.peak_rss = "done", answer["peak_rss"]
        self.watch(progress, f"done {name}")

    def _drop_unneeded(self, targets: Iterable[str], states: Any) -> None:
        """Delete outputs whose every user is done (all users, when nothing is left to run)."""
        for name in self.graph.order:
            task, key = self.graph.tasks[name], self.graph.keys[name]
            users = self.graph.users(name)
            if task.keep or not users or not self.store.folder(key).is_dir():
                continue
            if all(self.store.done(self.graph.keys[user]) is not None for user in users) and not any(
                states[user].state != "done" for user in users if user in states
            ):
                self.store.drop_outputs(key)
