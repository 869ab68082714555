"""Apply planned edits with LibCST, byte-exact outside the statements they name.

Only the top-level statements that hold an edit are parsed with LibCST (parsing all of a 1,400-line file takes
longer than everything else together). Their statements are walked in step with the standard library's tree,
so that a rule may name a statement by its ``ast`` node and LibCST does the writing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import Any

import libcst as cst

from codemods.analysis import syntax
from codemods.analysis.source import Source
from codemods.framework.base import Drop, Edit, EditError, Insert, Move, Rewrite


def apply(source: Source, edits: Sequence[Edit]) -> str:
    """The text with ``edits`` made; raises :class:`EditError` where a statement shares its line."""
    replaced = {}
    for first, last, group in _top_level(source):
        inside = {id(s) for s in syntax.statements(group)} | _nested(group)
        mine = [e for e in edits if id(_target(e)) in inside]
        if mine:
            text = "".join(source.lines[first - 1 : last])
            replaced[first, last] = _rewrite(text, group, mine)
    return source.with_lines(replaced)


def _nested(group: Sequence[ast.stmt]) -> set[int]:
    return {id(n) for stmt in group for n in syntax.walk(stmt) if isinstance(n, ast.stmt)}


def _target(edit: Edit) -> ast.stmt:
    return edit.before if isinstance(edit, Insert) else edit.target


def _top_level(source: Source) -> Iterator[tuple[int, int, list[ast.stmt]]]:
    """Line ranges of the module's statements, those that share a line together."""
    group: list[ast.stmt] = []
    first = last = 0
    for stmt in source.tree.body:
        decorators = [d.lineno for d in getattr(stmt, "decorator_list", [])]
        start, end = min([stmt.lineno, *decorators]), stmt.end_lineno or stmt.lineno
        if group and start <= last:
            group.append(stmt)
            last = max(last, end)
            continue
        if group:
            yield first, last, group
        group, first, last = [stmt], start, end
    if group:
        yield first, last, group


def _rewrite(text: str, group: Sequence[ast.stmt], edits: Sequence[Edit]) -> str:
    module = cst.parse_module(text)
    if module.code != text:
        raise EditError("LibCST does not reproduce this source exactly")
    worker = _Worker(module, edits)
    worker.pair(module.body, group)
    missing = [e for e in edits if id(_target(e)) not in worker.nodes]
    if missing:
        line = _target(missing[0]).lineno
        raise EditError(f"the statement on line {line} shares its line with another")
    return module.with_changes(body=worker.block(module.body, group)).code


class _Worker:
    """One slice being rewritten: ``nodes`` maps the ``ast`` statement to its LibCST statement."""

    def __init__(self, module: cst.Module, edits: Sequence[Edit]) -> None:
        self.module = module
        self.nodes: dict[int, Any] = {}
        self.gone = {id(e.target) for e in edits if isinstance(e, (Drop, Move))}
        self.rewritten = {id(e.target): e for e in edits if isinstance(e, Rewrite)}
        self.ahead: dict[int, list[Insert | Move]] = {}
        for edit in edits:
            if isinstance(edit, (Insert, Move)):
                self.ahead.setdefault(id(edit.before), []).append(edit)
        self.touched = self.gone | set(self.rewritten) | set(self.ahead)

    def pair(self, nodes: Sequence[Any], stmts: Sequence[ast.stmt]) -> None:
        """Walk both trees in step and remember which LibCST statement each ``ast`` statement is."""
        rest = list(stmts)
        for node in nodes:
            if isinstance(node, cst.SimpleStatementLine):
                mine, rest = rest[: len(node.body)], rest[len(node.body) :]
                if len(mine) == 1:
                    self.nodes[id(mine[0])] = node
                continue
            stmt = rest.pop(0)
            self.nodes[id(stmt)] = node
            for inner, block in _paired_blocks(node, stmt):
                if isinstance(inner, cst.IndentedBlock):
                    self.pair(inner.body, block)
                elif isinstance(inner, cst.If):
                    self.pair([inner], block)

    def block(self, nodes: Sequence[Any], stmts: Sequence[ast.stmt]) -> list[Any]:
        """The statements of one block after the edits."""
        out: list[Any] = []
        carried: list[cst.EmptyLine] = []  # comments above a removed statement belong to what surrounds it
        dropping = False
        rest = list(stmts)
        for node in nodes:
            count = len(node.body) if isinstance(node, cst.SimpleStatementLine) else 1
            mine, rest = rest[:count], rest[count:]
            key = id(mine[0]) if len(mine) == 1 else 0
            for edit in self.ahead.get(key, ()):
                new = self._new(edit)
                if not carried and _all_blank(
                    node.leading_lines
                ):  # the blank line goes before the new statement
                    carried, node = list(node.leading_lines), node.with_changes(leading_lines=[])
                out.append(_lead(new[0], carried))
                out += new[1:]
                carried = []
            if key in self.gone:
                if not dropping and not self._is_moved(key):
                    carried = [*carried, *node.leading_lines]
                dropping = True
                continue
            dropping = False
            node = _lead(self._changed(node, mine), carried)
            carried = []
            out.append(node)
        if carried:
            raise EditError("nothing would be left of a block")
        return out

    def _is_moved(self, key: int) -> bool:
        return any(isinstance(e, Move) and id(e.target) == key for es in self.ahead.values() for e in es)

    def _changed(self, node: Any, stmts: Sequence[ast.stmt]) -> Any:
        if len(stmts) != 1:
            return node
        stmt = stmts[0]
        if id(stmt) in self.rewritten:
            return self.rewritten[id(stmt)].make(node)
        inside = (s for s in syntax.walk(stmt) if s is not stmt)
        if isinstance(node, cst.SimpleStatementLine) or not any(id(s) in self.touched for s in inside):
            return node
        for name, (inner, block) in zip(_block_names(node), _paired_blocks(node, stmt), strict=True):
            if isinstance(inner, cst.IndentedBlock):
                new: Any = inner.with_changes(body=self.block(inner.body, block))
            elif isinstance(inner, cst.If):
                new = self._changed(inner, block)
            else:
                continue
            owner = getattr(node, name)
            changed = owner.with_changes(body=new) if isinstance(owner, (cst.Else, cst.Finally)) else new
            node = node.with_changes(**{name: changed})
        return node

    def _new(self, edit: Insert | Move) -> list[Any]:
        """The statements an edit puts in. A moved statement takes its comments along, not its blank lines."""
        if isinstance(edit, Move):
            node = self.nodes[id(edit.target)]
            return [node.with_changes(leading_lines=[x for x in node.leading_lines if x.comment])]
        return list(cst.parse_module(edit.text, self.module.config_for_parsing).body)


def _all_blank(lines: Sequence[cst.EmptyLine]) -> bool:
    return bool(lines) and not any(line.comment for line in lines)


def _lead(node: Any, lines: Sequence[cst.EmptyLine]) -> Any:
    return node.with_changes(leading_lines=[*lines, *node.leading_lines]) if lines else node


def _block_names(node: Any) -> list[str]:
    """The fields of a compound statement that hold blocks this module can edit."""
    names = ["body"] if hasattr(node, "body") else []
    names += ["orelse"] if getattr(node, "orelse", None) is not None else []
    return names + (["finalbody"] if getattr(node, "finalbody", None) is not None else [])


def _paired_blocks(node: Any, stmt: ast.stmt) -> Iterator[tuple[Any, list[ast.stmt]]]:
    for name in _block_names(node):
        owner = getattr(node, name)
        inner = owner.body if isinstance(owner, (cst.Else, cst.Finally)) else owner
        yield inner, getattr(stmt, name)
