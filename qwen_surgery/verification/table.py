"""The rich table of a verification."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qwen_surgery.verification.results import Check, LevelResult, Report

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("max_abs", "cosine", "kl", "agreement")
HEADINGS = {
    "max_abs": "max abs",
    "cosine": "1-cosine",
    "kl": "KL",
    "perplexity": "perplexity",
    "agreement": "tokens",
}
_AT_LEAST = ("cosine", "agreement")


def number(name: str, value: float | None) -> str:
    """A metric as people read it: errors in powers of ten, a cosine as its distance from 1."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "-"
    if name == "agreement":
        return f"{value:.0%}"
    if name == "cosine":
        return f"{max(0.0, 1 - value):.1e}"
    return f"{value:.1e}"


def rows_of(level: LevelResult, *, every_net: bool = False) -> dict[tuple[str, str], list[Check]]:
    """Checks that share a row: one net and run, or one kind of net and phase with all layers and lengths."""
    rows: dict[tuple[str, str], list[Check]] = {}
    for check in level.checks:
        key = (check.net, check.label) if every_net else (check.kind, check.phase)
        rows.setdefault(key, []).append(check)
    return rows


def make_table(report: Report, *, every_net: bool = False) -> Table:
    """One table: a row for each kind of net and phase with its worst numbers over layers, lengths, outputs.

    With *every_net* there is a row for each run of each net. The sampling head's ``max abs`` is the total
    variation between the two distributions."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = f"verify {report.checkout}, S={report.seq_length}, recipe {report.recipe}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("net", no_wrap=True)
    table.add_column("phase", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for name in COLUMNS:
        table.add_column(HEADINGS.get(name, name), justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for level in report.levels:
        table.add_row(Text(f"{level.level} {level.mode} {level.name}", "bold"))
        if not level.checks:
            table.add_row("-", "-", "0", *[""] * len(COLUMNS), Text("nothing was compared", "red"))
        for (net, phase), checks in rows_of(level, every_net=every_net).items():
            worst = worst_of(checks)
            failed = [check for check in checks if not check.passed]
            verdict = Text("ok", "green") if not failed else Text(f"{len(failed)} missed", "red")
            numbers = (number(name, worst.get(name)) for name in COLUMNS)
            table.add_row(net, phase, str(len(checks)), *numbers, verdict)
        table.add_section()
    return table


def worst_of(checks: list[Check]) -> dict[str, float]:
    """The worst number of each column. Distributions put their total variation where arrays have max abs."""
    result: dict[str, float] = {}
    for name in COLUMNS:
        values = [check.values[name] for check in checks if name in check.values]
        if name == "max_abs":
            other = "total_variation"
            values += [check.values[other] for check in checks if other in check.values]
        if values:
            result[name] = min(values) if name in _AT_LEAST else max(values)
    return result


def misses(report: Report, limit: int = 20) -> list[str]:
    """One line for each missed check, at most *limit*, then how many more."""
    lines = [
        f"{level.level} {level.mode} {level.name}: {check.net} {check.label} {check.output}: "
        + "; ".join(check.missed)
        for level in report.levels
        for check in level.missed
    ]
    if len(lines) > limit:
        lines = [*lines[:limit], f"... and {len(lines) - limit} more"]
    return lines


#: What each level puts beside the unpatched model, in a reader's words.
_CANDIDATES = {
    "source": "patched PyTorch",
    "onnx": "onnxruntime",
    "mlir": "TPU-MLIR",
    "chip": "emulated chip",
    "runtime": "the vendor's runtime",
}


def _candidate(level: LevelResult) -> str:
    detail = f"{level.mode} {level.name}" if level.level in ("onnx", "chip") else level.mode
    return f"{_CANDIDATES[level.level]} ({detail})"


def token_lines(report: Report) -> list[str]:
    """The greedy tokens of every level, one under the other, the unpatched model's first."""
    rows: list[tuple[str, list[int]]] = []
    for level in report.levels:
        if not level.texts:
            continue
        reference, candidate = (list(level.texts[who]) for who in ("reference", "candidate"))
        if ("unpatched PyTorch", reference) not in rows:
            rows.append(("unpatched PyTorch", reference))
        rows.append((_candidate(level), candidate))
    if not rows:
        return []
    width = max(len(who) for who, _ in rows)
    return ["greedy tokens", *(f"  {who:<{width}}  {' '.join(map(str, tokens))}" for who, tokens in rows)]


def text_lines(report: Report) -> list[str]:
    """How likely each model found the text, the unpatched one first."""
    rows: list[tuple[str, str]] = []
    for level in report.levels:
        for values in (check.values for check in level.checks if "perplexity" in check.values):
            if not rows:
                rows.append(("unpatched PyTorch", f"{values['reference_perplexity']:.4f}"))
            said = f"{values['perplexity']:.4f}, KL {values['kl']:.2g}, best token {values['agreement']:.1%}"
            rows.append((_candidate(level), f"{said} of {values['tokens']:.0f}"))
    width = max((len(who) for who, _ in rows), default=0)
    return ["perplexity of the text", *(f"  {who:<{width}}  {said}" for who, said in rows)] if rows else []


def answer_lines(report: Report) -> list[str]:
    """Each question once, under it what every model said, equal answers of several models on one line."""
    lines: list[str] = []
    questions = [answer.question for level in report.levels[:1] for answer in level.answers]
    for place, question in enumerate(questions):
        said: dict[tuple[tuple[int, ...], str], list[str]] = {}
        for level in report.levels:
            if place >= len(level.answers):
                continue
            answer = level.answers[place]
            said.setdefault((answer.reference, answer.reference_text), []).append("unpatched PyTorch")
            said.setdefault((answer.candidate, answer.candidate_text), []).append(_candidate(level))
        lines.append(f"? {question}")
        for (tokens, text), who in said.items():
            lines.append(f"  {', '.join(dict.fromkeys(who))}")
            lines.append(f"    {text}")
            lines.append(f"    {' '.join(map(str, tokens))}")
    return lines


def said_lines(report: Report) -> list[str]:
    """What stands below the table: greedy tokens, the text's perplexity, answers."""
    return [*token_lines(report), *text_lines(report), *answer_lines(report)]
