"""A Python source file as text, lines and tree, with its bytes kept exactly.

Nothing here executes or imports the file. Newlines (LF, CRLF, CR), a byte order mark, the encoding cookie and
a missing final newline all survive: :meth:`Source.encode` undoes :func:`read`.
"""

from __future__ import annotations

import ast
import codecs
import io
import re
import tokenize
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from codemods.analysis.idle import settle

#: Bytes; upstream's files have about 60,000. Parsing takes a hundred times as much memory.
LARGEST = 4 << 20
#: Levels of nesting; upstream's trees are 25 deep. Beyond a few thousand, parsers run out of stack.
DEEPEST = 250
_NEWLINE = re.compile("\r\n|\r|\n")
Question = ParamSpec("Question")
Answer = TypeVar("Answer")
_SKIP = re.compile(r"qwen-surgery:\s*skip\[([^\]]*)\]")


class SourceError(ValueError):
    """The bytes are not a Python source file this Python can parse. ``line`` is 1-based, or None."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True)
class Suppression:
    """A ``# qwen-surgery: skip[name]`` comment: one per name and comment."""

    line: int
    codemod: str


@dataclass
class Source:
    """A parsed file. ``lines`` keep their newlines; ``tree`` is the standard library's, with positions."""

    text: str
    tree: ast.Module
    encoding: str = "utf-8"
    bom: bytes = b""
    kept: dict[object, Any] = field(default_factory=dict, repr=False)  #: answers of :func:`kept_on_source`

    @cached_property
    def lines(self) -> list[str]:
        ends = [match.end() for match in _NEWLINE.finditer(self.text)]
        starts = [0, *ends]
        return [self.text[a:b] for a, b in zip(starts, [*ends, len(self.text)], strict=True) if b > a]

    @cached_property
    def suppressions(self) -> tuple[Suppression, ...]:
        """The suppression comments. Comments, not strings: a text that only looks like one is not one."""
        if "qwen-surgery:" not in self.text:
            return ()
        found: list[Suppression] = []
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            match = token.type == tokenize.COMMENT and _SKIP.search(token.string)
            if match:
                names = (name.strip() for name in match[1].split(","))
                found.extend(Suppression(token.start[0], name) for name in names if name)
        return tuple(found)

    def with_lines(self, replaced: dict[tuple[int, int], str]) -> str:
        """The text with line ranges (first, last; 1-based, inclusive) replaced."""
        out: list[str] = []
        at = 1
        for (first, last), text in sorted(replaced.items()):
            out += [*self.lines[at - 1 : first - 1], text]
            at = last + 1
        return "".join([*out, *self.lines[at - 1 :]])

    def encode(self, text: str) -> bytes:
        """``text`` in this file's encoding, with its byte order mark. Raises :class:`SourceError` where the
        encoding cannot hold it.
        """
        data = _encoded(text, self.encoding)
        if data is None:
            raise SourceError(f"the edited text cannot be written in the file's encoding, {self.encoding}")
        return self.bom + data


def kept_on_source(
    ask: Callable[Concatenate[Source, Question], Answer],
) -> Callable[Concatenate[Source, Question], Answer]:
    """*ask*, which answers a question about a source, run once for each source and further arguments: rules
    ask again and again, and no source changes."""

    @wraps(ask)
    def asked(source: Source, *about: Question.args, **named: Question.kwargs) -> Answer:
        key = (ask, about, tuple(named.items()))
        if key not in source.kept:
            source.kept[key] = ask(source, *about, **named)
        answer: Answer = source.kept[key]
        return answer

    return asked


def parse(text: str) -> Source:
    """Parse ``text``; raises :class:`SourceError` naming the line that does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in upstream's strings are upstream's business
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            raise SourceError(f"does not parse: {error.msg} (line {error.lineno})", error.lineno) from error
        except (RecursionError, MemoryError) as error:
            raise SourceError("does not parse: it is nested too deeply") from error
        except ValueError as error:
            raise SourceError(f"does not parse: {error}") from error
    _refuse_depth(tree)
    settle(text, tree)
    return Source(text, tree)


def _refuse_depth(tree: ast.Module) -> None:
    """Raise :class:`SourceError` for a tree that the recursive readers of this program could not walk."""
    level: list[ast.AST] = [tree]
    for _ in range(DEEPEST):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return
    line = next((node.lineno for node in level if isinstance(node, ast.stmt | ast.expr)), None)
    raise SourceError(f"is nested more than {DEEPEST} levels deep (line {line})", line)


def _encoded(text: str, encoding: str) -> bytes | None:
    """``text`` in ``encoding``, line by line; None where that is not what the encoding reads as ``text``.

    Some codecs (utf-7, unicode_escape, iso2022_jp) do not give back the bytes that they have read, or make a
    line's bytes depend on the lines before it: with these an edit would change more than its lines.
    """
    try:
        data = b"".join(line.encode(encoding) for line in text.splitlines(keepends=True))
        return data if data.decode(encoding) == text else None
    except (UnicodeError, LookupError):
        return None


@lru_cache(maxsize=4)  # a patch asks what a file is, then edits it: one parse serves both
def read(data: bytes) -> Source:
    """Decode and parse ``data``; raises :class:`SourceError` for what is no Python text. Do not edit it."""
    if len(data) > LARGEST:
        raise SourceError(f"is larger than any modeling file: more than {LARGEST:,} bytes")
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        bom = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
        encoding = "utf-8" if bom else encoding
        text = data[len(bom) :].decode(encoding)
    except (SyntaxError, UnicodeError, LookupError) as error:
        raise SourceError(f"not readable as Python text: {error}") from error
    if _encoded(text, encoding) != data[len(bom) :]:
        raise SourceError(f"is encoded as {encoding}, which does not give back the bytes it was read from")
    source = parse(text)
    source.encoding, source.bom = encoding, bom
    return source
