"""Makes a quantised release of a checkout, as AutoGPTQ and AutoAWQ write one: for tests, demos and measuring.

Written from the published formats, and knows nothing of the program that reads them: words are put together
field by field. Weights are rounded to the nearest code; no text is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from golden.eras.checkout import read_safetensors, safetensors_header

_NAMES = {"<f2": "F16", "<i4": "I32"}
#: AutoAWQ's order of eight outputs in a word.
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Scheme:
    """How to quantise: *bits* 4 or 8, inputs that share a scale (*group*; -1 for all), zeros in the middle of
    the codes or (not *symmetric*) where they fit, stored less one or (*v2*) as they are; in AWQ's order if
    *awq*. Layers without a bias get one of zeros if *idle_bias*, as AutoGPTQ's do."""

    bits: int = 4
    group: int = 64
    symmetric: bool = True
    v2: bool = False
    awq: bool = False
    idle_bias: bool = True

    def config(self) -> dict[str, Any]:
        """``quantization_config`` of config.json."""
        if self.awq:
            said = {"quant_method": "awq", "version": "gemm", "zero_point": not self.symmetric}
        else:
            said = {"quant_method": "gptq", "desc_act": False, "sym": self.symmetric, "damp_percent": 0.01}
            said |= {"checkpoint_format": "gptq_v2"} if self.v2 else {}
        return {"bits": self.bits, "group_size": self.group, **said}


@dataclass(frozen=True)
class Rounded:
    """A matrix [O, I] as integers: codes [O, I], zeros and float16 scales [O, groups]."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray

    def values(self) -> np.ndarray:
        """What they stand for, float16 [O, I], in the arithmetic of the release's own runtime."""
        times = self.codes.shape[1] // self.scales.shape[1]
        zeros, scales = (np.repeat(one, times, axis=1) for one in (self.zeros, self.scales))
        return (self.codes.astype(np.float16) - zeros.astype(np.float16)) * scales


def rounded(matrix: np.ndarray, scheme: Scheme) -> Rounded:
    """The nearest integers of float32 *matrix* [O, I]. Raises ValueError where groups do not fit."""
    outputs, inputs = matrix.shape
    group = inputs if scheme.group == -1 else scheme.group
    if inputs % group:
        raise ValueError(f"groups of {group} do not divide {inputs} inputs")
    groups = matrix.reshape(outputs, inputs // group, group)
    top = (1 << scheme.bits) - 1
    low, high = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
    if scheme.symmetric:
        high = np.maximum(-low, high)
        low = -high
    scales = np.maximum((high - low) / top, 1e-6).astype("<f2")
    middle = np.full(scales.shape, (top + 1) // 2)
    # Less one, a zero of 0 would have no code: such a group starts at 1.
    zeros = middle if scheme.symmetric else np.clip(np.rint(-low / scales), 1, top).astype(int)
    codes = np.rint(groups / scales.astype(np.float32)[..., None]) + zeros[..., None]
    return Rounded(np.clip(codes, 0, top).astype(np.uint32).reshape(outputs, inputs), zeros, scales)


def words(fields: np.ndarray, bits: int) -> np.ndarray:
    """Fields [n * 32 / bits, m] as int32 words [n, m], the first of a word in its lowest bits."""
    count = 32 // bits
    packed = np.zeros((fields.shape[0] // count, fields.shape[1]), np.uint32)
    for place in range(count):
        packed |= fields[place::count].astype(np.uint32) << np.uint32(bits * place)
    return packed.view("<i4")


def _awq_words(fields: np.ndarray) -> np.ndarray:
    """Fields [n, O] as AWQ's words [n, O / 8]."""
    order = np.arange(fields.shape[1]).reshape(-1, 8)[:, _AWQ].reshape(-1)
    return np.ascontiguousarray(words(fields[:, order].T, 4).T)


def stored(name: str, one: Rounded, scheme: Scheme) -> dict[str, np.ndarray]:
    """The tensors of layer *name* that a release stores."""
    scales = {f"{name}.scales": np.ascontiguousarray(one.scales.T)}
    if scheme.awq:
        packed = {f"{name}.qweight": _awq_words(one.codes.T), f"{name}.qzeros": _awq_words(one.zeros.T)}
        return {**packed, **scales}
    zeros = one.zeros - (0 if scheme.v2 else 1)
    inputs = one.codes.shape[1]
    return {
        f"{name}.qweight": words(one.codes.T, scheme.bits),
        f"{name}.qzeros": np.ascontiguousarray(words(zeros, scheme.bits).T),
        **scales,
        f"{name}.g_idx": np.asarray(np.arange(inputs) // (inputs // one.scales.shape[1]), "<i4"),
    }


def quantise_checkout(path: Path, scheme: Scheme) -> Path:
    """Make the checkout *path* (bfloat16 weights in safetensors) a quantised release of itself: matrices of
    its layers as integers, everything else in float16. Raises ValueError where groups do not fit."""
    names: dict[str, str] = {}
    total = 0
    for shard in sorted(path.glob("*.safetensors")):
        tensors = dict(_quantised(read_safetensors(shard), scheme))
        write_tensors(shard, tensors)
        names |= dict.fromkeys(tensors, shard.name)
        total += sum(one.nbytes for one in tensors.values())
    index = path / "model.safetensors.index.json"
    if index.exists():
        said = {"metadata": {"total_size": total}, "weight_map": names}
        index.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config |= {"fp16": True, "quantization_config": scheme.config()}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


def _quantised(tensors: dict[str, np.ndarray], scheme: Scheme) -> Iterator[tuple[str, np.ndarray]]:
    for name, values in tensors.items():
        if ".h." not in name or values.ndim != 2:
            yield name, values.astype("<f2")
            continue
        layer = name.removesuffix(".weight")
        yield from stored(layer, rounded(values, scheme), scheme).items()
        if scheme.idle_bias and not layer.endswith("c_attn"):
            yield f"{layer}.bias", np.zeros(values.shape[0], "<f2")


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file of float16 and int32 arrays."""
    kinds = {name: _NAMES[values.dtype.newbyteorder("<").str] for name, values in tensors.items()}
    parts = ((name, values.shape, kinds[name], values.nbytes) for name, values in tensors.items())
    with path.open("wb") as file:
        file.write(safetensors_header(parts))
        for values in tensors.values():
            file.write(np.ascontiguousarray(values).tobytes())
