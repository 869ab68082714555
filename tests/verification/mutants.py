"""Errors put in on purpose. Each is one a real toolchain has made, or one slip away from the right code.

``level`` is the first level at which the error is made, and so the one that must catch it. ``nets`` says
which kinds of net are at fault: each of them must be flagged, and no other. It is empty for errors that are
made between the nets, in masks, positions and the cache: only the conversation can catch those.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from qwen_surgery.patching.sources import Sources
from qwen_surgery.runtime import host
from qwen_surgery.verification import runtime
from qwen_surgery.verification.engines import Engine, OrtEngine, TorchEngine
from tests.verification.conftest import SEQ_LENGTH, Bench

Make = Callable[[Bench, pytest.MonkeyPatch], Engine]


@dataclass(frozen=True)
class Mutant:
    name: str
    level: str
    nets: tuple[str, ...]
    make: Make


# ---- the patched source ----------------------------------------------------------------------------------


def _edited(*edits: tuple[str, str]) -> Make:
    """The patched code with a piece of text replaced, which must be there."""

    def make(bench: Bench, _patch: pytest.MonkeyPatch) -> Engine:
        text = bench.sources.patched["modeling_qwen.py"].decode()
        for before, after in edits:
            assert before in text, before
            text = text.replace(before, after)
        files = {**bench.sources.patched, "modeling_qwen.py": text.encode()}
        return TorchEngine(replace(bench.sources, patched=files), bench.index, bench.geometry)

    return make


def _configured(side: str, **values: object) -> Make:
    """Another value in config.json, of the patched files or of those that fill the rotary tables."""

    def make(bench: Bench, _patch: pytest.MonkeyPatch) -> Engine:
        files: dict[str, bytes] = getattr(bench.sources, side)
        config = {**json.loads(files["config.json"]), **values}
        changed: Sources = replace(
            bench.sources, **{side: {**files, "config.json": json.dumps(config).encode()}}
        )
        return TorchEngine(changed, bench.index, bench.geometry)

    return make


# ---- the runtime's conventions ---------------------------------------------------------------------------


def _torch(bench: Bench) -> Engine:
    return TorchEngine(bench.sources, bench.index, bench.geometry)


def _convention(name: str, wrong: Callable[..., np.ndarray]) -> Make:
    """One of the runtime's functions replaced, in the conversation."""

    def make(bench: Bench, patch: pytest.MonkeyPatch) -> Engine:
        patch.setattr(runtime, name, wrong)
        return _torch(bench)

    return make


def _bound(places: dict[str, str]) -> Make:
    """Tensors of the checkpoint read from where others lie."""

    def make(bench: Bench, _patch: pytest.MonkeyPatch) -> Engine:
        index = dict(bench.index)
        index |= {name: bench.index[other] for name, other in places.items()}
        return TorchEngine(bench.sources, index, bench.geometry)

    return make


def _rewritten(rewrite: Callable[[runtime.Runtime, runtime.State, int], None]) -> Make:
    """After each decode step *rewrite* gets the runtime, its cache before the step, and the step's slot."""

    class Rewritten(runtime.Runtime):
        def decode(self, token: int) -> np.ndarray:
            before = self.saved()
            logits = super().decode(token)
            rewrite(self, before, self.length - 1)
            return logits

    def make(bench: Bench, patch: pytest.MonkeyPatch) -> Engine:
        patch.setattr(runtime, "Runtime", Rewritten)
        return _torch(bench)

    return make


def _slot(shift: int) -> Make:
    """The new KV unit is written *shift* slots away."""

    def rewrite(run: runtime.Runtime, before: runtime.State, slot: int) -> None:
        for mine, old in ((run._keys, before.keys), (run._values, before.values)):
            for array, previous in zip(mine, old, strict=True):
                unit = array[:, slot].copy()
                array[:, slot] = previous[:, slot]
                array[:, slot + shift] = unit

    return _rewritten(rewrite)


