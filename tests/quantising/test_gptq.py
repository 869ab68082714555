"""The quantiser ``gptq``: its mathematics against a slow version of the same, and what it does at the edges.

If these fail, integers are stored that lose more than rounding would, or that the chip's format cannot hold.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_surgery.errors import Refused
from qwen_surgery.packing import formats
from qwen_surgery.packing.formats import Quantisation
from qwen_surgery.packing.plans import PackPlan, Quantised
from qwen_surgery.quantising import chosen, gptq, search
from qwen_surgery.weights.integers import Integers
from qwen_surgery.weights.refs import TensorRef

COLUMNS = 256
FORMS = [
    Quantisation(4, 64, False, "BF16", 8),
    Quantisation(4, 128, True, "F16", 8),
    Quantisation(8, 64, False, "BF16", 8),
    Quantisation(8, COLUMNS, True, "BF16", 8),
    Quantisation(8, COLUMNS, True, "F16", 8, signed=True),
]


def _inputs(seed: int, count: int, columns: int = COLUMNS) -> torch.Tensor:
    """Inputs that depend on each other, of very different sizes."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((columns, columns)) * np.exp(rng.standard_normal(columns))
    return torch.from_numpy((rng.standard_normal((count, columns)) @ mixed).astype(np.float32))


def _weights(seed: int, rows: int = 48, columns: int = COLUMNS) -> np.ndarray:
    values = np.random.default_rng(seed).standard_t(4, (rows, columns)) * 0.02
    values[0, :64] = 0
    return values.astype(np.float32)


def _factor(inputs: torch.Tensor) -> gptq.Factor:
    hessian = gptq.Hessian(inputs.shape[1])
    for part in inputs.split(100):
        hessian.add(part)
    return hessian.factor()


def _quantised(values: np.ndarray, form: Quantisation, factor: gptq.Factor) -> Integers:
    return gptq.quantise(lambda first, last: values[first:last], values.shape, form, factor)


def _stored(one: Integers, form: Quantisation) -> np.ndarray:
    """The weights that the chip sees."""
    return Integers(one.codes, search.as_stored(one.scale, form), one.zero, one.bits).values()


def _lost(values: np.ndarray, one: Integers, form: Quantisation, inputs: torch.Tensor) -> float:
    """The squared error of the products with *inputs*."""
    error = torch.from_numpy(values - _stored(one, form))
    return float((inputs @ error.T).square().sum())


