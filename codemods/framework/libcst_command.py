"""Each rule as an ordinary LibCST command: ``python -m libcst.tool codemod
codemods.disable_torch2.DisableTorch2Command``.

LibCST's codemod package costs more time to import than a whole patch run, so a rule module makes its
command class only
when somebody asks for it by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from codemods.framework.base import Rule


def lazy_command(rule: Rule) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for a rule's module: they add ``<RuleClass>Command``."""
    name = f"{type(rule).__name__}Command"
    made: dict[str, Any] = {}

    def getter(attribute: str) -> Any:
        if attribute != name:
            raise AttributeError(f"module has no attribute {attribute!r}")
        if name not in made:
            made[name] = _make(rule, name)
        return made[name]

    def names() -> list[str]:
        return [type(rule).__name__, "RULE", name]

    return getter, names


def _make(rule: Rule, name: str) -> Any:
    import libcst as cst
    from libcst.codemod import CodemodCommand, SkipFile

    from codemods.framework.base import Status
    from codemods.framework.runner import run_rules

    def transform_module_impl(self: Any, tree: cst.Module) -> cst.Module:
        result = run_rules(tree.bytes, [rule])
        for outcome in result.outcomes:
            if outcome.status in (Status.DECLINED, Status.FAILED):
                self.warn(f"{outcome.codemod}, line {outcome.line}: {outcome.status.value}: {outcome.reason}")
        if not result.changed:
            raise SkipFile("; ".join(o.reason for o in result.outcomes))
        return cst.parse_module(result.code, config=cst.PartialParserConfig(encoding=tree.encoding))

    body = {
        "DESCRIPTION": rule.title,
        "__doc__": rule.__doc__,
        "__module__": type(rule).__module__,
        "transform_module_impl": transform_module_impl,
    }
    return type(name, (CodemodCommand,), body)