def _cached(edit: Callable[..., tuple[list[np.ndarray], list[np.ndarray]]]) -> Make:
    """The new units of all layers, K and V, go through *edit* on their way into the cache."""

    def rewrite(run: runtime.Runtime, _before: runtime.State, slot: int) -> None:
        units = ([array[:, slot].copy() for array in cache] for cache in (run._keys, run._values))
        for cache, edited in zip((run._keys, run._values), edit(*units), strict=True):
            for array, unit in zip(cache, edited, strict=True):
                array[:, slot] = unit

    return _rewritten(rewrite)


def _all_open(length: int, seq_length: int) -> np.ndarray:
    return np.zeros((1, 1, seq_length, seq_length), dtype=np.float32)


def _own_closed(length: int, seq_length: int) -> np.ndarray:
    mask = np.zeros((1, 1, 1, seq_length + 1), dtype=np.float32)
    mask[..., length - 1 :] = runtime.MASK_VALUE
    return mask


def _one_slot_more(length: int, seq_length: int) -> np.ndarray:
    mask = np.zeros((1, 1, 1, seq_length + 1), dtype=np.float32)
    mask[..., length:seq_length] = runtime.MASK_VALUE
    return mask


def _one_slot_less(length: int, seq_length: int) -> np.ndarray:
    mask = np.zeros((1, 1, 1, seq_length + 1), dtype=np.float32)
    mask[..., length - 2 : seq_length] = runtime.MASK_VALUE
    return mask


def _decode_open(length: int, seq_length: int) -> np.ndarray:
    return np.zeros((1, 1, 1, seq_length + 1), dtype=np.float32)


_WEAK = 1e-3  # of the contract's constant: exp(-10) is little, not nothing
_true_prefill_mask, _true_decode_mask = host.prefill_mask, host.decode_mask


def _weak_prefill(length: int, seq_length: int) -> np.ndarray:
    return _true_prefill_mask(length, seq_length) * np.float32(_WEAK)


def _weak_decode(length: int, seq_length: int) -> np.ndarray:
    return _true_decode_mask(length, seq_length) * np.float32(_WEAK)


def _strict(length: int, seq_length: int) -> np.ndarray:
    """No row sees its own key, but the first one, which has no other."""
    mask = _true_prefill_mask(length, seq_length).copy()
    rows = np.arange(1, seq_length)
    mask[..., rows, rows] = runtime.MASK_VALUE
    return mask


def _stretched(length: int, seq_length: int) -> np.ndarray:
    positions = np.zeros((1, seq_length), dtype=np.int32)
    positions[0, :length] = np.minimum(np.arange(length) * 2, seq_length - 1)
    return positions


def _padded_left(tokens: Sequence[int], seq_length: int) -> np.ndarray:
    ids = np.zeros((1, seq_length), dtype=np.int32)
    ids[0, seq_length - len(tokens) :] = tokens
    return ids


# ---- what comes out of the exported nets -----------------------------------------------------------------

Change = Callable[[str, list[np.ndarray], list[np.ndarray]], list[np.ndarray]]


