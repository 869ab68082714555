"""Which branches of a checkout's code ran while its twin did."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any


class Watch:
    """Lines of one module that ran inside :meth:`watching`."""

    def __init__(self, module: ModuleType) -> None:
        spec: Any = module.__spec__
        self._file = str(spec.origin)
        self._source = str(spec.loader.get_source(module.__name__))
        self.lines: set[int] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, lines of the module are noted; another tracer that runs gets its turn back afterwards."""
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        return self._line if frame.f_code.co_filename == self._file else None

    def _line(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line":
            self.lines.add(frame.f_lineno)
        return self._line

    def not_entered(self) -> list[str]:
        """``line N: if ...`` of each arm that did not run, in functions that did.

        Arms that end in ``raise`` are left out.
        """
        tree = ast.parse(self._source)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        found = {arm for function in functions if self._ran(function.body) for arm in self._arms(function)}
        return [text for _, text in sorted(found)]

    def _ran(self, body: list[ast.stmt]) -> bool:
        return any(line in self.lines for node in body for line in range(node.lineno, _end(node) + 1))

    def _arms(self, function: ast.FunctionDef) -> list[tuple[int, str]]:
        found = []
        for node in ast.walk(function):
            if not isinstance(node, ast.If) or node.test.lineno not in self.lines:
                continue
            test = ast.unparse(node.test)
            for word, body in (("if", node.body), ("else of if", node.orelse)):
                if body and not self._ran(body) and not _only_raises(body):
                    found.append((body[0].lineno, f"line {body[0].lineno}: {word} {test}"))
        return found


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _only_raises(body: list[ast.stmt]) -> bool:
    return isinstance(body[-1], ast.Raise)
