"""Show a running build on stderr: a live table on a terminal, a line per event elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from qwen_surgery import console

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qwen_surgery.building.runner import Progress, TaskState

_MARKS = {
    "waiting": "[dim]waiting[/]",
    "running": "[cyan]running[/]",
    "done": "[green]done[/]",
    "failed": "[red]failed[/]",
}
#: Rows of the live table: what runs, what failed, and the last that finished.
_ROWS = 12


def clock(seconds: float) -> str:
    """``7 s``, ``1:05``, ``1:02:03``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Bytes as ``12 MB`` or ``3.4 GB``."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


class Display:
    """Watches runs; use in a ``with`` block. One display serves several runs after one another."""

    def __init__(self) -> None:
        self._live: Any = None
        self._tty = sys.stderr.isatty()

    def __enter__(self) -> Display:
        if self._tty:
            from rich.live import Live

            self._live = Live(console=console.err(), refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A note."""
        console.err().print(text)

    def __call__(self, progress: Progress, event: str) -> None:
        """What :class:`~.runner.Runner` calls."""
        if self._live is not None:
            self._live.update(_table(progress))
        elif event:
            self._line(progress, event)

    def reading(self, what: str, done: int, total: int) -> None:
        """Progress of work that is no task, such as reading the weights."""
        share = f"{what}: {size(done)} of {size(total)}"
        if self._live is not None:
            self._live.update(share)
        elif done == total:
            self.say(share)

    def _line(self, progress: Progress, event: str) -> None:
        what, _, name = event.partition(" ")
        states = list(progress.states.values())
        count = sum(state.state == "done" for state in states)
        head = f"[{count:>{len(str(len(states)))}}/{len(states)}]"
        state = progress.states[name]
        if what == "done":
            self.say(
                f"{head} {name}  {clock(state.seconds)}, {size(state.peak_rss)}; "
                f"{clock(progress.eta())} to go"
            )
        elif what == "failed":
            self.say(f"{head} {name} failed after {clock(state.seconds)}")
        else:
            self.say(f"{head} {name} ...")


def _table(progress: Progress) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    states = list(progress.states.values())
    done = [state for state in states if state.state == "done"]
    table = Table(box=None, pad_edge=False)
    for heading, justify in (("task", "left"), ("state", "left"), ("elapsed", "right"), ("memory", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for state in _shown(states):
        elapsed = time.monotonic() - state.started if state.state == "running" else state.seconds
        memory = size(state.peak_rss) if state.peak_rss else ""
        table.add_row(
            state.name, console.styled(_MARKS[state.state]), clock(elapsed) if elapsed else "", memory
        )
    waiting = sum(state.state == "waiting" for state in states)
    foot = f"{len(done)} of {len(states)} done, {waiting} waiting, {clock(progress.eta())} to go"
    return Group(table, ProgressBar(total=len(states), completed=len(done), width=60), foot)


def _shown(states: list[TaskState]) -> list[TaskState]:
    active = [state for state in states if state.state in ("running", "failed")]
    done = [state for state in states if state.state == "done"]
    waiting = [state for state in states if state.state == "waiting"]
    room = max(0, _ROWS - len(active))
    late = done[-(room // 2 + room % 2) :] if room else []
    return [*late, *active, *waiting[: max(0, room - len(late))]]
