"""``disable-torch2``: keep attention out of ``F.scaled_dot_product_attention``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from codemods.analysis import fused, syntax
from codemods.analysis.attention import attentions
from codemods.analysis.handed import tampered
from codemods.analysis.source import Source
from codemods.framework.base import Decisions, Example, Rewrite, Rule, Site, Status

SDPA = "scaled_dot_product_attention"
NEVER = "False"  #: the guard of a branch that a literal False keeps from running

# fmt: off
#: Calls a version test is made of; anything else might be run for its effect.
_TESTS = frozenset((
    "hasattr", "getattr", "int", "str", "len", "tuple", "bool", "split", "startswith", "parse", "Version",
    "is_available",
))
# fmt: on

_BODY = """\
class Attention(nn.Module):
    def __init__(self, config):
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(self, q, k, v, attention_mask=None):
        if {guard}:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self._attn(q, k, v, attention_mask)
"""


class DisableTorch2(Rule):
    """Set the flag that switches on torch 2's fused attention to False.

    Why
        Torch 2's fused attention exports as one operator that TPU-MLIR does not read. It also hides the
        scores, and the compiler wants to see matmul, add, softmax, matmul to build its own fused attention.

    Checked before
        Every call of scaled_dot_product_attention stands under an `if` that a module-level flag must be true
        for; the flag is bound once, by a test without side effects, and read only in conditions of attention
        classes.

    Checked after
        The flag is the constant False and no call of scaled_dot_product_attention is left unguarded.

    Declines
        - the call is not guarded by a module-level flag
        - the flag is bound more than once, imported, or rebound with `global`
        - the flag is read for anything else than choosing a branch in attention
        - the flag's value is computed by a call that may have an effect
    """

    name = "disable-torch2"
    absent = "attention never calls scaled_dot_product_attention in this revision"
    examples = (
        Example(
            "a version test",
            'USE_FUSED = int(torch.__version__.split(".")[0]) >= 2  # torch 2 only\n\n\n'
            + _BODY.format(guard="USE_FUSED"),
            "USE_FUSED = False  # torch 2 only\n\n\n" + _BODY.format(guard="USE_FUSED"),
            Status.APPLIED,
        ),
        Example(
            "done by hand", "USE_FUSED = False\n\n\n" + _BODY.format(guard="USE_FUSED"), None, Status.ALREADY
        ),
        Example("older than the fused path", "USE_FUSED = True\n", None, Status.ABSENT),
        Example("no flag to turn", _BODY.format(guard="not self.training"), None, Status.DECLINED),
    )

    def sites(self, source: Source, decided: Decisions) -> Iterator[Site]:
        out_of_reach = [
            Site(Status.DECLINED, f"{SDPA} is reached by name, not by a call", line, line)
            for line in _hidden(source)
        ]
        flags: dict[str, int] = {}
        for where, stmts, call in _calls(source):
            flag = _guard(source, stmts, call)
            if flag == NEVER:
                reason = f"the branch that calls {SDPA} is never taken"
                yield Site(Status.ALREADY, reason, call.lineno, call.end_lineno, where)
            elif flag is None:
                reason = f"{SDPA} is called without a module-level flag that could switch it off"
                out_of_reach.append(Site(Status.DECLINED, reason, call.lineno, call.end_lineno, where))
            else:
                flags.setdefault(flag, call.lineno)
        if out_of_reach:  # turning a flag would not keep attention out of it
            yield from out_of_reach
            return
        for flag, used in flags.items():
            yield self._flag(source, flag, used)

    def _flag(self, source: Source, flag: str, used: int) -> Site:
        bound = [stmt for stmt, _ in syntax.assignments(source.tree.body, flag)]
        problem = _flag_problem(source, flag, bound)
        if problem:
            line = bound[0].lineno if bound else used
            return Site(Status.DECLINED, problem, line, line)
        stmt = bound[0]
        span = (stmt.lineno, stmt.end_lineno)
        assert isinstance(stmt, (ast.Assign, ast.AnnAssign))
        if isinstance(stmt.value, ast.Constant) and stmt.value.value is False:
            return Site(Status.ALREADY, f"{flag} is False", *span)
        other = _other_numbers(source, flag)
        if other:
            return Site(Status.DECLINED, other, *span)
        reason = f"{flag} guards {SDPA} (line {used}){_lost_fill(source, flag)}"
        return Site(Status.APPLIED, reason, *span, edits=(Rewrite(stmt, _set_false),))


def _set_false(node: Any) -> Any:
    import libcst as cst

    (assign,) = node.body
    return node.with_changes(body=[assign.with_changes(value=cst.Name("False"))])


def _calls(source: Source) -> Iterator[tuple[str, list[ast.stmt], ast.Call]]:
    """Every SDPA call: qualified function, that function's body, the call."""
    for top in source.tree.body:
        functions = [top, *(top.body if isinstance(top, ast.ClassDef) else ())]
        for function in functions:
            if isinstance(function, ast.FunctionDef):
                owner = f"{top.name}." if isinstance(top, ast.ClassDef) else ""
                for call in syntax.calls(function, SDPA):
                    yield owner + function.name, function.body, call


