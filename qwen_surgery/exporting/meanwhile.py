"""Do one thing in a copy of this process while this one imports torch, which takes as long as the rest."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def meanwhile(function: Callable[[], _T]) -> Callable[[], _T]:
    """Start *function* in a forked copy of this process; call what is returned to wait for its result.

    The result must be picklable. When the copy fails, *function* runs here, so that its errors are the
    ordinary ones; so it does where there is no fork, or threads that a fork would lose.
    """
    if not hasattr(os, "fork") or threading.active_count() > 1:
        return function
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(function, write_end)
    os.close(write_end)

    def wait() -> _T:
        with os.fdopen(read_end, "rb") as stream:
            data = stream.read()
        _, status = os.waitpid(child, 0)
        return pickle.loads(data) if status == 0 else function()

    return wait


def _answer(function: Callable[[], object], write_end: int) -> None:
    """The copy's life: write the result to the pipe and end at once, without this program's exit handlers."""
    status = 1
    try:
        data = pickle.dumps(function())
        with os.fdopen(write_end, "wb") as stream:
            stream.write(data)
        status = 0
    finally:
        os._exit(status)
