"""``add-attention-mask``: add the caller's mask where upstream's path never does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from codemods.analysis.attention import ScorePath, attentions
from codemods.analysis.source import Source
from codemods.framework.base import Decisions, Example, Insert, Rule, Site, Status

NAME = "add-attention-mask"

_BODY = """\
class Attention(nn.Module):
    def __init__(self, config):
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def _attn(self, query, key, value, attention_mask=None):
        scores = torch.matmul(query, key.transpose(-1, -2)) / value.size(-1) ** 0.5
{masked}
{add}        return torch.matmul(torch.softmax(scores, dim=-1), value)

    def forward(self, hidden, attention_mask=None):
        q, k, v = self.c_attn(hidden).split(self.width, dim=2)
        return self.c_proj(self._attn(q, k, v, {passed}))
"""
_MASKED = """\
        rows, columns = query.size(-2), key.size(-2)
        keep = torch.tril(torch.ones((columns, columns)))[columns - rows :].bool()
        scores = torch.where(keep, scores, torch.finfo(scores.dtype).min)
"""
_ADD = """\
        if attention_mask is not None:
            scores = scores + attention_mask
"""


class AddAttentionMask(Rule):
    """Add the caller's attention_mask to scores that upstream masks only by its own triangle.

    Why
        Some revisions take attention_mask and never use it: the causal triangle is their only mask. Removing
        the triangle there, as the documented edit does, leaves no masking at all, and nothing complains. With
        the mask added, the exported net obeys its mask input.

    Checked before
        forward passes its attention_mask to the method unchanged, and every statement between product and
        softmax is understood, a mask of the method's own among them, so that a sum right before the softmax
        masks the final scores and hides no more than is hidden already.

    Checked after
        The scores are summed with attention_mask before the softmax.

    Declines
        - the method does not receive forward's attention_mask
        - attention_mask is rebound on the way
        - the scores are rewritten in a form not known
        - nothing masks the scores: with a mask added they would be others than without
    """

    name = NAME
    absent = "no attention method over named scores in this file"
    examples = (
        Example(
            "left out",
            _BODY.format(masked=_MASKED, add="", passed="attention_mask"),
            _BODY.format(masked=_MASKED, add=_ADD, passed="attention_mask"),
            Status.APPLIED,
        ),
        Example(
            "already added",
            _BODY.format(masked="", add=_ADD, passed="attention_mask"),
            None,
            Status.ALREADY,
        ),
        Example("no attention", "import torch\n", None, Status.ABSENT),
        Example(
            "the mask is not passed on",
            _BODY.format(masked=_MASKED, add="", passed="None"),
            None,
            Status.DECLINED,
        ),
        Example(
            "nothing is masked",
            _BODY.format(masked="", add="", passed="attention_mask"),
            None,
            Status.DECLINED,
        ),
    )

    def sites(self, source: Source, decided: Decisions) -> Iterator[Site]:
        for attention in attentions(source):
            for path in attention.paths:
                yield replace(self._site(path), required=not path.dead)

    def _site(self, path: ScorePath) -> Site:
        if path.added:
            stmt = path.added[0]
            reason = "attention_mask is added to the scores"
            return Site(Status.ALREADY, reason, stmt.lineno, stmt.end_lineno, path.where)
        line = path.softmax.lineno
        problem = path.mask_reaches()
        if path.unknown:
            problem = "the scores are rewritten in a form not known"
            line = path.unknown[0].lineno
        elif not path.masks:
            problem = "nothing masks these scores here: attention_mask would hide what they show now"
        if problem:
            return Site(Status.DECLINED, problem, line, line, path.where)
        mask, scores = path.mask_parameter, path.scores
        text = f"if {mask} is not None:\n    {scores} = {scores} + {mask}\n"
        reason = "the method takes attention_mask and never uses it"
        return Site(Status.APPLIED, reason, line, line, path.where, (Insert(path.softmax, text),))
