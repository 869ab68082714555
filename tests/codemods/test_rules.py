"""Every built-in rule's own examples, and that no rule escapes them."""

from __future__ import annotations

import pytest

from codemods.config import BUILTIN as CONFIG_EDITS
from codemods.config import get, run
from codemods.framework import registry
from codemods.framework.base import Status
from codemods.framework.recipes import Recipe
from tests.codemods.rules import RuleTest, expected


@pytest.mark.parametrize("name", registry.BUILTIN)
class TestBuiltinRules(RuleTest):
    @pytest.fixture(autouse=True)
    def _rule(self, name: str) -> None:
        type(self).rule = registry.get(name)


@pytest.mark.parametrize("name", CONFIG_EDITS)
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


def test_names_are_unique_and_say_the_file() -> None:
    """``explain`` and the docs find a rule by name: the name, the key and the module must agree."""
    for name, module in registry.BUILTIN.items():
        assert registry.get(name).name == name
        assert module == "codemods." + name.replace("-", "_")
    for name, module in CONFIG_EDITS.items():
        assert get(name).name == name
        assert module.rsplit(".", 1)[-1] == name.replace("-", "_")
