"""Changes that were once edited into other numbers, by kind: each is declined, with a reason and a line."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import codemods
from codemods.framework.base import Status
from golden.eras import modeling_source

_ADD = "        if attention_mask is not None:\n            attn_weights = attn_weights + attention_mask\n"
_BLOCK = "        attended, *rest = self.attn(\n"
_INIT = "        self.wte = nn.Embedding(self.vocab_size, self.embed_dim)\n"
_WHERE = "        attn_weights = torch.where(causal_mask, attn_weights.to(attn_weights.dtype), mask_value)\n"
_LOOP = """\
                attention_mask=attention_mask,
                use_cache=use_cache,
                output_attentions=output_attentions,
            )
            if use_cache"""
_ONE_PAST = "key = torch.cat([earlier_key, key], dim=1)"
_HEAD = "class QWenMLP(nn.Module):"


@dataclass(frozen=True)
class Known:
    """A piece of an era's text, what takes its place, and the codemod that must decline."""

    era: str
    old: str
    new: str
    codemod: str = "drop-causal-mask"


def before_add(*lines: str) -> Known:
    """*lines* before the caller's mask is added."""
    return Known("registered-mask-list", _ADD, "".join(f"        {line}\n" for line in lines) + _ADD)


def in_block(line: str) -> Known:
    return Known("registered-mask-list", _BLOCK, f"        {line}\n{_BLOCK}")


def in_init(*lines: str) -> Known:
    """*lines* at the end of the model's ``__init__``."""
    return Known(
        "registered-mask-list",
        "        self.post_init()\n\n    def set_input",
        "".join(f"        {line}\n" for line in lines) + "        self.post_init()\n\n    def set_input",
    )


def handed(value: str) -> Known:
    """The model hands its layers *value*."""
    return Known("registered-mask-list", _LOOP, _LOOP.replace("=attention_mask", f"={value}", 1))


def before_class(text: str) -> Known:
    """*text* after the attention class, with ``OtherAttention`` used by the blocks."""
    return Known("registered-mask-list", _HEAD, f"{text}\n\n{_HEAD}")


_SOFTMAX = "        attn_weights = nn.functional.softmax(attn_weights.float(), dim=-1)\n"
_FLOAT_SOFTMAX = "            attn_weights = F.softmax(attn_weights.float(), dim=-1)\n"

_LATE_SUM = (
    "        if attention_mask is not None:\n            attn_weights = attn_weights + attention_mask\n"
)
_LATE_FILLS = (
    "        if causal_mask is not None:\n"
    "            attn_weights = torch.where(causal_mask, attn_weights.to(attn_weights.dtype), mask_value)\n"
)
_LATE_SCALE = "        attn_weights = attn_weights / (value.size(-1) ** 0.5)\n"
_LATE_FILL = "        if causal_mask is not None:\n            attn_weights = torch.where("


def in_plain_branch(line: str, era: str = "late") -> Known:
    """*line* before the mask of the branch that torch 2 never runs unpatched: there causal_mask may be None,
    mask_value a number, and what raises an error raises it only in the patched file."""
    at = _LATE_FILL if era == "late" else _LATE_SUM
    return Known(era, at, f"        {line}\n{at}", "disable-torch2")


def in_block_of(era: str, old: str, new: str, codemod: str = "add-attention-mask") -> Known:
    """Another argument where attention or a layer is called."""
    return Known(era, old, new, codemod)


