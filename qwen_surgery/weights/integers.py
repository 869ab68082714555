"""Weights as integers: what a quantised checkpoint stores, and what a quantiser makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Integers:
    """A matrix as integers: each weight is ``(code - zero) * scale`` of its group of columns.

    ``codes`` [rows, columns] has one code to an element, also for 4 *bits*: uint8, or int8 where the format
    is signed; ``scale`` is float32 and ``zero`` uint8, both [rows, columns / group].
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    bits: int

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return int(self.codes.shape[1] // self.scale.shape[1])

    def values(self) -> np.ndarray:
        """The float32 weights that they stand for, [rows, columns]."""
        import numpy as np

        grouped = self.codes.reshape(*self.scale.shape, self.group).astype(np.float32)
        grouped -= self.zero[:, :, None]
        grouped *= self.scale[:, :, None]
        return grouped.reshape(self.codes.shape)

    def rows(self, which: Any) -> Integers:
        """Some rows (a slice or indices)."""
        return Integers(self.codes[which], self.scale[which], self.zero[which], self.bits)

    def run(self, first: int, last: int) -> Integers:
        """The rows from *first* to *last*."""
        return self.rows(slice(first, last))
