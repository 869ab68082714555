"""``search``: for each group of weights the scale that loses least in squared error. Needs no data.

The compiler takes a scale from a group's extremes and rounds it to 16 bits after it has chosen the codes.
Here smaller scales are tried too, each fitted to its own codes by least squares, all as they will be stored;
the compiler's is among them, so no group comes out worse. Zero points stay the compiler's: moving them gains
next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qwen_surgery.packing import formats
from qwen_surgery.packing.formats import Quantisation
from qwen_surgery.weights.integers import Integers

#: By bits: the shares of the compiler's scale that are fitted. 8 bits have few outliers to give up.
_SHRINK = {4: (0.95, 0.8), 8: (0.97, 0.9)}
#: Elements handled at once, for the reasons that packing has.
_BLOCK = 1 << 18
#: Groups of more elements lie by rows in memory, smaller ones by columns: numpy is quick along long axes.
_LONG = 256


def quantise(values: np.ndarray, form: Quantisation) -> Integers:
    """Float32 *values* [rows, columns] in the format *form*."""
    rows, columns = values.shape
    shape = rows, columns // form.group
    scale, zero = np.empty(shape, np.float32), np.empty(shape, np.uint8)
    codes = np.empty((rows, columns), np.int8 if form.signed else np.uint8)
    for part, groups in _blocks(values, form):
        with np.errstate(all="ignore"):  # packing refuses what is not finite, by its scale
            found = groups.best()
            groups.write_codes(codes[part], *found)
            scale[part], zero[part] = (one.reshape(-1, shape[1]) for one in found)
    return Integers(codes, scale, zero, form.bits)


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
    for part, groups in _blocks(values, form, importance):
        with np.errstate(all="ignore"):
            scale[part], zero[part] = (one.reshape(-1, shape[1]) for one in groups.best())
    return scale, zero


def _blocks(
    values: np.ndarray, form: Quantisation, importance: np.ndarray | None = None
) -> Iterator[tuple[slice, _Groups]]:
    """Some rows of *values* after others, and their groups: one object, which holds them until the next."""
    rows, columns = values.shape
    step = max(1, min(rows, _BLOCK // columns))
    groups = _Groups(form, step * columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        groups.take(values[part], importance)
        yield part, groups


class _Groups:
    """Groups of a block of weights, and what one scale each makes of them.

    ``weights`` and ``rounded`` (codes less zero points, for the scales last tried) lie along ``axis``. Memory
    for *most* elements is asked for once: fresh pages for every block would cost more than all arithmetic,
    and threads would wait for each other there.
    """

    def __init__(self, form: Quantisation, most: int) -> None:
        self.form = form
        self.axis = 1 if form.group > _LONG else 0
        self._room = np.empty((3, most), np.float32)
        self._codes = np.empty(most, np.int8 if form.signed else np.uint8)

    def take(self, values: np.ndarray, importance: np.ndarray | None) -> None:
        """Hold *values* [rows, columns]."""
        groups = self._along(values)
        self.weights, self.rounded, self._lost = (
            part[: values.size].reshape(groups.shape) for part in self._room
        )
        np.copyto(self.weights, groups)
        self.importance = None
        if importance is not None:
            self.importance = np.ascontiguousarray(self._along(np.broadcast_to(importance, values.shape)))

    def _along(self, values: np.ndarray) -> np.ndarray:
        groups = values.reshape(-1, self.form.group)
        return groups if self.axis else groups.T

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """The best scale of each group, as it is stored, and its zero point."""
        low, high = self.weights.min(axis=self.axis), self.weights.max(axis=self.axis)
        widest, zero = formats.scales(low, high, self.form)
        best = as_stored(widest, self.form)
        least = self._lose(best, zero)
        for share in _SHRINK[self.form.bits]:
            self._round(as_stored(widest * np.float32(share), self.form), zero)
            scale = as_stored(self._fitted(), self.form)
            loss = self._lose(scale, zero)
            better = loss < least  # never where numbers are not finite
            best, least = np.where(better, scale, best), np.where(better, loss, least)
        return best, zero

    def write_codes(self, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> None:
        """Put the codes nearest to the weights into *codes* [rows, columns]."""
        self._round(scale, zero)
        self.rounded += self._spread(zero)
        made = self._codes[: codes.size].reshape(self.rounded.shape)
        np.copyto(made, self.rounded, casting="unsafe")
        np.copyto(self._along(codes), made)

    def _spread(self, each: np.ndarray) -> np.ndarray:
        """A number per group, to go with its elements."""
        return np.expand_dims(each, self.axis)

    def _round(self, scale: np.ndarray, zero: np.ndarray) -> None:
        """Round for a *scale* and *zero* per group. A scale of 0 makes every weight 0."""
        np.multiply(self.weights, self._spread(np.where(scale == 0, 0, 1 / scale)), out=self.rounded)
        np.rint(self.rounded, out=self.rounded)
        np.maximum(self.rounded, self._spread(self.form.bottom - zero), out=self.rounded)
        np.minimum(self.rounded, self._spread(self.form.top - zero), out=self.rounded)

    def _lose(self, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        """Round for a *scale* and *zero* per group; the squared error of each."""
        self._round(scale, zero)
        np.multiply(self.rounded, self._spread(scale), out=self._lost)
        np.subtract(self.weights, self._lost, out=self._lost)
        return self._sum(self._lost, self._lost)

    def _fitted(self) -> np.ndarray:
        """The scales that suit best the codes that were made last."""
        return self._sum(self.rounded, self.weights) / self._sum(self.rounded, self.rounded)

    def _sum(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        if self.importance is not None:
            one = one * self.importance
        return np.einsum("ij,ij->i" if self.axis else "ij,ij->j", one, other)


def as_stored(scale: np.ndarray, form: Quantisation) -> np.ndarray:
    """Float32 scales as 16 bits keep them."""
    return formats.to_float32(formats.convert(scale, "F32", form.scale), form.scale)
