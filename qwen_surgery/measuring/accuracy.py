"""How close a net on the emulated chip comes to float32: inputs a demo would give, the reference, cosines.

What a pass does to the numbers shows here: the ONNX passes are proven equal in float32, but the chip rounds
at each of its operations, and passes on the Top dialect have no other proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qwen_surgery.nets import MASK_VALUE, NetKind

if TYPE_CHECKING:
    from qwen_surgery.exporting.template import Template


def inputs_of(template: Template, prompt: int, seed: int = 0) -> list[np.ndarray]:
    """Inputs in the net's order, for *prompt* tokens in padded slots (a decode net gets the next token), with
    values that bfloat16 holds exactly.
    """
    rng = np.random.default_rng(seed)
    result = []
    for value in template.model.graph.input:
        shape = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        if value.name == "position_ids":
            result.append(_positions(template.kind, shape, prompt))
        elif value.name == "attention_mask":
            result.append(_mask(template.kind, shape, prompt))
        elif value.name == "input_ids":
            result.append(rng.integers(0, template.slots["wte.weight"][0], shape).astype(np.int32))
        elif not value.name.startswith("weight/"):
            bits = rng.standard_normal(shape, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
            result.append(bits.view(np.float32))
    return result


def _positions(kind: NetKind, shape: tuple[int, ...], prompt: int) -> np.ndarray:
    if kind is NetKind.BLOCK_CACHE:
        return np.full(shape, prompt - 1, np.int32)
    slots = np.arange(shape[1], dtype=np.int32)
    return (slots * (slots < prompt))[None]


def _mask(kind: NetKind, shape: tuple[int, ...], prompt: int) -> np.ndarray:
    mask = np.full(shape, MASK_VALUE, np.float32)
    if kind is NetKind.BLOCK_CACHE:
        mask[..., : prompt - 1] = 0
        mask[..., -1] = 0
    else:
        rows = np.arange(shape[-1])
        mask[0, 0][(rows[None] <= rows[:, None]) & (rows[:, None] < prompt)] = 0
    return mask


def reference(
    template: Template, weights: dict[str, np.ndarray], inputs: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """What the exported net computes in float32, in onnxruntime."""
    import onnxruntime as ort

    from qwen_surgery.measuring.prediction import with_weights

    bound = with_weights(template, weights).SerializeToString()
    session = ort.InferenceSession(bound, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))


def cosines(
    kind: NetKind, wanted: Sequence[np.ndarray], got: Sequence[np.ndarray], prompt: int
) -> list[float]:
    """The cosine of each output to the wanted one, over the rows that a prefill net is asked for."""
    kept = slice(0, prompt) if kind is NetKind.BLOCK else slice(None)
    return [_cosine(x[:, kept], y[:, kept]) for x, y in zip(wanted, got, strict=True)]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape} differ")
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))
