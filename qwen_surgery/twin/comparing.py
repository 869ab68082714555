"""Where a model and its nets part: the first place, in the order in which a token passes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qwen_surgery.twin.whole import Trail
    from qwen_surgery.verification.engines import Engine


class Recorder:
    """An engine that remembers the first input and the outputs of each net's last run."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.nets = engine.nets
        self.given: dict[str, np.ndarray] = {}
        self.gave: dict[str, list[np.ndarray]] = {}

    def run(self, net: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.given[net] = np.array(inputs[0])
        self.gave[net] = [np.array(array) for array in self._engine.run(net, inputs)]
        return self.gave[net]


@dataclass(frozen=True)
class Parting:
    """The first place where model and nets differ, and what to look at.

    ``difference`` is relative to the model's numbers; infinite where one of the two has none.
    """

    place: str
    difference: float
    look: str


@dataclass(frozen=True)
class _Pair:
    """One place: the model's numbers there (None: it was never there), and the nets'."""

    place: str
    model: np.ndarray | None
    nets: np.ndarray
    look: str


def parting(
    trail: Trail, nets: Recorder, layers: int, *, decode: bool, limit: float
) -> tuple[Parting | None, float]:
    """(the first place that differs by more than *limit* or None, the largest difference seen)."""
    if trail.order != list(range(layers)):
        return Parting("the order of the layers", np.inf, _order(trail.order, layers)), np.inf
    worst = 0.0
    for pair in _places(trail, nets, layers, decode=decode):
        found = _difference(pair.model, pair.nets)
        if not found <= limit:
            return Parting(pair.place, found, pair.look), found
        worst = max(worst, found)
    return None, worst


def _order(order: list[int], layers: int) -> str:
    missing = sorted(set(range(layers)) - set(order))
    if missing:
        return (
            f"the model's forward does not run layer {', '.join(map(str, missing))}; the nets run every layer"
        )
    return f"the model's forward runs its layers in the order {order}; the nets run each once, in order"


def _difference(model: np.ndarray | None, nets: np.ndarray) -> float:
    if model is None or model.size != nets.size or not np.isfinite(model).all():
        return np.inf
    gap = np.abs(model.ravel() - nets.ravel()).max()
    return float(gap / max(1.0, np.abs(model).max())) if np.isfinite(gap) else np.inf


def _places(trail: Trail, nets: Recorder, layers: int, *, decode: bool) -> Iterator[_Pair]:
    block, table = ("block_cache", "embedding_cache") if decode else ("block", "embedding")

    def rows(array: np.ndarray) -> np.ndarray:
        """The rows of a net's [1, S, ...] that stand for tokens, as many as the model read."""
        return array.reshape(-1, *array.shape[2:])[: 1 if trail.embedded is None else len(trail.embedded)]

    yield _Pair(table, trail.embedded, rows(nets.gave[table][0]), "the embedding's own class")
    for i in range(layers):
        net = f"{block}_{i}"
        after = f"{block}_{i - 1}" if i else table
        between = (
            f"what the model's forward does between {'its layers' if i else 'the embedding and its layers'}"
        )
        yield _Pair(f"between {after} and {net}", trail.inputs.get(i), rows(nets.given[net]), between)
        outputs = (trail.outputs.get(i), trail.keys.get(i), trail.values.get(i))
        for what, model, mine in zip(("", "'s key", "'s value"), outputs, nets.gave[net], strict=True):
            if model is not None or not what:
                yield _Pair(net + what, model, rows(mine), _look_in_block(trail, i))
    yield _Pair(
        f"between {block}_{layers - 1} and lm_head",
        None if trail.closing is None else trail.closing[-1],
        nets.given["lm_head"],
        "what the model's forward does between its last layer and the final norm",
    )
    closing = "the final norm, lm_head's own class, and what lies between the norm and lm_head"
    yield _Pair("lm_head", trail.head, nets.gave["lm_head"][0], closing)
    look = "what the whole model's forward does with its logits"
    yield _Pair("after lm_head", trail.logits, nets.gave["lm_head"][0], look)


def _look_in_block(trail: Trail, i: int) -> str:
    if trail.odd_mask is not None and trail.odd_mask <= i:
        return f"the attention_mask that the model hands to layer {trail.odd_mask}: not only open and closed"
    return (
        f"what the model hands to layer {i} (rotary tables, mask), what that layer knows and others do not "
        "(its index, attributes set on it), and the patched layer"
    )
