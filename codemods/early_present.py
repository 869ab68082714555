"""``early-present``: return the new keys and values, not the whole history."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from codemods.analysis import syntax
from codemods.analysis.attention import Attention, attentions
from codemods.analysis.effects import effects, words
from codemods.analysis.handed import cache_problem, tampered
from codemods.analysis.source import Source
from codemods.framework.base import Decisions, Example, Move, Rule, Site, Status

_BODY = """\
class Attention(nn.Module):
    def __init__(self, config):
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(self, hidden, layer_past=None, use_cache=False):
        query, key, value = self.c_attn(hidden).split(self.width, dim=2)
{early}        if layer_past is not None:
            past_key, past_value = layer_past
            key = torch.cat((past_key, key), dim=1)
            value = torch.cat((past_value, value), dim=1)
{late}        return self.c_proj(self._attn(query, key, value)), present
"""
#: Methods that raise for a tensor of no length and change none.
_ANY_LENGTH = words(
    "clone contiguous detach to type type_as float half bfloat16 squeeze unsqueeze transpose size dim"
)
_PRESENT = """\
        if use_cache:
            present = (key, value)
        else:
            present = None
"""


@dataclass(frozen=True)
class _Parts:
    """The two statements: the one that joins the history, the one that makes ``present``."""

    join: ast.If
    presents: list[ast.stmt]  #: in a row, the one like the other; hardly ever more than one
    key: str
    value: str


class EarlyPresent(Rule):
    """Build present before the history is joined, so that a step returns one new unit.

    Why
        The runtime keeps the cache and writes one unit per step. With present built after the concat every
        decode step would return the whole history, S + 1 units in place of 1.

    Checked before
        The statement that makes present reads only key, value and the cache switch. Between the join and it
        nothing rewrites key or value or uses present. The join only concatenates the past before the new.

    Checked after
        Right before the join, present is made from key and value.

    Declines
        - key or value is rewritten between the join and present (quantised after joining, for one)
        - present is not the pair of key and value, or is read for something else than the outputs
        - the join does more than concatenate, or the statements are not in one block
    """

    name = "early-present"
    absent = "forward joins no history to key and value"
    examples = (
        Example(
            "after the join",
            _BODY.format(early="", late=_PRESENT),
            _BODY.format(early=_PRESENT, late=""),
            Status.APPLIED,
        ),
        Example("done by hand", _BODY.format(early=_PRESENT, late=""), None, Status.ALREADY),
        Example("no cache", "import torch\n", None, Status.ABSENT),
        Example(
            "key is quantised in between",
            _BODY.format(early="", late="        key = quantise(key)\n" + _PRESENT),
            None,
            Status.DECLINED,
        ),
    )

    def sites(self, source: Source, decided: Decisions) -> Iterator[Site]:
        for attention in attentions(source):
            if attention.forward is not None:
                yield from self._forward(attention, attention.forward)

    def _forward(self, attention: Attention, forward: ast.FunctionDef) -> Iterator[Site]:
        where = f"{attention.name}.forward"
        found = _parts(forward)
        if found is None:
            line = next((s.lineno for s in forward.body if "layer_past" in syntax.reads(s)), None)
            if line is not None:
                reason = (
                    "layer_past is used, but not by one statement that concatenates it before key and value"
                )
                yield Site(Status.DECLINED, reason, line, line, where)
            return
        join = found.join
        if not found.presents:
            reason = "no statement of forward makes a pair of key and value for the cache"
            yield Site(Status.DECLINED, reason, join.lineno, join.end_lineno, where)
            return
        body = forward.body
        first, last = found.presents[0], found.presents[-1]
        at, to = body.index(first), body.index(join)
        span = first.lineno, last.end_lineno, where
        if at < to:
            between = body[at + len(found.presents) : to]
            problem = _unsound(forward, found, between) or _elsewhere(attention, forward, found)
            reason = problem or "present is made before the history is joined"
            yield Site(Status.DECLINED if problem else Status.ALREADY, reason, *span)
            return
        problem = (
            _join_problem(found)
            or _unsound(forward, found, body[to + 1 : at])
            or _elsewhere(attention, forward, found)
        )
        if problem:
            yield Site(Status.DECLINED, problem, *span)
            return
        reason = f"nothing between lines {join.lineno} and {first.lineno} rewrites what present holds"
        moves = tuple(Move(present, join) for present in found.presents)
        yield Site(Status.APPLIED, reason, join.lineno, last.end_lineno, where, moves)


def _parts(forward: ast.FunctionDef) -> _Parts | None:
    joins = [s for s in forward.body if isinstance(s, ast.If) and len(_joined(s)) == 2]
    if len(joins) != 1:
        return None
    names = _joined(joins[0])
    for key, value in (names, names[::-1]):  # whichever is joined first
        presents = [s for s in forward.body if _makes_present(forward, s, key, value)]
        if presents and _in_a_row(forward.body, presents):
            return _Parts(joins[0], presents, key, value)
    return _Parts(joins[0], [], *names)


def _in_a_row(body: list[ast.stmt], stmts: list[ast.stmt]) -> bool:
    """``stmts`` follow one another in ``body`` and say the same."""
    at = body.index(stmts[0])
    return body[at : at + len(stmts)] == stmts and all(syntax.same(s, stmts[0]) for s in stmts)


def _joined(stmt: ast.If) -> list[str]:
    """The names ``stmt`` extends by concatenation (``x = cat((past, x))``), in order."""
    found = []
    for inner in syntax.statements(stmt.body):
        if (
            isinstance(inner, ast.Assign)
            and len(inner.targets) == 1
            and isinstance(inner.targets[0], ast.Name)
        ):
            name = inner.targets[0].id
            if name in syntax.reads(inner.value) and syntax.calls(inner.value, "cat") and name not in found:
                found.append(name)
    return found


def _join_problem(parts: _Parts) -> str:
    """The join must put the past before the new along one axis, and touch key and value in no other way."""
    for place, name in enumerate((parts.key, parts.value)):
        for stmt, value in syntax.assignments([parts.join], name):
            pieces = value.elts if isinstance(value, ast.Tuple) else [value]
            if not all(_appends(piece, name) for piece in pieces):
                return f"line {stmt.lineno} does more to `{name}` than append it to the past"
            for i, piece in enumerate(pieces):
                past, new = piece.args[0].elts  # type: ignore[union-attr]
                problem = _past_problem(parts.join, past, place, several=len(pieces) > 1)
                parts_differ = len(pieces) > 1 and not (_part(past) == _part(new) == i)
                if problem or parts_differ:
                    return (
                        problem or f"line {stmt.lineno} joins parts of the cache that do not belong together"
                    )
    stray = syntax.binds(parts.join) & {"layer_past", "use_cache"}
    if stray:
        return f"the join rebinds `{min(stray)}`"
    return ""


def _part(node: ast.expr) -> object:
    return syntax.constant(node.slice) if isinstance(node, ast.Subscript) else None


def _appends(node: ast.expr | None, name: str) -> bool:
    if node is None or syntax.call_name(node) != "cat" or not isinstance(node, ast.Call) or not node.args:
        return False
    pair = node.args[0]
    if not isinstance(pair, (ast.Tuple, ast.List)) or len(pair.elts) != 2:
        return False
    past, new = pair.elts
    bare = new.value if isinstance(new, ast.Subscript) else new
    return syntax.is_name(bare, name) and name not in syntax.reads(past)


def _makes_present(forward: ast.FunctionDef, stmt: ast.stmt, key: str, value: str) -> bool:
    """``present = (key, value) if cached else None``, as a statement or an expression."""
    pairs = [
        n
        for n in syntax.walk(stmt)
        if isinstance(n, ast.Tuple)
        and isinstance(n.ctx, ast.Load)
        and len(n.elts) == 2
        and syntax.is_name(n.elts[0], key)
        and syntax.is_name(n.elts[1], value)
    ]
    if not pairs:
        return False
    if isinstance(stmt, ast.Assign):
        value_ = stmt.value
        chosen = isinstance(value_, ast.IfExp) and pairs[0] in (value_.body, value_.orelse)
        return len(stmt.targets) == 1 and syntax.is_name(stmt.targets[0]) and (chosen or value_ is pairs[0])
    if not isinstance(stmt, ast.If):
        return False
    arms = [s for s in (*stmt.body, *stmt.orelse) if not _idle(forward, stmt, s)]
    made = [
        s for s in arms if isinstance(s, ast.Assign) and len(s.targets) == 1 and syntax.is_name(s.targets[0])
    ]
    known = all(s.value in pairs or (syntax.is_none(s.value)) for s in made)
    return known and len(made) == len(arms) and len(_names(made)) == 1


def _idle(forward: ast.FunctionDef, around: ast.stmt, stmt: ast.stmt) -> bool:
    """``stmt`` in ``around`` only gives something a name that nothing outside ``around`` knows."""
    if isinstance(stmt, ast.Pass) or (isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Name)):
        return True
    if not isinstance(stmt, ast.Assign) or not all(_of_any_length(n) for n in syntax.walk(stmt.value)):
        return False
    inside = {id(n) for n in syntax.walk(around)}
    known = {n.id for n in syntax.walk(forward) if isinstance(n, ast.Name) and id(n) not in inside}
    names = all(isinstance(target, ast.Name) for target in stmt.targets)
    return names and not syntax.binds(stmt) & (known | set(syntax.parameters(forward)))


def _of_any_length(node: ast.AST) -> bool:
    """A part of an expression that works alike however long the history is."""
    if isinstance(node, ast.Call):
        return syntax.call_name(node) in _ANY_LENGTH
    return isinstance(node, (ast.Name, ast.Attribute, ast.Constant, ast.UnaryOp, ast.USub, ast.Load))


def _names(made: list[ast.Assign]) -> frozenset[str]:
    return frozenset().union(*(syntax.binds(s) for s in made))


def _present_name(parts: _Parts) -> str:
    """What present is called: what is bound to the pair of key and value."""
    for stmt in syntax.statements(parts.presents):
        if isinstance(stmt, ast.Assign) and any(isinstance(n, ast.Tuple) for n in syntax.walk(stmt.value)):
            return min(syntax.binds(stmt))
    raise AssertionError("a statement that makes present binds it")


def _unsound(forward: ast.FunctionDef, parts: _Parts, between: list[ast.stmt]) -> str:
    """What stands between the two places and would see or change the difference; empty when nothing does."""
    name = _present_name(parts)
    kept = syntax.reads(parts.presents[0])
    for stmt in between:
        changed = (kept & syntax.binds(stmt)) | {n for n in (parts.key, parts.value) if _mutates(stmt, n)}
        if changed:
            return f"`{sorted(changed)[0]}` is rewritten on line {stmt.lineno}, between the join and present"
        if name in syntax.reads(stmt) | syntax.binds(stmt):
            return f"`{name}` is used on line {stmt.lineno}, between the join and present"
    if kept & syntax.binds(parts.join) - {parts.key, parts.value}:
        return "the join rebinds what present depends on"
    if name in syntax.reads(parts.join) | syntax.binds(parts.join):
        return f"`{name}` is used where the history is joined"
    making = {id(s) for s in syntax.statements(parts.presents)}
    bound = [s for s, _ in syntax.assignments(forward.body, name) if id(s) not in making]
    if bound:
        return f"`{name}` is bound again on line {bound[0].lineno}"
    for stmt in syntax.statements(forward.body):
        if id(stmt) in making or any(syntax.blocks(stmt)) or name not in syntax.reads(stmt):
            continue
        if _only_kept(forward, stmt):
            continue
        if not _is_output(stmt, name):
            return f"`{name}` is read on line {stmt.lineno} for something else than the outputs"
    return ""


def _only_kept(forward: ast.FunctionDef, stmt: ast.stmt) -> bool:
    """``kept = x``, where whatever reads ``kept`` is an expression statement of that name alone."""
    if not isinstance(stmt, ast.Assign) or not isinstance(stmt.value, ast.Name):
        return False
    looks = {id(s.value) for s in syntax.statements(forward.body) if isinstance(s, ast.Expr)}
    kept = syntax.binds(stmt)
    read = (n for n in syntax.walk(forward) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
    return all(isinstance(x, ast.Name) for x in stmt.targets) and not any(
        n.id in kept and id(n) not in looks for n in read
    )


def _elsewhere(attention: Attention, forward: ast.FunctionDef, parts: _Parts) -> str:
    """What reaches present's tensors or the history from elsewhere in the file; empty when nothing does."""
    if not attention.paths:  # its scores are made elsewhere; drop-causal-mask declines such a class
        return ""
    name = _present_name(parts)
    start = min(parts.join.lineno, parts.presents[0].lineno)
    for write in effects(attention.source).written(forward, [parts.key, parts.value, name, "layer_past"]):
        if write.line >= start:
            return f"what present holds may be changed in place on line {write.line}"
    found = tampered(attention.source, attention.node) or cache_problem(attention.source, attention.node)
    return f"{found.reason} (line {found.line})" if found is not None else ""


