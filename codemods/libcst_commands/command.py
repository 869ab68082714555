"""A LibCST command made from a rule."""

from __future__ import annotations

import libcst as cst
from libcst.codemod import CodemodCommand, SkipFile

from codemods.framework.base import Rule, Status
from codemods.framework.runner import run_rules


def command(rule: Rule) -> type[CodemodCommand]:
    """The command ``<RuleClass>Command``: it warns where the rule declines, and skips a file that stays."""

    def transform_module_impl(self: CodemodCommand, tree: cst.Module) -> cst.Module:
        result = run_rules(tree.bytes, [rule])
        for outcome in result.outcomes:
            if outcome.status in (Status.DECLINED, Status.FAILED):
                self.warn(f"{outcome.codemod}, line {outcome.line}: {outcome.status.value}: {outcome.reason}")
        if not result.changed:
            raise SkipFile("; ".join(o.reason for o in result.outcomes))
        return cst.parse_module(result.code, config=cst.PartialParserConfig(encoding=tree.encoding))

    body = {
        "DESCRIPTION": rule.prose.title,
        "__doc__": rule.__doc__,
        "__module__": type(rule).__module__,
        "transform_module_impl": transform_module_impl,
    }
    return type(f"{type(rule).__name__}Command", (CodemodCommand,), body)
