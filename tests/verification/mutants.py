"""Errors put in on purpose. Each is one a real toolchain has made, or one slip away from the right code.

``level`` is the first level at which the error is made, and so the one that must catch it; ``where`` says
which checks must: single nets, or only the conversation through the cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from qwen_surgery.checkout import Sources
from qwen_surgery.verification import runtime
from qwen_surgery.verification.engines import Engine, OrtEngine, TorchEngine
from tests.verification.conftest import SEQ_LENGTH, Bench


@dataclass(frozen=True)
class Mutant:
    name: str
    level: str
    where: str
    make: Callable[[Bench, pytest.MonkeyPatch], Engine]


# ---- the patched source ----------------------------------------------------------------------------------


def _edited(*edits: tuple[str, str]) -> Callable[[Bench, pytest.MonkeyPatch], Engine]:
    """The patched code with a piece of text replaced, which must be there."""

    def make(bench: Bench, _patch: pytest.MonkeyPatch) -> Engine:
        text = bench.sources.patched["modeling_qwen.py"].decode()
        for before, after in edits:
            assert before in text, before
            text = text.replace(before, after)
        files = {**bench.sources.patched, "modeling_qwen.py": text.encode()}
        return TorchEngine(replace(bench.sources, patched=files), bench.index, bench.geometry)

    return make


def _configured(side: str, **values: object) -> Callable[[Bench, pytest.MonkeyPatch], Engine]:
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


def _convention(name: str, wrong: Callable[..., np.ndarray]) -> Callable[[Bench, pytest.MonkeyPatch], Engine]:
    """One of the runtime's functions replaced, in the conversation."""

    def make(bench: Bench, patch: pytest.MonkeyPatch) -> Engine:
        patch.setattr(runtime, name, wrong)
        return _torch(bench)

    return make


def _slot(shift: int) -> Callable[[Bench, pytest.MonkeyPatch], Engine]:
    """The new KV unit is written *shift* slots away."""

    class Shifted(runtime.Runtime):
        def decode(self, token: int) -> np.ndarray:
            before = self.saved()
            logits = super().decode(token)
            slot = self.length - 1
            for mine, old in ((self._keys, before.keys), (self._values, before.values)):
                for array, previous in zip(mine, old, strict=True):
                    unit = array[:, slot].copy()
                    array[:, slot] = previous[:, slot]
                    array[:, slot + shift] = unit
            return logits

    def make(bench: Bench, patch: pytest.MonkeyPatch) -> Engine:
        patch.setattr(runtime, "Runtime", Shifted)
        return _torch(bench)

    return make


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


def _from_one(length: int, seq_length: int) -> np.ndarray:
    positions = np.zeros((1, seq_length), dtype=np.int32)
    positions[0, :length] = np.minimum(np.arange(length) * 2, seq_length - 1)
    return positions


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


def _tampered(change: Change) -> Callable[[Bench, pytest.MonkeyPatch], Engine]:
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


