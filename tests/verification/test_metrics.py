"""No number may hide a failure: NaN, constants, wrong shapes and empty comparisons never pass."""

from __future__ import annotations

import numpy as np
import pytest

from golden import tolerances
from qwen_surgery.runtime import host
from qwen_surgery.verification import runtime
from qwen_surgery.verification.metrics import agreement, distance, kl_divergence, total_variation, worst
from qwen_surgery.verification.results import LevelResult, Report, judge, net_check

REFERENCE = np.linspace(-2, 3, 24, dtype=np.float32).reshape(2, 12)


@pytest.mark.parametrize(
    ("candidate", "word"),
    [
        (np.full_like(REFERENCE, np.nan), "NaN"),
        (np.where(REFERENCE > 2.9, np.inf, REFERENCE), "infinite"),
        (np.full_like(REFERENCE, 0.5), "constant"),
        (REFERENCE[:, :6], "shape"),
        (REFERENCE[:0], "nothing"),
    ],
)
def test_faults_miss_whatever_the_tolerance(candidate: np.ndarray, word: str) -> None:
    for (level, mode), limits in tolerances.load().items():
        check = net_check(limits, "block_0", 0, "prefill 5", "x", distance(REFERENCE, candidate), "net")
        assert not check.passed, (level, mode)
        assert any(word in sentence for sentence in check.missed)


def test_cosine_tells_nearly_equal_arrays_apart() -> None:
    found = distance(REFERENCE, REFERENCE + np.float32(1e-4))
    assert 0 < 1 - found.cosine < 1e-6
    assert distance(REFERENCE, REFERENCE).cosine == 1.0
    assert distance(REFERENCE, 2 * REFERENCE).relative == pytest.approx(1.0)


def test_kl_and_tokens() -> None:
    logits = np.random.default_rng(0).standard_normal(50)
    assert kl_divergence(logits, logits + 5) == pytest.approx(0, abs=1e-12)
    assert kl_divergence(logits, -logits) > 0.1
    assert kl_divergence(logits, np.full(50, np.nan)) == float("inf")
    assert agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 0.75
    assert agreement([], []) == 0
    assert total_variation({1: 0.5, 2: 0.5}, {1: 0.5, 3: 0.5}) == 0.5


def test_nothing_compared_is_a_miss() -> None:
    assert worst([]).faults
    assert not LevelResult("source", "fp32", "torch").passed
    assert not Report("checkout", 16, "static").passed
    assert judge({}, "net", {"max_abs": 0.0}), "an unknown tolerance must not pass"
    limits = tolerances.load()["source", "fp32"]
    assert judge(limits, "net", {}), "a number that was not measured must not pass"


def test_every_tolerance_has_a_reason_and_every_level_is_covered() -> None:
    found = tolerances.load()
    assert {("source", "fp32"), ("onnx", "fp32"), ("mlir", "fp32")} <= set(found)
    assert {("chip", mode) for mode in ("bf16", "f16", "int8", "int4")} <= set(found)
    assert all(len(limit.reason) > 10 for limits in found.values() for limit in limits.values())
    assert found["source", "fp32"]["net.max_abs"].limit == 1e-5
    assert found["onnx", "fp32"]["net.max_abs"].limit == 1e-4
    cosines = [found["chip", mode]["net.cosine"].limit for mode in ("bf16", "int8", "int4")]
    assert cosines == [0.9999, 0.999, 0.98]
    assert found["chip", "bf16"]["answers.agreement"].limit == 1.0


def test_masks_and_positions_are_the_vendor_runtimes() -> None:
    mask = host.prefill_mask(3, 5)[0, 0]
    assert [[int(v == 0) for v in row] for row in mask] == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert mask.min() == -10000
    assert [int(v == 0) for v in host.decode_mask(3, 5).ravel()] == [1, 1, 0, 0, 0, 1]
    assert host.prefill_positions(3, 5).tolist() == [[0, 1, 2, 0, 0]]


def test_what_the_penalty_looks_back_on() -> None:
    """The latest tokens, then the last one again: padding must not penalise a token that was not said."""
    assert host.sampling_ids([7, 8, 9], 6, 2).tolist() == [[8, 9, 9, 9, 9, 9]]
    assert host.sampling_ids(range(10), 4, 32).tolist() == [[6, 7, 8, 9]]


def test_a_sampling_that_is_no_number_misses_in_every_mode() -> None:
    for (level, mode), limits in tolerances.load().items():
        if level != "mlir":
            missed = judge(limits, "sampling", {"total_variation": float("nan"), "head_variation": 1.0})
            assert len(missed) >= 2, (level, mode)
            assert any("not a number" in sentence for sentence in missed)


def test_no_limit_is_empty() -> None:
    """A limit that every value meets would be a check that is none."""
    for limits in tolerances.load().values():
        for limit in limits.values():
            assert limit.limit > 0, limit
            assert not limit.holds(float("nan"))
            if limit.metric.endswith("total_variation"):
                assert limit.limit <= 0.5, limit


def test_penalty_sampling_follows_the_contract() -> None:
    logits = np.zeros(100, dtype=np.float32)
    logits[:60] = np.linspace(8, 1, 60)
    settings = host.Sampling(top_p=0.1, temperature=0.5, penalty=2.0)
    probabilities, tokens = runtime.penalty_sample(logits, np.array([[0]]), settings)
    assert probabilities.shape == tokens.shape == (1, 50)
    assert probabilities.sum() == pytest.approx(1, abs=1e-6)
    assert (probabilities > 0).sum() == 5, "top-p never leaves fewer than five"
    assert tokens[0, 0] == 1, "a token that was just said is penalised"
    few, same = runtime.penalty_sample(logits, np.array([[0]]), host.Sampling(0.9, 4.0, 2.0, top_k=3))
    assert (few > 0).sum() == 3 and np.array_equal(same, tokens), "as many as top_k says, if fewer than five"
    assert few.sum() == pytest.approx(1, abs=1e-6)
    draws = [runtime.draw(probabilities, tokens, u) for u in np.linspace(0, 0.999, 200)]
    assert set(draws) == set(tokens[0, :5].tolist())
