"""Run one task: in a process of its own, whichever machine that is on.

:func:`run` is what executors get; it needs nothing but the store's folder (a shared one when workers are
elsewhere) and a plain
description of the task, so any ``concurrent.futures.Executor`` can carry it. The task itself runs in a
child process: its memory goes back when it ends, its peak is measured, its output is its log, and it dies
with whoever asked for it.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from qwen_surgery.building.graph import Store
from qwen_surgery.errors import Missed, Refused, SurgeryError, ToolFailed, Usage
from qwen_surgery.toolchain.environment import log_tail, run_guarded

_ERRORS = {error.__name__: error for error in (Missed, Refused, ToolFailed, Usage, SurgeryError)}


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the task described by *spec* and commit its outputs; what it said about itself.

    *spec*: ``name``, ``key``, ``action``, ``params``, ``places``, ``needs`` (name -> folder), ``store``,
    ``logs``. Gives ``seconds`` and ``peak_rss``, or ``error`` (class name, message, hint, log tail):
    exceptions do not travel well between versions of Python, plain data does.
    """
    store = Store(Path(spec["store"]))
    work = store.begin(spec["key"])
    started = time.monotonic()
    log = Path(spec["logs"]) / f"{spec['name'].replace(':', '.')}.log"
    description = work.with_name(work.name + ".json")
    result = work.with_name(work.name + ".result.json")
    try:
        description.write_text(json.dumps(spec))
        peak = _child(work, description, result, log)
        answer = json.loads(result.read_text())
        if "error" in answer:
            return answer
        seconds = time.monotonic() - started
        peak = max(peak, answer.get("tool_rss", 0))
        store.commit(spec["key"], work, answer["info"], seconds, peak)
        return {"info": answer["info"], "seconds": seconds, "peak_rss": peak}
    except OSError as error:
        return {"error": ["ToolFailed", f"{spec['name']}: {work}: {error.strerror or error}", "", ""]}
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for path in (description, result):
            path.unlink(missing_ok=True)


def _child(work: Path, description: Path, result: Path, log: Path) -> int:
    """Run :func:`main` in a child process; its peak RSS. One that dies without an answer gets one here."""
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "qwen_surgery.building.worker", str(work), str(description), str(result)]
    with log.open("wb") as stream:
        status, peak = run_guarded(command, work, env, stream.fileno())
    if not result.exists():
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        name = json.loads(description.read_text())["name"]
        hint = (
            "signal 9 often means the machine ran out of memory: fewer --jobs need less"
            if status == -9
            else ""
        )
        answer = {"error": ["ToolFailed", f"{name} {how}", hint or f"log: {log}", log_tail(log)]}
        result.write_text(json.dumps(answer))
    return peak


def raise_error(error: list[str]) -> None:
    """Raise what a task's answer describes."""
    kind, message, hint, tail = error
    if kind == "ToolFailed":
        raise ToolFailed(message, hint=hint, log_tail=tail)
    raise _ERRORS.get(kind, SurgeryError)(message, hint=hint)


def main(work: str, description: str, result: str) -> int:
    """The child process: call the action, write its answer whole."""
    import resource

    spec = json.loads(Path(description).read_text())
    try:
        module, function = spec["action"].split(":")
        action = getattr(importlib.import_module(module), function)
        info = action(
            {**spec["params"], **spec["places"]},
            {name: Path(p) for name, p in spec["needs"].items()},
            Path(work),
        )
        # Tools that the action waited for are its children.
        tool_rss = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        answer: dict[str, Any] = {"info": info or {}, "tool_rss": tool_rss}
    except SurgeryError as error:
        kind = type(error).__name__
        answer = {"error": [kind, str(error), error.hint, getattr(error, "log_tail", "")]}
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        answer = {"error": ["ToolFailed", f"{spec['name']}: {where}{error.strerror or error}", "", ""]}
    except Exception as error:
        traceback.print_exc()
        answer = {"error": ["SurgeryError", f"{spec['name']}: {type(error).__name__}: {error}", "", ""]}
    own, tools = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    spent = own.ru_utime + own.ru_stime, tools.ru_utime + tools.ru_stime
    print(f"processor time: {spent[0]:.1f} s, its tools {spent[1]:.1f} s", flush=True)
    temporary = Path(result + ".part")
    temporary.write_text(json.dumps(answer))
    temporary.replace(result)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