def _no_penalty(bench: Bench, _patch: pytest.MonkeyPatch) -> Engine:
    class NoPenalty(Tampered):
        def run(self, net: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
            if net == "penalty_sample_head":
                inputs = [*inputs[:4], np.ones(1, dtype=np.float32)]
            return self._engine.run(net, inputs)

    return NoPenalty(OrtEngine(bench.folder))


def _zeroed_history(bench: Bench, _patch: pytest.MonkeyPatch) -> Engine:
    class Zeroed(Tampered):
        def run(self, net: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
            if net.startswith("block_cache"):
                inputs = [*inputs[:3], np.zeros_like(inputs[3]), inputs[4]]
            return self._engine.run(net, inputs)

    return Zeroed(OrtEngine(bench.folder))


_MASK_ADD = "            attn_weights = attn_weights + attention_mask\n"

MUTANTS = (
    Mutant("dropped mask", "source", "net", _edited((_MASK_ADD, "            pass\n"))),
    Mutant(
        "swapped w1 and w2",
        "source",
        "net",
        _edited(
            ("F.silu(self.w2(hidden_states))", "F.silu(self.w1(hidden_states))"),
            ("self.w1(hidden_states) * gate", "self.w2(hidden_states) * gate"),
        ),
    ),
    Mutant("wrong rotary base", "source", "net", _configured("reference", rotary_emb_base=20000.0)),
    Mutant(
        "LogN left in",
        "source",
        "net",
        _configured("patched", use_logn_attn=True, seq_length=SEQ_LENGTH),
    ),
    Mutant("wrong attention scale", "source", "net", _edited(("size_temp ** 0.5", "size_temp ** 0.45"))),
    Mutant("rotary the other way", "source", "net", _edited(("+ _rotate_half", "- _rotate_half"))),
    Mutant(
        "rotary on the query only", "source", "net", _edited(("key = apply_rotary_pos_emb(key, tables)", ""))
    ),
    Mutant("dropped residual", "source", "net", _edited(("residual + self.mlp(", "self.mlp("))),
    Mutant("norm without its gain", "source", "net", _edited((".type_as(x) * self.weight", ".type_as(x)"))),
    Mutant("norm over the batch's epsilon", "source", "net", _configured("patched", layer_norm_epsilon=1e-3)),
    Mutant(
        "query and key exchanged",
        "source",
        "net",
        _edited(("query, key, value = joint", "key, query, value = joint")),
    ),
    Mutant("relu for silu", "source", "net", _edited(("F.silu", "F.relu"))),
    Mutant(
        "whole history returned",
        "source",
        "net",
        _edited(
            ("present = (key, value)", "present = (torch.cat([key, key], 1), torch.cat([value, value], 1))")
        ),
    ),
    Mutant("KV unit one slot late", "source", "end-to-end", _slot(1)),
    Mutant("KV unit one slot early", "source", "end-to-end", _slot(-1)),
    Mutant("prefill mask not causal", "source", "end-to-end", _convention("prefill_mask", _all_open)),
    Mutant("decode mask closes its own key", "source", "end-to-end", _convention("decode_mask", _own_closed)),
    Mutant("decode mask opens one pad", "source", "end-to-end", _convention("decode_mask", _one_slot_more)),
    Mutant("positions stretched", "source", "end-to-end", _convention("prefill_positions", _from_one)),
    Mutant("NaN in one value", "onnx", "net", _tampered(_in("block_1", _nan))),
    Mutant("constant output", "onnx", "net", _tampered(_in("lm_head", _constant))),
    Mutant("constant block", "onnx", "net", _tampered(_in("block_cache_0", _constant))),
    Mutant("wrong shape", "onnx", "net", _tampered(_in("block_0", lambda o: [o[0][:, :-1], *o[1:]]))),
    Mutant("an output missing", "onnx", "net", _tampered(_in("block_0", lambda o: o[:2]))),
    Mutant("K and V exchanged", "onnx", "net", _tampered(_in("block_cache_1", lambda o: [o[0], o[2], o[1]]))),
    Mutant("bf16 trace", "onnx", "net", _tampered(_in("block_0", _rounded))),
    Mutant("token off by one", "onnx", "net", _tampered(_in("greedy_head", _off_by_one_token))),
    Mutant("sampling without penalty", "onnx", "net", _no_penalty),
    Mutant("history ignored", "onnx", "net", _zeroed_history),
    Mutant(
        "another layer's weights",
        "onnx",
        "net",
        lambda bench, _patch: Tampered(OrtEngine(bench.folder), names={"block_1": "block_0"}),
    ),
    Mutant(
        "missing net",
        "onnx",
        "net",
        lambda bench, _patch: Without(OrtEngine(bench.folder), "block_cache_1"),
    ),
    Mutant(
        "missing head", "onnx", "net", lambda bench, _patch: Without(OrtEngine(bench.folder), "greedy_head")
    ),
)
