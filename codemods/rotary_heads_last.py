"""``rotary-heads-last``: rotate queries and keys as the projections leave them, heads behind the tokens."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import partial
from typing import Any

from codemods.analysis import decoder, syntax
from codemods.analysis.source import Source
from codemods.framework.base import Decisions, Example, Insert, Rewrite, Rule, Site, Status

NAME = "apply_rotary_pos_emb"
_ROTATE = "rotate_half"

_FILE = """\
def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
{ahead}    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    turned_q = q * cos + {rotate}(q) * sin
    turned_k = k * cos + {rotate}(k) * sin
    return turned_q{swap}, turned_k{swap}
"""
_AHEAD = "    q, k, unsqueeze_dim = q.transpose(1, 2), k.transpose(1, 2), 3 - unsqueeze_dim\n"


class RotaryHeadsLast(Rule):
    """Rotate queries and keys with heads behind the tokens.

    Why
        Attention transposes queries and keys to heads first and only then rotates them. The chip keeps keys
        with heads last, so that each new key is transposed there and back, and a rotation of one token by
        many heads works on rows of one head each. Rotated before the transposition, the whole row of a token
        is one operation and the key is stored as it stands.

    Checked before
        The function multiplies and adds its queries and keys with the angles and with rotate_half, which acts
        on the last axis only; the angles are spread over heads by one unsqueeze whose place no caller of the
        file chooses. All of this gives the same numbers in either order of the two axes.

    Checked after
        The function transposes both of its arguments on entry and both results on return.

    Declines
        - queries or keys go through anything but sums, products and rotate_half
        - rotate_half reads or joins along another axis than the last
        - a caller of the file chooses where the angles are spread
    """

    name = "rotary-heads-last"
    absent = f"no function {NAME} in this file"
    examples = (
        Example(
            "heads first",
            _FILE.format(ahead="", swap="", rotate=_ROTATE),
            _FILE.format(ahead=_AHEAD, swap=".transpose(1, 2)", rotate=_ROTATE),
            Status.APPLIED,
        ),
        Example(
            "heads last",
            _FILE.format(ahead=_AHEAD, swap=".transpose(1, 2)", rotate=_ROTATE),
            None,
            Status.ALREADY,
        ),
        Example("no rotary", "x = 1\n", None, Status.ABSENT),
        Example(
            "something that is not known",
            _FILE.format(ahead="", swap="", rotate="mix_heads"),
            None,
            Status.DECLINED,
        ),
    )

    def sites(self, source: Source, decided: Decisions) -> Iterator[Site]:
        function = decoder.function(source, NAME)
        if function is None:
            return
        span = (function.lineno, function.end_lineno, NAME)
        if _is_done(function):
            yield Site(Status.ALREADY, "queries and keys are transposed on entry and return", *span)
            return
        problem = _problem(source, function)
        if problem:
            yield Site(Status.DECLINED, problem, *span)
            return
        q, k, *_ = syntax.parameters(function)
        place = _place(function)
        first, last = decoder.body(function)[0], function.body[-1]
        ahead = f"{q}, {k}, {place} = {q}.transpose(1, 2), {k}.transpose(1, 2), 3 - {place}\n"
        assert isinstance(last, ast.Return) and isinstance(last.value, ast.Tuple)
        back = ", ".join(f"{ast.unparse(value)}.transpose(1, 2)" for value in last.value.elts)
        edits = (Insert(first, ahead), Rewrite(last, partial(_return, back)))
        yield Site(Status.APPLIED, "rotates with heads behind the tokens", *span, edits=edits)


def _is_done(function: ast.FunctionDef) -> bool:
    first, last = decoder.body(function)[0], function.body[-1]
    if not (isinstance(first, ast.Assign) and isinstance(first.value, ast.Tuple)):
        return False
    if not (isinstance(last, ast.Return) and isinstance(last.value, ast.Tuple)):
        return False
    given = first.value.elts[:2]
    returned = last.value.elts
    return all(map(decoder.is_swapped, (*given, *returned))) and len(returned) == 2


def _place(function: ast.FunctionDef) -> str:
    """The parameter that says where the angles are spread over heads; '' when that is not one parameter."""
    places = {ast.unparse(call.args[0]) for call in syntax.calls(function, "unsqueeze") if call.args}
    place = places.pop() if len(places) == 1 else ""
    return place if place in syntax.parameters(function) else ""


def _problem(source: Source, function: ast.FunctionDef) -> str:
    """Why the rotation is not shown to be the same with two axes exchanged; empty when it is."""
    names = syntax.parameters(function)
    if len(names) < 5:
        return f"{NAME} does not take queries, keys, cosines, sines and a place"
    place, (q, k, cos, sin, *_) = _place(function), names
    if not place:
        return "the angles are not spread over heads by one unsqueeze at a parameter"
    if problem := _chosen_place(source, function, names.index(place), place):
        return problem
    *steps, last = decoder.body(function)
    if not (isinstance(last, ast.Return) and isinstance(last.value, ast.Tuple) and len(last.value.elts) == 2):
        return "it does not end in returning two values"
    if not all(isinstance(value, ast.Name) for value in last.value.elts):
        return "it returns something that is not a plain name"
    for step in steps:
        if not isinstance(step, ast.Assign):
            return f"line {step.lineno} is not an assignment"
        for value in _values(step):
            spread = _is_spread(value, {cos, sin}, place)
            if not spread and not _acts_by_element(value):
                return f"line {step.lineno}: {ast.unparse(value)} is not a sum of products of known form"
            if not spread and syntax.binds(step) & {q, k, cos, sin}:
                return f"line {step.lineno} binds an argument anew"
    return _other_axis(source)


def _values(step: ast.Assign) -> list[ast.expr]:
    return list(step.value.elts) if isinstance(step.value, ast.Tuple) else [step.value]


def _chosen_place(source: Source, function: ast.FunctionDef, index: int, place: str) -> str:
    default = syntax.constant(function.args.defaults[-1]) if function.args.defaults else None
    if default != 1 or syntax.parameters(function)[-1] != place:
        return f"{place} is not 1 by default"
    for call in syntax.calls(source.tree, NAME):
        if len(call.args) > index or any(item.arg in (place, None) for item in call.keywords):
            return f"the call on line {call.lineno} chooses {place}"
    return ""


def _is_spread(value: ast.expr, angles: set[str], place: str) -> bool:
    """Whether *value* is ``cos.unsqueeze(place)``, or the same of rows of cos."""
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute)):
        return False
    if value.func.attr != "unsqueeze" or [ast.unparse(a) for a in value.args] != [place]:
        return False
    table = value.func.value
    if isinstance(table, ast.Subscript) and syntax.is_name(table.slice):
        table = table.value
    return isinstance(table, ast.Name) and table.id in angles


def _acts_by_element(value: ast.expr) -> bool:
    """Whether *value* is made of names by sums, differences, products and :data:`_ROTATE`."""
    if isinstance(value, ast.BinOp):
        known = isinstance(value.op, ast.Add | ast.Sub | ast.Mult)
        return known and _acts_by_element(value.left) and _acts_by_element(value.right)
    if isinstance(value, ast.Call):
        own = syntax.is_name(value.func, _ROTATE) and len(value.args) == 1 and not value.keywords
        return own and _acts_by_element(value.args[0])
    return isinstance(value, ast.Name)


def _other_axis(source: Source) -> str:
    """Why :data:`_ROTATE` may act on another axis than the last; empty when it does not."""
    function = decoder.function(source, _ROTATE)
    if function is None:
        return f"no one function {_ROTATE} in this file"
    given = syntax.parameters(function)[0]
    for node in syntax.walk(function):
        if isinstance(node, ast.Subscript) and syntax.is_name(node.value, given):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
            if len(parts) != 2 or syntax.constant(parts[0]) is not Ellipsis:
                return f"{_ROTATE} picks other parts than of the last axis (line {node.lineno})"
        elif isinstance(node, ast.Call):
            axis = syntax.keyword(node, "dim") or (node.args[1] if len(node.args) == 2 else None)
            if syntax.call_name(node) != "cat" or syntax.constant(axis) != -1:
                return f"{_ROTATE} calls {ast.unparse(node.func)} in a form not known (line {node.lineno})"
    return ""


def _return(values: str, node: Any) -> Any:
    """The return statement *node*, a LibCST one, with *values*."""
    import libcst as cst

    return node.with_changes(body=[cst.Return(cst.parse_expression(values))])
