"""``scalar-divide``: divide the scores by a number, not by a tensor made on the spot."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import partial
from typing import Any

from codemods.analysis import syntax
from codemods.analysis.attention import ScorePath, attentions
from codemods.analysis.source import Source
from codemods.framework.base import Decisions, Example, Rewrite, Rule, Site, Status

# fmt: off
#: Calls that make a tensor, by the last part of their name.
_MAKERS = frozenset((
    "full", "tensor", "as_tensor", "ones", "zeros", "empty", "full_like", "scalar_tensor", "from_numpy",
    "new_full", "new_tensor",
))
# fmt: on
_NUMBERS = frozenset(("size", "sqrt", "float", "int", "dim", "pow"))

_BODY = """\
class Attention(nn.Module):
    def __init__(self, config):
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def _attn(self, query, key, value, attention_mask=None):
        scores = torch.matmul(query, key.transpose(-1, -2))
        scores = scores / {divisor}
        scores = scores + attention_mask
        return torch.matmul(torch.softmax(scores, dim=-1), value)

    def forward(self, hidden, attention_mask=None):
        q, k, v = self.c_attn(hidden).split(self.width, dim=2)
        return self.c_proj(self._attn(q, k, v, attention_mask))
"""
_FULL = """torch.full(
            [],
            value.size(-1) ** 0.5,
            dtype=scores.dtype,
            device=scores.device,
        )"""


class ScalarDivide(Rule):
    """Divide the scores by a number instead of a tensor made with torch.full.

    Why
        torch.full with a size computed from another tensor becomes a chain of Shape, Gather and
        ConstantOfShape nodes whose shape the compiler cannot infer. A number becomes the one constant that
        the attention pattern needs.

    Checked before
        The divisor is one zero-dimensional tensor filled with an expression of sizes and numbers, of the
        scores' own dtype, so that dividing by the number rounds the same.

    Checked after
        No division in the method has a tensor constructor on its right.

    Declines
        - the tensor is not zero-dimensional, or has another dtype than the scores
        - its value is not a pure expression of sizes, numbers and attributes
        - the divisor is a local name bound to a tensor
        - a division in a form not known: in place through an alias, with rounding
    """

    name = "scalar-divide"
    absent = "no method of this file divides attention scores"
    examples = (
        Example(
            "a filled tensor",
            _BODY.format(divisor=_FULL),
            _BODY.format(divisor="(value.size(-1) ** 0.5)"),
            Status.APPLIED,
        ),
        Example("already a number", _BODY.format(divisor="self.width ** 0.5"), None, Status.ALREADY),
        Example("nothing is divided", "x = 1 / 2\n", None, Status.ABSENT),
        Example(
            "the divisor calls something",
            _BODY.format(divisor="torch.full([], temperature())"),
            None,
            Status.DECLINED,
        ),
    )

    def sites(self, source: Source, decided: Decisions) -> Iterator[Site]:
        for attention in attentions(source):
            for path in attention.paths:
                yield from self._path(path)

    def _path(self, path: ScorePath) -> Iterator[Site]:
        for stmt in syntax.statements(path.before):
            if any(syntax.blocks(stmt)):
                continue
            for dividend, divisor in _divisions(stmt):
                if path.scores in syntax.reads(dividend) | (
                    syntax.binds(stmt) if isinstance(stmt, ast.Assign) else set()
                ):
                    yield self._site(path, stmt, divisor)

    def _site(self, path: ScorePath, stmt: ast.stmt, divisor: ast.expr) -> Site:
        span = (stmt.lineno, stmt.end_lineno, path.where)
        name = syntax.call_name(divisor)
        if name not in _MAKERS:
            problem = _not_number(path, divisor)
            if problem:
                return Site(Status.DECLINED, problem, *span)
            return Site(Status.ALREADY, f"divides by the number {ast.unparse(divisor)}", *span)
        assert isinstance(divisor, ast.Call)
        value, problem = _filled(path, divisor)
        if value is None:
            return Site(Status.DECLINED, problem, *span)
        reason = f"divides by torch.{name} of {ast.unparse(value)}"
        edit = Rewrite(stmt, partial(_replace, ast.dump(divisor), ast.dump(value)))
        return Site(Status.APPLIED, reason, *span, edits=(edit,))


def _divisions(stmt: ast.stmt) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(dividend, divisor) of each division in one simple statement."""
    if isinstance(stmt, ast.AugAssign) and isinstance(stmt.op, ast.Div):
        yield stmt.target, stmt.value
    for node in syntax.walk(stmt):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            yield node.left, node.right
        elif isinstance(node, ast.Call) and syntax.last_name(node.func) in {"div", "div_", "true_divide"}:
            operands = [*([] if syntax.on_torch(node) else [node.func.value]), *node.args]  # type: ignore[attr-defined]
            if len(operands) == 2:
                yield operands[0], operands[1]


