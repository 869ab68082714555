"""Makes a small Qwen v1 checkout: config, Python files, weights in safetensors shards, tokenizer files.

Only numpy and the standard library are needed. Every tensor depends on the seed and its own name, so the
same call gives the same bytes, and a checkout with more layers starts with the same layers.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from golden.eras import vocabulary
from golden.eras.sources import ERAS, python_files

_ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4}
#: How far a random output row leans towards the embedding of the token before it.
_LEAN = 2.5
_STORED_NAME = {"bf16": "BF16", "f16": "F16", "f32": "F32"}


@dataclass(frozen=True)
class Sizes:
    """The sizes that fix every tensor's shape; ``intermediate`` is config.json's number (twice w1's rows)."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocab: int


def to_bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits (uint16), rounded to nearest even. NaN and infinity are not expected."""
    bits = values.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) -> float32, exactly."""
    return (bits.astype("<u4") << 16).view("<f4")


def tensor_shapes(sizes: Sizes, *, tie: bool = False) -> dict[str, tuple[int, ...]]:
    """Checkpoint tensor name -> shape, in the order of the model."""
    h, half = sizes.hidden, sizes.intermediate // 2
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (sizes.vocab, h)}
    for i in range(sizes.layers):
        layer = f"transformer.h.{i}"
        shapes |= {
            f"{layer}.ln_1.weight": (h,),
            f"{layer}.attn.c_attn.weight": (3 * h, h),
            f"{layer}.attn.c_attn.bias": (3 * h,),
            f"{layer}.attn.c_proj.weight": (h, h),
            f"{layer}.ln_2.weight": (h,),
            f"{layer}.mlp.w1.weight": (half, h),
            f"{layer}.mlp.w2.weight": (half, h),
            f"{layer}.mlp.c_proj.weight": (h, half),
        }
    shapes["transformer.ln_f.weight"] = (h,)
    if not tie:
        shapes["lm_head.weight"] = (sizes.vocab, h)
    return shapes


def _random(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return generator.standard_normal(shape, dtype=np.float32)


def _next_token(ordinary: int, seed: int) -> np.ndarray:
    """For each ordinary token the one that tends to follow it: one cycle through all of them."""
    order = np.random.default_rng([seed, 1]).permutation(ordinary)
    follows = np.empty(ordinary, dtype=np.int64)
    follows[order] = np.roll(order, -1)
    return follows


def tensor_values(name: str, shape: tuple[int, ...], seed: int, ordinary: int) -> np.ndarray:
    """The float32 values of one tensor.

    Gains are spread around 1 (all-one gains would let a tool drop the norm's product unseen); attention is
    sharp enough that a wrong mask or a wrong position shows. The output layer leans towards one successor
    for each token, so that the best token leads by more than float32's rounding; special tokens are never the
    best.
    """
    values = _random(name, shape, seed)
    if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
        return np.asarray(1.0 + 0.25 * np.clip(values, -3, 3), dtype=np.float32)
    if name.endswith("bias"):
        return np.asarray(0.5 * values, dtype=np.float32)
    width = shape[-1] ** 0.5
    if name == "transformer.wte.weight":
        return values
    if name == "lm_head.weight":
        values[ordinary:] *= 0.1
        embedding = _random("transformer.wte.weight", shape, seed)
        values[_next_token(ordinary, seed)] += _LEAN * embedding[:ordinary]
        return values * np.float32(0.5 / width)
    gain = 1.5 if "c_attn" in name else 0.8
    return np.asarray(values * np.float32(gain / width), dtype=np.float32)


def _encode(values: np.ndarray, dtype: str) -> bytes:
    """Bytes as stored. What is stored in float32 or float16 is rounded to bfloat16's grid first where that is
    exact in the wider type, so that all three hold comparable weights."""
    bits = to_bfloat16_bits(values)
    if dtype == "bf16":
        return bits.tobytes()
    exact = from_bfloat16_bits(bits)
    return exact.astype("<f2" if dtype == "f16" else "<f4").tobytes()


def write_safetensors(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: str,
    data: Callable[[str, tuple[int, ...]], bytes] | None,
) -> int:
    """Write one shard and return its number of data bytes. Without *data* the file is sparse: a true header,
    and zeros that take no disk."""
    sizes = {name: int(np.prod(shape)) * _ITEM_BYTES[dtype] for name, shape in shapes.items()}
    total, kind = sum(sizes.values()), _STORED_NAME[dtype]
    header = safetensors_header((name, shape, kind, sizes[name]) for name, shape in shapes.items())
    with path.open("wb") as file:
        file.write(header)
        if data is None:
            file.truncate(len(header) + total)
        else:
            for name, shape in shapes.items():
                file.write(data(name, shape))
    return total


def safetensors_header(tensors: Iterable[tuple[str, tuple[int, ...], str, int]]) -> bytes:
    """What stands before the data of a safetensors file: for each tensor in it its name, shape, dtype (as the
    format calls it) and bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype, size in tensors:
        stop = offset + size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one file in bfloat16, as float32."""
    data = path.read_bytes()
    start = 8 + struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: from_bfloat16_bits(
            np.frombuffer(
                data,
                "<u2",
                entry["data_offsets"][1] // 2 - entry["data_offsets"][0] // 2,
                start + entry["data_offsets"][0],
            )
        ).reshape(entry["shape"])
        for name, entry in header.items()
    }


