"""How TPU-MLIR stores weights: the number formats of the coefficient section, bit for bit.

Everything here was found by compiling crafted weights with TPU-MLIR 1.30.2 and comparing bytes (zero groups,
groups on one side of zero, subnormals, ties, overflows); ``tests/packing`` repeats that comparison. All
arithmetic is float32.

Plain formats
    BF16: round to nearest, ties to even; subnormals become zero of their sign. F16: round to nearest even,
    overflow to infinity. F32: as it is.
Quantised formats (W4BF16, W8BF16, W4F16, W8F16), per row (output channel) and group of columns
    asymmetric, ``lo`` and ``hi`` being the group's smallest and largest weight and ``top`` 15 or 255:
    ``scale = max(hi - lo, 1e-5) / top``, ``zero = clip(round(-lo / scale), 0, top)``;
    symmetric: ``scale = 2 * max(|lo|, |hi|) / top``, ``zero`` 8 or 128; a scale too small for a normal
    float32 is 0, and so are its group's codes.
    ``code = clip(round(w / scale) + zero, 0, top)``; rounding is half away from zero; two 4-bit codes share a
    byte, the first in the low half. Scales are stored in the 16-bit type and zeros as uint8, by lanes:
    ``[rows / lanes, lanes, groups] -> [lanes, rows / lanes, groups]``.
Signed (int8 of TPU-MLIR 1.6), one group a whole row
    ``scale = max(|lo|, |hi|) / 127``, codes from -128 to 127 without zero points; a scale too small is 0, and
    its row's codes are -128. Scales are stored row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_surgery.weights.integers import Integers

#: Just below one half: adding it and truncating rounds half away from zero without ever rounding 0.49999997
#: up.
_HALF = np.nextafter(np.float32(0.5), np.float32(0))
_HALF_BITS = np.uint32(_HALF.view(np.uint32))
_SIGN = np.uint32(0x80000000)
_SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal
_LEAST_RANGE = np.float32(1e-5)

#: numpy's type for the stored elements of each plain format; BF16 is kept as its bits
STORAGE: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}


@dataclass(frozen=True)
class Quantisation:
    """A per-group weight format: *bits* 4 or 8, *group* columns, scales stored as *scale* (BF16, F16)."""

    bits: int
    group: int
    symmetric: bool
    scale: str
    lanes: int
    signed: bool = False

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << (self.bits - self.signed)) - 1

    @property
    def bottom(self) -> int:
        """The smallest code."""
        return -self.top - 1 if self.signed else 0


def to_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """A new float32 array of stored *values* (BF16 as uint16 bits, F16, F32)."""
    if dtype == "BF16":
        wide = values.astype(np.uint32)
        np.left_shift(wide, 16, out=wide)
        return wide.view(np.float32)
    return values.astype(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits (uint16), as TPU-MLIR rounds."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    special = (bits & 0x7F800000) == 0x7F800000
    if special.any():  # rounding up must not turn a NaN into something else
        nan = special & ((bits & 0x7FFFFF) != 0)
        rounded[nan] = (bits[nan] >> 16).astype(np.uint16) | 0x40
    subnormal = (bits & 0x7F800000) == 0
    if subnormal.any():
        rounded[subnormal] &= 0x8000
    return rounded


def _without_subnormals(bits: np.ndarray) -> np.ndarray:
    """bfloat16 *bits* with subnormals turned into zero of their sign; a copy only where there are any."""
    mantissa_only = ((bits & 0x7FFF) - np.uint16(1)) < 0x7F  # true zeros wrap round and stay out
    if not mantissa_only.any():
        return bits
    return np.where(mantissa_only, bits & 0x8000, bits).astype(np.uint16)


def convert(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """Stored *values* of dtype *source* in the plain format *target*; same shape, contiguous."""
    if source == target == "BF16":
        return _without_subnormals(np.ascontiguousarray(values))
    if source == target:
        return np.ascontiguousarray(values)
    wide = to_float32(values, source)
    if target == "BF16":
        return to_bf16(wide)
    if target == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            return wide.astype(np.float16)
    return np.ascontiguousarray(wide)


def _round_in_place(values: np.ndarray, scratch: np.ndarray) -> None:
    """Round half away from zero; *scratch* is a uint32 array of the same shape."""
    np.bitwise_and(values.view(np.uint32), _SIGN, out=scratch)
    np.bitwise_or(scratch, _HALF_BITS, out=scratch)
    np.add(values, scratch.view(np.float32), out=values)
    np.trunc(values, out=values)


def _extremes(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value of every row. Of short rows numpy finds them twice as fast as columns."""
    if groups.shape[1] > 256:
        return groups.min(axis=1), groups.max(axis=1)
    columns = np.ascontiguousarray(groups.T)
    return columns.min(axis=0), columns.max(axis=0)


