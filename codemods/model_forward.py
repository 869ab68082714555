"""``model-forward``: read what the model does around its layers, which no net does."""

from __future__ import annotations

from collections.abc import Iterator

from codemods.analysis import forward
from codemods.analysis.attention import attentions
from codemods.analysis.handed import mask_problem
from codemods.analysis.model_parts import ModelClass, ModelSizes, models
from codemods.analysis.source import Source
from codemods.config.facts import ModelFacts
from codemods.framework.base import Decisions, Example, Rule, Site, Status

_BODY = """\
class Model(nn.Module):
    def __init__(self, config):
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = RMSNorm(config.hidden_size)

    def forward(self, input_ids, past_key_values=None, attention_mask=None):
        hidden_states = self.wte(input_ids)
        length = hidden_states.size(1)
        if past_key_values is None:
            past_key_values = [None] * len(self.h)
        else:
            length += past_key_values[0][0].shape[1]
        presents = ()
{before}        for i, (block, layer_past) in enumerate(zip(self.h, past_key_values)):
{inside}            outputs = block(hidden_states, layer_past=layer_past, attention_mask=attention_mask)
            hidden_states = outputs[0]
            presents = presents + (outputs[1],)
        return self.ln_f(hidden_states), presents
"""
_LONG = """\
        if length > {least}:
            hidden_states = hidden_states * 1.01
"""
_HEAD = """\
class LMHeadModel(nn.Module):
    def __init__(self, config):
        self.transformer = Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids, past_key_values=None, attention_mask=None):
        outputs = self.transformer(
            input_ids=input_ids, past_key_values=past_key_values, attention_mask=attention_mask
        )
        logits = self.lm_head(outputs[0])
        return ({logits}, *outputs[1:])
"""


def _model(before: str = "", inside: str = "") -> str:
    return _BODY.format(before=before, inside=inside)


class ModelForward(Rule):
    """Read what the model's own forward does around its layers, and decline what the nets do not do.

    Why
        A bmodel holds an embedding, layers, and a norm with the output layer; a runtime feeds one to the
        next. Whatever the model's forward does besides, to embeddings, states, masks, positions or logits, is
        in no net. Some of it shows at real sizes only: a branch for long prompts, for many layers, for one
        layer's index.

    Checked before
        Both forwards are run on abstract values, for a prompt of 1 to S tokens and for a decode step, with
        the unpatched config.json and the export length S. Accepted between the parts, in this order: self.wte
        (an nn.Embedding) of the caller's ids; dropout; one loop over all of self.h in their order, or over
        their numbers, each given the states of the one before it, the caller's mask as upstream expands it,
        its own history, tables of self.rotary_emb as long as all tokens with an unchanged base, and flags;
        self.ln_f; self.lm_head (an nn.Linear); the result as a tuple or one of transformers' outputs. Between
        any two: device and dtype, contiguous, clone, detach, view and reshape to the same shape, `+ 0`,
        `* 1`, the last row alone; methods and functions of the file are read too. What does not come back
        into these values is free: flags, shapes, lists of states, losses, logs, everything for training. A
        branch on a length, a layer's index or a number of config.json is read only where it can be taken;
        where it never is, it is listed. What always runs the export's tiny twin runs as well.

    Checked after
        Nothing is edited: the forwards stay as they are.

    Declines
        - something else is done to embeddings, states or logits, always or from some length on
        - a layer is left out, run twice, in another order or not always, or is given something else
        - masks, rotary lengths or the rotary base are changed
        - an attribute is kept from one call to the next, and read
        - a layer is changed after it was made
        - code that is not read (a try, a while, a call of something unknown) is given the states
    """

    name = "model-forward"
    absent = "no class of this file makes wte and h, or transformer and lm_head"
    edits = False
    examples = (
        Example("nothing besides", _model(), None, Status.ALREADY),
        Example("only beyond the export length", _model(_LONG.format(least=100000)), None, Status.ALREADY),
        Example("from some length on", _model(_LONG.format(least=4000)), None, Status.DECLINED),
        Example(
            "embeddings scaled",
            _model("        hidden_states = hidden_states * 4.0\n"),
            None,
            Status.DECLINED,
        ),
        Example(
            "a layer left out",
            _model(inside="            if i == 20:\n                continue\n"),
            None,
            Status.DECLINED,
        ),
        Example("logits as they are", _HEAD.format(logits="logits.float()"), None, Status.ALREADY),
        Example("logits capped", _HEAD.format(logits="30 * torch.tanh(logits / 30)"), None, Status.DECLINED),
        Example("no model", "import torch\n", None, Status.ABSENT),
    )

    def sites(self, source: Source, decided: Decisions) -> Iterator[Site]:
        sizes = decided.sizes or ModelFacts.from_config({}).for_reading()
        masks = {
            Site(Status.DECLINED, found.reason, found.line, found.line)
            for attention in attentions(source)
            if (found := mask_problem(source, attention.node)) is not None
        }
        for model in models(source):
            yield from _sites(source, model, sizes)
        yield from sorted(masks, key=lambda site: site.line or 0)


def _sites(source: Source, model: ModelClass, sizes: ModelSizes) -> Iterator[Site]:
    """One forward's: what it does besides, what it never does, or that it does nothing besides."""
    where = f"{model.node.name}.forward"
    found = forward.read(source, model, sizes)
    for one in found.problems:
        yield Site(Status.DECLINED, one.reason, one.line, one.line, where)
    for one in found.never:
        yield Site(Status.ALREADY, one.reason, one.line, one.line, where)
    if not found.problems:
        parts = "the model and the output layer" if model.head else "embedding, layers and final norm"
        line = model.forward.lineno
        yield Site(Status.ALREADY, f"it does nothing besides {parts}", line, line, where)
