"""The number formats against a slow reference, element by element.

If these fail, packed weights differ from what the compiler would have stored.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qwen_surgery.packing import formats
from qwen_surgery.packing.formats import Quantisation
from qwen_surgery.weights.integers import Integers

_NORMAL = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
_USUAL = st.floats(-4, 4, width=32, allow_subnormal=False)
#: weights on a coarse grid hit the ties that a careless rounding gets wrong
_GRID = st.integers(-64, 64).map(lambda n: n / 16)


def _round(value: float) -> float:
    """Half away from zero, on the exact value."""
    return math.copysign(math.floor(abs(value) + 0.5), value) if abs(value) < 2**52 else value


def _slow_group(group: np.ndarray, form: Quantisation) -> tuple[list[int], np.float32, int]:
    """Codes, scale and zero of one group, one float32 operation at a time."""
    f32, top = np.float32, form.top
    low, high = min(group), max(group)
    with np.errstate(all="ignore"):
        if form.symmetric:
            reach = f32(max(abs(low), abs(high)) * f32(1 if form.signed else 2))
            scale = f32(reach / f32(top))
            zero = 0 if form.signed else 1 << (form.bits - 1)
            if scale < np.finfo(f32).smallest_normal:
                return [form.bottom] * len(group), f32(0), zero
        else:
            scale = f32(max(f32(high - low), f32(1e-5)) / f32(top))
            ratio = float(f32(-low / scale))
            zero = int(min(max(_round(ratio), 0), top)) if math.isfinite(ratio) else (top if ratio > 0 else 0)
        codes = []
        for weight in group:
            ratio = float(f32(weight / scale))
            code = _round(ratio) + zero if math.isfinite(ratio) else ratio
            codes.append(int(min(max(code, form.bottom), top)))
    return codes, scale, zero


def _unpack(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return codes
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], -1)


_FORMS = {
    "int4": Quantisation(4, 8, False, "BF16", 2),
    "int4 symmetric": Quantisation(4, 8, True, "BF16", 2),
    "int8": Quantisation(8, 8, False, "BF16", 2),
    "int8 symmetric": Quantisation(8, 8, True, "BF16", 2),
    "int8 signed": Quantisation(8, 8, True, "BF16", 0, signed=True),
}


@pytest.mark.parametrize("name", _FORMS)
@settings(max_examples=60)
@given(data=st.data())
def test_quantise_equals_the_slow_reference(name: str, data: st.DataObject) -> None:
    form = _FORMS[name]
    elements = data.draw(st.sampled_from([_USUAL, _GRID, _NORMAL]))
    values = data.draw(hnp.arrays(np.float32, (4, 16), elements=elements))
    with np.errstate(over="ignore"):
        wide = np.ptp(values.reshape(-1, 8).astype(np.float64), axis=1)
    if wide.max() > 3e38:  # a group wider than float32: scales are infinite, and refused later
        return
    made = formats.quantise(values.copy(), form)
    codes, scale, zero = formats.store_codes(made.codes, form), made.scale, made.zero
    for row in range(4):
        for group in range(2):
            want = _slow_group(values[row, group * 8 : group * 8 + 8], form)
            have = _unpack(codes.view(np.int8) if form.signed else codes, form.bits)[
                row, group * 8 : group * 8 + 8
            ]
            assert (list(have), scale[row, group], zero[row, group]) == want


@given(hnp.arrays(np.uint32, 64, elements=st.integers(0, 2**32 - 1)))
def test_bfloat16_is_the_nearest_with_ties_to_even(bits: np.ndarray) -> None:
    values = bits.view(np.float32)
    result = formats.to_bf16(values)
    for value, have in zip(values, result, strict=True):
        if np.isnan(value):
            assert (int(have) & 0x7F80) == 0x7F80
            assert int(have) & 0x7F
            continue
        if abs(value) < np.finfo(np.float32).smallest_normal:
            assert int(have) in (0, 0x8000)
            continue
        raw = int(np.float32(value).view(np.uint32))
        down, rest = raw >> 16, raw & 0xFFFF
        want = down + (rest > 0x8000 or (rest == 0x8000 and down & 1 == 1))
        assert int(have) == want


@given(hnp.arrays(np.uint16, (3, 5), elements=st.integers(0, 2**16 - 1)))
def test_bfloat16_weights_are_copied_but_for_subnormals(bits: np.ndarray) -> None:
    same = formats.convert(bits, "BF16", "BF16")
    subnormal = (bits & 0x7F80) == 0
    assert (same[~subnormal] == bits[~subnormal]).all()
    assert (same[subnormal] == (bits[subnormal] & 0x8000)).all()


@given(st.sampled_from([32, 64]), st.integers(1, 4), st.integers(1, 5))
def test_lanes_put_row_r_into_lane_r_modulo_lanes(lanes: int, blocks: int, groups: int) -> None:
    values = np.arange(lanes * blocks * groups, dtype=np.int32).reshape(-1, groups)
    stored = formats.by_lanes(values, lanes)
    assert stored.shape == (lanes, blocks, groups)
    for row in range(lanes * blocks):
        assert (stored[row % lanes, row // lanes] == values[row]).all()


def _form(group: int, *, bits: int = 4, signed: bool = False) -> Quantisation:
    return Quantisation(bits, group, signed, "BF16", 1, signed=signed)


def _dequantised(one: Integers) -> np.ndarray:
    codes = one.codes.astype(np.float32).reshape(len(one.codes), -1, one.group)
    return ((codes - one.zero[..., None]) * one.scale[..., None]).reshape(one.codes.shape)


def test_integers_in_smaller_groups_are_the_same_weights() -> None:
    values = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    wide = formats.quantise(values.copy(), _form(32))
    fine = formats.fitted(wide, _form(16))
    assert fine.group == 16
    np.testing.assert_array_equal(_dequantised(fine), _dequantised(wide))


def test_integers_about_the_middle_are_stored_signed_where_the_net_has_no_zeros() -> None:
    rng = np.random.default_rng(0)
    scale, zero = np.ones((3, 1), np.float32), np.full((3, 1), 128, np.uint8)
    one = Integers(rng.integers(0, 256, (3, 16), np.uint8), scale, zero, 8)
    signed = formats.fitted(one, _form(16, bits=8, signed=True))
    assert signed.codes.dtype == np.int8
    np.testing.assert_array_equal(_dequantised(signed), _dequantised(one))
    zero[1] = 127
    with pytest.raises(ValueError, match="zero point is not 128"):
        formats.fitted(one, _form(16, bits=8, signed=True))


@pytest.mark.parametrize(
    ("form", "said"),
    [(_form(64), "groups of 32, the net's are of 64"), (_form(32, bits=8), "4 bits, the net stores 8")],
)
def test_integers_that_a_layout_cannot_hold_are_refused(form: Quantisation, said: str) -> None:
    values = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    with pytest.raises(ValueError, match=said):
        formats.fitted(formats.quantise(values, _form(32)), form)