def _past_problem(join: ast.If, past: ast.expr, place: int, *, several: bool) -> str:
    """The past is ``layer_past[place]`` as a whole, or a part of it where the cache is a tuple."""
    bare = past.value if several and isinstance(past, ast.Subscript) else past
    if isinstance(bare, ast.Name):
        values = [value for _, value in syntax.assignments(join.body, bare.id)]
        if _unpacks(join, bare.id, place):
            return ""
        bare = values[0] if values and values[0] and all(syntax.same(v, values[0]) for v in values) else bare
    if (
        isinstance(bare, ast.Subscript)
        and syntax.is_name(bare.value, "layer_past")
        and syntax.constant(bare.slice) == place
    ):
        return ""
    return f"`{ast.unparse(past)}` is not the whole history"


def _unpacks(join: ast.If, name: str, place: int) -> bool:
    """``past_key, past_value = layer_past``."""
    for stmt in syntax.statements(join.body):
        if (
            isinstance(stmt, ast.Assign)
            and isinstance(stmt.targets[0], ast.Tuple)
            and syntax.is_name(stmt.value, "layer_past")
        ):
            elements = stmt.targets[0].elts
            return len(elements) == 2 and syntax.is_name(elements[place], name)
    return False


def _mutates(stmt: ast.stmt, name: str) -> bool:
    """In-place methods (``key.mul_(…)``) and subscript stores."""
    for node in syntax.walk(stmt):
        if (
            isinstance(node, ast.Call)
            and syntax.is_method_of(node, name)
            and syntax.last_name(node.func).endswith("_")
        ):
            return True
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Store)
            and syntax.is_name(node.value, name)
        ):
            return True
    return False


def _is_output(stmt: ast.stmt, name: str) -> bool:
    """Read as a whole, as an element of a tuple that is returned or named, never looked into or renamed."""
    value = getattr(stmt, "value", None)
    if not isinstance(stmt, (ast.Assign, ast.Return, ast.AugAssign)) or value is None:
        return False
    if isinstance(stmt, ast.Assign) and not all(isinstance(target, ast.Name) for target in stmt.targets):
        return False
    elements = {id(e) for n in syntax.walk(value) if isinstance(n, ast.Tuple) for e in n.elts}
    elements |= {id(value)} if isinstance(stmt, ast.Return) else set()
    return all(id(n) in elements for n in syntax.walk(value) if syntax.is_name(n, name))
