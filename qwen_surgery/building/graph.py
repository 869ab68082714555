"""Tasks, their keys, the graph that they make up, and the store of what they made.

A task's key is a hash of everything that decides its result: its step, the step's parameters, digests of its
inputs, and the keys of the tasks it needs. Its outputs live in ``STORE/<key>/``; that folder appears by one
rename, after everything in it is written, so a folder that is there is whole. Outputs that nothing needs any
more are dropped, the record stays.

Not all of a build's tasks are known when it starts. An :class:`Expansion` waits for some tasks and makes more
from what they found, as doit's ``calc_dep`` and snakemake's checkpoints do. It sees nothing but their records
and outputs, so a build that was killed grows the same graph again without running anything twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_surgery.building.step import Step, decode, encode
from qwen_surgery.parsing import DATA_ERRORS

DONE = "done.json"
#: Changes when a step's result changes for equal parameters: everything is then made anew.
FORMAT = 2


@dataclass(frozen=True)
class Cost:
    """What a task takes: bytes of memory, bytes on disk (both at most), and about how many seconds."""

    memory: int = 0
    disk: int = 0
    seconds: float = 1.0


@dataclass(frozen=True)
class Task:
    """One step in a graph.

    ``inputs`` are digests of what it reads from outside the graph, ``needs`` names of other tasks. ``keep``:
    its outputs stay after the build; others are deleted once every task that needs them is done. ``command``
    is what ``--dry-run`` shows; ``expected`` is the answer that a plan takes for granted.
    """

    name: str
    step: Step
    inputs: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    cost: Cost = Cost()
    keep: bool = False
    command: str = ""
    expected: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What is known of a finished task: what it said, and the folder of its outputs. ``planned``: it has not
    run, and this is what a plan expects."""

    info: Mapping[str, Any]
    folder: Path
    planned: bool = False


@dataclass(frozen=True)
class Expansion:
    """Tasks (and further expansions) that follow once all of *after* are done, from what those answered."""

    after: tuple[str, ...]
    grow: Callable[[Mapping[str, Answer]], Iterable[Task | Expansion]]


