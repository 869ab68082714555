"""One mutant, one verdict: what the codemods did with it, and whether the numbers bear it out.

``forced`` makes the edits without asking whether they are sound, so that a refusal is judged too: a mutant
that was declined although the forced edit gives the same numbers was harmless.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache

import torch

import codemods
from codemods.analysis import syntax
from codemods.framework import recipes, registry
from codemods.framework.base import Status
from tests.soundness.numbers import LIMIT, NotViable, compute, difference, movement

#: Numbers no further apart than this many times what a rounding step of the weights moves them say nothing:
#: the mutant blows rounding up. An edit that changes a mask moves a sane model a thousand times more.
CHAOS = 10


class Verdict(str, Enum):
    EQUAL = "equal"  #: edited, and the numbers are the unedited file's
    DIFFERS = "differs"  #: edited, and they are not: an unsound edit
    HARMLESS = "declined, harmless"  #: declined, though the edits would have changed no number
    HARMFUL = "declined, harmful"  #: declined, and rightly so
    UNCHANGED = "unchanged"  #: nothing to edit
    NOT_VIABLE = "not viable"  #: the mutant itself does not run


@dataclass(frozen=True)
class Judged:
    """A verdict, and what the codemods declined: their names with the reasons."""

    verdict: Verdict
    declined: tuple[str, ...] = ()


def judge(text: str, recipe: str, others: Mapping[str, str] | None = None) -> Judged:
    """What ``recipe`` did to ``text`` as ``patch`` would use it, and whether that was right.

    The reference is the unpatched text in ordinary use: of attention's branches only the one that this
    version of torch takes is run, so a change of the other one is harmless where the edited file still gives
    the same numbers. What no rule edits is not asked: model-forward may decline what both texts do alike.
    """
    try:
        plain = reference = compute(text, layered=False, others=others)
    except NotViable:
        return Judged(Verdict.NOT_VIABLE)
    result = codemods.run(text, _editing(recipe))
    assert not result.failed, result.failed
    done = {(o.codemod, o.where.rpartition(".")[2]): o.status for o in result.outcomes}
    reasons = tuple(f"{o.codemod}: {o.reason}" for o in result.declined)
    if result.declined:
        edited, added = forced(text)
    elif result.changed:
        edited = result.code.decode()
        added = done.get(("add-attention-mask", "_attn")) is Status.APPLIED
        # A file without a causal mask of its own counts as edited already: its layers want the nets' mask.
        if done.get(("drop-causal-mask", "_attn")) is Status.ALREADY:
            try:
                reference = compute(text, layered=True, others=others)
            except NotViable:
                return Judged(Verdict.NOT_VIABLE)
    else:
        return Judged(Verdict.UNCHANGED)
    apart = _apart(reference, edited, added, others)
    if apart <= LIMIT:
        return Judged(Verdict.HARMLESS if reasons else Verdict.EQUAL, reasons)
    if apart <= CHAOS * movement(text, plain, others):
        return Judged(Verdict.NOT_VIABLE, reasons)
    return Judged(Verdict.HARMFUL if reasons else Verdict.DIFFERS, reasons)


@cache
def _editing(recipe: str) -> recipes.Recipe:
    """*recipe* without the rules that edit nothing."""
    whole = recipes.load(recipe)
    return replace(whole, codemods=tuple(name for name in whole.codemods if registry.get(name).edits))


def _apart(
    reference: list[torch.Tensor], edited: str, added: bool, others: Mapping[str, str] | None
) -> float:
    """How far the edited text's numbers are from the unedited one's, infinite where it does not run.

    Where the edit added attention_mask, the unpatched text may have hidden the padding (in another branch) or
    not: the nets' mask is tried both ways.
    """
    found = []
    for padded in (True, False)[: 1 + added]:
        try:
            ours = compute(edited, layered=True, padded=padded, others=others)
            found.append(difference(reference, ours))
        except NotViable:
            found.append(math.inf)
        if found[-1] <= LIMIT:
            break
    return min(found)


# -- the edits, unasked --------------------------------------------------------------------------------------


def forced(text: str) -> tuple[str, bool]:
    """``text`` with the flag off, causal masks out, attention_mask in and present early, wherever they are;
    and whether attention_mask had to be added."""
    tree = ast.parse(text)
    added = False
    for stmt in syntax.statements(tree.body):
        if isinstance(stmt, ast.Assign) and "SUPPORT_TORCH2" in syntax.binds(stmt):
            stmt.value = ast.Constant(False)
    for owner in [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "QWenAttention"]:
        for method in [n for n in owner.body if isinstance(n, ast.FunctionDef)]:
            if method.name == "_attn":
                added = _unmasked(method)
            elif method.name == "forward":
                _early(method)
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n", added


class _Unmask(ast.NodeTransformer):
    """``where(mask, scores, low)`` and ``scores.masked_fill(...)`` become the scores."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = syntax.call_name(node)
        if (
            name == "where"
            and syntax.on_torch(node)
            and len(node.args) == 3
            and "mask" in ast.unparse(node.args[0])
        ):
            return node.args[1]
        if name in {"masked_fill", "masked_fill_"} and isinstance(node.func, ast.Attribute):
            return node.func.value
        return node


def _unmasked(method: ast.FunctionDef) -> bool:
    before = ast.unparse(method)
    _Unmask().visit(method)
    if "+ attention_mask" in before or "+= attention_mask" in before:
        return False
    for i, stmt in enumerate(method.body):
        soft = syntax.calls(ast.parse(ast.unparse(stmt)), "softmax")
        if soft and soft[0].args:
            name = next((n.id for n in ast.walk(soft[0].args[0]) if isinstance(n, ast.Name)), "attn_weights")
            new = f"if attention_mask is not None:\n    {name} = {name} + attention_mask\n"
            method.body[i:i] = ast.parse(new).body
            return True
    return False


def _early(method: ast.FunctionDef) -> None:
    body = method.body
    joins = [
        i
        for i, s in enumerate(body)
        if isinstance(s, ast.If) and "torch.cat" in ast.unparse(s) and "layer_past" in ast.unparse(s.test)
    ]
    made = [i for i, s in enumerate(body) if "present = (" in ast.unparse(s)]
    if joins and made and made[0] > joins[0]:
        body.insert(joins[0], body.pop(made[0]))