def _slowly(values: np.ndarray, one: Integers, form: Quantisation, factor: gptq.Factor) -> np.ndarray:
    """The codes for the scales of *one*, column by column, the rest of the inverse worked out anew each time.

    As the method is first told: the best correction of all columns that are left, and then one of them less.
    """
    order = factor.order.numpy()
    upper = factor.upper.double().numpy()
    inverse = upper.T @ upper
    left = values.astype(np.float64)[:, order]
    codes = np.empty(values.shape, np.int64)
    scale, zero = one.scale.astype(np.float64), one.zero.astype(np.float64)
    for place, column in enumerate(order):
        step, middle = scale[:, column // form.group], zero[:, column // form.group]
        with np.errstate(all="ignore"):
            code = np.where(step == 0, middle, np.rint(left[:, place] / step) + middle)
        codes[:, column] = code = np.clip(code, form.bottom, form.top)
        error = (left[:, place] - (code - middle) * step) / inverse[0, 0]
        left[:, place:] -= np.outer(error, inverse[0])
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return codes


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_is_the_method_as_it_is_told(form: Quantisation) -> None:
    factor, values = _factor(_inputs(0, 600)), _weights(0, 12)
    found = _quantised(values, form, factor)
    differ = (_slowly(values, found, form, factor) != found.codes).mean()
    assert differ < 0.005, "but for ties that float32 breaks the other way"


def test_the_factor_is_one_of_the_inverse() -> None:
    inputs = _inputs(1, 900, 40)
    factor = _factor(inputs)
    hessian = (inputs.T @ inputs).double()
    hessian.diagonal().copy_(torch.from_numpy(factor.importance).double())
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    expected = torch.linalg.inv(hessian)[factor.order][:, factor.order]
    torch.testing.assert_close(upper.T @ upper, expected, rtol=2e-3, atol=float(expected.abs().max()) * 2e-3)
    assert list(factor.importance[factor.order]) == sorted(factor.importance, reverse=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(FORMS), st.sampled_from([200, 1000]))
def test_products_lose_less_than_by_rounding_on_the_text_and_on_others(
    seed: int, form: Quantisation, count: int
) -> None:
    inputs, values = _inputs(seed, 2 * count), _weights(seed)
    read, others = inputs[:count], inputs[count:]
    found, rounded = _quantised(values, form, _factor(read)), formats.quantise(values.copy(), form)
    assert _lost(values, found, form, read) < 0.8 * _lost(values, rounded, form, read)
    assert _lost(values, found, form, others) < _lost(values, rounded, form, others)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_integers_are_such_as_the_format_stores(form: Quantisation) -> None:
    values = _weights(2)
    values[:, ::64] *= 40  # an outlier in each group
    found = _quantised(values, form, _factor(_inputs(2, 300)))
    assert found.codes.dtype == (np.int8 if form.signed else np.uint8)
    assert found.codes.min() >= form.bottom and found.codes.max() <= form.top
    assert found.scale.shape == found.zero.shape == (len(values), COLUMNS // form.group)
    np.testing.assert_array_equal(search.as_stored(found.scale, form), found.scale)
    if form.symmetric:
        assert set(np.unique(found.zero)) == {0 if form.signed else 1 << (form.bits - 1)}


def test_a_group_keeps_its_own_scale_whatever_the_order_of_its_columns() -> None:
    form, values = FORMS[0], _weights(3)
    values[:, 64:128] *= 1000
    found = _quantised(values, form, _factor(_inputs(3, 600)))
    assert (found.scale[:, 1] > 50 * found.scale[:, [0, 2, 3]].max(axis=1)).all()
    error = np.abs(values - _stored(found, form))[:, 64:128]
    assert np.median(error / found.scale[:, 1:2]) < 1, "the large columns lose parts of their own step"


def test_rows_do_not_depend_on_how_many_are_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    factor, values = _factor(_inputs(4, 300)), _weights(4)
    whole = _quantised(values, FORMS[0], factor)
    monkeypatch.setattr(gptq, "_ROWS", 7)
    parts = _quantised(values, FORMS[0], factor)
    assert (parts.codes != whole.codes).mean() < 0.002
    np.testing.assert_array_equal(parts.scale, whole.scale)


def test_columns_that_the_text_never_uses_are_rounded_as_they_are() -> None:
    form, inputs, values = FORMS[0], _inputs(5, 600), _weights(5)
    dead = [3, 70, 71, 255]
    inputs[:, dead] = 0
    found = _quantised(values, form, _factor(inputs))
    scale, zero = (np.repeat(each, form.group, axis=1)[:, dead] for each in (found.scale, found.zero))
    nearest = np.clip(np.rint(values[:, dead] / scale) + zero, form.bottom, form.top)
    np.testing.assert_array_equal(found.codes[:, dead], nearest)


def test_a_short_text_is_trusted_less() -> None:
    shares = []
    for count in (4000, 400, 40, 4):
        hessian = gptq.Hessian(COLUMNS)
        hessian.add(_inputs(6, count))
        shares.append(hessian.damping())
    assert shares == sorted(shares) and shares[0] < 0.05 < shares[-1] <= 10


def test_one_huge_input_is_damped_until_it_can_be_factored() -> None:
    inputs = torch.full((50, COLUMNS), 1e-3)
    inputs[:, 7] = 1e4
    factor, values = _factor(inputs), _weights(7)
    assert torch.isfinite(factor.upper).all()
    found = _quantised(values, FORMS[0], factor)
    assert _lost(values, found, FORMS[0], inputs) <= 1.001 * _lost(
        values, formats.quantise(values.copy(), FORMS[0]), FORMS[0], inputs
    )


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_inputs_that_say_nothing_are_refused(bad: float) -> None:
    with pytest.raises(Refused, match="all zero or not finite"):
        _factor(torch.full((50, 64), bad))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_integers_come_back_from_their_file(form: Quantisation, tmp_path: Path) -> None:
    values, file = _weights(8), tmp_path / chosen.FILE
    one = _quantised(values, form, _factor(_inputs(8, 300)))
    chosen.save(file, {"mlp.w1.weight": one})
    ref = TensorRef("h.0.mlp.w1.weight", tmp_path / "shard", 0, 0, "BF16", values.shape)
    (found,) = chosen.refs(file, {"mlp.w1.weight": ref}).values()
    assert (found.name, found.shape) == (ref.name, values.shape)
    back = found.integers()
    for part in ("codes", "scale", "zero"):
        np.testing.assert_array_equal(getattr(back, part), getattr(one, part))
    assert back.bits == form.bits
    assert file.stat().st_size < values.size * form.bits / 8 * 1.4 + 2000
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Refused, match="cannot be read"):
        found.integers()


def test_a_weight_stored_in_two_formats_is_refused() -> None:
    shape = (128, COLUMNS)
    plan = PackPlan(
        1 << 20,
        tuple(Quantised(0, 0, 0, ["slot", "w"], shape, 64 * i, 64 * (i + 1), FORMS[i]) for i in range(2)),
    )
    with pytest.raises(Refused, match="w is stored in two formats"):
        chosen.forms(plan)
