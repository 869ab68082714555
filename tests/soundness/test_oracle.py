"""No edit changes what a file computes: mutants of every era run the same, patched or not."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from golden.eras import ERAS, modeling_source
from tests.codemods.test_history import git, revisions
from tests.soundness.judging import Tally, tally
from tests.soundness.mutants import mutants

#: At most this share of the mutants that an edit would not harm may be declined.
DECLINED = 0.15


def run(text: str, seed: int, count: int, recipe: str) -> Tally:
    return tally(itertools.islice(mutants(text, seed), count), recipe)


def together(tallies: list[Tally]) -> Tally:
    whole = Tally()
    for part in tallies:
        whole.counts += part.counts
        whole.unsound += part.unsound
    return whole


def check(tallies: list[Tally]) -> None:
    whole = together(tallies)
    print(whole)
    assert not whole.unsound, whole.unsound
    if sum(whole.counts.values()) > 1000:  # a share of fewer says little
        assert whole.declined_share < DECLINED, str(whole)


def test_no_mutant_is_edited_into_other_numbers() -> None:
    """20 of every era under the default recipe, 8 of each that the documented one can edit."""
    found = [run(modeling_source(era), 20260, 20, "static") for era in ERAS]
    found += [run(modeling_source(era), 20261, 8, "documented") for era in ERAS[2:]]
    check(found)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["static", "documented"])
def test_no_mutant_of_many_is_edited_into_other_numbers(recipe: str) -> None:
    """10,000 in all: 1,100 of every era under the default recipe, 460 of each that the other can edit."""
    static = recipe == "static"
    eras, count = (ERAS, 1100) if static else (ERAS[2:], 460)
    check([run(modeling_source(era), 7, count, recipe) for era in eras])


@pytest.mark.slow
@pytest.mark.upstream
def test_no_mutant_of_upstream_s_code_is_edited_into_other_numbers(upstream: Path) -> None:
    found = []
    for revision, data in revisions(upstream).items():
        others = {
            name: git(upstream, "show", f"{revision}:{name}").decode()
            for name in ("configuration_qwen.py", "qwen_generation_utils.py")
        }
        found.append(tally(itertools.islice(mutants(data.decode(), 7), 60), "static", others))
    check(found)
