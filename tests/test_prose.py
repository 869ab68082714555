"""Prose is laid out by people: no line breaks in the middle for want of looking, and examples that parse."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

pytestmark = pytest.mark.repository

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    path
    for room in ("codemods", "golden", "graph_passes", "qwen_surgery")
    for path in sorted((ROOT / room).rglob("*.py"))
]
#: A line that the next word would have lengthened to no more than this was not broken by hand.
ROOM = 88
_LIST = re.compile(r"\s*(- |\* |\d+\. |#:|>>>|\||::)")


def too_early(lines: list[str]) -> Iterator[int]:
    """Indices of lines that end although the next line's first word had plenty of room."""
    literal = False
    for i, (line, following) in enumerate(pairwise(lines)):
        words = following.split()
        literal = line.endswith("::") or (literal and not line[:1].strip())
        if literal:
            continue
        same = len(line) - len(line.lstrip()) == len(following) - len(following.lstrip())
        listed = _LIST.match(line) or _LIST.match(following)
        if not words or not line.strip() or not same or listed or line.rstrip()[-1] in ":.":
            continue
        if len(line) + 1 + len(words[0]) <= ROOM:
            yield i


def docstrings(tree: ast.Module) -> Iterator[tuple[int, list[str]]]:
    """First line number and lines of each docstring, the quotes as they stand in the file not counted."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            expression = node.body[0]
            assert isinstance(expression, ast.Expr) and isinstance(expression.value, ast.Constant)
            yield expression.lineno, expression.value.value.splitlines()


def wrapped_docstrings(text: str) -> list[str]:
    found = []
    for at, lines in docstrings(ast.parse(text)):
        lines = [" " * (len(lines[-1]) - len(lines[-1].lstrip())) + lines[0], *lines[1:]]
        found += [f"{at + i}: {lines[i].strip()}" for i in too_early(lines) if i or lines[1].strip()]
        ends = [
            i for i, line in enumerate(lines) if line.strip() and not "".join(lines[i + 1 : i + 2]).strip()
        ]
        found += [f"{at + i}: {lines[i].strip()}" for i in ends if i == 1 and len(lines[i].split()) == 1]
    return found


def fragments(text: str) -> Iterator[list[tokenize.TokenInfo]]:
    """Runs of string literals that Python joins, one a line."""
    run: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING and token.string[0] != "b":
            run.append(token)
        elif token.type not in (tokenize.NL, tokenize.COMMENT):
            if len(run) > 1:
                yield run
            run = []


def wrapped_fragments(text: str) -> list[str]:
    """Joined literals of which one ends although the next one's first word had room on its line."""
    found = []
    for run in fragments(text):
        for here, following in pairwise(run):
            body = ast.literal_eval(here.string.lstrip("f")) if "{" not in here.string else here.string[:-1]
            word = following.string.lstrip("rbf")[1:].split(" ")[0]
            if body.endswith(" ") and here.end[1] + len(word) + 1 <= ROOM:
                found.append(f"{here.start[0]}: {here.string}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_is_broken_where_a_word_had_room(path: Path) -> None:
    """Text that was wrapped twice by a machine reads like a bad telegram, and it gets published."""
    text = path.read_text(encoding="utf-8")
    assert wrapped_docstrings(text) == []
    assert wrapped_fragments(text) == []


def test_what_a_machine_wrapped_is_seen() -> None:
    docstring = (
        '"""One line that goes on for a while and is then broken; ``skip``\nnames\nwhat to leave out.\n"""\n'
    )
    assert len(wrapped_docstrings(docstring)) == 2
    assert len(wrapped_docstrings('def f():\n    """' + "word " * 18 + 'and one\n    more.\n    """\n')) == 1
    assert len(wrapped_fragments('WHY = (\n    "filled with "\n    "the lowest "\n    "value"\n)\n')) == 2
    assert wrapped_fragments('WHY = "one" "two"\n') == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.name)
def test_code_on_a_page_parses(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        ast.parse(block)
