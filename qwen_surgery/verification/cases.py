"""What each net is fed with, and what must come out: taken from the unpatched model's own run.

Every net is judged by itself: it gets what the reference computed up to it, so that one net's error never
hides or spoils another's. Rows that stand for padding are fed with something, but never compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qwen_surgery import nets
from qwen_surgery.errors import Usage
from qwen_surgery.nets import Geometry, NetKind
from qwen_surgery.runtime import host
from qwen_surgery.verification import runtime
from qwen_surgery.verification.metrics import Distance, distance, total_variation

if TYPE_CHECKING:
    from qwen_surgery.verification.reference import Pass, ReferenceModel


@dataclass(frozen=True)
class Selection:
    """What to verify: *layers* (None: all), *names* of nets or kinds (empty: all), prompt *lengths*. With
    *sample* the chosen layers follow each other: what lies between them does not run."""

    lengths: tuple[int, ...]
    layers: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()
    seed: int = 0
    sample: bool = False

    def layer_list(self, geometry: Geometry) -> tuple[int, ...]:
        """The chosen layers; raises Usage for one that the model does not have."""
        chosen = tuple(range(geometry.layers)) if self.layers is None else self.layers
        for i in chosen:
            if not 0 <= i < geometry.layers:
                raise Usage(f"there is no layer {i}", hint=f"layers are 0 to {geometry.layers - 1}")
        return chosen

    def wants(self, name: str, kind: NetKind) -> bool:
        return not self.names or name in self.names or kind.value in self.names

    def net_names(
        self,
        geometry: Geometry,
        *,
        heads: bool = True,
        sampler: NetKind = NetKind.PENALTY_SAMPLE_HEAD,
    ) -> list[str]:
        """Nets that must be compared; raises Usage when *names* holds one that the contract does not know."""
        contract = nets.nets(geometry.layers, heads=heads, sampler=sampler)
        known = {n.name for n in contract} | {n.kind.value for n in contract}
        for name in self.names:
            if name not in known:
                raise Usage(f"there is no net {name}", hint="a net's name (block_3) or a kind (block)")
        layers = self.layer_list(geometry)
        return [
            n.name for n in contract if self.wants(n.name, n.kind) and (n.layer is None or n.layer in layers)
        ]

    def kept(self, geometry: Geometry) -> tuple[int, ...] | None:
        """The layers that the reference needs for what is chosen; None: the whole model."""
        every = [net for kind in _SETTINGS for net in nets.nets(geometry.layers, sampler=kind)]
        kinds = {n.kind for n in every if self.wants(n.name, n.kind)}
        if kinds & _AFTER_THE_LAYERS:
            return None
        if self.sample:
            return tuple(sorted(set(self.layer_list(geometry))))
        return tuple(range(1 + max(self.layer_list(geometry)))) if kinds & _BLOCKS else (0,)


_BLOCKS = {NetKind.BLOCK, NetKind.BLOCK_CACHE}
#: What each head to sample by is fed with: fewer candidates than it holds, where it can be told so.
_SETTINGS = {
    NetKind.PENALTY_SAMPLE_HEAD: host.Sampling(),
    NetKind.SAMPLE_HEAD: host.Sampling(top_p=0.95, top_k=20),
}
_AFTER_THE_LAYERS = {NetKind.LM_HEAD, NetKind.GREEDY_HEAD, *_SETTINGS}


@dataclass(frozen=True)
class NetCase:
    """One run of one net. ``expected`` are the outputs' rows that count; ``rows`` how many rows those are
    along the length axis (None: the whole output)."""

    net: str
    kind: NetKind
    layer: int | None
    label: str
    inputs: tuple[np.ndarray, ...]
    expected: tuple[np.ndarray, ...]
    rows: int | None = None

    @property
    def phase(self) -> str:
        """``prefill`` or ``decode``: the first word of the label."""
        return self.label.split()[0]

    def compare(self, outputs: Sequence[np.ndarray], geometry: Geometry) -> list[tuple[str, Distance]]:
        """(output name, distance) for each output of the contract."""
        specs = nets.outputs(self.kind, geometry)
        if len(outputs) != len(specs):
            fault = f"{len(outputs)} outputs instead of {len(specs)}"
            return [("all outputs", Distance(np.inf, np.inf, 0.0, 0.0, 0, (fault,)))]
        if self.kind.samples:
            return [("probs", _sampled_distance(self.expected, outputs))]
        result = []
        for spec, expected, found in zip(specs, self.expected, outputs, strict=True):
            squeezed = [size for size in spec.shape if size != 1]
            if [size for size in found.shape if size != 1] != squeezed:
                fault = f"shape {list(found.shape)} instead of {list(spec.shape)}"
                result.append((spec.name, Distance(np.inf, np.inf, 0.0, 0.0, 0, (fault,))))
                continue
            shaped = found.reshape(spec.shape)
            result.append(
                (spec.name, distance(expected, shaped if self.rows is None else shaped[:, : self.rows]))
            )
        return result


def as_distribution(outputs: Sequence[np.ndarray]) -> dict[int, float]:
    """Token -> probability, out of the sampling head's two outputs."""
    probabilities, tokens = (np.asarray(array).ravel() for array in outputs)
    result: dict[int, float] = {}
    for token, probability in zip(tokens, probabilities, strict=True):
        result[int(token)] = result.get(int(token), 0.0) + float(probability)
    return result


