"""What a codemod says about itself, read from its class's docstring.

The first line is its title. After it come sections, each a heading on a line of its own and indented text::

    Set the flag that switches on torch 2's fused attention to False.

    Why
        It exports as one operator that the compiler does not read.

    Declines
        - the call is not guarded by a flag

A class that builds on another one inherits the sections it does not write itself.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

WHY, BEFORE, AFTER, DECLINES = "Why", "Checked before", "Checked after", "Declines"
SECTIONS = (WHY, BEFORE, AFTER, DECLINES)


@dataclass(frozen=True)
class Prose:
    """The parts of one docstring, each on a single line; empty where it has no such section."""

    title: str  #: one line: what it does
    why: str  #: the TPU or ONNX reason
    precondition: str  #: what is checked before the edit
    postcondition: str  #: what is checked after it
    declines: tuple[str, ...]  #: when it declines


def read(cls: type) -> Prose:
    """The prose of ``cls``. Raises ValueError, naming the class, for a heading that is no section's."""
    parts: dict[str, list[str]] = {}
    for one in reversed(cls.__mro__):
        if "name" in vars(one):  # a codemod, not one of their base classes
            parts |= _parts(one)
    why, before, after = (" ".join(parts.get(name, ())) for name in (WHY, BEFORE, AFTER))
    return Prose(" ".join(parts[""]).rstrip("."), why, before, after, _items(parts.get(DECLINES, [])))


def _items(lines: list[str]) -> tuple[str, ...]:
    """The items of a list, each on one line."""
    items: list[str] = []
    for line in lines:
        if line.startswith("- "):
            items.append(line[2:])
        else:
            items[-1] += f" {line}"
    return tuple(items)


def _parts(cls: type) -> dict[str, list[str]]:
    """Heading to lines; the title has the empty heading."""
    title, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")
    heading, parts = "", {"": title.splitlines()}
    for line in filter(None, rest.splitlines()):
        if line in SECTIONS:
            heading = line
            parts[heading] = []
        elif heading and line.startswith(" "):
            parts[heading].append(line.strip())
        else:
            raise ValueError(f"{cls.__qualname__}: {line!r} is none of the sections {', '.join(SECTIONS)}")
    return parts