def _not_number(path: ScorePath, divisor: ast.expr, depth: int = 0) -> str:
    """Why ``divisor`` is not shown to be a Python number; empty when it is."""
    for node in syntax.walk(divisor):
        if isinstance(node, ast.Call) and syntax.last_name(node.func) not in _NUMBERS:
            return f"the divisor calls {ast.unparse(node.func)}: not a number in a form known here"
        if (
            isinstance(node, ast.Call)
            and syntax.last_name(node.func) in {"sqrt", "pow"}
            and syntax.on_torch(node)
        ):
            return f"the divisor calls {ast.unparse(node.func)}, which makes a tensor"
        if isinstance(node, (ast.NamedExpr, ast.IfExp, ast.Lambda, ast.Await)):
            return "the divisor is not a plain expression"
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and depth < 4:
            for bound, value in syntax.assignments(path.function.body, node.id):
                tensor = value is not None and any(syntax.calls(value, maker) for maker in _MAKERS)
                if tensor and divisor is node:
                    return f"the divisor `{node.id}` is bound to a tensor on line {bound.lineno}"
    return ""


def _filled(path: ScorePath, call: ast.Call) -> tuple[ast.expr | None, str]:
    """The number a zero-dimensional constructor is filled with, or None and the reason."""
    name = syntax.last_name(call.func)
    wanted = 2 if name == "full" else 1
    if name not in {"full", "tensor"} or not syntax.on_torch(call) or len(call.args) > wanted:
        return None, f"the divisor is made by {ast.unparse(call.func)} in a form not known"
    extra = [k.arg for k in call.keywords if k.arg not in {"size", "fill_value", "data", "dtype", "device"}]
    if extra:
        return None, f"the divisor's constructor is given {extra[0]}"
    value = (
        call.args[wanted - 1]
        if len(call.args) == wanted
        else syntax.keyword(call, "fill_value" if wanted == 2 else "data")
    )
    if name == "full":
        size = call.args[0] if call.args else syntax.keyword(call, "size")
        if not (isinstance(size, (ast.List, ast.Tuple)) and not size.elts):
            return None, "the divisor is not a zero-dimensional tensor"
    dtype = syntax.keyword(call, "dtype")
    own = (
        isinstance(dtype, ast.Attribute)
        and dtype.attr == "dtype"
        and syntax.is_name(dtype.value, path.scores)
    )
    if dtype is not None and not own:
        return None, f"the divisor has a dtype of its own, {ast.unparse(dtype)}"
    if value is None or isinstance(value, (ast.List, ast.Tuple)):
        return None, "the divisor's value cannot be read off"
    problem = _not_number(path, value)
    if problem:
        return None, problem
    # A name that holds a tensor would change the rounding; sizes and what follows from them are numbers.
    return value, ""


def _replace(divisor: str, value: str, node: Any) -> Any:
    """Replace the divisor in a LibCST statement; both are given as the standard library's dumps."""
    import libcst as cst

    module = cst.Module([])

    def dumped(part: Any) -> str:
        return ast.dump(ast.parse(f"({module.code_for_node(part)}\n)", mode="eval").body)

    class Replace(cst.CSTTransformer):
        def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
            if dumped(original_node) != divisor:
                return updated_node
            for arg in original_node.args:
                if dumped(arg.value) == value:
                    return _in_parentheses(cst, arg.value)
            return updated_node

    return node.visit(Replace())


def _in_parentheses(cst: Any, value: Any) -> Any:
    """The value on its own, in parentheses if it is more than a name, a number or a call."""
    atom = isinstance(value, (cst.Name, cst.Integer, cst.Float, cst.Call, cst.Attribute, cst.Subscript))
    if atom or value.lpar:
        return value
    return value.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
