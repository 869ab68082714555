"""Tasks, their keys, and the store of what they made.

A task's key is a hash of everything that decides its result: its action, its parameters, digests of its
inputs, and the keys of the tasks it needs. Its outputs live in ``STORE/<key>/``; that folder appears by one
rename, after everything in it is written, so a folder that is there is whole. Outputs that nothing needs
any more are dropped, the marker stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qwen_surgery.errors import ToolFailed
from qwen_surgery.parsing import DATA_ERRORS, build

DONE = "done.json"
#: Changes when an action's result changes for equal parameters: everything is then made anew.
FORMAT = 2


@dataclass(frozen=True)
class Task:
    """One step. ``action`` names a function ``module:function`` (see :mod:`.worker`) that gets ``params``.

    ``inputs`` are digests of what it reads from outside the graph; ``places`` say where that is and how to
    run (folders, the toolchain's location) and are no part of the key; ``needs`` names other tasks.
    ``memory`` and ``disk`` are what it takes at most, in bytes, ``seconds`` how long it is thought to take.
    ``keep``: its outputs stay after the build; others are deleted once every task that needs them is done.
    """

    name: str
    action: str
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    memory: int = 0
    disk: int = 0
    seconds: float = 1.0
    keep: bool = False
    command: str = ""  # for --dry-run: what it runs


class Graph:
    """Tasks by name, checked to be whole and free of cycles, in an order that respects needs."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self.tasks: dict[str, Task] = {}
        for task in tasks:
            if task.name in self.tasks:
                raise ValueError(f"two tasks are called {task.name}")
            self.tasks[task.name] = task
        self.order = self._sorted()
        self.keys: dict[str, str] = {}
        for name in self.order:
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
                "action": task.action,
                "params": task.params,
                "inputs": task.inputs,
                "needs": {need: self.keys[need] for need in task.needs},
            },
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def users(self, name: str) -> tuple[str, ...]:
        """The tasks that need *name*."""
        return tuple(task.name for task in self.tasks.values() if name in task.needs)


@dataclass(frozen=True)
class Done:
    """What a finished task left: what it said, its wall seconds, peak RSS in bytes, and bytes it left in
    the store.
    """

    info: dict[str, Any]
    seconds: float
    peak_rss: int
    size: int


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
            data = json.loads((self.folder(key) / DONE).read_text())
            return build(Done, {field.name: data[field.name] for field in fields(Done)})
        except (OSError, *DATA_ERRORS):
            return None

    def has_outputs(self, key: str) -> bool:
        """Whether the task is finished and its outputs are still there, each with the size and the time it
        had. (A finished bmodel has a second name, under which somebody may have written into it.)
        """
        try:
            data = json.loads((self.folder(key) / DONE).read_text())
            return all(_stamp(self.folder(key) / name) == stamp for name, stamp in data["files"].items())
        except (OSError, *DATA_ERRORS):
            return False

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
        record = {
            "info": info,
            "seconds": seconds,
            "peak_rss": peak_rss,
            "size": sum(size for size, _ in files.values()),
            "files": files,
        }
        marker = work / DONE
        with marker.open("w") as stream:
            json.dump(record, stream)
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


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def stale(graph: Graph, store: Store, targets: Iterable[str]) -> tuple[str, ...]:
    """The tasks that must run for *targets* to have their outputs, in order.

    A finished task whose outputs were dropped runs again only if a task that must run needs them.
    """
    wanted = set()
    stack = [name for name in targets if not store.has_outputs(graph.keys[name])]
    while stack:
        name = stack.pop()
        if name in wanted:
            continue
        wanted.add(name)
        stack += [need for need in graph.tasks[name].needs if not store.has_outputs(graph.keys[need])]
    return tuple(name for name in graph.order if name in wanted)


def peak_disk(graph: Graph, names: Iterable[str]) -> int:
    """The most bytes the store holds at one time when *names* run one after the other, outputs dropped as
    they go.

    Running side by side can only bring forward what a task writes, by at most what runs at one time; the
    two largest tasks are added for that.
    """
    todo = list(names)
    held: dict[str, int] = {}
    peak = 0
    finished: set[str] = set()
    for name in todo:
        held[name] = graph.tasks[name].disk
        peak = max(peak, sum(held.values()))
        finished.add(name)
        for need in graph.tasks[name].needs:
            users = [user for user in graph.users(need) if user in todo]
            if need in held and not graph.tasks[need].keep and all(user in finished for user in users):
                del held[need]
    largest = sorted((graph.tasks[name].disk for name in todo), reverse=True)
    return peak + sum(largest[:1])


def require_disk(folder: Path, needed: int) -> None:
    """Raise :class:`ToolFailed` when the disk of *folder* has less than *needed* bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ToolFailed(
            f"the build needs {needed / 1e6:,.0f} MB of disk, {folder} has {free / 1e6:,.0f} MB free",
            hint="free some space or choose another --out",
        )
