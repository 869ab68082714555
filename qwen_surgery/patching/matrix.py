"""A survey's rows as a matrix revision x codemod: for people, as Markdown, as JSON, into the catalogue."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codemods.framework.base import Outcome, Status
from golden import revisions
from qwen_surgery import console, files
from qwen_surgery.errors import ToolFailed
from qwen_surgery.patching.edits import blocks
from qwen_surgery.patching.plan import by_codemod
from qwen_surgery.patching.receipt import outcome_json
from qwen_surgery.patching.report import STYLES
from qwen_surgery.patching.survey import SurveyRow

if TYPE_CHECKING:
    from rich.table import Table

#: What stands for a status in a matrix that would not fit otherwise.
_MARKS = {
    Status.APPLIED: "+",
    Status.ALREADY: "=",
    Status.ABSENT: ".",
    Status.DECLINED: "!",
    Status.FAILED: "X",
}
# The worst first: what a cell shows, and what colours it, when a codemod has several sites.
_WORST = (Status.FAILED, Status.DECLINED, Status.APPLIED, Status.ALREADY, Status.ABSENT)


def outcomes(row: SurveyRow, recipe: str) -> tuple[Outcome, ...]:
    """The sites of one row; none for a missing content."""
    return row.verdict.outcomes[recipe] if row.verdict else ()


def columns(rows: Iterable[SurveyRow], recipe: str) -> list[str]:
    """Every codemod that has an outcome, in the recipe's order; all config edits share ``config``."""
    found: dict[str, None] = {}
    for row in rows:
        for outcome in outcomes(row, recipe):
            found.setdefault(_column(outcome))
    return sorted(found, key=lambda name: name == _CONFIG)


_CONFIG = "config"


def _column(outcome: Outcome) -> str:
    return _CONFIG if outcome.codemod.startswith("config:") else outcome.codemod


def cell(row: SurveyRow, recipe: str, column: str) -> tuple[str, Status | None]:
    """A cell's text, e.g. ``applied x2`` or ``declined, applied``, and its worst status."""
    found = Counter(o.status for o in outcomes(row, recipe) if _column(o) == column)
    parts = [f"{s.value} x{found[s]}" if found[s] > 1 else s.value for s in _WORST if found[s]]
    worst = next((s for s in _WORST if found[s]), None)
    return ", ".join(parts) or "-", worst


def label(row: SurveyRow) -> str:
    """What a row is called: short commit and path, or the path alone."""
    return f"{row.item.revision[:7]} {row.item.path}".strip()


def _head(row: SurveyRow) -> tuple[str, str, str]:
    era = "missing in this clone" if row.verdict is None else row.verdict.era or "?"
    return label(row), row.item.date[:10], era


def show(rows: Sequence[SurveyRow], recipe: str) -> None:
    """Print the matrix and, below it, why anything was declined or failed."""
    tty = sys.stdout.isatty()
    names = columns(rows, recipe)
    printer = console.on(sys.stdout, width=None if tty else 10_000)  # a pipe has no width: never fold there
    headings = [name.replace("-", "-\n") if tty else name for name in names]
    table, legend = _table(rows, recipe, names, headings, {}), []
    if not console.fits(printer, table):
        numbers = [str(number) for number in range(1, len(names) + 1)]
        table = _table(rows, recipe, names, numbers, _MARKS)
        legend = [", ".join(f"{number} {name}" for number, name in zip(numbers, names, strict=True))]
        marks = ", ".join(f"{mark} {status.value}" for status, mark in _MARKS.items())
        legend += [f"{marks}; a number behind a mark: at so many sites"]
    printer.print(table)
    for line in (*legend, *_reasons(rows, recipe), summary(rows, recipe)):
        printer.print(line, soft_wrap=not legend)


