"""Which elements of which weights an expression reads: to tell two expressions apart and to find gaps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from qwen_surgery.packing.expressions import ARITHMETIC, Expression, move, slots

Shape = tuple[int, ...]


def _is_column(expression: Expression) -> bool:
    """A one-dimensional slot seen as one column."""
    return expression[0] == "reshape" and expression[2][0] == "slot" and expression[1][1:] == [1]


def _has_arithmetic(expression: Expression) -> bool:
    if expression[0] in ARITHMETIC or expression[0] == "neg":
        return True
    if expression[0] == "concat":
        return any(_has_arithmetic(part) for part in expression[2])
    return expression[0] not in ("slot", "const") and _has_arithmetic(expression[-1])


class ElementOrigins:
    """Knows the *shapes* of all slots; answers where an expression's elements come from."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._shapes = dict(shapes)

    def numbers(self, expression: Expression, slot: str) -> np.ndarray:
        """For every element of *expression*: which element of *slot* it is, counted from 1; 0 for none.

        Arithmetic passes on the numbers of the side that comes from the slot. The type is uint32, and uint64
        for huge slots.
        """
        kind = expression[0]
        if kind == "slot":
            count = math.prod(self._shapes[expression[1]])
            if expression[1] != slot:
                return np.broadcast_to(np.uint32(0), self._shapes[expression[1]])
            width = np.uint32 if count < 1 << 32 else np.uint64
            return np.arange(1, count + 1, dtype=width).reshape(self._shapes[slot])
        if kind == "const":
            return np.zeros(expression[1], np.uint32)
        if kind in ARITHMETIC:
            return np.maximum(self.numbers(expression[1], slot), self.numbers(expression[2], slot))
        if kind == "neg":
            return self.numbers(expression[1], slot)
        if kind == "concat":
            parts = [self.numbers(part, slot) for part in expression[2]]
            return np.concatenate(parts, axis=expression[1])
        return move(expression, self.numbers(expression[-1], slot))

    def same(self, one: tuple[Expression, int], other: tuple[Expression, int], rows: int) -> bool:
        """Whether *rows* rows of two (expression, first row) are the very same elements."""
        if one == other:
            return True

        def part(run: tuple[Expression, int], slot: str) -> np.ndarray:
            return self.numbers(run[0], slot)[run[1] : run[1] + rows]

        if _has_arithmetic(one[0]) or _has_arithmetic(other[0]) or slots(one[0]) != slots(other[0]):
            return False
        return all(np.array_equal(part(one, slot), part(other, slot)) for slot in slots(one[0]))


def whole_rows(
    expression: Expression, rows: np.ndarray, shapes: Mapping[str, Shape]
) -> list[tuple[str, np.ndarray]] | None:
    """Which whole rows of which slots *rows* of a matrix are, in order; None where one is cut."""
    kind = expression[0]
    if kind == "slot":
        return [(expression[1], rows)]
    if kind == "gather" and expression[1] == 0:
        return whole_rows(expression[3], np.take(expression[2], rows), shapes)
    if kind == "slice":
        (start, _, step), *others = expression[1]
        if all(
            bounds == [0, size, 1] for bounds, size in zip(others, _columns(expression, shapes), strict=True)
        ):
            return whole_rows(expression[2], start + step * rows, shapes)
    if kind == "concat" and expression[1] == 0 and all(part[0] == "slot" for part in expression[2]):
        names = [name for _, name in expression[2]]
        ends = np.cumsum([shapes[name][0] for name in names])
        parts = np.searchsorted(ends, rows, side="right")
        runs = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(parts)) + 1)
        return [
            (names[parts[run[0]]], rows[run] - ends[parts[run[0]]] + shapes[names[parts[run[0]]]][0])
            for run in runs
        ]
    return None


def _columns(expression: Expression, shapes: Mapping[str, Shape]) -> Shape:
    """The axes after the first of a matrix that is made by moving rows."""
    return shapes[min(slots(expression))][1:]


class Coverage:
    """Collects what has been used of each weight."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._sources = ElementOrigins(shapes)
        self._shapes = dict(shapes)
        self._rows = {name: np.zeros(shape[0] if shape else 1, bool) for name, shape in shapes.items()}
        self._elements: dict[str, np.ndarray] = {}

    def add(self, expression: Expression, start: int, stop: int) -> None:
        """Rows *start* to *stop* of the matrix *expression* are used."""
        whole = whole_rows(expression, np.arange(start, stop), self._shapes)
        if whole is not None:
            for name, rows in whole:
                self._rows[name][rows] = True
            return
        if _is_column(expression) and len(self._shapes[expression[2][1]]) == 1:
            self._rows[expression[2][1]][start:stop] = True
            return
        for name in slots(expression):
            numbers = self._sources.numbers(expression, name)[start:stop]
            seen = self._elements.setdefault(name, np.zeros(math.prod(self._shapes[name]) + 1, bool))
            seen[numbers.reshape(-1)] = True

    def unused(self) -> list[str]:
        """The weights of which at least one element was never used."""
        result = []
        for name, rows in self._rows.items():
            seen = self._elements.get(name)
            if rows.all():
                continue
            if seen is None or not (seen[1:].reshape(len(rows), -1) | rows[:, None]).all():
                result.append(name)
        return sorted(result)
