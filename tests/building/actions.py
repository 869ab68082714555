"""Small steps for graph tests: they run in the build's own worker processes, without TPU-MLIR."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_surgery.building.step import PLACE, Step
from qwen_surgery.errors import Refused, ToolFailed


@dataclass(frozen=True)
class Write(Step):
    """``out.txt``: the parameter ``text`` and behind it what the needed tasks wrote, in order."""

    text: str
    sleep: float = field(default=0.0, metadata=PLACE)
    count: str = field(default="", metadata=PLACE)

    def run(self, needs: Mapping[str, Path], work: Path) -> dict[str, Any]:
        parts = [self.text, *(needs[name].joinpath("out.txt").read_text() for name in sorted(needs))]
        time.sleep(self.sleep)
        (work / "out.txt").write_text("+".join(parts))
        if self.count:
            # One line per run, outside the store: what really ran, and how often.
            with Path(self.count).open("a") as stream:
                stream.write(self.text + "\n")
        return {"length": len(parts)}


class Refuse(Step):
    """Writes half an output, then refuses."""

    def run(self, needs: Mapping[str, Path], work: Path) -> dict[str, Any]:
        (work / "out.txt").write_text("half")
        raise Refused("the input is bad", hint="use another")


class Fail(Step):
    """A failing tool."""

    def run(self, needs: Mapping[str, Path], work: Path) -> dict[str, Any]:
        raise ToolFailed("block_0: model_deploy failed with status 1", log_tail="last words", signal=7)


class Die(Step):
    """Killed as the kernel kills when memory runs out."""

    def run(self, needs: Mapping[str, Path], work: Path) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


class Crash(Step):
    """A bug."""

    def run(self, needs: Mapping[str, Path], work: Path) -> dict[str, Any]:
        raise KeyError("missing")


@dataclass(frozen=True)
class Overlap(Step):
    """Says how many of its kind were at work at the same time."""

    place: Path

    def run(self, needs: Mapping[str, Path], work: Path) -> dict[str, Any]:
        mine = self.place / str(os.getpid())
        mine.touch()
        time.sleep(0.4)
        seen = len(list(self.place.iterdir()))
        mine.unlink()
        return {"seen": seen}
