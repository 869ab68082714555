"""Run one task: in a process of its own, whichever machine that is on.

:func:`run` is what executors get. It needs nothing but the store's folder (a shared one when workers are
elsewhere) and a plain description of the task, so any ``concurrent.futures.Executor`` can carry it. The step
itself runs in a child process: its memory goes back when it ends, its peak is measured, its output is its
log, and it dies with whoever asked for it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_surgery.building.graph import Store
from qwen_surgery.building.step import decode, encode, load
from qwen_surgery.errors import Missed, Refused, SurgeryError, ToolFailed, Usage
from qwen_surgery.files import write_whole
from qwen_surgery.toolchain.environment import log_tail, run_guarded

_ERRORS = {error.__name__: error for error in (Missed, Refused, Usage)}


@dataclass(frozen=True)
class Job:
    """A task to run. ``params`` are its step's, as JSON; ``needs``: task -> folder."""

    name: str
    key: str
    action: str
    params: dict[str, Any]
    needs: dict[str, Path]
    store: Path
    logs: Path


@dataclass(frozen=True)
class Failure:
    """An error, in a form that travels between processes and versions of Python."""

    kind: str
    message: str
    hint: str = ""
    log_tail: str = ""
    signal: int | None = None

    @classmethod
    def of(cls, error: Exception, task: str) -> Failure:
        if isinstance(error, SurgeryError):
            tail, signal = getattr(error, "log_tail", ""), getattr(error, "signal", None)
            return cls(type(error).__name__, str(error), error.hint, tail, signal)
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            return cls("ToolFailed", f"{task}: {where}{error.strerror or error}")
        return cls("SurgeryError", f"{task}: {type(error).__name__}: {error}")

    def error(self) -> SurgeryError:
        """The error to raise."""
        if self.kind == "ToolFailed":
            return ToolFailed(self.message, hint=self.hint, log_tail=self.log_tail, signal=self.signal)
        return _ERRORS.get(self.kind, SurgeryError)(self.message, hint=self.hint)


@dataclass(frozen=True)
class Ended:
    """How a task ended: what its step said, or why it failed; peak RSS in bytes of its largest process."""

    peak_rss: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None


def run(job: Job) -> Ended:
    """Run *job* and commit its outputs, unless it fails."""
    store = Store(job.store)
    work = store.begin(job.key)
    started = time.monotonic()
    description = work.with_name(work.name + ".json")
    result = work.with_name(work.name + ".result.json")
    try:
        description.write_text(json.dumps(encode(job)))
        ended = _child(job, work, description, result)
        if ended.failure is None:
            store.commit(job.key, work, ended.info, time.monotonic() - started, ended.peak_rss)
        return ended
    except OSError as error:
        return Ended(failure=Failure("ToolFailed", f"{job.name}: {work}: {error.strerror or error}"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for path in (description, result):
            path.unlink(missing_ok=True)


def _child(job: Job, work: Path, description: Path, result: Path) -> Ended:
    """Run :func:`main` in a child process. One that dies without an answer gets one here."""
    log = job.logs / f"{job.name.replace(':', '.')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "qwen_surgery.building.worker", str(work), str(description), str(result)]
    with log.open("wb") as stream:
        status, peak = run_guarded(command, work, env, stream.fileno())
    if result.exists():
        ended: Ended = decode(Ended, json.loads(result.read_text()))
        return Ended(max(peak, ended.peak_rss), ended.info, ended.failure)
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    memory = "signal 9 often means the machine ran out of memory: fewer --jobs need less"
    hint = memory if status == -9 else f"log: {log}"
    signal = -status if status < 0 else None
    return Ended(peak, failure=Failure("ToolFailed", f"{job.name} {how}", hint, log_tail(log), signal))


def main(work: str, description: str, result: str) -> int:
    """The child process: run the step, write its answer whole."""
    job: Job = decode(Job, json.loads(Path(description).read_text()))
    try:
        info = load(job.action, job.params).run(job.needs, Path(work))
        # Tools that the step waited for are its children.
        ended = Ended(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, dict(info))
    except Exception as error:
        if not isinstance(error, SurgeryError | OSError):
            traceback.print_exc()
        ended = Ended(failure=Failure.of(error, job.name))
    own, tools = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    spent = own.ru_utime + own.ru_stime, tools.ru_utime + tools.ru_stime
    print(f"processor time: {spent[0]:.1f} s, its tools {spent[1]:.1f} s", flush=True)
    write_whole(Path(result), json.dumps(encode(ended)).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
