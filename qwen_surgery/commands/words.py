"""The options by which ``verify`` and ``build`` are given questions and a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from qwen_surgery.errors import Refused

_OPTIONS = (
    click.option("--ask", multiple=True, metavar="TEXT", help="Compare the answers to a question."),
    click.option(
        "--ask-file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="A file of questions, one a line.",
    ),
    click.option(
        "--text",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Compare perplexity, KL and best tokens on this text (UTF-8).",
    ),
    click.option(
        "--text-tokens", default=256, show_default=True, type=click.IntRange(1), help="Of the text, at most."
    ),
)


def word_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options; their values go through :func:`words_from`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def words_from(given: Mapping[str, Any]) -> dict[str, Any]:
    """``questions``, ``text`` and ``text_tokens`` of the options. Refused for a file that cannot be read."""
    asked = (line.strip() for line in _read(given["ask_file"]).splitlines())
    return {
        "questions": (*given["ask"], *(line for line in asked if line)),
        "text": _read(given["text"]),
        "text_tokens": given["text_tokens"],
    }


def _read(file: Path | None) -> str:
    return "" if file is None else read_text(file)


def read_text(file: Path) -> str:
    """The text of *file*. Raises Refused where it cannot be read as UTF-8, or is empty."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{file} cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise Refused(f"{file} is empty")
    return text