class Tampered:
    """An engine whose inputs or outputs are tampered with on the way."""

    def __init__(
        self, engine: Engine, change: Change | None = None, names: dict[str, str] | None = None
    ) -> None:
        self._engine = engine
        self._change = change
        self._names = names or {}
        self.nets = engine.nets

    def run(self, net: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        outputs = self._engine.run(self._names.get(net, net), inputs)
        if self._change is None:
            return outputs
        return self._change(net, list(inputs), [np.array(array) for array in outputs])


class Without(Tampered):
    """An engine that lacks nets."""

    def __init__(self, engine: Engine, *missing: str) -> None:
        super().__init__(engine)
        self.nets = tuple(name for name in engine.nets if name not in missing)


def _tampered(change: Change) -> Make:
    return lambda bench, _patch: Tampered(OrtEngine(bench.folder), change)


def _in(kind: str, edit: Callable[[list[np.ndarray]], list[np.ndarray]]) -> Change:
    return lambda net, inputs, outputs: edit(outputs) if net == kind else outputs


def _nan(outputs: list[np.ndarray]) -> list[np.ndarray]:
    outputs[0].flat[0] = np.nan
    return outputs


def _constant(outputs: list[np.ndarray]) -> list[np.ndarray]:
    return [np.full_like(outputs[0], outputs[0].mean()), *outputs[1:]]


def _rounded(outputs: list[np.ndarray]) -> list[np.ndarray]:
    """Mantissas cut to bfloat16's, as an export that traced in bf16 would have them."""
    bits = outputs[0].view(np.uint32) & np.uint32(0xFFFF0000)
    return [bits.view(np.float32), *outputs[1:]]


def _off_by_one_token(outputs: list[np.ndarray]) -> list[np.ndarray]:
    return [outputs[0] + 1]


def _token_swap(outputs: list[np.ndarray]) -> list[np.ndarray]:
    outputs[0][:, [0, 1]] = outputs[0][:, [1, 0]]
    return outputs


def _interleaved(outputs: list[np.ndarray]) -> list[np.ndarray]:
    """K's order inside a head changed in one kind of net alone."""
    halves = np.split(outputs[1], 2, axis=-1)
    outputs[1] = np.stack(halves, axis=-1).reshape(outputs[1].shape)
    return outputs


class Fed(Tampered):
    """An engine whose nets of *kinds* read other inputs than they are given, as wrongly compiled ones do."""

    def __init__(
        self, engine: Engine, kinds: Sequence[str], edit: Callable[[list[np.ndarray]], list[np.ndarray]]
    ) -> None:
        super().__init__(engine)
        self._kinds, self._edit = kinds, edit

    def run(self, net: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        mine = net in self._kinds or net.rpartition("_")[0] in self._kinds
        return self._engine.run(net, self._edit(list(inputs)) if mine else inputs)


def _fed(kinds: Sequence[str], edit: Callable[[list[np.ndarray]], list[np.ndarray]]) -> Make:
    return lambda bench, _patch: Fed(OrtEngine(bench.folder), kinds, edit)


def one_input(place: int, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[..., list[np.ndarray]]:
    """An edit of the input at *place*."""
    return lambda inputs: [edit(array) if i == place else array for i, array in enumerate(inputs)]


def _renamed(**names: str) -> Make:
    """Nets under other nets' names."""
    return lambda bench, _patch: Tampered(OrtEngine(bench.folder), names=names)


def _lacking(net: str) -> Make:
    return lambda bench, _patch: Without(OrtEngine(bench.folder), net)


_MASK_ADD = "            attn_weights = attn_weights + attention_mask\n"
_H0, _H1 = "transformer.h.0", "transformer.h.1"
BLOCKS = ("block", "block_cache")
EMBEDDINGS = ("embedding", "embedding_cache")
LAYER_0, LAYER_1 = ("block_0", "block_cache_0"), ("block_1", "block_cache_1")
BETWEEN = ()  # at fault is what happens between the nets

MUTANTS = (
    # the edited code
    Mutant("dropped mask", "source", BLOCKS, _edited((_MASK_ADD, "            pass\n"))),
    Mutant(
        "mask a thousand times too weak",
        "source",
        BLOCKS,
        _edited((_MASK_ADD, _MASK_ADD.replace("attention_mask", "attention_mask * 1e-3"))),
    ),
    Mutant(
        "swapped w1 and w2",
        "source",
        BLOCKS,
        _edited(
            ("F.silu(self.w2(hidden_states))", "F.silu(self.w1(hidden_states))"),
            ("self.w1(hidden_states) * gate", "self.w2(hidden_states) * gate"),
        ),
    ),
    Mutant("wrong rotary base", "source", BLOCKS, _configured("reference", rotary_emb_base=20000.0)),
    Mutant(
        "LogN left in",
        "source",
        ("block_cache",),  # only there are keys beyond S
        _configured("patched", use_logn_attn=True, seq_length=SEQ_LENGTH),
    ),
    Mutant("wrong attention scale", "source", BLOCKS, _edited(("size_temp ** 0.5", "size_temp ** 0.45"))),
    Mutant(
        "softmax over the heads",
        "source",
        BLOCKS,
        _edited(("F.softmax(attn_weights, dim=-1)", "F.softmax(attn_weights, dim=1)")),
    ),
    Mutant("rotary the other way", "source", BLOCKS, _edited(("+ _rotate_half", "- _rotate_half"))),
    Mutant(
        "rotary on the query only", "source", BLOCKS, _edited(("key = apply_rotary_pos_emb(key, tables)", ""))
    ),
    Mutant(
        "key cached before its rotation",
        "source",
        BLOCKS,
        _edited(
            (
                "        if rotary_pos_emb_list is not None:\n            cur_len",
                "        plain = key\n        if rotary_pos_emb_list is not None:\n            cur_len",
            ),
            ("present = (key, value)", "present = (plain, value)"),
        ),
    ),
    Mutant("dropped residual", "source", BLOCKS, _edited(("residual + self.mlp(", "self.mlp("))),
    Mutant(
        "norm without its gain",
        "source",
        (*BLOCKS, "lm_head"),
        _edited((".type_as(x) * self.weight", ".type_as(x)")),
    ),
    Mutant(
        "norm with another epsilon",
        "source",
        (*BLOCKS, "lm_head"),
        _configured("patched", layer_norm_epsilon=1e-3),
    ),
    Mutant(
        "query and key exchanged",
        "source",
        BLOCKS,
        _edited(("query, key, value = joint", "key, query, value = joint")),
    ),
    Mutant("relu for silu", "source", BLOCKS, _edited(("F.silu", "F.relu"))),
    Mutant(
        "whole history returned",
        "source",
        BLOCKS,
        _edited(
            ("present = (key, value)", "present = (torch.cat([key, key], 1), torch.cat([value, value], 1))")
        ),
    ),
    # weights in the wrong place
    Mutant(
        "gains of two norms exchanged",
        "source",
        LAYER_0,
        _bound({f"{_H0}.ln_1.weight": f"{_H0}.ln_2.weight", f"{_H0}.ln_2.weight": f"{_H0}.ln_1.weight"}),
    ),
    Mutant(
        "one matrix of another layer",
        "source",
        LAYER_1,
        _bound({f"{_H1}.mlp.c_proj.weight": f"{_H0}.mlp.c_proj.weight"}),
    ),
    Mutant(
        "bias of another layer",
        "source",
        LAYER_0,
        _bound({f"{_H0}.attn.c_attn.bias": f"{_H1}.attn.c_attn.bias"}),
    ),
    Mutant(
        "a block's gain in the final norm",
        "source",
        ("lm_head",),
        _bound({"transformer.ln_f.weight": f"{_H1}.ln_2.weight"}),
    ),
    Mutant(
        "output layer tied by mistake",
        "source",
        ("lm_head",),
        _bound({"lm_head.weight": "transformer.wte.weight"}),
    ),
    # the runtime's conventions: only the conversation can tell
    Mutant("KV unit one slot late", "source", BETWEEN, _slot(1)),
    Mutant("KV unit one slot early", "source", BETWEEN, _slot(-1)),
    Mutant("KV unit in another layer's cache", "source", BETWEEN, _cached(lambda k, v: (k[::-1], v[::-1]))),
    Mutant("K and V exchanged in the cache", "source", BETWEEN, _cached(lambda k, v: (v, k))),
    Mutant(
        "KV unit never written",
        "source",
        BETWEEN,
        _cached(lambda k, v: ([u * 0 for u in k], [u * 0 for u in v])),
    ),
    Mutant("prefill mask not causal", "source", BETWEEN, _convention("prefill_mask", _all_open)),
    Mutant("prefill mask closes its own key", "source", BETWEEN, _convention("prefill_mask", _strict)),
    Mutant("prefill mask too weak", "source", BETWEEN, _convention("prefill_mask", _weak_prefill)),
    Mutant("decode mask closes its own key", "source", BETWEEN, _convention("decode_mask", _own_closed)),
    Mutant("decode mask opens one pad", "source", BETWEEN, _convention("decode_mask", _one_slot_more)),
    Mutant(
        "decode mask closes the latest unit", "source", BETWEEN, _convention("decode_mask", _one_slot_less)
    ),
    Mutant("decode mask opens every slot", "source", BETWEEN, _convention("decode_mask", _decode_open)),
    Mutant("decode mask too weak", "source", BETWEEN, _convention("decode_mask", _weak_decode)),
    Mutant("positions stretched", "source", BETWEEN, _convention("prefill_positions", _stretched)),
    Mutant(
        "decode position one late",
        "source",
        BETWEEN,
        _convention("decode_position", lambda length: np.array([[length]], dtype=np.int32)),
    ),
    Mutant("prompt padded on the left", "source", BETWEEN, _convention("padded", _padded_left)),
    Mutant(
        "last row of the padding read",
        "source",
        BETWEEN,
        _convention("last_row", lambda states, length: states.reshape(states.shape[-2:])[-1]),
    ),
    # the exported nets
    Mutant("NaN in one value", "onnx", ("block_1",), _tampered(_in("block_1", _nan))),
    Mutant("constant output", "onnx", ("lm_head",), _tampered(_in("lm_head", _constant))),
    Mutant("constant block", "onnx", ("block_cache_0",), _tampered(_in("block_cache_0", _constant))),
    Mutant("wrong shape", "onnx", ("block_0",), _tampered(_in("block_0", lambda o: [o[0][:, :-1], *o[1:]]))),
    Mutant("an output missing", "onnx", ("block_0",), _tampered(_in("block_0", lambda o: o[:2]))),
    Mutant(
        "K and V exchanged",
        "onnx",
        ("block_cache_1",),
        _tampered(_in("block_cache_1", lambda o: [o[0], o[2], o[1]])),
    ),
    Mutant("K interleaved in prefill alone", "onnx", ("block_0",), _tampered(_in("block_0", _interleaved))),
    Mutant("bf16 trace", "onnx", ("block_0",), _tampered(_in("block_0", _rounded))),
    Mutant(
        "two rows of the vocabulary exchanged", "onnx", ("lm_head",), _tampered(_in("lm_head", _token_swap))
    ),
    Mutant("token off by one", "onnx", ("greedy_head",), _tampered(_in("greedy_head", _off_by_one_token))),
    Mutant(
        "embedding off by one",
        "onnx",
        EMBEDDINGS,
        _fed(EMBEDDINGS, one_input(0, lambda ids: (ids + 1) % 768)),
    ),
    Mutant(
        "decode position one early",
        "onnx",
        ("block_cache",),
        _fed(("block_cache",), one_input(1, lambda position: position - 1)),
    ),
    Mutant(
        "stale history open", "onnx", ("block_cache",), _fed(("block_cache",), one_input(2, np.zeros_like))
    ),
    Mutant("history ignored", "onnx", ("block_cache",), _fed(("block_cache",), one_input(3, np.zeros_like))),
    Mutant(
        "history of K and V exchanged",
        "onnx",
        ("block_cache",),
        _fed(("block_cache",), lambda inputs: [*inputs[:3], inputs[4], inputs[3]]),
    ),
    Mutant(
        "heads of the history exchanged",
        "onnx",
        ("block_cache",),
        _fed(("block_cache",), one_input(3, lambda history: history[:, :, ::-1])),
    ),
    Mutant(
        "sampling without penalty",
        "onnx",
        ("penalty_sample_head",),
        _fed(("penalty_sample_head",), one_input(4, np.ones_like)),
    ),
    Mutant(
        "sampling without temperature",
        "onnx",
        ("penalty_sample_head",),
        _fed(("penalty_sample_head",), one_input(3, np.ones_like)),
    ),
    Mutant(
        "sampling without top-p",
        "onnx",
        ("penalty_sample_head",),
        _fed(("penalty_sample_head",), one_input(2, np.ones_like)),
    ),
    Mutant("another layer's weights", "onnx", ("block_1",), _renamed(block_1="block_0")),
    Mutant(
        "two layers' decode nets exchanged",
        "onnx",
        ("block_cache",),
        _renamed(block_cache_0="block_cache_1", block_cache_1="block_cache_0"),
    ),
    Mutant("missing net", "onnx", ("block_cache_1",), _lacking("block_cache_1")),
    Mutant("missing head", "onnx", ("greedy_head",), _lacking("greedy_head")),
)
