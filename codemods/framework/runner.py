"""Run rules over one source: decide on the tree, edit with LibCST, prove on the result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from codemods.analysis.source import Source, SourceError, Suppression, parse, read
from codemods.framework.base import Decisions, EditError, Outcome, Rule, Site, Status

if TYPE_CHECKING:
    from codemods.analysis.model_parts import ModelSizes


@dataclass(frozen=True)
class SourceResult:
    """What a run did to one file. ``code`` is the input, byte for byte, unless :attr:`changed`."""

    code: bytes
    outcomes: tuple[Outcome, ...]
    unused_suppressions: tuple[Suppression, ...] = ()
    changed: bool = False

    @property
    def failed(self) -> tuple[Outcome, ...]:
        return tuple(o for o in self.outcomes if o.status is Status.FAILED)

    @property
    def declined(self) -> tuple[Outcome, ...]:
        """Declined for want of proof, on a required rule; not those the user asked to skip."""
        return tuple(
            o for o in self.outcomes if o.status is Status.DECLINED and o.required and not o.suppressed
        )


def run_rules(
    data: bytes, rules: Sequence[Rule], skip: Iterable[str] = (), sizes: ModelSizes | None = None
) -> SourceResult:
    """Apply ``rules`` in order to ``data``; raises ``SourceError`` if it does not parse.

    ``sizes`` are those of the real model, where they are known.
    """
    source = read(data)
    skipped, used = set(skip), set()
    decided = Decisions(sizes=sizes)
    for rule in rules:
        sites = []
        for site in rule.sites(source, decided):
            site, suppression = _suppress(source, rule, site, skipped)
            used |= {suppression} if suppression else set()
            sites.append(site)
        decided.sites[rule.name] = sites
    outcomes = tuple(o for rule in rules for o in _outcomes(rule, decided.sites[rule.name]))
    names = {rule.name for rule in rules}
    unused = tuple(
        s for s in source.suppressions if s not in used and (s.codemod in names or not _known(s.codemod))
    )
    edits = [
        e for rule in rules for s in decided.sites[rule.name] if s.status is Status.APPLIED for e in s.edits
    ]
    if not edits:
        return SourceResult(data, outcomes, unused)
    try:
        text = _edited(source, edits)
        _prove(text, rules, decided)
    except EditError as error:
        return SourceResult(data, _instead(outcomes, Status.DECLINED, str(error)), unused)
    except Exception as error:  # whatever goes wrong inside an edit, the user's file stays as it was
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, _Unproven) else str(error)
        return SourceResult(data, _instead(outcomes, Status.FAILED, reason), unused)
    return SourceResult(source.encode(text), outcomes, unused, changed=True)


def _instead(outcomes: Sequence[Outcome], status: Status, reason: str) -> tuple[Outcome, ...]:
    """The outcomes with every applied one turned into ``status``: one failing edit takes all of them back."""
    return tuple(
        replace(o, status=status, reason=reason) if o.status is Status.APPLIED else o for o in outcomes
    )


class _Unproven(Exception):
    """A postcondition that does not hold on the edited source."""


def _known(name: str) -> bool:
    from codemods.framework import registry

    return name in registry.names()


def _suppress(source: Source, rule: Rule, site: Site, skip: set[str]) -> tuple[Site, Suppression | None]:
    """The site as the user's skip list and comments leave it, and the comment that was used."""
    if site.status not in (Status.APPLIED, Status.DECLINED):
        return site, None
    if rule.name in skip:
        return replace(site, status=Status.DECLINED, reason="skipped on request", edits=()), None
    for comment in source.suppressions:
        if comment.codemod == rule.name and site.line is not None:
            first, last = _above(source, site.line), site.end_line or site.line
            if first <= comment.line <= last:
                return replace(
                    site, status=Status.DECLINED, reason="suppressed by comment", edits=()
                ), comment
    return site, None


def _above(source: Source, line: int) -> int:
    """The first of the comment lines right above ``line``, or ``line``."""
    while line > 1 and source.lines[line - 2].lstrip().startswith("#"):
        line -= 1
    return line


SUPPRESSED = ("skipped on request", "suppressed by comment")


def _outcomes(rule: Rule, sites: Sequence[Site]) -> list[Outcome]:
    if not sites:
        return [Outcome(rule.name, Status.ABSENT, rule.absent, required=rule.required)]
    return [
        Outcome(
            rule.name,
            site.status,
            site.reason,
            site.line,
            site.end_line,
            site.where,
            suppressed=site.status is Status.DECLINED and site.reason in SUPPRESSED,
            required=rule.required and site.required,
        )
        for site in sites
    ]


def _edited(source: Source, edits: Sequence[object]) -> str:
    from codemods.framework.edit import apply  # LibCST is imported only when there is something to write

    return apply(source, edits)  # type: ignore[arg-type]


def _prove(text: str, rules: Sequence[Rule], decided: Decisions) -> None:
    """The edited text parses, compiles, and every rule that acted finds its postcondition there."""
    try:
        edited = parse(text)
        compile(text, "<patched>", "exec", dont_inherit=True)
    except (SourceError, SyntaxError, ValueError) as error:
        raise _Unproven(f"the edited file does not compile: {error}") from error
    for rule in rules:
        acted = [site.where for site in decided.sites[rule.name] if site.status is Status.APPLIED]
        if not acted:
            continue
        found = (site for site in rule.sites(edited, Decisions()) if site.where in acted)
        left = [site for site in found if site.status is not Status.ALREADY]
        if left:
            raise _Unproven(
                f"{rule.name}: after the edit, {left[0].where} line {left[0].line}: {left[0].reason}"
            )
