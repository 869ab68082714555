"""Questions about syntax trees that more than one rule asks. Pure functions over :mod:`ast` nodes."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Answer = TypeVar("Answer")

# fmt: off
#: Calls that have no effect besides their value, by the last part of their name.
PURE_CALLS = frozenset((
    "size", "dim", "finfo", "iinfo", "full", "tensor", "full_like", "to", "type", "type_as", "view",
    "reshape", "float", "bool", "int", "sqrt", "pow", "min", "max", "tril", "ones", "zeros", "item",
    "contiguous", "expand", "expand_as", "unsqueeze", "permute", "transpose", "where", "logical_not", "cat",
))
# fmt: on


def kept_on_node(question: Callable[[ast.AST], Answer]) -> Callable[[ast.AST], Answer]:
    """*question*, answered once for each node: rules ask again and again and change no tree."""
    key = f"_{question.__name__}"

    @functools.wraps(question)
    def asked(node: ast.AST) -> Answer:
        kept = node.__dict__
        if key not in kept:
            kept[key] = question(node)
        answer: Answer = kept[key]
        return answer

    return asked


@kept_on_node
def walk(node: ast.AST) -> list[ast.AST]:
    """``node`` and everything below it."""
    below, at = [node], 0
    while at < len(below):
        current = below[at]
        at += 1
        for name in current._fields:
            value = getattr(current, name, None)
            if isinstance(value, ast.AST):
                below.append(value)
            elif isinstance(value, list):
                below.extend(item for item in value if isinstance(item, ast.AST))
    return below


@kept_on_node
def _calls_below(node: ast.AST) -> dict[str, list[ast.Call]]:
    found: dict[str, list[ast.Call]] = {}
    for call in walk(node):
        if isinstance(call, ast.Call):
            found.setdefault(last_name(call.func), []).append(call)
    return found


@kept_on_node
def reads(node: ast.AST) -> frozenset[str]:
    """Names whose value ``node`` needs; an augmented assignment needs its target, and so does ``del``."""
    names = {n.id for n in walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)}
    added = (n.target for n in walk(node) if isinstance(n, ast.AugAssign))
    return frozenset(names.union(target.id for target in added if isinstance(target, ast.Name)))


@kept_on_node
def binds(node: ast.AST) -> frozenset[str]:
    """Names ``node`` gives a new value (or deletes)."""
    stored = (n for n in walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load))
    return frozenset(n.id for n in stored)


def same(a: ast.AST | None, b: ast.AST | None) -> bool:
    """Equal but for position and load/store context."""
    if a is None or b is None:
        return a is b
    return _shape(a) == _shape(b)


def _shape(node: ast.AST) -> str:
    return ast.dump(node).replace("Store()", "Load()")


def is_name(node: ast.AST | None, name: str | None = None) -> bool:
    return isinstance(node, ast.Name) and (name is None or node.id == name)


def call_name(node: ast.AST) -> str:
    """The last part of a call's function: ``F.softmax(x)`` and ``softmax(x)`` are both ``softmax``."""
    if not isinstance(node, ast.Call):
        return ""
    return last_name(node.func)


def last_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def calls(node: ast.AST, name: str) -> list[ast.Call]:
    """Every call in ``node`` whose function's last part is ``name``."""
    return _calls_below(node).get(name, [])


def is_method_of(node: ast.AST, owner: str) -> bool:
    """True for ``owner.something(...)``."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and is_name(node.func.value, owner)
    )


def on_torch(node: ast.Call) -> bool:
    """A function of a module (``torch.x``, ``nn.functional.x``, ``F.x``), not a tensor's method."""
    root: ast.AST = node.func
    while isinstance(root, ast.Attribute):
        root = root.value
    return is_name(root) and isinstance(root, ast.Name) and root.id in {"torch", "F", "nn"}


def is_pure(node: ast.AST) -> bool:
    """No effect but its value: names, constants, arithmetic, subscripts, and :data:`PURE_CALLS`."""
    for child in walk(node):
        if isinstance(child, (ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr, ast.Lambda)):
            return False
        if isinstance(child, ast.Call):
            name = last_name(child.func)
            if name not in PURE_CALLS or name.endswith("_"):
                return False
    return True


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == name), None)