KNOWN = {
    "the same mask twice, the other way round": Known(
        "registered-mask-list", _WHERE, _WHERE + _WHERE.replace("(causal_mask", "(~causal_mask")
    ),
    "another mask given in a loop, after it is handed on": Known(
        "registered-mask-list",
        "            if use_cache:\n                presents",
        "            attention_mask = None\n            if use_cache:\n                presents",
    ),
    "the plain branch looks at a mask that may be None": in_plain_branch("seen = causal_mask.shape"),
    "the plain branch copies a mask that may be None": in_plain_branch(
        "causal_mask = causal_mask.contiguous()"
    ),
    "the plain branch looks at a number as at a tensor": in_plain_branch("peek = mask_value[..., :1]"),
    "the plain branch copies a number as a tensor": in_plain_branch("alias = mask_value.detach()"),
    "the plain branch adds no mask, the flag of its softmax unset": Known(
        "tril-forward",
        '        self.softmax_in_fp32 = getattr(config, "softmax_in_fp32", False)\n',
        "",
        "disable-torch2",
    ),
    "the plain branch looks at a history that may be None": Known(
        "late",
        "                attn_output, attn_weight = self._attn(\n",
        "                alias = layer_past.expand_as(layer_past)\n"
        "                attn_output, attn_weight = self._attn(\n",
        "disable-torch2",
    ),
    "the plain branch asks scores whether they are true": in_plain_branch(
        "if attn_weights:\n            pass"
    ),
    "the plain branch makes a number of many": in_plain_branch("total = float(attn_weights)"),
    "the plain branch asks a number for its length": in_plain_branch("noted = mask_value.size(0)", "sdpa"),
    "the plain branch cuts a number": in_plain_branch("other = mask_value[:]", "sdpa"),
    "the plain branch turns four axes around": in_plain_branch("turned = attn_weights.t()"),
    "the plain branch asks for a fifth axis": in_plain_branch("noted = query.size(4)"),
    "the plain branch asks for a dtype that is none": in_plain_branch("other = query.to(torch.flaot16)"),
    "the plain branch calls what is not there": in_plain_branch("other = torch.halved(query)"),
    "the plain branch scales as the fused one does not": Known(
        "sdpa",
        "        self.scale_attn_weights = True\n",
        "        self.scale_attn_weights = False\n",
        "disable-torch2",
    ),
    "the triangle in place of the mask": in_block_of(
        "registered-mask",
        "value, registered_causal_mask, attention_mask, head_mask\n",
        "value, registered_causal_mask, registered_causal_mask, head_mask\n",
    ),
    "the hidden states in place of the mask": in_block_of(
        "registered-mask",
        "attention_mask=attention_mask,\n            layer",
        "attention_mask=hidden_states,\n            layer",
    ),
    "the mask no longer handed to attention": in_block_of(
        "bias-buffer", "            attention_mask=attention_mask,\n            layer", "            layer"
    ),
    "the fill value changed by F.relu in place": Known(
        "bias-buffer",
        "        attn_weights = torch.where(causal_mask",
        "        F.relu(mask_value, inplace=True)\n        attn_weights = torch.where(causal_mask",
    ),
    "the fill value changed by F.relu in place, said by its place": Known(
        "bias-buffer",
        "        attn_weights = torch.where(causal_mask",
        "        F.relu(mask_value, True)\n        attn_weights = torch.where(causal_mask",
    ),
    "masked scores returned early": Known(
        "registered-mask-list",
        _ADD,
        "        if head_mask is None:\n            return attn_weights @ value, attn_weights\n" + _ADD,
    ),
    "masked scores stored": before_add("self.seen = attn_weights"),
    "masked scores put into a list": before_add("self.seen.append(attn_weights)"),
    "masked scores changed in an arm of the sum": Known(
        "registered-mask-list", _ADD, _ADD + "            attn_weights.zero_()\n"
    ),
    "another scale of the mask in an arm of the sum": Known(
        "registered-mask-list",
        _ADD,
        _ADD.replace("None:\n", "None:\n            attention_mask = attention_mask * 2\n"),
    ),
    "a name restored after another has been given": Known(
        "registered-mask-list",
        _WHERE,
        "        kept = attn_weights\n" + _WHERE + "        attn_weights = kept\n",
    ),
    "a name restored to what it was before": before_add(
        "kept = value", "attention_mask = kept", "value = kept", "attention_mask = attention_mask"
    ),
    "two softmaxes in a row": Known(
        "kv-quant", _FLOAT_SOFTMAX, _FLOAT_SOFTMAX + _FLOAT_SOFTMAX.replace(".float()", "")
    ),
    "softmax over another axis": Known("registered-mask-list", _SOFTMAX, _SOFTMAX.replace("-1", "1")),
    "softmax over no axis that is said": Known(
        "registered-mask-list", _SOFTMAX, _SOFTMAX.replace(", dim=-1", "")
    ),
    "mask filled in place": before_add("attention_mask.masked_fill_(attention_mask < 0, -1.0)"),
    "mask copied over": before_add("attention_mask.copy_(attention_mask * 0.5)"),
    "mask written by out=": before_add("torch.mul(attention_mask, 0.0, out=attention_mask)"),
    "mask written into": before_add("attention_mask[..., 0] = -1e9"),
    "mask changed by an augmented assignment": before_add("attention_mask *= 0.0"),
    "mask changed by __setitem__": before_add("attention_mask.__setitem__((..., 0), -1e9)"),
    "mask's data replaced": before_add("attention_mask.data = attention_mask.data * 0"),
    "mask's data replaced by setattr": before_add("setattr(attention_mask, 'data', attention_mask.data * 0)"),
    "mask's data changed": before_add("attention_mask.data.mul_(0)"),
    "mask changed through another name": before_add("alias = attention_mask", "alias.zero_()"),
    "mask changed through a view": before_add("part = attention_mask[..., :2]", "part.fill_(-1e9)"),
    "mask changed through a view of a view": before_add("attention_mask.view(-1)[:3].zero_()"),
    "mask changed by a function of torch": before_add("torch.relu_(attention_mask)"),
    "mask changed with inplace=True": before_add("F.relu(attention_mask, inplace=True)"),
    "mask changed out of a list": before_add("[attention_mask][0].mul_(0)"),
    "mask changed by getattr": before_add("getattr(attention_mask, 'mul_')(0)"),
    "mask given to an unknown function": before_add("tidy(attention_mask)"),
    "mask given to a function called as a tensor's method": before_add(
        "import helpers", "helpers.sum(attention_mask)"
    ),
    "mask changed in the block": in_block("attention_mask.zero_()"),
    "mask changed in the block through a view": in_block("part = attention_mask[..., 1:]; part.zero_()"),
    "mask changed by a function of the file": Known(
        "registered-mask-list",
        _BLOCK,
        "        hush(attention_mask)\n" + _BLOCK + "",
    ),
    "mask scaled by the model": handed("attention_mask * 1e-6"),
    "mask inverted by the model": handed("-attention_mask"),
    "mask windowed by the model": handed(
        "attention_mask.masked_fill(torch.arange(attention_mask.size(-1)) < 2, -1e9)"
    ),
    "mask dropped by the model": handed("None"),
    "mask not inverted": Known("registered-mask-list", "1.0 - attention_mask", "attention_mask"),
    "mask of small numbers": Known(
        "registered-mask-list", "hidden * torch.finfo(self.dtype).min", "hidden * -1.0"
    ),
    "buffer filled after it was registered": in_init("self.registered_causal_mask.fill_(True)"),
    "buffer replaced by setattr": in_init(
        "setattr(self, 'registered_causal_mask', ~self.registered_causal_mask)"
    ),
    "buffer replaced": in_init("self.registered_causal_mask = ~self.registered_causal_mask"),
    "buffer changed through its name": in_init("self.get_buffer('registered_causal_mask').fill_(True)"),
    "buffer changed through _buffers": in_init("self._buffers['registered_causal_mask'].fill_(True)"),
    "buffer replaced by two names": in_init(
        "vars(self)['_buffers']['registered_causal_mask'] = ~self.registered_causal_mask"
    ),
    "scores called otherwise before a mask is added in place": Known(
        "registered-mask-list",
        _WHERE + "\n" + _ADD,
        "        seen = attn_weights\n"
        + _WHERE
        + _ADD.replace("= attn_weights +", "+=")
        + "        query = query * seen.sum()\n",
    ),
    "buffer changed through another name": in_init("mask = self.registered_causal_mask", "mask.fill_(True)"),
    "triangle changed in the method": Known(
        "registered-mask-list", _WHERE, "        causal_mask.fill_(True)\n" + _WHERE
    ),
    "triangle changed on the way": in_block("registered_causal_mask.fill_(True)"),
    "scores called otherwise before a mask in place": Known(
        "registered-mask-list",
        _WHERE,
        "        seen = attn_weights\n        attn_weights.masked_fill_(~causal_mask, mask_value)\n"
        "        total = seen.sum()\n"
        "        query = query * total\n",
    ),
    "masked scores kept": Known(
        "registered-mask-list",
        _ADD,
        "        kept = attn_weights.clone()\n" + _ADD + "        value = value * kept.sum()\n",
    ),
    "a method replaced": before_class("QWenAttention._attn = lambda self, *given: given[0]"),
    "a subclass with another forward": before_class(
        "class OtherAttention(QWenAttention):\n"
        "    def forward(self, *args, **kwargs):\n        return super().forward(*args)\n"
    ),
    "a subclass with another _attn": before_class(
        "class OtherAttention(QWenAttention):\n"
        "    def _attn(self, *args):\n        return super()._attn(*args[:-2])\n"
    ),
    "lengths compared where heads come first": Known(
        "late",
        "            side = key[0].size(2)",
        "            query = query.permute(0, 2, 1, 3)\n            side = key[0].size(2)",
    ),
    "no mask at all": Known(
        "registered-mask",
        "        attn_weights = torch.where(causal_mask, attn_weights.to(attn_weights.dtype), mask_value)\n",
        "",
        "add-attention-mask",
    ),
    "a second block that hands on another mask": before_class(
        "class OtherBlock(nn.Module):\n    def __init__(self, config):\n        super().__init__()\n"
        "        self.attn = QWenAttention(config)\n\n"
        "    def forward(self, hidden, attention_mask=None):\n"
        "        return self.attn(hidden, None, -attention_mask)\n"
    ),
    "an attention class made where it is not seen": before_class(
        "def build(config, kind=QWenAttention):\n    return kind(config)\n"
    ),
    "a block without a forward": before_class(
        "class OtherBlock(nn.Module):\n    def __init__(self, config):\n        super().__init__()\n"
        "        self.attn = QWenAttention(config)\n"
    ),
    "a subclass of a subclass with another _attn": before_class(
        "class NearAttention(QWenAttention):\n    spare = 1\n\n\n"
        "class OtherAttention(NearAttention):\n"
        "    def _attn(self, *args):\n        return super()._attn(*args[:-2])\n"
    ),
    "buffer filled where weights are": Known(
        "registered-mask-list",
        "    def _init_weights(self, module):\n",
        "    def _init_weights(self, module):\n        if isinstance(module, nn.Linear):\n"
        "            self.registered_causal_mask.fill_(True)\n",
    ),
    "a decorated method": Known("registered-mask-list", "    def _attn(", "    @halved\n    def _attn("),
    "the plain branch has another scale": Known(
        "sdpa", "size_temp ** 0.5", "size_temp ** 0.25", "disable-torch2"
    ),
    "the plain branch has another axis": Known(
        "sdpa", "F.softmax(attn_weights, dim=-1)", "F.softmax(attn_weights, dim=-2)", "disable-torch2"
    ),
    "the fused branch hides less": Known(
        "sdpa",
        "wide.masked_fill(~causal_mask, lowest)",
        "wide.masked_fill(~causal_mask, 0.0)",
        "disable-torch2",
    ),
    "the fused branch has other values": Known(
        "sdpa",
        "F.scaled_dot_product_attention(query, key, value,",
        "F.scaled_dot_product_attention(query, key, value * 2,",
        "disable-torch2",
    ),
    "the plain branch reads a name before it is set": Known(
        "sdpa",
        "        if self.scale_attn_weights:\n            size_temp",
        "        if self.scale_attn_weights:\n            size_temp = size_temp or 1\n            size_temp",
        "disable-torch2",
    ),
    "key changed in place after the join": Known(
        "registered-mask-list",
        "        attn_weights = torch.matmul(query, key",
        "        key.neg_()\n        attn_weights = torch.matmul(query, key",
        "early-present",
    ),
    "present changed in place after the join": Known(
        "registered-mask-list",
        "            present = None\n",
        "            present = None\n        for half in present or ():\n            half.mul_(2)\n",
        "early-present",
    ),
    "part of the past joined": Known(
        "registered-mask-list",
        _ONE_PAST,
        _ONE_PAST.replace("earlier_key,", "earlier_key[:, 1:],"),
        "early-present",
    ),
    "the triangle registered anew from outside": Known(
        "bias-buffer",
        "        self.post_init()\n\n    def set_output_embeddings",
        "        self.post_init()\n        first = self.transformer.h[0].attn\n"
        "        first.register_buffer('bias', torch.ones_like(first.bias), persistent=False)\n\n"
        "    def set_output_embeddings",
    ),
    "a buffer registered under a name that does not show": Known(
        "bias-buffer",
        "        self.post_init()\n\n    def set_output_embeddings",
        "        self.post_init()\n        for name, kept in [*self.named_buffers()]:\n"
        "            self.register_buffer(name, torch.ones_like(kept))\n\n"
        "    def set_output_embeddings",
    ),
    "values changed where there is a mask": Known(
        "kv-quant",
        _LATE_SUM,
        "        if attention_mask is not None:\n            value = value * 0\n"
        "            attn_weights = attn_weights + attention_mask\n",
    ),
    "values changed in an `if` of their own": Known(
        "kv-quant",
        _LATE_SUM,
        f"        if attention_mask is not None:\n            value = value * 0\n{_LATE_SUM}",
    ),
    "values changed by an expression that looks for a mask": Known(
        "kv-quant",
        _LATE_SUM,
        f"        value = value if attention_mask is None else value * 0\n{_LATE_SUM}",
    ),
    "the branch that goes sets an attribute by its name": Known(
        "tril-forward",
        "                    lowest = torch.finfo(query.dtype).min\n",
        "                    setattr(self, 'logn_tensor', torch.ones_like(self.logn_tensor))\n"
        "                    lowest = torch.finfo(query.dtype).min\n",
        "disable-torch2",
    ),
    "the branch that goes replaces a parameter": Known(
        "tril-forward",
        "                    lowest = torch.finfo(query.dtype).min\n",
        "                    self.c_proj.register_parameter('weight', nn.Parameter(self.c_proj.weight * 2))\n"
        "                    lowest = torch.finfo(query.dtype).min\n",
        "disable-torch2",
    ),
    "the branch that goes replaces what the module holds": Known(
        "tril-forward",
        "                    lowest = torch.finfo(query.dtype).min\n",
        "                    self.register_buffer('logn_tensor', torch.ones_like(self.logn_tensor))\n"
        "                    lowest = torch.finfo(query.dtype).min\n",
        "disable-torch2",
    ),
    "part of the history handed on": Known(
        "registered-mask-list",
        "            layer_past=layer_past,\n            output",
        "            layer_past=layer_past and [half[:, 1:] for half in layer_past],\n            output",
        "early-present",
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_cannot_be_shown_is_declined_with_a_line(name: str) -> None:
    known = KNOWN[name]
    text = modeling_source(known.era)
    changed = text.replace(known.old, known.new)
    assert changed != text, "the era's text has moved on"
    if "OtherAttention" in known.new:
        changed = changed.replace("self.attn = QWenAttention(", "self.attn = OtherAttention(")
    if "hush(" in known.new:
        changed = changed.replace(_HEAD, f"def hush(part):\n    part.zero_()\n\n\n{_HEAD}")
    result = codemods.run(changed, "static")
    found = [o for o in result.declined if o.codemod == known.codemod]
    assert found, result.outcomes
    assert all(o.status is Status.DECLINED and o.line and o.reason for o in found)


LOOKS = {
    "generate replaced, which calls the model from outside": Known(
        "registered-mask-list",
        "    def set_input",
        "    def generate(self):\n        return self\n\n    def chat(self):\n"
        "        self.__class__.generate = len\n\n    def set_input",
    ),
    "the plain branch adds no mask, so that it is added": Known("late", _LATE_SUM, ""),
    "a name kept and restored": before_add("kept = attention_mask", "total = 1", "attention_mask = kept"),
    "a name given its own value": before_add("attention_mask = attention_mask"),
    "the scores kept and restored before they are masked": Known(
        "registered-mask-list",
        _WHERE,
        "        kept = attn_weights\n        total = 1\n        attn_weights = kept\n" + _WHERE,
    ),
    "the scores changed in place before they are masked": Known(
        "registered-mask-list", _WHERE, "        attn_weights.mul_(0.5)\n" + _WHERE
    ),
    "another name beside the sum": Known(
        "registered-mask-list", _ADD, _ADD.replace("None:\n", "None:\n            alias = key.contiguous()\n")
    ),
    "another name beside present": Known(
        "registered-mask-list",
        "            present = (key, value)\n",
        "            kept = key\n            present = (key, value)\n            key = kept\n",
    ),
    "the same mask twice": Known("registered-mask-list", _WHERE, _WHERE + _WHERE),
    "another mask given where it is handed on no more": Known(
        "registered-mask-list",
        "        residual = hidden_states + attended\n",
        "        residual = hidden_states + attended\n        layer_past = residual\n",
    ),
    "present kept and restored": Known(
        "registered-mask-list",
        "        outputs = (self.c_proj",
        "        kept = present\n        seen = 1\n        present = kept\n        outputs = (self.c_proj",
    ),
    "a view beside present": Known(
        "registered-mask-list",
        "            present = (key, value)\n",
        "            alias = key.squeeze(0)\n            present = (key, value)\n",
    ),
    "present made twice": Known(
        "registered-mask-list",
        "            present = (key, value)\n",
        "            present = (key, value)\n            present = (key, value)\n",
    ),
    "a buffer of another name": in_init(
        "self._buffers['spare'] = torch.ones_like(self.registered_causal_mask)"
    ),
    "no gradient asked for": before_add("attention_mask.requires_grad_(False)"),
    "the mask added in place": Known(
        "registered-mask-list", _ADD, _ADD.replace("attn_weights = attn_weights +", "attn_weights +=")
    ),
    "the plain branch scales what is masked": Known("late", _LATE_FILLS, _LATE_FILLS + _LATE_SCALE),
    "the plain branch masks the sum": Known("late", _LATE_FILLS + "\n" + _LATE_SUM, _LATE_SUM + _LATE_FILLS),
    "a copy changed in the plain branch": in_plain_branch("copied = query.clone(); copied.mul_(0.5)"),
    "another tensor changed in the plain branch": in_plain_branch(
        "other = torch.zeros_like(key); other.add_(1)"
    ),
    "a part of the scores seen in the plain branch": in_plain_branch("peek = attn_weights[..., :1] * 2"),
    "one number made in the plain branch": in_plain_branch("total = float(attn_weights.float().sum())"),
    "a view in the plain branch": in_plain_branch(
        "alias = query.view(query.shape); query = [alias, None][0]"
    ),
    "a number copied in the plain branch": in_plain_branch("other = mask_value.detach()", "sdpa"),
    "a shape noted in the plain branch": Known(
        "late", _LATE_SUM, "        self.last_seen = query.shape\n" + _LATE_SUM
    ),
    "a copy is changed": before_add("copied = attention_mask.clone()", "copied.zero_()"),
    "a product is changed": before_add("scaled = attention_mask * 2", "scaled.zero_()"),
    "its shape is noted": before_add("self.seen = attention_mask.shape"),
    "another name for it": before_add("alias = attention_mask", "attention_mask = alias"),
    "a copy handed on": handed("attention_mask.contiguous()"),
    "a subclass that changes nothing": before_class("class OtherAttention(QWenAttention):\n    spare = 1\n"),
    "a method that only passes on": before_class(
        "class OtherAttention(QWenAttention):\n"
        "    def _attn(self, *args, **kwargs):\n        return super()._attn(*args, **kwargs)\n"
    ),
    "a function of the file looks at it": Known(
        "registered-mask-list", _BLOCK, "        look(attention_mask)\n" + _BLOCK
    ),
    "the buffer is a copy of itself": in_init(
        "self.registered_causal_mask = self.registered_causal_mask.clone()"
    ),
    "no else for present": Known(
        "registered-mask-list", "            present = None\n", "            pass\n"
    ),
    "a copy of the buffer is changed": in_init(
        "spare = self.registered_causal_mask.clone()", "spare.fill_(True)"
    ),
}


@pytest.mark.parametrize("name", LOOKS)
def test_what_changes_nothing_is_still_edited(name: str) -> None:
    known = LOOKS[name]
    text = modeling_source(known.era)
    changed = text.replace(known.old, known.new)
    assert changed != text
    if _LATE_SCALE in known.new:
        changed = changed.replace("            attn_weights = attn_weights / (size_temp ** 0.5)\n", "")
    changed = (
        changed.replace("self.attn = QWenAttention(", "self.attn = OtherAttention(")
        if "OtherAttention" in known.new
        else changed
    )
    if "look(" in known.new:
        changed = changed.replace(_HEAD, f"def look(part):\n    return part.sum()\n\n\n{_HEAD}")
    result = codemods.run(changed, "static")
    assert result.changed and not result.declined, result.declined