def _hidden(source: Source) -> list[int]:
    """Lines that mention SDPA other than as the function of a call: an alias, a string for ``getattr``."""
    called = {id(call.func) for call in syntax.calls(source.tree, SDPA)}
    found = [
        call.lineno
        for call in syntax.calls(source.tree, "getattr")
        if SDPA in map(syntax.constant, call.args)
    ]
    for node in syntax.walk(source.tree):
        if (
            isinstance(node, (ast.Attribute, ast.Name))
            and syntax.last_name(node) == SDPA
            and id(node) not in called
        ):
            found.append(node.lineno)
    return found


def _guard(source: Source, body: list[ast.stmt], call: ast.Call) -> str | None:
    """The module-level name that must be true for ``call`` to run, :data:`NEVER`, or None."""
    stmt = next(
        (s for s in syntax.statements(body) if not any(syntax.blocks(s)) and call in syntax.walk(s)), None
    )
    if stmt is None:
        return None
    known = syntax.binds_at_top(source.tree)
    for node, arm in syntax.path_to(body, stmt):
        if isinstance(node, ast.If) and arm == "body":
            for part in syntax.conjuncts(node.test):
                if isinstance(part, ast.Constant) and part.value is False:
                    return NEVER
                if isinstance(part, ast.Name) and part.id in known:
                    return part.id
    return None


def _flag_problem(source: Source, flag: str, bound: list[ast.stmt]) -> str:
    if len(bound) != 1 or not isinstance(bound[0], (ast.Assign, ast.AnnAssign)):
        return f"{flag} is bound {len(bound)} times" if bound else f"{flag} is not assigned in this file"
    stmt = bound[0]
    if stmt not in source.tree.body or (
        isinstance(stmt, ast.Assign) and not syntax.is_name(stmt.targets[0], flag)
    ):
        return f"{flag} is not bound by a plain module-level assignment"
    if isinstance(stmt, ast.Assign) and len(stmt.targets) != 1:
        return f"{flag} shares its assignment with another name"
    if any(isinstance(n, (ast.Global, ast.Nonlocal)) and flag in n.names for n in syntax.walk(source.tree)):
        return f"{flag} is rebound through a global statement"
    if stmt.value is None or any(syntax.last_name(c.func) not in _TESTS for c in _all_calls(stmt.value)):
        return f"{flag} is computed by a call that may have an effect of its own"
    tests = set()
    for attention in attentions(source):
        for node in syntax.walk(attention.node):
            if isinstance(node, (ast.If, ast.IfExp)):
                tests |= {id(n) for n in syntax.walk(node.test)}
    for node in syntax.walk(source.tree):
        if syntax.is_name(node, flag) and isinstance(node.ctx, ast.Load) and id(node) not in tests:  # type: ignore[attr-defined]
            return f"{flag} is also read on line {node.lineno}, outside attention's conditions"  # type: ignore[attr-defined]
    return ""


def _other_numbers(source: Source, flag: str) -> str:
    """Why attention without the fused call is not shown to compute the same as with it; empty when it is."""
    for attention in attentions(source):
        if not attention.paths:  # nothing here to compare with; drop-causal-mask declines such a class
            continue
        for function in attention.methods.values():
            choices = [
                n for n in syntax.walk(function) if isinstance(n, ast.If) and flag in syntax.reads(n.test)
            ]
            for choice in choices:
                if not any(syntax.calls(stmt, SDPA) for stmt in choice.body):
                    continue
                found = tampered(source, attention.node)
                problem = (
                    found.reason
                    if found is not None
                    else fused.difference(source, attention.node, choice, flag)
                )
                if problem:
                    return f"{problem} (line {found.line if found is not None else choice.lineno})"
    return ""


def _lost_fill(source: Source, flag: str) -> str:
    """What to say of a fused branch that forgets the causal mask it makes; empty where none does."""
    choices = [n for n in syntax.walk(source.tree) if isinstance(n, ast.If) and flag in syntax.reads(n.test)]
    line = next((line for choice in choices if (line := fused.lost_fill(choice)) is not None), None)
    if line is None:
        return ""
    return (
        f"; unpatched, line {line} throws the mask it fills away, so that a prompt with padding also sees "
        "what comes after: patched it does not"
    )


def _all_calls(node: ast.AST) -> list[ast.Call]:
    return [n for n in syntax.walk(node) if isinstance(n, ast.Call)]