def scales(low: np.ndarray, high: np.ndarray, form: Quantisation) -> tuple[np.ndarray, np.ndarray]:
    """(scale, zero), float32 [n], of groups whose smallest and largest weights are *low* and *high* [n]."""
    top = np.float32(form.top)
    if form.symmetric:
        scale = np.maximum(np.abs(low), np.abs(high)) * np.float32(1 if form.signed else 2) / top
        scale[scale < _SMALLEST_NORMAL] = 0
        return scale, np.full_like(scale, 0 if form.signed else 1 << (form.bits - 1))
    scale = np.maximum(high - low, _LEAST_RANGE) / top
    zero = -low / scale
    _round_in_place(zero, np.empty(zero.shape, np.uint32))
    return scale, np.clip(zero, 0, top)


def fitted(one: Integers, form: Quantisation) -> Integers:
    """The same weights in the layout of *form*: a group may be stored as several smaller ones of one scale.

    Raises ValueError where no integers of *form* are these weights.
    """
    if one.bits != form.bits:
        raise ValueError(f"they have {one.bits} bits, the net stores {form.bits}")
    if one.group % form.group:
        raise ValueError(f"they are in groups of {one.group}, the net's are of {form.group}")
    times = one.group // form.group
    scale, zero = (np.repeat(part, times, axis=1) if times > 1 else part for part in (one.scale, one.zero))
    if not form.symmetric or one.codes.dtype == np.int8:
        return Integers(one.codes, scale, zero, one.bits)
    middle = 1 << (form.bits - 1)
    if (zero != middle).any():
        raise ValueError(f"a zero point is not {middle}, and the net has no others")
    if not form.signed:
        return Integers(one.codes, scale, zero, one.bits)
    codes = (one.codes ^ np.uint8(middle)).view(np.int8)  # less the middle, in two's complement
    return Integers(codes, scale, np.zeros_like(zero), one.bits)


def joined(parts: list[Integers]) -> Integers:
    """The rows of *parts*, all in one format, one below the other."""
    if len(parts) == 1:
        return parts[0]
    codes, scale, zero = (
        np.concatenate([getattr(part, field) for part in parts]) for field in ("codes", "scale", "zero")
    )
    return Integers(codes, scale, zero, parts[0].bits)


def quantise(values: np.ndarray, form: Quantisation) -> Integers:
    """Float32 *values* [rows, columns] rounded as the compiler does; they are working memory, and lost."""
    rows, columns = values.shape
    groups = values.reshape(-1, form.group)
    with np.errstate(all="ignore"):
        scale, zero = scales(*_extremes(groups), form)
        np.divide(groups, scale[:, None], out=groups)
        _round_in_place(groups, np.empty(groups.shape, np.uint32))
        if form.symmetric and not scale.all():
            groups[scale == 0] = -np.inf  # what the compiler's conversion makes of x / 0
        np.add(groups, zero[:, None], out=groups)
        np.clip(groups, form.bottom, form.top, out=groups)
        codes = groups.astype(np.int8 if form.signed else np.uint8).reshape(rows, columns)
    count = columns // form.group
    return Integers(codes, scale.reshape(rows, count), zero.astype(np.uint8).reshape(rows, count), form.bits)


def store_codes(codes: np.ndarray, form: Quantisation) -> np.ndarray:
    """Codes [rows, columns] as they are stored, uint8 [rows, columns * bits / 8]."""
    stored = np.ascontiguousarray(codes).view(np.uint8)
    if form.bits == 8:
        return stored
    pairs = stored.view("<u2")  # low byte: even column, high byte: odd column
    return (pairs | (pairs >> 4)).astype(np.uint8)


def by_lanes(values: np.ndarray, lanes: int) -> np.ndarray:
    """[rows, groups] -> [lanes, rows / lanes, groups], row ``r`` going to lane ``r % lanes``."""
    rows, groups = values.shape
    return np.ascontiguousarray(values.reshape(rows // lanes, lanes, groups).transpose(1, 0, 2))


def store_scales(scale: np.ndarray, form: Quantisation) -> np.ndarray:
    """Float32 scales [rows, groups] as they are stored: 16-bit, by lanes."""
    stored = convert(scale, "F32", form.scale)
    return stored if form.signed else by_lanes(stored, form.lanes)
