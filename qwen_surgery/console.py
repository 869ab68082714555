"""Where output goes: results to stdout, everything else (progress, notes, errors) to stderr.

Everything shown goes through here, and here everything is made printable. JSON escapes on its own.

rich is imported on first use, so that commands which print little start fast.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


#: Control characters, marks that turn the direction of text, line and paragraph separators, halves of
#: characters: none of them shows, all of them can change what is shown. Line ends and tabs stay.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """*text* as a terminal may be given it: what does not show is written as an escape.

    Names, comments and messages come from files that anybody may have written: an escape sequence in one
    could set the window's title, clear the screen, or fake a line of this program.
    """
    return _HIDDEN.sub(lambda match: ascii(match[0])[1:-1], text)


def line(text: str, *, err: bool = False) -> None:
    """Print one line, whatever *text* holds, on stdout or stderr."""
    click.echo(printable(text).replace("\n", "\\n"), err=err)


def text(block: str, *, err: bool = False) -> None:
    """Print *block*, which may have several lines."""
    click.echo(printable(block), err=err)


def styled(markup: str) -> Text:
    """Text from rich's markup: what comes from outside must have gone through ``rich.markup.escape``."""
    from rich.text import Text

    return Text.from_markup(markup)


@cache
def _printing() -> type[Console]:
    """rich's console, which takes no markup from plain text and shows nothing that is not printable."""
    from rich import console
    from rich.segment import Segment
    from rich.theme import Theme

    # The terminal's own sixteen colours, which its user has made readable, dark or light; rich's bars and
    # headings have fixed ones.
    plain = Theme(
        {"bar.back": "dim", "bar.complete": "cyan", "bar.finished": "green", "bar.pulse": "cyan"}
        | {"markdown.h2": "bold", "markdown.h3": "bold", "markdown.code": "bold"}
    )

    class Printing(console.Console):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, theme=plain)

        def render(
            self, renderable: console.RenderableType, options: console.ConsoleOptions | None = None
        ) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                plain = segment.control or not _HIDDEN.search(segment.text)
                yield segment if plain else Segment(printable(segment.text), segment.style)

    return Printing


def on(stream: TextIO, *, width: int | None = None) -> Console:
    """A console on *stream*. Colours only on a terminal; NO_COLOR is honoured by rich."""
    tty = stream.isatty()
    return _printing()(file=stream, highlight=False, markup=False, soft_wrap=not tty, width=width)


def fits(printer: Console, table: Table) -> bool:
    """Whether *table* needs no folding on *printer*."""
    unbounded = printer.options.update(max_width=10_000)
    return printer.measure(table, options=unbounded).maximum <= printer.width


@cache
def out() -> Console:
    """The console for results (stdout)."""
    return _printing()(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())


@cache
def err() -> Console:
    """The console for notes, progress and errors (stderr)."""
    return _printing()(stderr=True, highlight=False, markup=False, soft_wrap=not sys.stderr.isatty())


_documents = 0


def print_json(data: Any) -> None:
    """Write *data* alone to stdout, as one JSON document."""
    global _documents
    _documents += 1
    json.dump(data, sys.stdout, indent=2, ensure_ascii=True)
    sys.stdout.write("\n")


def documents() -> int:
    """How many :func:`print_json` has written so far: a second of one call would make both unreadable."""
    return _documents


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each phase on stderr, where that is a terminal; call what this gives with a phase, how much
    is done and of how much.
    """
    from rich.progress import Progress, TaskID

    with Progress(console=err(), transient=True, disable=not err().is_terminal) as bars:
        phases: dict[str, TaskID] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in phases:
                phases[phase] = bars.add_task(phase, total=total)
            bars.update(phases[phase], completed=done)

        yield show
