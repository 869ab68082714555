"""Ways to write the same program differently, and ways to change what it means.

Each takes and gives source text. A *rewriting* keeps the meaning; a *mutation* changes it at one place
and says whether it found that place.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator

from codemods.analysis import syntax

NOISE = ("# a note", "# qwen: `key = quantise(key)` was here", "", "#", "# if attention_mask is not None:")


def methods(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """The methods of the attention classes of ``tree``."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and "Attention" in node.name:
            yield from (n for n in node.body if isinstance(n, ast.FunctionDef))


def reformatted(text: str) -> str:
    """Every line laid out anew, all comments gone, all redundant parentheses gone."""
    return ast.unparse(ast.parse(text)) + "\n"


def with_noise(text: str, rng: random.Random) -> str:
    """Comments and blank lines put before statements inside the attention methods."""
    lines = text.splitlines(keepends=True)
    starts = {
        (s.lineno, s.col_offset)
        for m in methods(ast.parse(text))
        for s in syntax.statements(m.body)
        if _starts(s, lines)
    }
    for line, column in sorted(starts, reverse=True):
        if rng.random() < 0.5:
            note = rng.choice(NOISE)
            lines.insert(line - 1, (" " * column + note if note else "") + "\n")
    return "".join(lines)


def _starts(stmt: ast.stmt, lines: list[str]) -> bool:
    """The statement begins its line (``elif`` does not)."""
    line = lines[stmt.lineno - 1]
    return line[: stmt.col_offset].isspace() and not line.lstrip().startswith("elif")


def renamed(text: str, suffix: str = "_r") -> str:
    """Every local name of the attention methods renamed, parameters of all but ``forward`` too."""
    tree = ast.parse(text)
    for method in methods(tree):
        mine = set(syntax.binds(method)) - set(syntax.parameters(method))
        if method.name.startswith("_") and not method.name.startswith("__"):
            mine |= set(syntax.parameters(method)) - {"self"}
        for node in ast.walk(method):
            if isinstance(node, ast.Name) and node.id in mine:
                node.id += suffix
            elif isinstance(node, ast.arg) and node.arg in mine:
                node.arg += suffix
    return ast.unparse(tree) + "\n"


def reordered(text: str, rng: random.Random) -> str:
    """Neighbouring statements of the attention methods swapped where neither depends on the other."""
    tree = ast.parse(text)
    for method in methods(tree):
        for owner in [method, *syntax.statements(method.body)]:
            for block in syntax.blocks(owner):
                for i in range(len(block) - 1):
                    if _independent(block[i], block[i + 1]) and rng.random() < 0.5:
                        block[i], block[i + 1] = block[i + 1], block[i]
    return ast.unparse(tree) + "\n"


def _independent(a: ast.stmt, b: ast.stmt) -> bool:
    plain = all(isinstance(s, (ast.Assign, ast.If)) and _local(s) for s in (a, b))
    crossed = (syntax.binds(a) & (syntax.reads(b) | syntax.binds(b))) | (syntax.binds(b) & syntax.reads(a))
    return plain and not crossed


def _local(stmt: ast.stmt) -> bool:
    """No store but to names, no statement that leaves the block or acts only by its effect."""
    return not any(
        isinstance(n, (ast.Raise, ast.Return, ast.Expr, ast.AugAssign, ast.Assert))
        or (isinstance(n, (ast.Attribute, ast.Subscript)) and isinstance(n.ctx, ast.Store))
        for n in ast.walk(stmt)
    )


def shape(text: str) -> list[str]:
    """The attention methods as sorted statements: equal for two orders of the same statements."""
    return sorted(
        ast.dump(s)
        for m in methods(ast.parse(text))
        for s in syntax.statements(m.body)
        if not any(syntax.blocks(s))
    )


class Mutation(ast.NodeTransformer):
    """Change what a node means wherever ``change`` returns another one; ``hits`` counts them."""

    def __init__(self, change: Callable[[ast.AST], ast.AST | None]) -> None:
        self.change = change
        self.hits = 0

    def visit(self, node: ast.AST) -> ast.AST:
        node = self.generic_visit(node)
        new = self.change(node)
        if new is None:
            return node
        self.hits += 1
        return ast.copy_location(new, node)


def mutated(text: str, change: Callable[[ast.AST], ast.AST | None]) -> str | None:
    """``text`` with ``change`` applied in its attention classes, or None where it found nothing to change."""
    tree = ast.parse(text)
    mutation = Mutation(change)
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            mutation.visit(node)
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n" if mutation.hits else None


def expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body