class Graph:
    """Tasks by name, in an order that respects needs, and expansions that wait to add more."""

    def __init__(self, items: Iterable[Task | Expansion]) -> None:
        self.tasks: dict[str, Task] = {}
        self.keys: dict[str, str] = {}
        self.order: tuple[str, ...] = ()
        self._waiting: list[Expansion] = []
        self.add(items)

    def add(self, items: Iterable[Task | Expansion]) -> None:
        """Take on *items*. Raises ValueError for a name that is taken, a need that is no task, a circle."""
        for item in items:
            if isinstance(item, Expansion):
                self._waiting.append(item)
            elif item.name in self.tasks:
                raise ValueError(f"two tasks are called {item.name}")
            else:
                self.tasks[item.name] = item
        self.order = self._sorted()
        for name in self.order:
            if name not in self.keys:
                self.keys[name] = self._key(self.tasks[name])

    def _sorted(self) -> tuple[str, ...]:
        from graphlib import CycleError, TopologicalSorter

        for task in self.tasks.values():
            for need in task.needs:
                if need not in self.tasks:
                    raise ValueError(f"{task.name} needs {need}, which is no task")
        try:
            return tuple(TopologicalSorter({t.name: t.needs for t in self.tasks.values()}).static_order())
        except CycleError as error:
            raise ValueError(f"tasks need each other in a circle: {error.args[1]}") from error

    def _key(self, task: Task) -> str:
        text = json.dumps(
            {
                "format": FORMAT,
                "name": task.name,
                "action": task.step.action,
                "params": task.step.decisive,
                "inputs": dict(task.inputs),
                "needs": {need: self.keys[need] for need in task.needs},
            },
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def grow(self, store: Store, *, plan: bool = False) -> bool:
        """Add what follows from the tasks that are done; whether that was anything.

        With *plan*, tasks that are not done count as done, with the answer that is expected of them.
        """
        for expansion in self._waiting:
            answers = {name: self._answer(name, store, plan) for name in expansion.after}
            known = {name: answer for name, answer in answers.items() if answer is not None}
            if len(known) == len(answers):
                self._waiting.remove(expansion)
                self.add(expansion.grow(known))
                self.grow(store, plan=plan)
                return True
        return False

    def _answer(self, name: str, store: Store, plan: bool) -> Answer | None:
        key, expected = self.keys[name], self.tasks[name].expected
        return store.answer(key) or (Answer(expected, store.folder(key), planned=True) if plan else None)

    def users(self, name: str) -> tuple[str, ...]:
        """The tasks that need *name*."""
        return tuple(task.name for task in self.tasks.values() if name in task.needs)

    @property
    def targets(self) -> tuple[str, ...]:
        """The tasks whose outputs are wanted: those that no other needs or that expansions wait for."""
        needed = {need for task in self.tasks.values() for need in task.needs} - self.awaited
        return tuple(name for name in self.order if name not in needed)

    @property
    def awaited(self) -> set[str]:
        """The tasks that expansions wait for."""
        return {name for expansion in self._waiting for name in expansion.after}


@dataclass(frozen=True)
class Done:
    """The record of a finished task: what it said, its wall seconds, its peak RSS in bytes, and the size and
    time of each of its files."""

    info: dict[str, Any]
    seconds: float
    peak_rss: int
    files: dict[str, tuple[int, int]]


class Store:
    """``ROOT/<key>/``: outputs of finished tasks; ``ROOT/.work``: of running ones."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.work = root / ".work"

    def folder(self, key: str) -> Path:
        """Where the outputs of the task with *key* are."""
        return self.root / key

    def done(self, key: str) -> Done | None:
        """The record of a finished task, None when it is not finished or its record is damaged."""
        try:
            done: Done = decode(Done, json.loads((self.folder(key) / DONE).read_text()))
        except (OSError, *DATA_ERRORS):
            return None
        return done

    def has_outputs(self, key: str) -> bool:
        """Whether the task is finished and its outputs are as it left them. (A finished bmodel has a second
        name, under which somebody may have written into it.)"""
        return self.answer(key) is not None

    def answer(self, key: str) -> Answer | None:
        """What the task *key* gives to an expansion; None when it is not finished or its outputs are gone."""
        done, folder = self.done(key), self.folder(key)
        try:
            whole = done is not None and all(_stamp(folder / name) == was for name, was in done.files.items())
        except (OSError, ValueError):  # a name that no folder can hold
            return None
        return Answer(done.info, folder) if done and whole else None

    def begin(self, key: str) -> Path:
        """A fresh folder for a task to work in, on the store's own disk."""
        self.work.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{key}-", dir=self.work))

    def commit(self, key: str, work: Path, info: dict[str, Any], seconds: float, peak_rss: int) -> None:
        """Make the outputs in *work* those of *key*, in one step. Of two racing commits either one stays."""
        files = {
            str(path.relative_to(work)): _stamp(path)
            for path in sorted(work.rglob("*"))
            if path.is_file() and not path.is_symlink()
        }
        marker = work / DONE
        with marker.open("w") as stream:
            json.dump(encode(Done(info, seconds, peak_rss, files)), stream)
            stream.flush()
            os.fsync(stream.fileno())
        target = self.folder(key)
        if target.exists():
            # An earlier run's record whose outputs were dropped, or another worker's equal result.
            old = Path(tempfile.mkdtemp(prefix=f"{key}-old-", dir=self.work))
            target.rename(old / "was")
            work.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            work.rename(target)

    def drop_outputs(self, key: str) -> None:
        """Delete the outputs of *key*; the record that it was done stays."""
        folder = self.folder(key)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name == DONE:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete what killed runs left in the work folder."""
        shutil.rmtree(self.work, ignore_errors=True)

    def retire(self, keep: Iterable[str]) -> None:
        """Delete every task folder that is not in *keep* (results of earlier inputs)."""
        kept = set(keep)
        for folder in self.root.glob("*"):
            if folder.is_dir() and folder.name not in kept and folder != self.work and len(folder.name) == 32:
                shutil.rmtree(folder, ignore_errors=True)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def stale(graph: Graph, store: Store) -> tuple[str, ...]:
    """The tasks that must run for all that *graph* wants to be there, in order.

    A finished task whose outputs were dropped runs again only if a task that must run needs them.
    """
    wanted = set()
    stack = list(graph.targets)
    while stack:
        name = stack.pop()
        if name not in wanted and not store.has_outputs(graph.keys[name]):
            wanted.add(name)
            stack += graph.tasks[name].needs
    return tuple(name for name in graph.order if name in wanted)


def chains(graph: Graph, seconds: Mapping[str, float]) -> dict[str, float]:
    """By task of *seconds*: how long from its start to the end of the longest chain of them behind it.

    Each task is looked at once, from the last on: where chains part and meet again, the ways through them are
    two to the power of the meetings.
    """
    behind = dict.fromkeys(seconds, 0.0)
    found: dict[str, float] = {}
    for name in reversed(graph.order):
        if name in seconds:
            found[name] = seconds[name] + behind[name]
            for need in seconds.keys() & set(graph.tasks[name].needs):
                behind[need] = max(behind[need], found[name])
    return found


def duration(graph: Graph, seconds: Mapping[str, float], jobs: int) -> float:
    """About how many seconds the tasks of *seconds* take, *jobs* at a time: all of them shared out, or their
    longest chain where that is longer."""
    return max(sum(seconds.values()) / max(1, jobs), *chains(graph, seconds).values(), 0.0)


def peak_disk(graph: Graph, names: Iterable[str]) -> int:
    """The most bytes in the store at one time when *names* run one by one and outputs are dropped as they go.

    Running side by side only brings forward what a task writes; the largest task is added for that.
    """
    todo = list(names)
    users = Counter(need for name in todo for need in graph.tasks[name].needs)
    held: dict[str, int] = {}
    peak = 0
    for name in todo:
        held[name] = graph.tasks[name].cost.disk
        peak = max(peak, sum(held.values()))
        for need in graph.tasks[name].needs:
            users[need] -= 1
            if not users[need] and not graph.tasks[need].keep:
                held.pop(need, None)
    return peak + max((graph.tasks[name].cost.disk for name in todo), default=0)
