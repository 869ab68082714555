"""Every built-in rule's own examples, and that no rule escapes them."""

from __future__ import annotations

import pytest

from codemods.config import get, names, run
from codemods.framework import prose, registry
from codemods.framework.base import Status
from codemods.framework.recipes import Recipe
from tests.codemods.rules import RuleTest, expected


@pytest.mark.parametrize("name", registry.BUILTIN)
class TestBuiltinRules(RuleTest):
    @pytest.fixture(autouse=True)
    def _rule(self, name: str) -> None:
        type(self).rule = registry.get(name)


@pytest.mark.parametrize("name", names())
def test_config_examples(name: str) -> None:
    """A config edit's examples end as they say at an export length of 512, and once is enough."""
    edit = get(name)
    assert edit.examples
    for example in edit.examples:
        recipe = Recipe("one", (), (name,))
        result = run(example.before, recipe, 512)
        assert result.text.decode() == expected(example), example.name
        assert example.status in {o.status for o in result.outcomes}, example.name
        assert run(result.text, recipe, 512).text == result.text, example.name
        if example.status is Status.APPLIED:
            assert result.changed


def test_names_say_the_file() -> None:
    """A codemod is found by its file and reported by its name: the two must agree."""
    for name in registry.BUILTIN:
        assert registry.get(name).name == name
    for name in names():
        assert get(name).name == name


@pytest.mark.parametrize("name", [*registry.BUILTIN, *names()])
def test_every_codemod_says_what_why_and_when_it_declines(name: str) -> None:
    """The docstring is what ``explain`` and the pages print: a section left out is a hole in both."""
    codemod = registry.get(name) if name in registry.BUILTIN else get(name)
    said = codemod.prose
    assert said.title and said.why.endswith(".")
    if name in registry.BUILTIN:
        assert said.precondition.endswith(".") and said.postcondition.endswith(".")
    declining = any(example.status is Status.DECLINED for example in codemod.examples)
    assert bool(said.declines) == declining


def test_a_section_with_an_unknown_heading_is_an_error() -> None:
    class Odd:
        """Do something.

        Whence
            Nowhere.
        """

        name = "odd"

    with pytest.raises(ValueError, match=r"Odd: 'Whence' is none of the sections Why,"):
        prose.read(Odd)
