"""``gptq``: columns are rounded one after another, and those still to come make up for what is lost.

What counts is not a weight's error but a product's: ``(W - Q) x`` over the inputs *x* that a matrix gets of a
text. Its square is ``(W - Q) H (W - Q)`` with ``H`` the sum of ``x x``. By a triangular factor of H's inverse
each column's error is spread over the columns behind it in the best way (Frantar and others, 2022). Columns
that matter most come first. Groups keep their place, and their scales are chosen beforehand, so that the
result is stored as any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from qwen_surgery.errors import Refused
from qwen_surgery.packing.formats import Quantisation
from qwen_surgery.quantising import search
from qwen_surgery.weights.integers import Integers

#: What is added to H's diagonal, as a share of its mean: at least, and where a text says next to nothing.
_LEAST_DAMPING, _MOST_DAMPING = 0.01, 10.0
#: Columns between two updates of all that are behind them.
_COLUMNS = 128
#: Rows at once: what they take besides the result is some copies of rows x columns of float32.
_ROWS = 4096

#: Gives the float32 rows from one number to another, [last - first, columns].
Rows = Callable[[int, int], np.ndarray]


class Hessian:
    """The sum of ``x x`` over inputs of *columns* features."""

    def __init__(self, columns: int) -> None:
        self._sum = torch.zeros(columns, columns)
        self._fourth = 0.0  # the sum of |x|^4
        self._count = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Take float32 *inputs* [n, columns]."""
        self._sum.addmm_(inputs.T, inputs)
        self._fourth += float(inputs.square().sum(1).double().square().sum())
        self._count += len(inputs)

    def damping(self) -> float:
        """What to add to the diagonal, as a share of its mean.

        A short text leaves directions in which nothing was seen: moving errors there costs nothing on this
        text, and much on others. How far so few samples can be trusted is Ledoit and Wolf's estimate (2004).
        """
        mean = float(self._sum.diagonal().double().mean()) / self._count
        square = float(torch.linalg.vector_norm(self._sum)) ** 2 / self._count**2
        spread = square - len(self._sum) * mean**2
        noise = (self._fourth / self._count - square) / self._count
        trusted = 1 - min(1.0, max(0.0, noise / spread)) if spread > 0 else 0.0
        share = (1 - trusted) / trusted if trusted else _MOST_DAMPING
        return min(_MOST_DAMPING, max(_LEAST_DAMPING, share))

    def factor(self) -> Factor:
        """What :func:`quantise` needs of it. Takes its memory: nothing can be added after it.

        Raises Refused where inputs were all zero or not finite.
        """
        seen = self._sum.diagonal().clone()
        if not torch.isfinite(seen).all() or not seen.any():
            raise Refused(
                "the calibration text gives inputs that are all zero or not finite",
                hint="use --quantizer search, or another --calibration text",
            )
        order = torch.argsort(seen, descending=True, stable=True)
        # The last come first here: a factor of that, turned round, is one of the inverse's.
        turned = order.flip(0)
        share = self.damping()
        ordered = self._sum[turned][:, turned]
        self._sum = torch.empty(0)
        lower, added = _cholesky(ordered, share * float(seen.mean()))
        del ordered
        upper = torch.eye(len(lower))
        torch.linalg.solve_triangular(lower, upper, upper=False, out=upper)
        return Factor(order, upper.flip(0, 1), (seen + added).numpy())


def _cholesky(matrix: torch.Tensor, added: float) -> tuple[torch.Tensor, float]:
    """The lower factor of *matrix* with *added* on its diagonal, or so much more as rounding asks for."""
    seen = matrix.diagonal().clone()
    while True:
        matrix.diagonal().copy_(seen + added)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return lower, added
        added *= 10


@dataclass(frozen=True)
class Factor:
    """``upper`` [columns, columns]: the factor of H's inverse, its columns in ``order``; ``importance``
    [columns]: how much an error of each column counts."""

    order: torch.Tensor
    upper: torch.Tensor
    importance: np.ndarray


def quantise(rows: Rows, shape: tuple[int, int], form: Quantisation, factor: Factor) -> Integers:
    """A matrix of *shape*, whose inputs *factor* knows, in the format *form*. No more of it than some
    thousand *rows* are asked for at once."""
    count, columns = shape
    codes = np.empty(shape, np.int8 if form.signed else np.uint8)
    scale = np.empty((count, columns // form.group), np.float32)
    zero = np.empty(scale.shape, np.uint8)
    for first in range(0, count, _ROWS):
        part = slice(first, min(first + _ROWS, count))
        values = np.ascontiguousarray(rows(part.start, part.stop))
        steps, middles = search.scales(values, form, factor.importance)
        codes[part] = _rounded(values, steps, middles, form, factor)
        scale[part] = steps
        with np.errstate(invalid="ignore"):  # packing refuses what is not finite, by its scale
            zero[part] = middles
    return Integers(codes, scale, zero, form.bits)


def _rounded(
    values: np.ndarray, scale: np.ndarray, zero: np.ndarray, form: Quantisation, factor: Factor
) -> np.ndarray:
    """Codes of some rows. Rows know nothing of each other; here they lie side by side, a column to a line."""
    order, upper = factor.order, factor.upper
    lines = torch.from_numpy(values).T[order]
    group = torch.div(order, form.group, rounding_mode="floor").tolist()
    steps, middles = (torch.from_numpy(np.ascontiguousarray(each.T)) for each in (scale, zero))
    codes = torch.empty(lines.shape, dtype=torch.int8 if form.signed else torch.uint8)
    for first in range(0, len(lines), _COLUMNS):
        last = min(first + _COLUMNS, len(lines))
        lost = torch.empty(last - first, lines.shape[1])
        for place in range(first, last):
            before, step, middle = place - first, steps[group[place]], middles[group[place]]
            line = torch.addmv(lines[place], lost[:before].T, upper[first:place, place], alpha=-1)
            rounded = torch.where(step == 0, 0.0, torch.round(line / step))
            rounded = torch.minimum(torch.maximum(rounded, form.bottom - middle), form.top - middle)
            codes[place] = rounded + middle
            lost[before] = (line - rounded * step) / upper[place, place]
        lines[last:].addmm_(upper[first:last, last:].T, lost, alpha=-1)
    result = np.empty(values.shape, codes.numpy().dtype)
    result[:, order.numpy()] = codes.numpy().T
    return result
