"""Run one parser on many mutated inputs: ``python -m tests.fuzz.run PARSER --inputs N --first I``.

Prints one JSON object: how many inputs, how many were read whole, and each kind of failure with its count and
the number of its first input (``--first I --inputs 1`` runs it again). A failure is any exception but the
program's own errors, more than 5 s for one input, or more than 1 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import tempfile
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

from qwen_surgery.errors import SurgeryError
from tests.fuzz.targets import TARGETS, Read

SECONDS, MEMORY = 5, 1 << 30


class TooSlow(BaseException):
    """One input took longer than :data:`SECONDS`."""


def _alarm(_signal: int, _frame: Any) -> None:
    raise TooSlow(f"more than {SECONDS} s")


def _limit_memory() -> None:
    """Let the process grow by :data:`MEMORY` from here on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _failure(read: Read, own: tuple[type[Exception], ...]) -> tuple[str, str]:
    """('', how it ended) when the input ends as it should, else what went wrong and where."""
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process: a busy machine is not its fault
        read()
        return "", "read"
    except own as error:
        return ("", "refused") if str(error) else ("an error without a word", type(error).__name__)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/tests/fuzz/" not in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "here"
        return f"{type(error).__name__} at {where}", str(error)[:200]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def run(name: str, inputs: int, first: int = 0) -> dict[str, Any]:
    """Inputs *first* to *first* + *inputs* of the parser *name*; see the module's text."""
    target = TARGETS[name]
    own = (SurgeryError, *target.errors)
    failures: dict[str, dict[str, Any]] = {}
    whole, slowest, began = 0, 0.0, time.monotonic()
    signal.signal(signal.SIGPROF, _alarm)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        write, read = target.prepare(Path(folder))
        _limit_memory()
        for number in range(first, first + inputs):
            write(Random(f"{name}:{number}"))
            start = time.process_time()
            wrong, said = _failure(read, own)
            slowest = max(slowest, time.process_time() - start)
            whole += said == "read"
            if wrong:
                known = failures.setdefault(wrong, {"count": 0, "first": number, "says": said})
                known["count"] += 1
    return {
        "parser": name,
        "inputs": inputs,
        "read": whole,
        "failures": failures,
        "slowest": round(slowest, 3),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parser", choices=[*TARGETS, "all"])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    for name in TARGETS if options.parser == "all" else [options.parser]:
        print(json.dumps(run(name, options.inputs, options.first)), flush=True)


if __name__ == "__main__":
    main()
