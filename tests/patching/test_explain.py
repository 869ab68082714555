"""``explain``: everything there is to know about a codemod, from the rule's own file."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from codemods.framework import recipes
from qwen_surgery.patching import explaining
from tests.patching.conftest import Result

Cli = Callable[..., Result]


def test_the_list_names_every_codemod_and_config_edit(cli: Cli) -> None:
    names = [line.split()[0] for line in cli("explain").out.splitlines()]
    for recipe in recipes.names():
        chosen = recipes.load(recipe)
        assert {*chosen.codemods, *chosen.config} <= set(names)


@pytest.mark.parametrize("name", explaining.everything())
def test_a_page_says_what_why_when_it_declines_and_shows_examples(name: str, cli: Cli) -> None:
    text = " ".join(cli("explain", name).out.split())
    page = json.loads(cli("explain", name, "--json").out)
    assert page["name"] == name
    for part in (page["title"], page["why"], *page["declines"]):
        assert " ".join(part.split()) in text
    applied = [e for e in page["examples"] if e["status"] == "applied"]
    assert applied or page["declines"], "a reader sees what it does, or why it only ever declines"
    for example in applied:
        assert example["before"] != example["after"]
        assert " ".join(example["after"].split()) in text


def test_config_outcomes_can_be_looked_up_by_their_own_name(cli: Cli) -> None:
    assert cli("explain", "config:use_logn_attn").out == cli("explain", "logn-attention").out


def test_unknown_codemod_is_a_usage_error(cli: Cli) -> None:
    result = cli("explain", "nonsense")
    assert result.code == 2
    assert "early-present" in result.err, "the names there are"