def constant(node: ast.AST | None) -> object:
    """The value of a literal number or constant, signs included; None for anything else (and for None)."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = constant(node.operand)
        return -value if isinstance(value, (int, float)) else None
    return node.value if isinstance(node, ast.Constant) else None


def blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """The statement lists directly under ``node``, in source order."""
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
            yield block
    for inner in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield inner.body


def statements(block: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Every statement of ``block``, those inside compound statements too; not of nested functions."""
    for stmt in block:
        yield stmt
        if not isinstance(stmt, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for inner in blocks(stmt):
                yield from statements(inner)


def assignments(block: Iterable[ast.stmt], name: str) -> Iterator[tuple[ast.stmt, ast.expr | None]]:
    """Every statement that binds ``name`` with the value it gets; None where that cannot be read off."""
    for stmt in statements(block):
        if isinstance(stmt, ast.Assign):
            for target in stmt.targets:
                if name in binds(target):
                    yield stmt, _value_of(target, stmt.value, name)
        elif isinstance(stmt, ast.AnnAssign) and is_name(stmt.target, name):
            yield stmt, stmt.value
        elif name in binds_itself(stmt):
            yield stmt, None


def binds_itself(stmt: ast.stmt) -> set[str]:
    """Names a statement binds outside its blocks: a loop's targets, ``with``'s ``as``, ``:=`` in a test."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(stmt):
        if isinstance(child, (ast.ExceptHandler, ast.match_case)):
            pattern = child.pattern if isinstance(child, ast.match_case) else None
            captured = (getattr(n, "name", None) for n in walk(pattern or ast.Pass()))
            found |= {name for name in (getattr(child, "name", None), *captured) if name}
        elif not isinstance(child, ast.stmt):
            found |= binds(child)
    return found


def _value_of(target: ast.expr, value: ast.expr, name: str) -> ast.expr | None:
    if is_name(target, name):
        return value
    pairs = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
    if pairs and len(target.elts) == len(value.elts):  # type: ignore[attr-defined]
        for left, right in zip(target.elts, value.elts, strict=True):  # type: ignore[attr-defined]
            if name in binds(left):
                return _value_of(left, right, name)
    return None


def path_to(block: list[ast.stmt], stmt: ast.stmt) -> list[tuple[ast.stmt, str]]:
    """The compound statements around ``stmt`` from the outside in, each with the arm taken; empty if none."""
    for outer in block:
        if outer is stmt:
            return []
        for arm in ("body", "orelse", "finalbody"):
            inner = getattr(outer, arm, None)
            if isinstance(inner, list) and any(s is stmt for s in statements(inner)):
                return [(outer, arm), *path_to(inner, stmt)]
    return []


def surely_bound(block: list[ast.stmt], at: ast.stmt) -> set[str]:
    """The locals that every way to ``at``, somewhere in ``block``, has bound (or run into an error)."""
    found: set[str] = set()
    for stmt in block:
        if stmt is at:
            break
        if any(s is at for s in statements([stmt])):
            inner = next(b for b in blocks(stmt) if any(s is at for s in statements(b)))
            return found | binds_itself(stmt) | surely_bound(inner, at)
        found |= _always_bound(stmt)
    return found


def _always_bound(stmt: ast.stmt) -> set[str]:
    if isinstance(stmt, (ast.FunctionDef, ast.ClassDef)):
        return {stmt.name}
    if isinstance(stmt, ast.If):
        arms = [
            arm
            for arm in (stmt.body, stmt.orelse)
            if not (arm and isinstance(arm[-1], (ast.Raise, ast.Return)))
        ]
        return (
            set.intersection(*({n for s in arm for n in _always_bound(s)} for arm in arms)) if arms else set()
        )
    if isinstance(stmt, ast.With):
        return binds_itself(stmt) | {n for s in stmt.body for n in _always_bound(s)}
    return set() if any(blocks(stmt)) or isinstance(stmt, ast.Delete) else set(binds(stmt))


def exclusive(block: list[ast.stmt], a: ast.stmt, b: ast.stmt) -> bool:
    """True when ``a`` and ``b`` are in opposite arms of one ``if``: at most one of them runs."""
    arms = {id(node): arm for node, arm in path_to(block, a) if isinstance(node, ast.If)}
    return any(id(node) in arms and arms[id(node)] != arm for node, arm in path_to(block, b))


def after(block: list[ast.stmt], a: ast.stmt, b: ast.stmt) -> bool:
    """True when ``a`` runs only after ``b`` has run: it stands below, and no loop comes back to ``b``."""
    around = [node for node, _ in path_to(block, b)]
    again = any(isinstance(node, (ast.For, ast.AsyncFor, ast.While)) for node in around)
    return not again and a.lineno > (b.end_lineno or b.lineno)


def parameters(function: ast.FunctionDef) -> list[str]:
    """Positional and keyword parameter names in order, ``self`` included."""
    args = function.args
    return [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]


def arguments(call: ast.Call, function: ast.FunctionDef) -> dict[str, ast.expr] | None:
    """What ``self.method(...)`` binds to each parameter; None when it cannot be told (``*args``)."""
    names = parameters(function)[1:]
    bound: dict[str, ast.expr] = {}
    for name, value in zip(names, call.args, strict=False):
        if isinstance(value, ast.Starred):
            return None
        bound[name] = value
    for item in call.keywords:
        if item.arg is None:
            return None
        bound[item.arg] = item.value
    return bound if len(call.args) <= len(names) else None


def binds_at_top(module: ast.Module) -> set[str]:
    """Names bound at module level, in ``if`` and ``try`` blocks too, but by no import, def or class."""
    return {name for stmt in statements(module.body) if not any(blocks(stmt)) for name in binds(stmt)}


def is_none(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def conjuncts(test: ast.expr) -> Iterator[ast.expr]:
    """The parts of ``a and b and c``; the expression itself when it is no conjunction."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        for value in test.values:
            yield from conjuncts(value)
    else:
        yield test
