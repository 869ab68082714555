"""Run a graph: all that must run, side by side as far as cores and memory go, resumable at any moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from qwen_surgery.building import resources, worker
from qwen_surgery.building.graph import Done, Graph, Store, chains, duration, peak_disk, stale
from qwen_surgery.building.step import encode
from qwen_surgery.errors import ToolFailed
from qwen_surgery.files import require_disk
from qwen_surgery.toolchain import environment

#: Share of the free memory that is planned with.
MEMORY_SHARE = 0.9
#: How often a running build's display is refreshed, in seconds.
TICK = 0.25


@dataclass
class TaskState:
    """How a task stands: ``waiting``, ``running``, ``done`` or ``failed``; ``expected`` are seconds."""

    name: str
    expected: float = 1.0
    state: str = "waiting"
    started: float = 0.0
    seconds: float = 0.0
    peak_rss: int = 0


@dataclass
class Progress:
    """What a display shows."""

    graph: Graph
    states: dict[str, TaskState]
    jobs: int = 1

    def eta(self) -> float:
        """Seconds to go: what is left by estimate, corrected by how finished tasks went."""
        done = [state for state in self.states.values() if state.state == "done"]
        spent = sum(state.seconds for state in done)
        planned = sum(state.expected for state in done)
        pace = spent / planned if planned > 0 and spent > 0 else 1.0
        now = time.monotonic()
        left = {}
        for name, state in self.states.items():
            if state.state in ("waiting", "running"):
                spent = now - state.started if state.state == "running" else 0.0
                left[name] = max(0.0, state.expected * pace - spent)
        return duration(self.graph, left, self.jobs)


Watcher = Callable[[Progress, str], None]


@dataclass
class Runner:
    """Runs the tasks of a graph on an executor, and those that it grows.

    ``jobs`` bounds how many run at one time; ``memory`` (bytes) what they may take together by their costs:
    a task that is larger than all of it runs alone. ``executor`` is any of ``concurrent.futures``; threads of
    this process by default. ``watch`` is called with the progress and what just happened, ``grown`` with the
    graph whenever it has new tasks, before any of them runs.
    """

    graph: Graph
    store: Store
    logs: Path
    jobs: int
    memory: int = field(default_factory=lambda: int(resources.free_memory() * MEMORY_SHARE))
    executor: Executor | None = None
    watch: Watcher = lambda progress, event: None
    grown: Callable[[Graph], None] = lambda graph: None

    def __post_init__(self) -> None:
        self.progress = Progress(self.graph, {}, self.jobs)

    def run(self) -> dict[str, Done]:
        """Bring what the graph wants up to date, and grow it as far as it goes; the record of every task.

        Raises the error of the first task that fails, after stopping the others; what was done stays done.
        """
        self.store.root.mkdir(parents=True, exist_ok=True)
        self.store.sweep()
        self.graph.grow(self.store)
        self._take_on()
        if self.progress.states:
            self._all()
        self._drop_unneeded()
        if self.graph.awaited:
            raise ToolFailed(f"{self.store.root}: results vanished meanwhile", hint="run it again")
        found = {name: self.store.done(self.graph.keys[name]) for name in self.graph.order}
        return {name: done for name, done in found.items() if done is not None}

    def _take_on(self) -> None:
        """Plan to run what the graph, as large as it is by now, needs to have run."""
        self.grown(self.graph)
        todo = stale(self.graph, self.store)
        require_disk(self.store.root, peak_disk(self.graph, todo), "the build")
        states = self.progress.states
        for name in todo:
            if name not in states or states[name].state == "done":  # done, but its outputs are gone already
                states[name] = TaskState(name, self.graph.tasks[name].cost.seconds)

    def _all(self) -> None:
        executor = self.executor or ThreadPoolExecutor(self.jobs)
        running: dict[Future[worker.Ended], str] = {}
        try:
            while any(state.state in ("waiting", "running") for state in self.progress.states.values()):
                self._start_ready(executor, running)
                finished, _ = wait(running, timeout=TICK, return_when=FIRST_COMPLETED)
                if not finished:
                    self.watch(self.progress, "")
                for future in finished:
                    self._finish(running.pop(future), future)
                    if self.graph.grow(self.store):
                        self._take_on()
                    self._drop_unneeded()
        except BaseException:
            for future in running:
                future.cancel()
            environment.stop_all()
            raise
        finally:
            if executor is not self.executor:
                executor.shutdown(wait=True, cancel_futures=True)

    def _start_ready(self, executor: Executor, running: dict[Future[worker.Ended], str]) -> None:
        """Start what can start: the longest tasks first, as far as jobs and memory go."""
        states, tasks = self.progress.states, self.graph.tasks
        ready = [
            name
            for name, state in states.items()
            if state.state == "waiting"
            and all(states[need].state == "done" for need in tasks[name].needs if need in states)
        ]
        behind = chains(self.graph, {name: tasks[name].cost.seconds for name in states})
        for name in sorted(ready, key=lambda name: -behind[name]):
            if len(running) >= self.jobs:
                return
            taken = sum(tasks[other].cost.memory for other in running.values())
            if running and taken + tasks[name].cost.memory > self.memory:
                continue
            states[name].state, states[name].started = "running", time.monotonic()
            running[executor.submit(worker.run, self._job(name))] = name
            self.watch(self.progress, f"start {name}")

    def _job(self, name: str) -> worker.Job:
        task, keys = self.graph.tasks[name], self.graph.keys
        needs = {need: self.store.folder(keys[need]).absolute() for need in task.needs}
        store, logs = self.store.root.absolute(), self.logs.absolute()
        return worker.Job(name, keys[name], task.step.action, encode(task.step), needs, store, logs)

    def _finish(self, name: str, future: Future[worker.Ended]) -> None:
        state = self.progress.states[name]
        state.seconds = time.monotonic() - state.started
        try:
            ended = future.result()
        except Exception as error:  # the executor itself failed: a lost cluster, a broken pool
            state.state = "failed"
            raise ToolFailed(f"{name} could not be run: {type(error).__name__}: {error}") from error
        if ended.failure is not None:
            state.state = "failed"
            self.watch(self.progress, f"failed {name}")
            raise ended.failure.error()
        state.state, state.peak_rss = "done", ended.peak_rss
        self.watch(self.progress, f"done {name}")

    def _drop_unneeded(self) -> None:
        """Delete outputs whose every user is done."""
        states = self.progress.states
        for name in self.graph.order:
            key, users = self.graph.keys[name], self.graph.users(name)
            if self.graph.tasks[name].keep or not users or not self.store.folder(key).is_dir():
                continue
            if all(
                self.store.done(self.graph.keys[user]) is not None
                and (user not in states or states[user].state == "done")
                for user in users
            ):
                self.store.drop_outputs(key)
