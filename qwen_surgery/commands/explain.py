"""``qwen-surgery explain``: what a codemod does, why, with examples, and when it declines."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from qwen_surgery import console
from qwen_surgery.errors import Usage

if TYPE_CHECKING:
    from qwen_surgery.patching.explaining import Page


@click.command("explain")
@click.argument("codemod", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, alone on stdout.")
def command(codemod: str | None, as_json: bool) -> int:
    """Say what CODEMOD does, why the chip wants it, and when it declines; list all without CODEMOD."""
    from qwen_surgery.patching import explaining

    found = explaining.everything()
    if codemod is None:
        if as_json:
            console.print_json([page.to_json() for page in found.values()])
        else:
            _list(found)
        return 0
    page = explaining.find(codemod)
    if page is None:
        raise Usage(f"no codemod is called {codemod!r}", hint=f"there are: {', '.join(found)}")
    if as_json:
        console.print_json(page.to_json())
    else:
        _show(page)
    return 0


def _list(found: dict[str, Page]) -> None:
    width = max(len(name) for name in found)
    for name, page in found.items():
        console.line(f"{name:<{width}}  {page.title}")


def _show(page: Page) -> None:
    text = page.to_text()
    if not sys.stdout.isatty():
        console.text(text)
        return
    from rich.markdown import Markdown

    console.out().print(Markdown(page.to_markdown(), code_theme="ansi_light"))
