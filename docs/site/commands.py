"""A page per command, from what click knows of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from qwen_surgery import extras
from qwen_surgery.cli import COMMANDS, root

FOLDER = "commands"


def pages() -> dict[str, str]:
    """The page of every command, and the index."""
    with click.Context(root, info_name="qwen-surgery") as context:
        made = {f"{FOLDER}/{name}.md": _page(context, name) for name in COMMANDS}
    return {f"{FOLDER}/index.md": _index(), **made}


def _index() -> str:
    rows = [f"| [`{name}`]({name}.md) | {said} |" for name, (_, said) in COMMANDS.items()]
    return "\n".join(["# Commands", "", "| command | what it does |", "|---|---|", *rows, "", _CODES])


_CODES = """\
Exit codes, the same for every command, have [a page of their own](../exit-codes.md). `--json` prints one JSON
document, alone on stdout, also when a command refuses. `qwen-surgery --debug COMMAND ...` shows a traceback.
"""


def _page(context: click.Context, name: str) -> str:
    command = root.get_command(context, name)
    assert command is not None
    parts = [f"# {name}", *_parts(context, command, name)]
    if needed := extras.OF_COMMAND.get(name):
        parts.append(f"Needs the extra packages of `pip install 'qwen-surgery[{','.join(needed)}]'`.")
    else:
        parts.append("Needs the core packages alone.")
    return "\n\n".join(parts) + "\n"


def _parts(context: click.Context, command: click.Command, name: str) -> Iterator[str]:
    """Usage, description and options; of a group, those of its commands too."""
    with click.Context(command, info_name=name, parent=context) as own:
        yield f"```\n{command.get_usage(own).removeprefix('Usage: ')}\n```"
        yield _prose(command)
        if rows := [_row(parameter, own) for parameter in command.params if _shown(parameter)]:
            yield "\n".join(["| option | what it means |", "|---|---|", *rows])
        if isinstance(command, click.Group):
            for below in command.list_commands(own):
                found = command.get_command(own, below)
                assert found is not None
                yield f"## {name} {below}"
                yield from _parts(own, found, below)


def _prose(command: click.Command) -> str:
    """The help text; what click is told to leave as it is (a line of \\b) keeps its lines."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    kept = [f"```\n{p.removeprefix(chr(8)).strip()}\n```" if p.startswith("\b") else p for p in paragraphs]
    return "\n\n".join(kept)


def _shown(parameter: click.Parameter) -> bool:
    return isinstance(parameter, click.Option) and not parameter.hidden


def _row(parameter: click.Parameter, context: click.Context) -> str:
    record = parameter.get_help_record(context)
    assert record is not None
    option, said = record
    # A pipe would end the table's cell, and click's name for a kind of value is no HTML.
    return f"| `{option.replace('|', ' / ')}` | {said.replace('|', chr(92) + '|').replace('<', '&lt;')} |"
