"""Work done in a forked copy comes back whole, and its errors are the ordinary ones."""

from __future__ import annotations

import os

import pytest

from qwen_surgery.errors import Refused
from qwen_surgery.exporting.meanwhile import meanwhile


def test_the_result_comes_from_another_process() -> None:
    wait = meanwhile(lambda: (os.getpid(), b"x" * 1_000_000))
    pid, data = wait()
    assert pid != os.getpid()
    assert len(data) == 1_000_000


def test_an_error_is_raised_here_with_its_hint() -> None:
    def refuse() -> None:
        raise Refused("no", hint="do this")

    with pytest.raises(Refused, match="no") as caught:
        meanwhile(refuse)()
    assert caught.value.hint == "do this"


def test_what_cannot_be_sent_is_made_here() -> None:
    assert meanwhile(lambda: lambda: 3)()() == 3
