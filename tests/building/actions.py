"""Small actions for graph tests: they run in the build's own worker processes, without TPU-MLIR."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from qwen_surgery.errors import Refused, ToolFailed


def write(params: dict[str, Any], needs: dict[str, Path], work: Path) -> dict[str, Any]:
    """``out.txt``: the parameter ``text`` and behind it what the needed tasks wrote, in order."""
    parts = [params["text"], *(needs[name].joinpath("out.txt").read_text() for name in sorted(needs))]
    time.sleep(params.get("sleep", 0.0))
    (work / "out.txt").write_text("+".join(parts))
    if params.get("count"):
        # One line per run, outside the store: what really ran, and how often.
        with Path(params["count"]).open("a") as stream:
            stream.write(params["text"] + "\n")
    return {"length": len(parts)}


def refuse(params: dict[str, Any], needs: dict[str, Path], work: Path) -> None:
    """Writes half an output, then refuses."""
    (work / "out.txt").write_text("half")
    raise Refused("the input is bad", hint="use another")


def fail(params: dict[str, Any], needs: dict[str, Path], work: Path) -> None:
    """A failing tool."""
    raise ToolFailed("block_0: model_deploy failed with status 1", log_tail="last words")


def die(params: dict[str, Any], needs: dict[str, Path], work: Path) -> None:
    """Killed as the kernel kills when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill(params: dict[str, Any], needs: dict[str, Path], work: Path) -> None:
    """Writes until the disk is full."""
    with (work / "big").open("wb") as stream:
        while True:
            stream.write(bytes(1 << 20))


def overlap(params: dict[str, Any], needs: dict[str, Path], work: Path) -> dict[str, Any]:
    """Says how many actions were at work at the same time as this one."""
    place = Path(params["place"])
    mine = place / str(os.getpid())
    mine.touch()
    time.sleep(0.4)
    seen = len(list(place.iterdir()))
    mine.unlink()
    return {"seen": seen}
