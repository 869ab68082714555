"""What the demos write for the nets from the host: padded prompts, positions, masks, what to sample with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_surgery.nets import MASK_VALUE, TOP_K, NetKind


def prefill_mask(length: int, seq_length: int) -> np.ndarray:
    """Additive mask float32 [1, 1, S, S] of a prompt of *length* tokens."""
    rows, columns = np.indices((seq_length, seq_length))
    allowed = (columns <= rows) & (rows < length)
    return np.where(allowed, 0.0, MASK_VALUE).astype(np.float32)[None, None]


def decode_mask(length: int, seq_length: int) -> np.ndarray:
    """Additive mask float32 [1, 1, 1, S+1] for the token that makes the sequence *length* long."""
    mask = np.zeros((1, 1, 1, seq_length + 1), dtype=np.float32)
    mask[..., length - 1 : seq_length] = MASK_VALUE
    return mask


def prefill_positions(length: int, seq_length: int) -> np.ndarray:
    """int32 [1, S]: 0..length-1, then 0."""
    positions = np.zeros((1, seq_length), dtype=np.int32)
    positions[0, :length] = np.arange(length)
    return positions


def decode_position(length: int) -> np.ndarray:
    """int32 [1, 1]: the position of the token that makes the sequence *length* long."""
    return np.array([[length - 1]], dtype=np.int32)


def padded(tokens: Sequence[int], seq_length: int) -> np.ndarray:
    """int32 [1, S]: the tokens, then 0."""
    ids = np.zeros((1, seq_length), dtype=np.int32)
    ids[0, : len(tokens)] = tokens
    return ids


@dataclass(frozen=True)
class Sampling:
    """Settings of penalty sampling. ``seed`` fixes every draw; ``last_n`` is how many of the latest tokens
    the penalty looks back on (the vendor's runtimes pass exactly these, padded with the last one); ``top_k``
    (1 to 50) is not heard by penalty_sample_head, which always takes 50."""

    top_p: float = 0.8
    temperature: float = 0.98
    penalty: float = 1.1
    last_n: int = 32
    seed: int = 0
    top_k: int = TOP_K


def sampling_ids(tokens: Sequence[int], seq_length: int, last_n: int) -> np.ndarray:
    """int32 [1, S] for a sampling head: the latest *last_n* tokens, then the last one again and again."""
    latest = list(tokens)[-min(last_n, seq_length) :]
    return np.array([latest + [latest[-1]] * (seq_length - len(latest))], dtype=np.int32)


def sampler_knobs(kind: NetKind, sampling: Sampling) -> tuple[np.ndarray, ...]:
    """What the sampling head *kind* takes behind logits and tokens, each [1]."""
    top_p, temperature, penalty = (
        np.array([knob], np.float32) for knob in (sampling.top_p, sampling.temperature, sampling.penalty)
    )
    if kind is NetKind.PENALTY_SAMPLE_HEAD:
        return top_p, temperature, penalty
    return penalty, temperature, np.array([sampling.top_k], np.int32), top_p