def _table(
    rows: Iterable[SurveyRow],
    recipe: str,
    names: Sequence[str],
    headings: Sequence[str],
    marks: dict[Status, str],
) -> Table:
    """The matrix for a console; *marks* stand for statuses where words would not fit."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("revision", "date", "era", *headings):
        table.add_column(heading, overflow="fold")
    for row in rows:
        cells = [cell(row, recipe, name) for name in names]
        texts = [_shortened(text, marks) for text, _ in cells]
        styles = [STYLES[status] if status else "dim" for _, status in cells]
        table.add_row(*_head(row), *map(Text, texts, styles))
    return table


def _shortened(text: str, marks: dict[Status, str]) -> str:
    for status, mark in marks.items():
        text = text.replace(status.value, mark)
    return text.replace(" x", "").replace(", ", "") if marks else text


def to_markdown(rows: Sequence[SurveyRow], recipe: str) -> str:
    """The matrix as a Markdown table, with the reasons of what was declined or failed below it."""
    names = columns(rows, recipe)
    lines = ["| " + " | ".join(("revision", "date", "era", *names)) + " |", "|---" * (3 + len(names)) + "|"]
    for row in rows:
        texts = (*_head(row), *(cell(row, recipe, name)[0] for name in names))
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |")
    reasons = [f"- {line}" for line in _reasons(rows, recipe)]
    return "\n".join([*lines, "", *reasons, *([""] if reasons else []), summary(rows, recipe)])


def to_page(rows: Sequence[SurveyRow], recipe: str, path: Path, since: str | None) -> str:
    """The matrix as a part of a page, under a heading that says what was looked at."""
    looked_at = console.printable(str(path)) + (f" since {console.printable(since)}" if since else "")
    found = to_markdown(rows, recipe) if rows else "No revision of Qwen modeling code."
    return f"## Survey of {looked_at}, recipe {recipe}\n\n{found}\n\n"


def _reasons(rows: Sequence[SurveyRow], recipe: str) -> list[str]:
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for o in outcomes(row, recipe):
            if o.status in (Status.DECLINED, Status.FAILED):
                where = label(row) + (f":{o.line}" if o.line else "")
                grouped.setdefault((o.codemod, o.status.value, o.reason), []).append(where)
    return [
        f"{codemod} {status}: {reason} ({places[0]}{f' and {len(places) - 1} more' if places[1:] else ''})"
        for (codemod, status, reason), places in grouped.items()
    ]


def summary(rows: Sequence[SurveyRow], recipe: str) -> str:
    """One line: how many revisions, how many are known, how many can be patched."""
    catalogue = _catalogue()
    present = [row.verdict for row in rows if row.verdict]
    known = sum(verdict.sha256 in catalogue for verdict in present)
    fine = sum(not any(blocks(o) for o in verdict.outcomes[recipe]) for verdict in present)
    missing = len(rows) - len(present)
    tail = f"; {missing} missing in this clone" if missing else ""
    return f"{len(rows)} revisions ({known} in the catalogue); {fine} can be patched with {recipe}{tail}"


def _catalogue() -> dict[str, revisions.Revision]:
    try:
        return revisions.load()
    except ValueError as error:
        raise ToolFailed(str(error)) from None


def to_json(rows: Sequence[SurveyRow], recipe: str, seq_length: int) -> dict[str, Any]:
    """Everything a survey found, as plain JSON values."""
    catalogue = _catalogue()
    return {
        "recipe": recipe,
        "seq_length": seq_length,
        "codemods": columns(rows, recipe),
        "revisions": [_row_json(row, recipe, catalogue) for row in rows],
    }


def _row_json(row: SurveyRow, recipe: str, catalogue: dict[str, revisions.Revision]) -> dict[str, Any]:
    verdict = row.verdict
    return {
        "revision": row.item.revision or None,
        "date": row.item.date,
        "path": row.item.path,
        "missing": row.missing,
        "sha256": verdict.sha256 if verdict else None,
        "era": verdict.era if verdict else None,
        "known": bool(verdict and verdict.sha256 in catalogue),
        "patchable": bool(verdict) and not any(blocks(o) for o in outcomes(row, recipe)),
        "outcomes": [outcome_json(o) for o in outcomes(row, recipe)],
    }


def having(
    rows: Iterable[SurveyRow], recipe: str, statuses: Sequence[str]
) -> list[tuple[SurveyRow, Outcome]]:
    """The sites with one of *statuses*; what the user asked to skip does not count as declined."""
    return [
        (row, o)
        for row in rows
        for o in outcomes(row, recipe)
        if o.status.value in statuses and not o.suppressed
    ]


def record(rows: Iterable[SurveyRow], origin: str) -> str:
    """Add *rows* to the catalogue in use, with today's outcomes as the expected ones; says what it did."""
    path = revisions.path()
    new = [
        revisions.Revision(
            sha256=row.verdict.sha256,
            origin=origin,
            revision=row.item.revision,
            path=row.item.path,
            date=row.item.date if row.item.revision else "",
            era=row.verdict.era,
            expected={r: by_codemod(_source_only(found)) for r, found in row.verdict.outcomes.items()},
        )
        for row in rows
        if row.verdict and row.verdict.era
    ]
    catalogue, added = revisions.merge(_catalogue(), new)
    if not os.access(path.parent, os.W_OK):
        raise ToolFailed(f"cannot write {path}", hint=f"set {revisions.VARIABLE} to a catalogue of your own")
    files.write_whole(path, revisions.dump(catalogue))
    return f"{path}: {added} revisions added, {len(new) - added} refreshed"


def _source_only(found: Iterable[Outcome]) -> list[Outcome]:
    return [o for o in found if not o.codemod.startswith("config:")]
