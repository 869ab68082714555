"""The Python files of a Qwen v1 checkout, one modeling file for each era of upstream's history.

Upstream's modeling file changed in seven ways that matter to an export (how the mask is made, where rotary
positions are computed, whether attention_mask is added, how the scores are scaled). The files here have the
structure of those eras in this project's own words. They share most of their text, so each is put together
from parts; the parts are data, never imported.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent

_LIST_FORWARD = ("forward_list_open", "forward_list_rotary")
_QUANTISED_INIT = ("attention_init_plain", "attention_init_quantised")
_MODEL_TAIL = ("lm_head", "rotary_tables", "norm")
_LIST_MODEL = (
    "pretrained",
    "model_rotary",
    "model_quantised",
    "model_mask",
    "model_inputs",
    "model_ntk",
    "model_forward_open",
    "model_length_quantised",
    "model_tables_list",
    "model_loop_list",
)
_MASKLESS_MODEL = tuple(
    "model_loop_maskless" if part == "model_loop_list" else part
    for part in _LIST_MODEL
    if part != "model_mask"
)

#: Era -> the parts of its modeling file, oldest era first.
_PARTS: dict[str, tuple[str, ...]] = {
    # A `bias` buffer is the mask, rotary angles are computed inside attention, attention_mask is never added.
    "bias-buffer": (
        "head",
        "attention_bias_buffer",
        "mlp",
        "block_bias_buffer",
        "pretrained",
        "model_inputs",
        "model_forward_open",
        "model_loop_bias_buffer",
        "lm_head",
        "rotary_angles",
        "norm",
    ),
    # The model hands down registered_causal_mask and one pair of tables; attention_mask is never added.
    "registered-mask": (
        "head",
        "attention_init_plain",
        "attn_pair",
        "upcast",
        "heads",
        "forward_pair",
        "mlp",
        "block_pair",
        "pretrained",
        "model_rotary",
        "model_mask",
        "model_inputs",
        "model_forward_open",
        "model_length_plain",
        "model_tables_pair",
        "model_loop_pair",
        *_MODEL_TAIL,
    ),
    # A list of tables, one per sequence; attention_mask is added.
    "registered-mask-list": (
        "head",
        "attention_init_plain",
        "attn_list",
        "upcast",
        "heads",
        *_LIST_FORWARD,
        "forward_cache_plain",
        "forward_close",
        "mlp",
        "block_list",
        "pretrained",
        "model_rotary",
        "model_mask",
        "model_inputs",
        "model_ntk",
        "model_forward_open",
        "model_length_plain",
        "model_tables_list",
        "model_loop_list",
        *_MODEL_TAIL,
    ),
    # The KV cache may be stored in 8 bits.
    "kv-quant": (
        "head",
        "cache_quantiser",
        *_QUANTISED_INIT,
        "attn_quantised",
        "upcast",
        "heads",
        *_LIST_FORWARD,
        "forward_cache_quantised",
        "forward_logn_always",
        "forward_end_quantised",
        "forward_close",
        "mlp",
        "block_list",
        *_LIST_MODEL,
        *_MODEL_TAIL,
    ),
    # scaled_dot_product_attention where torch has it (the era the vendor's hand-edited file starts from).
    "sdpa": (
        "head",
        "flag",
        "cache_quantiser",
        *_QUANTISED_INIT,
        "attn_quantised",
        "upcast",
        "heads",
        *_LIST_FORWARD,
        "forward_cache_quantised",
        "forward_logn_always",
        "forward_end_sdpa",
        "forward_close",
        "mlp",
        "block_list",
        *_LIST_MODEL,
        *_MODEL_TAIL,
    ),
    # No _upcast_and_reordered_attn; the mask is built in attention's forward.
    "tril-forward": (
        "head",
        "flag",
        "cache_quantiser",
        *_QUANTISED_INIT,
        "attn_quantised",
        "heads",
        "forward_list_open_maskless",
        "forward_list_rotary",
        "forward_cache_quantised",
        "forward_logn_always",
        "forward_end_tril",
        "forward_close",
        "mlp",
        "block_maskless",
        *_MASKLESS_MODEL,
        *_MODEL_TAIL,
    ),
    # Scalar divide; causal_mask may be None; LogN only past the trained length.
    "late": (
        "head",
        "flag",
        "cache_quantiser",
        *_QUANTISED_INIT,
        "attn_late",
        "heads",
        "forward_list_open_maskless",
        "forward_list_rotary",
        "forward_cache_quantised",
        "forward_logn_past_length",
        "forward_end_late",
        "forward_close",
        "mlp",
        "block_maskless",
        *_MASKLESS_MODEL,
        *_MODEL_TAIL,
    ),
}

#: Names of the eras, oldest first.
ERAS: tuple[str, ...] = tuple(_PARTS)


def modeling_source(era: str) -> str:
    """The text of ``modeling_qwen.py`` as *era* has it. Raises KeyError for an unknown era."""
    texts = ((_HERE / "parts" / f"{name}.py.txt").read_text(encoding="utf-8") for name in _PARTS[era])
    return "".join(texts)


def python_files(era: str) -> dict[str, str]:
    """Every Python file of a checkout of *era*: file name -> text."""
    files = {"modeling_qwen.py": modeling_source(era)}
    for name in ("configuration_qwen", "qwen_generation_utils", "tokenization_qwen"):
        files[f"{name}.py"] = (_HERE / f"{name}.py.txt").read_text(encoding="utf-8")
    return files
