"""The base class every rule's tests derive from: it runs each example in the rule's own file."""

from __future__ import annotations

import ast
from typing import ClassVar

import libcst

from codemods.framework.base import Example, Outcome, Rule, Status
from codemods.framework.runner import SourceResult, run_rules


class RuleTest:
    """Set ``rule``; every example of it is checked for status, text, second run and layout."""

    rule: ClassVar[Rule]

    def run(self, text: str) -> SourceResult:
        return run_rules(text.encode(), [self.rule])

    def test_examples_show_every_answer(self) -> None:
        """A rule documents what it edits, what it leaves, and what it declines, or its page is incomplete."""
        shown = {example.status for example in self.rule.examples}
        wanted = {Status.ALREADY, Status.ABSENT, Status.DECLINED}
        assert wanted <= shown
        assert (Status.APPLIED in shown) == self.rule.edits

    def test_examples_end_as_they_say(self) -> None:
        for example in self.rule.examples:
            result = self.run(example.before)
            assert self.decisive(result.outcomes) == example.status, (example.name, result.outcomes)
            assert result.code.decode() == expected(example), example.name
            assert result.changed == (example.after is not None), example.name

    def test_second_run_changes_nothing(self) -> None:
        for example in self.rule.examples:
            once = self.run(example.before)
            twice = self.run(once.code.decode())
            assert twice.code == once.code, example.name
            if example.status is Status.APPLIED:
                assert self.decisive(twice.outcomes) is Status.ALREADY, example.name

    def test_outcomes_give_reason_and_line(self) -> None:
        """Nothing is reported without saying why, and every site says where."""
        for example in self.rule.examples:
            for outcome in self.run(example.before).outcomes:
                assert outcome.codemod == self.rule.name and outcome.reason
                assert (outcome.line is None) == (outcome.status is Status.ABSENT), example.name

    def test_examples_print_as_they_are_written(self) -> None:
        for example in self.rule.examples:
            for text in filter(None, (example.before, example.after)):
                ast.parse(text)
                assert libcst.parse_module(text).code == text, example.name

    @staticmethod
    def decisive(outcomes: tuple[Outcome, ...]) -> Status:
        """The one status an example is about: the most that happened at any of its sites."""
        order = [Status.FAILED, Status.DECLINED, Status.APPLIED, Status.ALREADY, Status.ABSENT]
        return min((o.status for o in outcomes), key=order.index)


def expected(example: Example) -> str:
    return example.before if example.after is None else example.after
