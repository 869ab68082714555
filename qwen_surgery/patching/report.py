"""How outcomes are shown: plain lines in a pipe, a table on a terminal, JSON, SARIF."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from codemods.framework.base import Outcome, Status
from qwen_surgery import __version__, console
from qwen_surgery.patching.edits import blocks
from qwen_surgery.patching.receipt import outcome_json

if TYPE_CHECKING:
    from typing import TextIO

Outcomes = Mapping[str, tuple[Outcome, ...]]

STYLES = {
    Status.APPLIED: "green",
    Status.ALREADY: "cyan",
    Status.ABSENT: "dim",
    Status.DECLINED: "yellow",
    Status.FAILED: "bold red",
}


def place(name: str, outcome: Outcome) -> str:
    """``file:line`` of an outcome, or the file alone where it has no line."""
    return f"{name}:{outcome.line}" if outcome.line else name


def counts(outcomes: Outcomes) -> dict[str, int]:
    """How many sites ended in each status; every status is there."""
    found = Counter(o.status for sites in outcomes.values() for o in sites)
    return {status.value: found[status] for status in Status}


def summary(outcomes: Outcomes) -> str:
    """``5 applied, 1 already``: the statuses that occur."""
    return ", ".join(f"{n} {status}" for status, n in counts(outcomes).items() if n) or "no sites"


def show(outcomes: Outcomes, stream: TextIO | None = None) -> None:
    """Print every site: a table where *stream* (stdout by default) is a terminal, else a line each."""
    stream = stream or sys.stdout
    if stream.isatty():
        _table(outcomes, stream)
        return
    width = max((len(o.codemod) for sites in outcomes.values() for o in sites), default=0)
    for name, sites in outcomes.items():
        for o in sites:
            reason = f"{o.where}: {o.reason}" if o.where not in ("", name) else o.reason
            said = f"{o.status.value:<8}  {o.codemod:<{width}}  {place(name, o)}: {reason}"
            stream.write(console.printable(said).replace("\n", "\\n") + "\n")


def _table(outcomes: Outcomes, stream: TextIO) -> None:
    """In four columns where they fit, else with the place under the codemod."""
    from rich.table import Table
    from rich.text import Text

    wide = Table("outcome", "codemod", "place", "reason", box=None, pad_edge=False, header_style="bold")
    narrow = Table("outcome", "codemod, place", "reason", box=None, pad_edge=False, header_style="bold")
    longest = 0
    for name, sites in outcomes.items():
        for o in sites:
            where = [place(name, o), *([o.where] if o.where not in ("", name) else [])]
            status, reason = Text(o.status.value, STYLES[o.status]), Text(o.reason)
            wide.add_row(status, o.codemod, Text("\n".join(where)), reason)
            lines = [o.codemod, *(f"  {line}" for line in where)]
            narrow.add_row(status, Text("\n".join(lines)), reason)
            longest = max(longest, *map(len, lines))
    printer = console.on(stream)
    narrow.columns[1].width = min(longest, printer.width // 2 + 2)  # names folded cannot be searched for
    table = wide if console.fits(printer, wide) else narrow
    for column in table.columns:
        column.overflow = "fold"
    printer.print(table)


def show_diff(diff: bytes, stream: TextIO | None = None) -> None:
    """Write a diff: its very bytes into a pipe, where it is data for ``git apply``; on a terminal coloured,
    and printable.
    """
    stream = stream or sys.stdout
    if not stream.isatty():
        stream.flush()
        stream.buffer.write(diff)
        stream.flush()
        return
    from rich.text import Text

    styles = {"+": "green", "-": "red", "@": "cyan"}
    printer = console.on(stream)
    for line in diff.decode("utf-8", "replace").splitlines():
        style = "bold" if line.startswith(("+++", "---")) else styles.get(line[:1], "")
        printer.print(Text(console.printable(line), style), soft_wrap=True)


def to_json(outcomes: Outcomes) -> dict[str, list[dict[str, Any]]]:
    """Outcomes per file as plain JSON values."""
    return {name: [outcome_json(o) for o in sites] for name, sites in outcomes.items()}


def to_sarif(outcomes: Outcomes, prefix: str, rules: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Outcomes as a SARIF 2.1.0 log. *prefix* goes before file names; *rules*: codemod -> (title, why)."""
    names = sorted({o.codemod for sites in outcomes.values() for o in sites})
    results = [
        _result(prefix + name, o, names.index(o.codemod)) for name, sites in outcomes.items() for o in sites
    ]
    driver = {
        "name": "qwen-surgery",
        "version": __version__,
        "rules": [_rule(name, rules) for name in names],
    }
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }


def _rule(name: str, rules: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    title, why = rules.get(name, (name, name))
    return {"id": name, "shortDescription": {"text": title}, "fullDescription": {"text": why}}


def _result(uri: str, outcome: Outcome, rule_index: int) -> dict[str, Any]:
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": uri}}}
    if outcome.line:
        region = {"startLine": outcome.line, "endLine": outcome.end_line or outcome.line}
        location["physicalLocation"]["region"] = region
    if outcome.where:
        location["logicalLocations"] = [{"fullyQualifiedName": outcome.where}]
    kind, level = _kind_and_level(outcome)
    return {
        "ruleId": outcome.codemod,
        "ruleIndex": rule_index,
        "kind": kind,
        "level": level,
        "message": {"text": f"{outcome.status.value}: {outcome.reason}"},
        "locations": [location],
    }


def _kind_and_level(outcome: Outcome) -> tuple[str, str]:
    """SARIF allows a level other than none for the kind ``fail`` only; an edit to make is such a finding."""
    if blocks(outcome):
        return "fail", "error"
    return {
        Status.APPLIED: ("fail", "note"),
        Status.DECLINED: ("fail", "warning"),
        Status.FAILED: ("fail", "error"),
        Status.ALREADY: ("pass", "none"),
        Status.ABSENT: ("notApplicable", "none"),
    }[outcome.status]
