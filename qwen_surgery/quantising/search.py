"""``search``: for each group of weights the scale that loses least in squared error. Needs no data.

The compiler takes a scale from a group's extremes and rounds it to 16 bits after it has chosen the codes.
Here some smaller scales are tried, each also fitted to its own codes by least squares, all as they will be
stored; the compiler's is among them, so no group comes out worse. Zero points stay the compiler's: moving
them gains next to nothing.
"""

from __future__ import annotations

import numpy as np

from qwen_surgery.packing import formats
from qwen_surgery.packing.formats import Quantisation
from qwen_surgery.weights.integers import Integers

#: By bits: the shares of the compiler's scale that are tried and fitted. 8 bits have few outliers to give up.
_SHRINK = {4: (0.95, 0.8), 8: (0.97, 0.9)}
#: Elements handled at once: few enough to stay in a core's cache through all passes over them.
_BLOCK = 1 << 16
#: Groups of more elements lie by rows in memory, smaller ones by columns: numpy is quick along long axes.
_LONG = 256


def quantise(values: np.ndarray, form: Quantisation) -> Integers:
    """Float32 *values* [rows, columns] in the format *form*."""
    rows, columns = values.shape
    scale, zero = scales(values, form)
    codes = np.empty((rows, columns), np.int8 if form.signed else np.uint8)
    step = max(1, _BLOCK // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        with np.errstate(invalid="ignore"):  # packing refuses what is not finite, by its scale
            codes[part] = nearest(values[part], scale[part], zero[part], form)
    with np.errstate(invalid="ignore"):
        return Integers(codes, scale, zero.astype(np.uint8), form.bits)


def nearest(values: np.ndarray, scale: np.ndarray, zero: np.ndarray, form: Quantisation) -> np.ndarray:
    """The codes nearest to *values* [rows, columns] for scales and zero points [rows, columns / group]."""
    groups = _Groups(values, form)
    with np.errstate(all="ignore"):
        groups.round(groups.spread(scale), groups.spread(zero))
        groups.rounded += groups.spread(zero)
    found = groups.rounded if groups.axis else groups.rounded.T
    return found.reshape(values.shape)


def scales(
    values: np.ndarray, form: Quantisation, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The best scales found for *values* [rows, columns] and their zero points.

    Both are float32 [rows, columns / group]. A column's squared error counts as much as *importance*
    [columns] says (None: all alike).
    """
    rows, columns = values.shape
    shape = rows, columns // form.group
    scale, zero = np.empty(shape, np.float32), np.empty(shape, np.float32)
    step = max(1, _BLOCK // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        found = _search(_Groups(values[part], form, importance))
        scale[part], zero[part] = (one.reshape(-1, shape[1]) for one in found)
    return scale, zero


class _Groups:
    """Groups of a block of weights, and what one scale each makes of them.

    ``weights`` and ``rounded`` (codes less zero points, for the scales last tried) lie along ``axis``.
    """

    def __init__(self, values: np.ndarray, form: Quantisation, importance: np.ndarray | None = None) -> None:
        self.form, self.by_rows = form, values.reshape(-1, form.group)
        self.axis = 1 if form.group > _LONG else 0
        self.weights = self._along(self.by_rows)
        self.importance = None
        if importance is not None:
            each = np.broadcast_to(importance, values.shape)
            self.importance = self._along(each.reshape(-1, form.group))
        self.rounded = np.empty_like(self.weights)
        self._lost = np.empty_like(self.weights)

    def _along(self, groups: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(groups if self.axis else groups.T, np.float32)

    def spread(self, each: np.ndarray) -> np.ndarray:
        """A number per group, to go with its elements."""
        return np.expand_dims(each.reshape(-1), self.axis)

    def round(self, scale: np.ndarray, zero: np.ndarray) -> None:
        """Round for spread *scale* and *zero*. A scale of 0 makes every weight 0."""
        np.multiply(self.weights, np.where(scale == 0, 0, 1 / scale), out=self.rounded)
        np.rint(self.rounded, out=self.rounded)
        np.maximum(self.rounded, self.form.bottom - zero, out=self.rounded)
        np.minimum(self.rounded, self.form.top - zero, out=self.rounded)

    def lose(self, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        """Round for a *scale* and *zero* per group; the squared error of each."""
        wide = self.spread(scale)
        self.round(wide, self.spread(zero))
        np.multiply(self.rounded, wide, out=self._lost)
        np.subtract(self.weights, self._lost, out=self._lost)
        return self._sum(self._lost, self._lost)

    def fitted(self, scale: np.ndarray) -> np.ndarray:
        """The scale that suits the codes best which *scale*, tried last, gave."""
        return scale + self._sum(self.rounded, self._lost) / self._sum(self.rounded, self.rounded)

    def _sum(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        if self.importance is not None:
            one = one * self.importance
        return np.einsum("ij,ij->i" if self.axis else "ij,ij->j", one, other)


def _search(groups: _Groups) -> tuple[np.ndarray, np.ndarray]:
    """The best scale of each group, as it is stored, and its zero point."""
    form = groups.form
    with np.errstate(all="ignore"):
        widest, zero = formats.scales(groups.by_rows, form)
        best = as_stored(widest, form)
        least = groups.lose(best, zero)
        for share in _SHRINK[form.bits]:
            shrunk = as_stored(widest * np.float32(share), form)
            lost = groups.lose(shrunk, zero)
            fitted = as_stored(groups.fitted(shrunk), form)
            for scale, loss in ((shrunk, lost), (fitted, groups.lose(fitted, zero))):
                better = loss < least  # never where numbers are not finite
                best, least = np.where(better, scale, best), np.where(better, loss, least)
    return best, zero


def as_stored(scale: np.ndarray, form: Quantisation) -> np.ndarray:
    """Float32 scales as 16 bits keep them."""
    return formats.to_float32(formats.convert(scale, "F32", form.scale), form.scale)
