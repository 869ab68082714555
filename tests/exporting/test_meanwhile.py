"""Work done in a forked copy comes back whole, and its errors are the ordinary ones."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from qwen_surgery.errors import Refused
from qwen_surgery.exporting.meanwhile import meanwhile


def test_the_result_comes_from_another_process() -> None:
    """Run in a Python of its own: this one may have threads by now, which a fork would lose."""
    program = """
import os
from qwen_surgery.exporting.meanwhile import meanwhile
pid, data = meanwhile(lambda: (os.getpid(), b"x" * 1_000_000))()
print(pid != os.getpid(), len(data))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True 1000000\n"


def test_beside_other_threads_the_result_is_made_here() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert meanwhile(os.getpid)() == os.getpid()
    finally:
        stop.set()
        thread.join()


def test_an_error_is_raised_here_with_its_hint() -> None:
    def refuse() -> None:
        raise Refused("no", hint="do this")

    with pytest.raises(Refused, match="no") as caught:
        meanwhile(refuse)()
    assert caught.value.hint == "do this"


def test_what_cannot_be_sent_is_made_here() -> None:
    assert meanwhile(lambda: lambda: 3)()() == 3
