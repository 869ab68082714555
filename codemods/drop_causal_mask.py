"""``drop-causal-mask``: leave the causal mask to the ``attention_mask`` the caller passes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace

from codemods.add_attention_mask import NAME as ADD
from codemods.analysis import syntax
from codemods.analysis.attention import Mask, ScorePath, attentions
from codemods.analysis.causal import not_causal, not_negative
from codemods.analysis.source import Source
from codemods.framework.base import Decisions, Drop, Example, Rule, Site, Status

_BODY = """\
class Attention(nn.Module):
    def __init__(self, config):
        size = config.max_position_embeddings
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)
        self.register_buffer(
            "past_only",
            torch.{triangle}(torch.ones((size, size), dtype=torch.bool)).view(1, 1, size, size),
        )

    def {method}(self, query, key, value, attention_mask=None):
        scores = torch.matmul(query, key.transpose(-1, -2)) / value.size(-1) ** 0.5
{block}{add}
        return torch.matmul(torch.softmax(scores, dim=-1), value)

    def forward(self, hidden, attention_mask=None):
        q, k, v = self.c_attn(hidden).split(self.width, dim=2)
        return self.c_proj(self.{method}(q, k, v, attention_mask))
"""
_BLOCK = """\
        rows, columns = query.size(-2), key.size(-2)
        keep = self.past_only[:, :, columns - rows : columns, :columns]
        lowest = torch.finfo(scores.dtype).min
        scores = torch.where(keep, scores, lowest)
"""
_ADD = """
        if attention_mask is not None:
            scores = scores + attention_mask
"""


def body(method: str, block: str = _BLOCK, add: str = _ADD, triangle: str = "tril") -> str:
    """The example module, shared with the rule for the upcast path."""
    return _BODY.format(method=method, block=block, add=add, triangle=triangle)


def mask_examples(method: str) -> tuple[Example, ...]:
    return (
        Example("a buffer's triangle", body(method), body(method, block=""), Status.APPLIED),
        Example("done by hand", body(method, block=""), None, Status.ALREADY),
        Example("no attention in this file", "import torch\n", None, Status.ABSENT),
        Example("nothing else would mask", body(method, add=""), None, Status.DECLINED),
        Example("not a causal mask", body(method, triangle="triu"), None, Status.DECLINED),
    )


class DropCausalMask(Rule):
    """Remove the causal mask inside the attention method.

    Why
        The exported nets are given the whole mask as an input. Masking a second time inside adds Slice, Where
        and dynamic shapes to every layer, and breaks the add-softmax pattern that the compiler fuses.

    Checked before
        The block is a causal mask (a lower triangle, last query rows and first key columns, filled with the
        lowest value), and the caller's attention_mask, unchanged since the call, is added to the same scores
        before the softmax.

    Checked after
        The method masks its scores by the caller's attention_mask and by nothing else.

    Declines
        - attention_mask is never added to these scores (recipe `static` adds it first)
        - the mask is not shown to be causal: another slice, triangle, condition or fill value
        - the scores are rewritten in a form not known between product and softmax
        - attention_mask is changed or replaced between the module's call and the scores
    """

    name = "drop-causal-mask"
    absent = "no attention method in this revision masks scores this way"
    examples = mask_examples("_attn")
    upcast = False

    def sites(self, source: Source, decided: Decisions) -> Iterator[Site]:
        for attention in attentions(source):
            for path in attention.paths:
                if path.upcast == self.upcast:
                    yield replace(self._site(path, decided), required=not path.dead)
            if not self.upcast and not attention.paths:
                line = attention.node.lineno
                yield Site(
                    Status.DECLINED, f"{attention.name}: no softmax over named scores found", line, line
                )

    def _site(self, path: ScorePath, decided: Decisions) -> Site:
        line, end = path.function.lineno, path.softmax.lineno
        if path.unknown:
            stmt = path.unknown[0]
            reason = f"the scores `{path.scores}` are rewritten in a form not known: {_first_line(stmt)}"
            return Site(Status.DECLINED, reason, stmt.lineno, stmt.end_lineno, path.where)
        added = bool(path.added) or decided.applies(ADD, path.where)
        if not path.masks:
            if not added:
                reason = "no causal mask, and attention_mask is never added to the scores: nothing masks them"
                return Site(Status.DECLINED, reason, line, end, path.where)
            return Site(
                Status.ALREADY, "only the caller's attention_mask masks the scores", line, line, path.where
            )
        for mask in path.masks:
            problem = _problem(path, mask, added)
            if problem:
                return Site(Status.DECLINED, problem, mask.stmt.lineno, mask.stmt.end_lineno, path.where)
        dropped = removable(path, [mask.stmt for mask in path.masks])
        first, last = dropped[0].lineno, dropped[-1].end_lineno
        reason = "attention_mask is added to the same scores" + ("" if path.added else f" (by {ADD})")
        return Site(Status.APPLIED, reason, first, last, path.where, tuple(Drop(s) for s in dropped))


def _problem(path: ScorePath, mask: Mask, added: bool) -> str:
    """Why dropping ``mask`` is not shown to be sound; empty when it is."""
    return (
        mask.problem
        or not_causal(path, mask.condition)
        or not_negative(path, mask.fill)
        or (
            ""
            if added
            else "attention_mask is never added to these scores: without this mask nothing would mask them"
        )
        or path.mask_reaches()
    )


def removable(path: ScorePath, masks: list[ast.stmt]) -> list[ast.stmt]:
    """``masks`` and the statements that only prepared them, in order.

    A statement goes when everything it binds is read by nothing that stays. What is read elsewhere stays.
    """
    body = path.function.body
    rest = [s for s in body if s not in masks]
    needed, grew = frozenset().union(*(syntax.reads(mask) for mask in masks)), True
    feeders: list[ast.stmt] = []
    while grew:  # everything the masks are computed from
        grew = False
        for stmt in path.before:
            if (
                stmt not in masks
                and stmt not in feeders
                and _only_binds(stmt, path)
                and syntax.binds(stmt) & needed
            ):
                feeders.append(stmt)
                needed |= syntax.reads(stmt)
                grew = True
    going = set(map(id, feeders))
    shrunk = True
    while shrunk:  # keep what anything that stays still reads, and every other statement binding that name
        shrunk = False
        staying = [s for s in rest if id(s) not in going]
        used = set().union(*(syntax.reads(s) for s in staying)) if staying else set()
        for stmt in feeders:
            if id(stmt) in going and syntax.binds(stmt) & used:
                going.discard(id(stmt))
                shrunk = True
    return [s for s in body if s in masks or id(s) in going]


def _only_binds(stmt: ast.stmt, path: ScorePath) -> bool:
    """A pure assignment of locals other than the scores and the parameters, or an ``if`` made of such."""
    if syntax.binds(stmt) & {path.scores, *syntax.parameters(path.function)}:
        return False
    if isinstance(stmt, ast.If):
        return syntax.is_pure(stmt.test) and all(
            _only_binds(s, path) for block in syntax.blocks(stmt) for s in block
        )
    if isinstance(stmt, (ast.Assign, ast.AnnAssign)) and stmt.value is not None:
        targets = stmt.targets if isinstance(stmt, ast.Assign) else [stmt.target]
        names = all(isinstance(n, (ast.Name, ast.Tuple, ast.Store)) for x in targets for n in syntax.walk(x))
        return names and syntax.is_pure(stmt.value)
    return False


def _first_line(stmt: ast.stmt) -> str:
    text = ast.unparse(stmt).splitlines()[0]
    return text if len(text) < 80 else text[:77] + "..."
