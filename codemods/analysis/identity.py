"""Is this Qwen v1 modeling code, and of which era? Judged by content, never by file name."""

from __future__ import annotations

import ast
from enum import Enum

from codemods.analysis import syntax
from codemods.analysis.attention import Attention, attentions
from codemods.analysis.causal import is_triangle
from codemods.analysis.source import Source, SourceError, read


class Era(str, Enum):
    """Stages of upstream's history, by how attention is masked and what it carries."""

    BIAS_BUFFER = "bias-buffer"  #: the mask is a buffer of the attention class; rotary inside attention
    REGISTERED_MASK = "registered-mask"  #: registered_causal_mask argument, rotary_pos_emb
    REGISTERED_MASK_LIST = "registered-mask-list"  #: the same with rotary_pos_emb_list
    KV_QUANT = "kv-quant"  #: with a quantised key/value cache
    SDPA = "sdpa"  #: torch 2's fused attention behind a flag
    TRIL_FORWARD = "tril-forward"  #: the mask is built by torch.tril in forward, sliced in _attn
    LATE = "late"  #: scalar divide, `if causal_mask is not None`
    DERIVED = (
        "derived"  #: Qwen v1 shaped attention that fits none of these (a derived family, an edited file)
    )


def identify(source: bytes | str) -> Era | None:
    """The era of a Qwen v1 modeling file, or None when the content is something else.

    Raises :class:`~codemods.analysis.source.SourceError` when the source does not parse.
    """
    return era_of(read(source.encode() if isinstance(source, str) else source))


def may_be_modeling(data: bytes) -> bool:
    """A quick look at the text that spares parsing what cannot be Qwen v1 modeling code.

    c_attn is a parameter's name, so that no derived model can be without it.
    """
    return b"c_attn" in data and b"class " in data


def refusal(source: bytes | str) -> str:
    """Why a file is not Qwen v1 modeling code, in one sentence; empty when it is."""
    try:
        parsed = read(source.encode() if isinstance(source, str) else source)
    except SourceError as error:
        return str(error)
    return _refusal(parsed)


def _refusal(source: Source) -> str:
    """Qwen v1 is told by a joint linear c_attn, rotary positions, RMSNorm and a w1/w2 gated MLP, all in
    one file."""
    found = attentions(source)
    if not found:
        return "no class in it makes c_attn and c_proj and has a forward: not Qwen v1 attention"
    if not any(_is_linear(a, "c_attn") for a in found):
        return "c_attn is not a linear layer (GPT-2 style attention): not Qwen v1"
    names = {n.name for n in syntax.walk(source.tree) if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
    used = {syntax.last_name(n) for n in syntax.walk(source.tree) if isinstance(n, (ast.Name, ast.Attribute))}
    if not any("rotary" in name.lower() for name in names | used):
        return "no rotary position embedding in it: not Qwen v1"
    if not any("rmsnorm" in name.lower().replace("_", "") for name in names | used):
        return "no RMSNorm in it: not Qwen v1"
    if not any(
        {"w1", "w2", "c_proj"} <= _made(n) for n in syntax.walk(source.tree) if isinstance(n, ast.ClassDef)
    ):
        return "no gated MLP of w1, w2 and c_proj in it: not Qwen v1"
    return ""


def _made(node: ast.ClassDef) -> set[str]:
    return {
        n.attr for n in syntax.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
    }


def _is_linear(attention: Attention, name: str) -> bool:
    for node in syntax.walk(attention.node):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Attribute)
            and node.targets[0].attr == name
        ):
            return "linear" in syntax.call_name(node.value).lower()
    return False


def era_of(source: Source) -> Era | None:
    """As :func:`identify`, for a source that is parsed already."""
    if _refusal(source):
        return None
    attention = attentions(source)[0]
    names = set(syntax.parameters(attention.forward)) if attention.forward else set()
    attributes = {n.attr for n in syntax.walk(attention.node) if isinstance(n, ast.Attribute)}
    registers = bool(syntax.calls(attention.node, "register_buffer"))
    own_triangle = registers and any(
        len(c.args) > 1 and is_triangle(c.args[1]) for c in syntax.calls(attention.node, "register_buffer")
    )
    if own_triangle:
        return Era.BIAS_BUFFER
    if "registered_causal_mask" in names:
        if "scaled_dot_product_attention" in attributes:
            return Era.SDPA
        if "use_cache_quantization" in attributes:
            return Era.KV_QUANT
        return Era.REGISTERED_MASK_LIST if "rotary_pos_emb_list" in names else Era.REGISTERED_MASK
    inner = attention.methods.get("_attn")
    if inner is not None and "registered_causal_mask" in syntax.parameters(inner):
        return Era.TRIL_FORWARD
    if inner is not None and "causal_mask" in syntax.parameters(inner):
        return Era.LATE
    return Era.DERIVED
