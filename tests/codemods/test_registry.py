"""Recipes and codemods by name, third parties' too; skipping on request and by comment."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

import codemods
from codemods.analysis.source import Source
from codemods.framework import recipes, registry
from codemods.framework.base import Decisions, Rule, Site, Status
from golden.eras import modeling_source


class Greeting(Rule):
    """A third party's rule: declines every file that says hello."""

    name = "no-greeting"
    absent = "it says nothing"

    def sites(self, source: Source, decided: Decisions) -> Iterator[Site]:
        if "hello" in source.text:
            yield Site(Status.DECLINED, "it says hello", 1, 1)


THIRD = recipes.Recipe("third", ("scalar-divide", "no-greeting"), ())
NOT_A_RULE = object()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a package with these entry points were installed."""
    here = __name__

    def points(group: str) -> list[EntryPoint]:
        known = {
            registry.GROUP: {"no-greeting": "Greeting", "broken": "NOT_A_RULE"},
            recipes.GROUP: {"third": "THIRD", "broken": "NOT_A_RULE"},
        }
        return [EntryPoint(name, f"{here}:{attribute}", group) for name, attribute in known[group].items()]

    monkeypatch.setattr("importlib.metadata.entry_points", points)
    registry.get.cache_clear()


@pytest.mark.usefixtures("installed")
def test_third_party_rules_and_recipes_load_by_name() -> None:
    assert "no-greeting" in registry.names() and "third" in recipes.names()
    result = codemods.run(modeling_source("sdpa") + "\n# hello\n", "third")
    assert {o.codemod for o in result.outcomes} == {"scalar-divide", "no-greeting"}
    assert [o.codemod for o in result.declined] == ["no-greeting"]


@pytest.mark.usefixtures("installed")
def test_an_entry_point_of_the_wrong_kind_is_named() -> None:
    with pytest.raises(registry.UnknownCodemod, match="NOT_A_RULE"):
        registry.get("broken")
    with pytest.raises(recipes.UnknownRecipe, match="NOT_A_RULE"):
        recipes.load("broken")


def test_unknown_names_say_what_is_known() -> None:
    with pytest.raises(LookupError, match="static"):
        recipes.load("statik")
    with pytest.raises(LookupError, match="early-present"):
        codemods.run("x = 1\n", "static", skip=["early-presents"])


def test_the_default_recipe_comes_first_and_contains_the_documented_one() -> None:
    assert recipes.names()[0] == recipes.DEFAULT == "static"
    assert set(recipes.DOCUMENTED.codemods) < set(recipes.STATIC.codemods)
    assert set(recipes.DOCUMENTED.config) < set(recipes.STATIC.config)


def test_skipping_is_declined_but_no_error() -> None:
    result = codemods.run(modeling_source("sdpa"), "static", skip=["early-present"])
    (skipped,) = [o for o in result.outcomes if o.codemod == "early-present"]
    assert skipped.status is Status.DECLINED and skipped.suppressed
    assert result.changed and not result.declined
    present = modeling_source("sdpa").splitlines()[(skipped.line or 1) - 1 : skipped.end_line]
    assert "\n".join(present) in result.code.decode()


@pytest.mark.parametrize("place", ["above", "beside"])
def test_a_comment_suppresses_its_own_site_only(place: str) -> None:
    lines = modeling_source("sdpa").splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith("SUPPORT_TORCH2"))
    comment = "# qwen-surgery: skip[disable-torch2]"
    lines[at] = f"{comment}\n{lines[at]}" if place == "above" else f"{lines[at].rstrip()}  {comment}\n"
    result = codemods.run("".join(lines), "static")
    statuses = {o.codemod: (o.status, o.suppressed) for o in result.outcomes}
    assert statuses["disable-torch2"] == (Status.DECLINED, True)
    assert statuses["early-present"] == (Status.APPLIED, False)
    assert not result.declined and not result.unused_suppressions


def test_an_unused_suppression_is_reported() -> None:
    text = "# qwen-surgery: skip[early-present, no-such-rule]\n" + modeling_source("sdpa")
    result = codemods.run(text, "static")
    assert [(s.line, s.codemod) for s in result.unused_suppressions] == [
        (1, "early-present"),
        (1, "no-such-rule"),
    ]
    assert {o.codemod for o in result.outcomes if o.status is Status.APPLIED} >= {"early-present"}


def test_a_string_is_not_a_suppression() -> None:
    text = modeling_source("sdpa") + '\nTEXT = "# qwen-surgery: skip[early-present]"\n'
    assert not codemods.run(text, "static").unused_suppressions


def test_suppressing_the_sum_keeps_the_mask() -> None:
    """Without the added attention_mask the causal mask must stay, however it came to be missing."""
    result = codemods.run(modeling_source("bias-buffer"), "static", skip=["add-attention-mask"])
    (mask,) = [o for o in result.outcomes if o.codemod == "drop-causal-mask"]
    assert mask.status is Status.DECLINED and not mask.suppressed
