"""Integers from elsewhere through a pack plan: kept as they are, row by row, or refused with the reason.

If these fail, the chip does not get a quantised checkpoint's integers, or those that a quantiser chose.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_surgery.errors import Refused
from qwen_surgery.packing import formats
from qwen_surgery.packing.plans import PackPlan, Quantised, pack
from qwen_surgery.weights import TensorRef
from qwen_surgery.weights.integers import Integers

ROWS, COLUMNS, GROUP = 12, 64, 16
_FORM = formats.Quantisation(4, GROUP, False, "BF16", 2)


@dataclass(frozen=True)
class Chosen:
    """A weight's integers, held in memory."""

    name: str
    values: Integers

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.codes.shape

    def integers(self) -> Integers:
        return self.values


def _chosen(name: str, rows: int = ROWS, group: int = GROUP) -> Chosen:
    rng = np.random.default_rng(len(name))
    groups = (rows, COLUMNS // group)
    codes, zero = rng.integers(0, 16, (rows, COLUMNS), np.uint8), rng.integers(0, 16, groups, np.uint8)
    return Chosen(name, Integers(codes, rng.random(groups, np.float32), zero, 4))


def _plan(expression: list[Any], start: int = 0, stop: int = ROWS) -> PackPlan:
    """A plan of rows *start* to *stop* of *expression*, which ends there or later."""
    codes, groups = (stop - start) * COLUMNS // 2, (stop - start) * COLUMNS // GROUP
    one = Quantised(0, codes, codes + 2 * groups, expression, (stop, COLUMNS), start, stop, _FORM)
    return PackPlan(codes + 3 * groups, (one,))


def _packed(plan: PackPlan, given: dict[str, Chosen], tmp_path: Path) -> bytes:
    section = bytearray(plan.size)

    def sink(offset: int, data: np.ndarray) -> None:
        raw = np.ascontiguousarray(data).tobytes()
        section[offset : offset + len(raw)] = raw

    shard = tmp_path / "shard"
    shard.write_bytes(bytes(4 * ROWS * COLUMNS))  # weights of no use: their integers are given
    tensors = {
        name: TensorRef(name, shard, 0, 4 * ROWS * COLUMNS, "F32", (ROWS, COLUMNS)) for name in plan.slots
    }
    pack(plan, tensors, sink, given=given)
    return bytes(section)


def _stored(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> bytes:
    """What the chip gets, written out anew: pairs of codes, then scales and zeros with even rows first."""
    pairs = codes[:, ::2] | codes[:, 1::2] << 4
    lanes = np.concatenate([np.arange(0, len(codes), 2), np.arange(1, len(codes), 2)])
    scales = (formats.to_bf16(scale[lanes])).astype("<u2")
    return bytes(pairs.astype(np.uint8).tobytes() + scales.tobytes() + zero[lanes].tobytes())


_A, _B = ["slot", "a"], ["slot", "bb"]


@pytest.mark.parametrize(
    ("expression", "rows", "start", "stop"),
    [
        (_A, [("a", range(ROWS))], 0, ROWS),
        (_A, [("a", range(4, 10))], 4, 10),
        (["gather", 0, [3, 1, 2, 0], _A], [("a", (3, 1, 2, 0))], 0, 4),
        (["slice", [[2, 10, 2], [0, COLUMNS, 1]], _A], [("a", (2, 4, 6, 8))], 0, 4),
        (["concat", 0, [_A, _B]], [("a", range(8, ROWS)), ("bb", range(4))], 8, 16),
        (
            ["gather", 0, [13, 0, 14, 1], ["concat", 0, [_A, _B]]],
            [("bb", (1,)), ("a", (0,)), ("bb", (2,)), ("a", (1,))],
            0,
            4,
        ),
    ],
)
def test_given_integers_are_packed_as_they_are(
    expression: list[Any], rows: list[tuple[str, Any]], start: int, stop: int, tmp_path: Path
) -> None:
    given = {name: _chosen(name) for name in ("a", "bb")}
    plan = _plan(expression, start, stop)
    picked = [given[name].values.rows(list(which)) for name, which in rows]
    want = [np.concatenate([getattr(one, field) for one in picked]) for field in ("codes", "scale", "zero")]
    assert _packed(plan, given, tmp_path) == _stored(*want)


def test_a_weight_without_given_integers_is_rounded_as_before(tmp_path: Path) -> None:
    plan = _plan(_A)
    assert _packed(plan, {"bb": _chosen("bb")}, tmp_path) == _packed(plan, {}, tmp_path)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        (["mul", _A, ["const", [1], [2.0]]], "does not keep their rows whole"),
        (["gather", 1, list(range(COLUMNS)), _A], "does not keep their rows whole"),
        (["slice", [[0, ROWS, 1], [0, COLUMNS, 2]], _A], "does not keep their rows whole"),
        (["concat", 0, [_A, ["slot", "c"]]], "c is stored with them and has none"),
    ],
)
def test_integers_that_would_not_stay_whole_are_refused_by_name(
    expression: list[Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=f"a: its integers cannot be packed .*{said}"):
        _packed(_plan(expression, 0, 8), {"a": _chosen("a")}, tmp_path)


def test_groups_smaller_than_the_nets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="groups of 8, the net's are of 16"):
        _packed(_plan(_A), {"a": _chosen("a", group=8)}, tmp_path)


def test_weights_stored_together_in_different_groups_get_the_smaller_one(tmp_path: Path) -> None:
    given = {"a": _chosen("a", group=32), "bb": _chosen("bb")}
    plan = _plan(["concat", 0, [_A, _B]], 0, 2 * ROWS)
    a, b = formats.fitted(given["a"].values, _FORM), given["bb"].values
    want = [np.concatenate([getattr(one, field) for one in (a, b)]) for field in ("codes", "scale", "zero")]
    assert _packed(plan, given, tmp_path) == _stored(*want)
