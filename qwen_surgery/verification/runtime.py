"""Runs a model net by net the way the vendor's runtimes do: their masks, slots and positions.

Prefill: tokens are padded with 0 to S; row i below the length allows keys j <= i, rows from the length on are
fully masked; pad positions are 0. The K and V of pad rows stay in the cache as the nets gave them.
Decode, for the token that makes the sequence L long: position L-1; history slots [L-1, S) are masked and
slot S, the token's own key, is open; the new K/V unit is then written to slot L-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qwen_surgery.errors import Refused, Usage
from qwen_surgery.nets import MIN_TOKENS_TO_KEEP, TOP_K, Geometry, sampler_of
from qwen_surgery.runtime.host import (
    Sampling,
    decode_mask,
    decode_position,
    padded,
    prefill_mask,
    prefill_positions,
    sampler_knobs,
    sampling_ids,
)
from qwen_surgery.verification.engines import has_fused_head

if TYPE_CHECKING:
    from qwen_surgery.verification.engines import Engine


def last_row(states: np.ndarray, length: int) -> np.ndarray:
    """[H]: the hidden states of a prompt's last token, out of a prefill block's [1, S, H]."""
    return states.reshape(states.shape[-2:])[length - 1]


def penalised(logits: np.ndarray, input_ids: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Logits float32 [V] after the repetition penalty on every token of *input_ids*."""
    scores = logits.astype(np.float32).ravel().copy()
    seen = np.unique(input_ids)
    scores[seen] = np.where(
        scores[seen] < 0, scores[seen] * sampling.penalty, scores[seen] / sampling.penalty
    )
    return scores


def penalty_sample(
    logits: np.ndarray, input_ids: np.ndarray, sampling: Sampling
) -> tuple[np.ndarray, np.ndarray]:
    """What a head to sample by computes: probabilities float32 [1, 50] and their tokens int32 [1, 50].

    Written from the contract, independently of the exported net, so that it can judge it; it also serves
    models whose heads run on the host.
    """
    scores = penalised(logits, input_ids, sampling)
    best = np.argsort(-scores, kind="stable")[:TOP_K]
    top = scores[best] / np.float32(sampling.temperature)
    exact = np.exp(top - top.max())
    exact[sampling.top_k :] = 0.0
    running = np.cumsum(exact / exact.sum())
    dropped = running >= sampling.top_p
    dropped[:MIN_TOKENS_TO_KEEP] = False
    dropped[sampling.top_k :] = True
    exact = np.where(dropped, 0.0, exact)
    return (exact / exact.sum()).astype(np.float32)[None], best.astype(np.int32)[None]


def draw(probabilities: np.ndarray, tokens: np.ndarray, uniform: float) -> int:
    """The token whose slice of the distribution holds *uniform* (in [0, 1)).

    Candidates are ordered by token, so that two nearly equal distributions draw the same token.
    """
    order = np.argsort(tokens.ravel(), kind="stable")
    running = np.cumsum(probabilities.ravel()[order].astype(np.float64))
    place = int(np.searchsorted(running, uniform * running[-1], side="right"))
    return int(tokens.ravel()[order][min(place, order.size - 1)])


@dataclass(frozen=True)
class State:
    """A conversation at one moment: its tokens and each layer's cache, float32 [1, S, n, d]."""

    tokens: list[int]
    keys: list[np.ndarray]
    values: list[np.ndarray]


class Runtime:
    """One conversation on one engine. ``length`` tokens are in the cache.

    With a ``fused_head`` the engine's lm_head gives the best token: what stands for logits below is that
    token, and sampling is not possible.

    Raises Refused when the engine lacks a net that a step needs, Usage when the sequence does not fit in S.
    """

    def __init__(self, engine: Engine, geometry: Geometry) -> None:
        needed = ["embedding", "embedding_cache", "lm_head"]
        needed += [f"{kind}_{i}" for i in range(geometry.layers) for kind in ("block", "block_cache")]
        have = set(engine.nets)
        missing = [name for name in needed if name not in have]
        if missing:
            raise Refused(f"nets are missing: {', '.join(missing)}")
        self._engine = engine
        self._geometry = geometry
        self.fused_head = has_fused_head(engine)
        self._sampler = sampler_of(have)
        self._has_heads = {"greedy_head", self._sampler.value} <= have
        self._keys: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self.tokens: list[int] = []

    def saved(self) -> State:
        """The conversation as it is now, for :meth:`restore`."""
        copies = [[array.copy() for array in arrays] for arrays in (self._keys, self._values)]
        return State(list(self.tokens), *copies)

    def restore(self, state: State) -> None:
        """Go back to a saved conversation; the state can be used again."""
        self.tokens = list(state.tokens)
        self._keys = [array.copy() for array in state.keys]
        self._values = [array.copy() for array in state.values]

    @property
    def length(self) -> int:
        return len(self.tokens)

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Read a prompt; logits float32 [1, V] after its last token."""
        g = self._geometry
        if not 1 <= len(tokens) <= g.seq_length:
            raise Usage(
                f"a prompt of {len(tokens)} tokens does not fit in an export length of {g.seq_length}"
            )
        length = len(tokens)
        self.tokens = list(tokens)
        (states,) = self._engine.run("embedding", [padded(tokens, g.seq_length)])
        positions, mask = prefill_positions(length, g.seq_length), prefill_mask(length, g.seq_length)
        self._keys, self._values = [], []
        for i in range(g.layers):
            states, key, value = self._engine.run(f"block_{i}", [states, positions, mask])
            self._keys.append(np.array(key))
            self._values.append(np.array(value))
        return self._logits(last_row(states, length))

    def decode(self, token: int) -> np.ndarray:
        """Read one more token through the cache; logits float32 [1, V] after it."""
        g = self._geometry
        if not self.tokens:
            raise Usage("decode needs a prefill first")
        if self.length >= g.seq_length:
            raise Usage(f"the export length of {g.seq_length} is used up")
        self.tokens.append(token)
        slot = self.length - 1
        (states,) = self._engine.run("embedding_cache", [np.array([[token]], dtype=np.int32)])
        position = decode_position(self.length)
        mask = decode_mask(self.length, g.seq_length)
        for i in range(g.layers):
            inputs = [states, position, mask, self._keys[i], self._values[i]]
            states, key, value = self._engine.run(f"block_cache_{i}", inputs)
            self._keys[i][:, slot] = key.reshape(1, g.kv_heads, g.head_dim)
            self._values[i][:, slot] = value.reshape(1, g.kv_heads, g.head_dim)
        return self._logits(states)

    def _logits(self, hidden: np.ndarray) -> np.ndarray:
        shape = (1, 1, self._geometry.hidden) if self.fused_head else (1, self._geometry.hidden)
        (logits,) = self._engine.run("lm_head", [hidden.reshape(shape)])
        return logits

    def greedy(self, logits: np.ndarray) -> int:
        """The best token, by the greedy head where the engine has one."""
        if self.fused_head:
            return int(logits.ravel()[0])
        if self._has_heads:
            return int(self._engine.run("greedy_head", [logits])[0].ravel()[0])
        return int(np.argmax(logits))

    def candidates(self, logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities and tokens to sample from, by the sampling head where the engine has one."""
        if self.fused_head:
            raise Usage("this model's lm_head gives tokens: it cannot be sampled from")
        ids = sampling_ids(self.tokens, self._geometry.seq_length, sampling.last_n)
        if not self._has_heads:
            return penalty_sample(logits, ids, sampling)
        probabilities, tokens = self._engine.run(
            self._sampler.value, [logits, ids, *sampler_knobs(self._sampler, sampling)]
        )
        return probabilities, tokens