def _spread(shapes: dict[str, tuple[int, ...]], shards: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Split tensors over *shards* files of about equal size, keeping their order; no file is left empty."""
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    groups: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    seen = 0
    for left, (name, shape) in zip(range(len(shapes), 0, -1), shapes.items(), strict=True):
        size = int(np.prod(shape))
        first_empty = next((i for i, group in enumerate(groups) if not group), shards)
        wanted = min(int((seen + size / 2) * shards / total), first_empty, shards - 1)
        if shards - first_empty >= left:
            wanted = first_empty  # each tensor that is left must open a file
        groups[max(wanted, first_empty - 1, 0)][name] = shape
        seen += size
    yield from groups


def _config(era: str, sizes: Sizes, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "attn_dropout_prob": 0.0,
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate,
        "kv_channels": sizes.hidden // sizes.heads,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": options["max_positions"],
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "onnx_safe": None,
        "rotary_emb_base": options["rotary_base"],
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": options["trained_length"],
        "tie_word_embeddings": options["tie"],
        "tokenizer_class": "QWenTokenizer",
        "transformers_version": "4.32.0",
        "use_cache": True,
        "use_dynamic_ntk": options["dynamic_ntk"] and era != "bias-buffer",
        "use_flash_attn": "auto",
        "use_logn_attn": options["logn"] and era != "bias-buffer",
        "vocab_size": sizes.vocab,
    }


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"


def _text_files(era: str, config: dict[str, Any], extras: int, end: int) -> dict[str, str]:
    generation = {
        "chat_format": "chatml",
        "eos_token_id": end,
        "pad_token_id": end,
        "max_window_size": 6144,
        "max_new_tokens": 512,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.8,
        "repetition_penalty": 1.1,
        "transformers_version": "4.32.0",
    }
    tokenizer = {
        "model_max_length": config["seq_length"],
        "tokenizer_class": "QWenTokenizer",
        "extras": extras,
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    return {
        "config.json": _json(config),
        "generation_config.json": _json(generation),
        "tokenizer_config.json": _json(tokenizer),
        **python_files(era),
    }


def _write_weights(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    shards: int,
    dtype: str,
    data: Callable[[str, tuple[int, ...]], bytes] | None,
) -> None:
    if shards == 1:
        write_safetensors(path / "model.safetensors", shapes, dtype, data)
        return
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(_spread(shapes, shards), start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        total += write_safetensors(path / file, group, dtype, data)
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(_json(index), encoding="utf-8")


def make_checkout(
    path: str | Path,
    era: str = "sdpa",
    layers: int = 2,
    hidden: int = 128,
    heads: int = 2,
    intermediate: int | None = None,
    vocab: int = 768,
    trained_length: int = 2048,
    seed: int = 0,
    shards: int = 2,
    weight_dtype: str = "bf16",
    tie: bool = False,
    *,
    max_positions: int | None = None,
    rotary_base: float = 10000.0,
    logn: bool = True,
    dynamic_ntk: bool = True,
    sparse: bool = False,
    weights: Mapping[str, np.ndarray] | None = None,
    tokens: bytes | None = None,
) -> Path:
    """Write a checkout into the folder *path* (made if need be) and return that path.

    *intermediate* is config.json's number (twice the rows of w1), four times *hidden* by default.
    *trained_length* is config.json's ``seq_length``: LogN scaling and dynamic NTK begin past it (the
    ``bias-buffer`` era has neither). *max_positions* is by default the larger of *trained_length* and 2048.
    *weight_dtype* is ``bf16``, ``f16`` or ``f32``; values lie on bfloat16's grid in all three (float16
    rounds the smallest). *tie* leaves out lm_head.weight. *sparse* writes true headers over files of
    zeros that take no disk: for measuring real geometries. *weights* (float32, by tensor name) stand in for
    random ones, *tokens* (a tiktoken file) for the made-up vocabulary.

    Raises ValueError for sizes that do not fit together, KeyError for an unknown era or dtype.
    """
    if era not in ERAS:
        raise KeyError(f"no era {era!r}; there are {', '.join(ERAS)}")
    if weight_dtype not in _ITEM_BYTES:
        raise KeyError(f"no weight dtype {weight_dtype!r}; there are {', '.join(_ITEM_BYTES)}")
    if hidden % heads or (hidden // heads) % 2:
        raise ValueError(f"hidden size {hidden} must split into {heads} heads of an even width")
    sizes = Sizes(layers, hidden, heads, intermediate or 4 * hidden, vocab)
    if min(layers, hidden, heads, sizes.intermediate, shards, trained_length) < 1 or sizes.intermediate % 2:
        raise ValueError("sizes must be positive, and the intermediate size even")
    shapes = tensor_shapes(sizes, tie=tie)
    if shards > len(shapes):
        raise ValueError(f"{len(shapes)} tensors cannot fill {shards} shards")
    ordinary, extras = vocabulary.split(vocab)

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    options = {
        "trained_length": trained_length,
        "max_positions": max_positions or max(trained_length, 2048),
        "rotary_base": rotary_base,
        "tie": tie,
        "logn": logn,
        "dynamic_ntk": dynamic_ntk,
    }
    config = _config(era, sizes, options)
    for name, text in _text_files(era, config, extras, end=ordinary).items():
        (path / name).write_text(text, encoding="utf-8")
    (path / "qwen.tiktoken").write_bytes(tokens or vocabulary.tiktoken_file(ordinary))

    def data(name: str, shape: tuple[int, ...]) -> bytes:
        values = tensor_values(name, shape, seed, ordinary) if weights is None else weights[name]
        return _encode(values.reshape(shape), weight_dtype)

    _write_weights(path, shapes, shards, weight_dtype, None if sparse else data)
    return path
