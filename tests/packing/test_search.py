"""The quantiser ``search``.

If these fail, a bmodel written with it is less exact than the compiler's own, or cannot be stored at all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_surgery.cli import main
from qwen_surgery.packing import formats, sidefile, write
from qwen_surgery.packing.formats import Quantisation
from qwen_surgery.quantising import search
from qwen_surgery.weights.integers import Integers
from tests.packing.conftest import Bench

FORMS = [
    Quantisation(bits, group, symmetric, scale, 8, signed)
    for bits, group, symmetric, signed in (
        (4, 64, False, False),
        (4, 64, True, False),
        (4, 128, False, False),
        (8, 384, False, False),
        (8, 384, True, False),
        (8, 384, True, True),
    )
    for scale in ("BF16", "F16")
]


def _weights(seed: int, rows: int, spread: float) -> np.ndarray:
    """Rows of 384 with outliers, zeros and groups on one side of zero."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, (rows, 384)) * spread
    values[0, :128] = 0
    values[-1] = np.abs(values[-1]) + spread
    return values.astype(np.float32)


def _lost(values: np.ndarray, found: Integers, form: Quantisation) -> np.ndarray:
    """The squared error of every group, by the scales as they are stored."""
    scale = search.as_stored(found.scale, form)[..., None].astype(np.float64)
    codes = found.codes.reshape(*found.scale.shape, -1).astype(np.float64)
    made = (codes - found.zero[..., None]) * scale
    return ((values.reshape(made.shape) - made) ** 2).sum(-1)


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 9), st.sampled_from([1e-3, 0.02, 3.0]), st.sampled_from(FORMS))
def test_no_group_loses_more_than_by_rounding(
    seed: int, rows: int, spread: float, form: Quantisation
) -> None:
    values = _weights(seed, rows, spread)
    rounded, found = formats.quantise(values.copy(), form), search.quantise(values.copy(), form)
    before, after = _lost(values, rounded, form), _lost(values, found, form)
    assert (after <= before * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_loses_less_than_rounding(form: Quantisation) -> None:
    values = np.random.default_rng(0).standard_normal((64, 384)).astype(np.float32)
    rounded, found = formats.quantise(values.copy(), form), search.quantise(values.copy(), form)
    share = _lost(values, found, form).sum() / _lost(values, rounded, form).sum()
    assert share < (0.95 if form.bits == 4 else 1.0)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from(FORMS))
def test_codes_fit_their_bits_and_scales_their_type(seed: int, form: Quantisation) -> None:
    values = _weights(seed, 8, 0.02)
    found, again = search.quantise(values.copy(), form), search.quantise(values.copy(), form)
    assert found.codes.min() >= form.bottom and found.codes.max() <= form.top
    assert found.codes.shape == values.shape and found.scale.shape == (8, 384 // form.group)
    np.testing.assert_array_equal(search.as_stored(found.scale, form), found.scale)
    np.testing.assert_array_equal(found.codes, again.codes)
    np.testing.assert_array_equal(found.codes[3:5], search.quantise(values[3:5].copy(), form).codes)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("form", FORMS[:2])
def test_what_is_not_finite_stays_visible(bad: float, form: Quantisation) -> None:
    values = _weights(0, 8, 0.02)
    values[2, 5] = bad
    assert not np.isfinite(search.quantise(values, form).scale).all(), "packing refuses by the scale"


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


@pytest.mark.tpu
def test_refit_by_search_and_back(bench: Callable[..., Bench], tmp_path: Path) -> None:
    made = bench("int4")
    first, better, again, back = (
        tmp_path / f"{name}.bmodel" for name in ("first", "better", "again", "back")
    )
    write(first, made.pieces())
    sidefile.describe(first, made.pieces(), made.model.manifest.geometry, made.model.config()).save(first)
    checkout = str(made.model.checkout)
    assert _run("refit", str(first), checkout, "--quantizer", "search", "--out", str(better)) == 0
    assert better.read_bytes() != first.read_bytes()
    assert better.stat().st_size == first.stat().st_size
    assert sidefile.load(better).notes["quantizer"] == "search"
    assert _run("refit", str(better), checkout, "--out", str(again)) == 0
    assert again.read_bytes() == better.read_bytes(), "a refit forgets how the integers were chosen"
    assert _run("refit", str(better), checkout, "--quantizer", "rtn", "--out", str(back)) == 0
    assert back.read_bytes() == first.read_bytes()


@pytest.mark.tpu
def test_a_bmodel_without_integers_takes_no_quantiser(
    bench: Callable[..., Bench], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, out = bench("bf16"), tmp_path / "plain.bmodel"
    write(out, made.pieces())
    sidefile.describe(out, made.pieces(), made.model.manifest.geometry, made.model.config()).save(out)
    before = out.read_bytes()
    assert _run("refit", str(out), str(made.model.checkout), "--quantizer", "search") == 2
    assert "no weight as integers" in capsys.readouterr().err
    assert out.read_bytes() == before