def _sampled_distance(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> Distance:
    """Total variation between two candidate lists, as ``max_abs``: the order of equal candidates is free."""
    for array, other in zip(expected, found, strict=True):
        if array.size != other.size:
            fault = f"{other.size} candidates instead of {array.size}"
            return Distance(np.inf, np.inf, 0.0, 0.0, 0, (fault,))
    if not np.isfinite(found[0]).all():
        return Distance(np.inf, np.inf, 0.0, 0.0, 0, ("probabilities are NaN or infinite",))
    gap = total_variation(as_distribution(expected), as_distribution(found))
    plain = distance(expected[0], found[0])
    return Distance(gap, plain.relative, plain.cosine, 1.0, expected[0].size, plain.faults)


def make_prompts(selection: Selection, geometry: Geometry) -> list[list[int]]:
    """One random prompt per length, the same for the same seed; raises Usage for a length outside 1..S."""
    prompts = []
    for length in selection.lengths:
        if not 1 <= length <= geometry.seq_length:
            raise Usage(f"a prompt of {length} tokens does not fit in 1..{geometry.seq_length}")
        generator = np.random.default_rng([selection.seed, length])
        prompts.append([int(t) for t in generator.integers(0, geometry.vocab, length)])
    return prompts


def longest_prompt(seq_length: int, steps: int) -> int:
    """Tokens of the longest prompt after which *steps* decode steps fit; raises Usage when none does."""
    if steps >= seq_length:
        raise Usage(f"{steps} steps do not fit in an export length of {seq_length}", hint="use fewer --steps")
    return seq_length - steps


def default_lengths(seq_length: int) -> tuple[int, ...]:
    """Ragged prompts: one token, about a third, all but one (its decode step fills the last slot), all."""
    return tuple(sorted({1, seq_length // 3 + 1, max(1, seq_length - 1), seq_length}))


class CaseMaker:
    """Runs the reference over every prompt and turns what it recorded into cases.

    Cases come prompt by prompt; only one pass of the reference is held at a time. ``bytes`` is about what all
    cases of one run take together.
    """

    def __init__(self, reference: ReferenceModel, geometry: Geometry, selection: Selection) -> None:
        self._reference = reference
        self._g = geometry
        self._selection = selection
        self._layers = selection.layer_list(geometry)

    @property
    def bytes(self) -> int:
        g = self._g
        prefill = 4 * g.seq_length * g.hidden + g.seq_length**2 // max(1, len(self._layers))
        return 4 * len(self._selection.lengths) * len(self._layers) * (prefill + 2 * g.seq_length * g.hidden)

    def cases(self) -> Iterator[NetCase]:
        """Every case, prefill and then one decode step for each prompt that leaves room for one."""
        for prompt in make_prompts(self._selection, self._g):
            yield from self._of_prompt(prompt)

    def _of_prompt(self, prompt: list[int]) -> Iterator[NetCase]:
        record = self._reference.prefill(prompt)
        for case in self._prefill_cases(record):
            if self._selection.wants(case.net, case.kind):
                yield case
        if len(prompt) == self._g.seq_length:
            return
        record = self._reference.decode(self._next_token(record))
        for case in self._decode_cases(record):
            if self._selection.wants(case.net, case.kind):
                yield case

    def _next_token(self, record: Pass) -> int:
        """The reference's own next token; a random one where it has no logits."""
        if record.logits is not None:
            return int(np.argmax(record.logits))
        return int(np.random.default_rng([self._selection.seed, record.tokens[-1]]).integers(self._g.vocab))

    def _prefill_cases(self, record: Pass) -> Iterator[NetCase]:
        g, length = self._g, len(record.tokens)
        label = f"prefill {length}"
        ids = host.padded(record.tokens, g.seq_length)
        if 0 in record.block_inputs:
            yield NetCase(
                "embedding", NetKind.EMBEDDING, None, label, (ids,), (record.block_inputs[0][None],), length
            )
        positions = host.prefill_positions(length, g.seq_length)
        mask = host.prefill_mask(length, g.seq_length)
        for i in self._layers:
            states = np.zeros((1, g.seq_length, g.hidden), dtype=np.float32)
            states[0, :length] = record.block_inputs[i]
            # Padding is not zero in real life: it is what token 0 becomes. Repeat the first row.
            states[0, length:] = record.block_inputs[i][0]
            expected = (record.block_outputs[i][None], record.keys[i][None], record.values[i][None])
            yield NetCase(f"block_{i}", NetKind.BLOCK, i, label, (states, positions, mask), expected, length)
        yield from self._head_cases(record, label)

    def _decode_cases(self, record: Pass) -> Iterator[NetCase]:
        g, length = self._g, record.start + 1
        label = f"decode {length}"
        token = np.array([[record.tokens[0]]], dtype=np.int32)
        if 0 in record.block_inputs:
            yield NetCase(
                "embedding_cache",
                NetKind.EMBEDDING_CACHE,
                None,
                label,
                (token,),
                (record.block_inputs[0][None],),
            )
        position = host.decode_position(length)
        mask = host.decode_mask(length, g.seq_length)
        for i in self._layers:
            inputs = (
                record.block_inputs[i][None],
                position,
                mask,
                self._history(record.past_keys[i], i),
                self._history(record.past_values[i], i),
            )
            expected = (record.block_outputs[i][None], record.keys[i][None], record.values[i][None])
            yield NetCase(f"block_cache_{i}", NetKind.BLOCK_CACHE, i, label, inputs, expected)
        yield from self._head_cases(record, label)

    def _history(self, units: np.ndarray, layer: int) -> np.ndarray:
        """[1, S, n, d]: the past units, then noise of their size in the slots that the mask must close."""
        generator = np.random.default_rng([self._selection.seed, layer, len(units)])
        shape = (1, self._g.seq_length, self._g.kv_heads, self._g.head_dim)
        history = generator.standard_normal(shape, dtype=np.float32) * np.float32(units.std() + 1e-3)
        history[0, : len(units)] = units
        return history

    def _head_cases(self, record: Pass, label: str) -> Iterator[NetCase]:
        if record.logits is None or record.last_hidden is None:
            return
        g = self._g
        logits = record.logits[None].astype(np.float32)
        yield NetCase("lm_head", NetKind.LM_HEAD, None, label, (record.last_hidden[None],), (logits,))
        best = np.array([[int(np.argmax(logits))]], dtype=np.int32)
        yield NetCase("greedy_head", NetKind.GREEDY_HEAD, None, label, (logits,), (best,))
        # As if the three best tokens had just been said: a head that forgets the penalty must show.
        said = [*record.tokens, *(int(token) for token in np.argsort(logits[0])[-3:])]
        for kind, settings in _SETTINGS.items():
            ids = host.sampling_ids(said, g.seq_length, settings.last_n)
            inputs = (logits, ids, *host.sampler_knobs(kind, settings))
            expected = runtime.penalty_sample(logits, ids, settings)
            yield NetCase(kind.value, kind, None, label, inputs, expected)
