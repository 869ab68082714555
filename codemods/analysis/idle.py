"""Assignments that leave every name as it was, read as a look at the name on their right.

``x = x``, and the second half of ``kept = x; ...; x = kept`` where nothing in between binds either name. They
stay in the text. In the tree that the rules read, each is an expression statement: its name is needed there,
and nothing is bound.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from codemods.analysis import syntax

#: ``a = b`` to the end of a statement, as it is mostly written.
_COPY = re.compile(r"(?<![\w.])([^\W\d]\w*) *= *([^\W\d]\w*) *(?=[;#\r\n]|$)")


def settle(text: str, tree: ast.Module) -> None:
    """Put a look in place of each such assignment in the functions of ``tree``, before anything reads it.

    Files whose ``text`` has no such pair, as nearly all have none, are not walked for them.
    """
    copies = set(_COPY.findall(text))
    if not any((value, name) in copies for name, value in copies):
        return
    for function in reversed(list(_functions(tree))):  # those inside first
        if any(_copied(stmt) for stmt in syntax.statements(function.body)):
            inside = list(ast.walk(function))
            if not any(isinstance(n, (ast.Global, ast.Nonlocal)) for n in inside):
                _settle(function.body, _bound_otherwise(inside))


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function below ``node``, those in functions and classes too."""
    for block in syntax.blocks(node):
        for stmt in block:
            if isinstance(stmt, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield stmt
            yield from _functions(stmt)


def _bound_otherwise(inside: list[ast.AST]) -> set[str]:
    """Names that are local to a function also without its assignments of one name to another."""
    given = {n.arg for n in inside if isinstance(n, ast.arg)}
    copies = {id(n.targets[0]) for n in inside if isinstance(n, ast.Assign) and _copied(n)}
    stored = (n for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return given | {n.id for n in stored if id(n) not in copies}


def _settle(block: list[ast.stmt], names: set[str]) -> None:
    copies: dict[str, str] = {}  # a name, and the one whose value it has
    for i, stmt in enumerate(block):
        if isinstance(stmt, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue  # functions are settled on their own
        for inner in syntax.blocks(stmt):
            _settle(inner, names)
        copied = _copied(stmt)
        if copied is not None:
            name, value = copied
            if name in names and (value == name or copies.get(value) == name):
                block[i] = ast.copy_location(ast.Expr(stmt.value), stmt)  # type: ignore[attr-defined]
                continue
        bound = syntax.binds(stmt)
        copies = {k: v for k, v in copies.items() if k not in bound and v not in bound}
        if copied is not None:
            copies[copied[0]] = copied[1]


def _copied(stmt: ast.stmt) -> tuple[str, str] | None:
    """``a`` and ``b`` of ``a = b``."""
    if isinstance(stmt, ast.Assign) and len(stmt.targets) == 1:
        target, value = stmt.targets[0], stmt.value
        if isinstance(target, ast.Name) and isinstance(value, ast.Name):
            return target.id, value.id
    return None
