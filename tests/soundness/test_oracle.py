"""No edit changes what a file computes: mutants of every era run the same, patched or not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.soundness.judging import Verdict
from tests.soundness.run import Record, declined_share, records, report, run, units

#: At most this share of the mutants that an edit would not harm may be declined.
DECLINED = 0.15


def check(found: list[Record]) -> None:
    print(report(found))
    counts = Counter(record.verdict for record in found)
    assert counts[Verdict.EQUAL] > len(found) // 5, "too few were edited and ran to say anything"
    assert not counts[Verdict.DIFFERS], report(found)
    if counts[Verdict.EQUAL] + counts[Verdict.HARMLESS] > 1000:  # a share of fewer says little
        assert declined_share(counts) < DECLINED, report(found)


def test_no_mutant_is_edited_into_other_numbers() -> None:
    check([record for unit in units(84, 20260, parts=1) for record in records(unit)])


@pytest.mark.slow
def test_no_mutant_of_many_is_edited_into_other_numbers(tmp_path: Path) -> None:
    check(run(units(10_000, 7), 2, tmp_path))


@pytest.mark.slow
@pytest.mark.upstream
def test_no_mutant_of_upstream_s_code_is_edited_into_other_numbers(upstream: Path, tmp_path: Path) -> None:
    check(run(units(2_000, 7, str(upstream)), 2, tmp_path))
