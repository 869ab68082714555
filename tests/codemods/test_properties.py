"""The same program written another way gets the same edits; never a wrong one."""

from __future__ import annotations

import ast
import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import codemods
from codemods.framework.base import Status
from golden.eras import ERAS, modeling_source
from tests.codemods import transforms

CASES = [(era, recipe) for era in ERAS for recipe in ("static", "documented")]
FEW = settings(deadline=None, max_examples=5)
SEEDS = st.integers(0, 2**32 - 1)


def summary(result: codemods.SourceResult) -> list[tuple[str, str, str]]:
    return sorted((o.codemod, o.status.value, o.where) for o in result.outcomes)


@cache
def patched(text: str, recipe: str) -> tuple[codemods.SourceResult, str]:
    result = codemods.run(text, recipe)
    assert not result.failed
    return result, result.code.decode()


@pytest.mark.parametrize("era", ERAS)
@FEW
@given(seed=SEEDS)
def test_comments_and_blank_lines_change_nothing(era: str, seed: int) -> None:
    recipe = "static"
    source = modeling_source(era)
    noisy = transforms.with_noise(source, random.Random(seed))
    plain, plain_text = patched(source, recipe)
    result, text = patched(noisy, recipe)
    assert summary(result) == summary(plain)
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(plain_text))


@pytest.mark.parametrize(("era", "recipe"), CASES)
def test_another_layout_changes_nothing(era: str, recipe: str) -> None:
    source = modeling_source(era)
    plain, plain_text = patched(source, recipe)
    result, text = patched(transforms.reformatted(source), recipe)
    assert summary(result) == summary(plain)
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(plain_text))


@pytest.mark.parametrize(("era", "recipe"), CASES)
def test_renamed_locals_get_the_same_edits(era: str, recipe: str) -> None:
    """Patching after renaming is renaming after patching: the rules depend on no local's name."""
    source = modeling_source(era)
    plain, _ = patched(source, recipe)
    result, text = patched(transforms.renamed(source), recipe)
    assert summary(result) == summary(plain)
    _, again = patched(text, recipe)
    assert again == text


@pytest.mark.parametrize("era", ERAS)
@FEW
@given(seed=SEEDS)
def test_reordered_statements_never_get_a_wrong_edit(era: str, seed: int) -> None:
    """An edit made on a reordered method leaves exactly the statements it leaves on the original."""
    recipe = "static"
    source = modeling_source(era)
    plain, plain_text = patched(source, recipe)
    result, text = patched(transforms.reordered(source, random.Random(seed)), recipe)
    declined = {o.where for o in result.declined} - {o.where for o in plain.declined}
    if not declined:
        assert transforms.shape(text) == transforms.shape(plain_text)
    statuses = {(o.codemod, o.where): o.status for o in plain.outcomes}
    for outcome in result.outcomes:
        before = statuses[outcome.codemod, outcome.where]
        assert outcome.status in (before, Status.DECLINED), outcome


@pytest.mark.parametrize("era", ERAS)
@FEW
@given(seed=SEEDS)
def test_comments_outside_the_edits_survive(era: str, seed: int) -> None:
    """Every line outside the reported ranges is still there, in order, byte for byte."""
    noisy = transforms.with_noise(modeling_source(era), random.Random(seed))
    result = codemods.run(noisy, "static")
    touched: set[int] = set()
    for outcome in result.outcomes:
        if outcome.status is Status.APPLIED:
            assert outcome.line is not None and outcome.end_line is not None
            touched |= set(range(outcome.line, outcome.end_line + 1))
    kept = [line for n, line in enumerate(noisy.splitlines(), 1) if n not in touched]
    after = iter(result.code.decode().splitlines())
    assert all(line in after for line in kept)  # `in` consumes the iterator: an ordered subsequence
