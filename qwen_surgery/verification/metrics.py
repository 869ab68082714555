"""How far two arrays, two next-token distributions or two token sequences are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Distance:
    """The difference of one array from its reference.

    ``max_abs`` is the largest difference, ``relative`` the norm of the difference over the reference's norm,
    ``cosine`` the cosine of the two as vectors, ``scale`` the reference's largest magnitude. ``faults`` are
    reasons why no number can be a pass: wrong shape, nothing to compare, NaN, a constant output.
    """

    max_abs: float
    relative: float
    cosine: float
    scale: float
    elements: int
    faults: tuple[str, ...] = field(default=())


_NOTHING = Distance(float("inf"), float("inf"), 0.0, 0.0, 0)


def distance(reference: np.ndarray, candidate: np.ndarray) -> Distance:
    """Compare *candidate* with *reference*; arrays must have equal shapes, but for axes of size 1."""
    if reference.size == 0 or candidate.size == 0:
        return _fault("nothing to compare: an array is empty")
    if _shape(reference) != _shape(candidate):
        return _fault(f"shape {list(candidate.shape)} instead of {list(reference.shape)}")
    expected = reference.astype(np.float64).ravel()
    found = candidate.astype(np.float64).ravel()
    if not np.isfinite(expected).all():
        return _fault("the reference itself holds NaN or infinity")
    if not np.isfinite(found).all():
        return _fault(f"{int((~np.isfinite(found)).sum())} of {found.size} values are NaN or infinite")
    faults = []
    if found.size > 1 and np.ptp(found) == 0 and np.ptp(expected) > 0:
        faults.append(f"the output is constant ({found[0]:g})")
    difference = np.abs(found - expected)
    norm_expected, norm_found = float(np.linalg.norm(expected)), float(np.linalg.norm(found))
    norm_difference = float(np.linalg.norm(difference))
    if norm_expected and norm_found:
        # From the normalised difference: 1 - cosine is not lost to rounding when the two are nearly equal.
        gap = expected / norm_expected - found / norm_found
        cosine = 1.0 - float(gap @ gap) / 2
    else:
        cosine = 1.0 if norm_expected == norm_found else 0.0
    return Distance(
        max_abs=float(difference.max()),
        relative=norm_difference / norm_expected if norm_expected else norm_difference,
        cosine=cosine,
        scale=float(np.abs(expected).max()),
        elements=found.size,
        faults=tuple(faults),
    )


def _shape(array: np.ndarray) -> tuple[int, ...]:
    return tuple(size for size in array.shape if size != 1)


def _fault(reason: str) -> Distance:
    return Distance(_NOTHING.max_abs, _NOTHING.relative, _NOTHING.cosine, _NOTHING.scale, 0, faults=(reason,))


def worst(distances: Sequence[Distance]) -> Distance:
    """The largest error of several, number by number; no distance at all is a fault."""
    if not distances:
        return _fault("nothing was compared")
    return Distance(
        max_abs=max(d.max_abs for d in distances),
        relative=max(d.relative for d in distances),
        cosine=min(d.cosine for d in distances),
        scale=max(d.scale for d in distances),
        elements=sum(d.elements for d in distances),
        faults=tuple(dict.fromkeys(fault for d in distances for fault in d.faults)),
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (float64) of *logits* along the last axis."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities (float64 [V]) of one row of logits; NaN logits give NaN."""
    shifted = logits.astype(np.float64).ravel() - logits.astype(np.float64).max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def kl_divergence(reference_logits: np.ndarray, candidate_logits: np.ndarray) -> float:
    """KL(reference || candidate) of the next-token distributions, in nats; NaN logits give infinity."""
    expected, found = (
        x.astype(np.float64).ravel() - x.astype(np.float64).max()
        for x in (reference_logits, candidate_logits)
    )
    if expected.shape != found.shape or not np.isfinite(found).all():
        return float("inf")
    log_expected, log_found = log_softmax(expected), log_softmax(found)
    return max(0.0, float((np.exp(log_expected) * (log_expected - log_found)).sum()))


def total_variation(first: dict[int, float], second: dict[int, float]) -> float:
    """Half the summed difference of two distributions over tokens: 0 equal, 1 disjoint."""
    return sum(abs(first.get(t, 0.0) - second.get(t, 0.0)) for t in first.keys() | second.keys()) / 2


def agreement(reference: Sequence[int], candidate: Sequence[int]) -> float:
    """Share of equal tokens, position by position; 0 when there are none or the lengths differ."""
    if not reference or len(reference) != len(candidate):
        return 0.0
    return sum(a == b for a, b in zip(reference, candidate, strict=True)) / len(reference)
