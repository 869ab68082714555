"""A model quantised by ``gptq``, net by net: what each takes, and the integers it gets.

A layer's turn is :func:`layer_integers` and then :func:`states_behind`, whose result is what the next layer
takes. :func:`head_integers` comes last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from qwen_surgery.errors import Refused
from qwen_surgery.families.family import HEAD
from qwen_surgery.quantising import gptq
from qwen_surgery.quantising.calibration import Layers, Progress

if TYPE_CHECKING:
    from qwen_surgery.packing.formats import Quantisation
    from qwen_surgery.quantising.chosen import ChosenRef
    from qwen_surgery.weights import TensorRef
    from qwen_surgery.weights.integers import Integers

Weights = Mapping[str, "TensorRef"]
Forms = Mapping[str, "Quantisation"]


def layer_integers(
    layers: Layers, weights: Weights, forms: Forms, states: np.ndarray, progress: Progress = lambda *_: None
) -> dict[str, Integers]:
    """The integers of a layer's *weights* for which there are *forms*, by slot, where it gets *states*
    [windows, L, H]. Raises Refused for weights or inputs that are not finite."""
    floats = {slot: read(ref) for slot, ref in weights.items()}
    found: dict[str, Integers] = {}
    hessians = layers.hessians(floats, states, list(forms), progress)
    while hessians:
        slots, hessian = hessians.popitem()
        factor = hessian.factor()
        for slot in slots:
            rows = floats[slot].numpy()
            found[slot] = gptq.quantise(lambda a, b: rows[a:b], rows.shape, forms[slot], factor)  # noqa: B023
    return found


def states_behind(
    layers: Layers, weights: Weights, integers: Mapping[str, ChosenRef], states: np.ndarray
) -> np.ndarray:
    """What a layer of *weights*, some of which are kept as *integers*, makes of *states* [windows, L, H]."""
    floats = {slot: read(ref) for slot, ref in weights.items() if slot not in integers}
    floats |= {slot: torch.from_numpy(ref.integers().values()) for slot, ref in integers.items()}
    return layers.outputs(floats, states)


def head_integers(layers: Layers, weights: Weights, forms: Forms, states: np.ndarray) -> dict[str, Integers]:
    """The integers of the output layer, which gets the last layer's *states* [windows, L, H]."""
    norm = {slot: read(ref) for slot, ref in weights.items() if slot != HEAD}
    factor = layers.head_hessian(norm, states).factor()
    table = weights[HEAD]

    def rows(first: int, last: int) -> np.ndarray:
        return _finite(table, table.read_rows(np.arange(first, last)))

    return {HEAD: gptq.quantise(rows, (table.shape[0], table.shape[1]), forms[HEAD], factor)}


def read(ref: TensorRef) -> torch.Tensor:
    """The values of *ref*, float32. Raises Refused where one is not finite."""
    return torch.from_numpy(np.ascontiguousarray(_finite(ref, ref.read())))


def _finite(ref: TensorRef, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise Refused(f"tensor {ref.name} holds values that are not finite; it cannot be quantised")
    return values
