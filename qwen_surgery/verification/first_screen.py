"""A verification in words: what was compared with what, the verdict, and the three figures that matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qwen_surgery.verification.results import Check, LevelResult, Report

_UNPATCHED = "the unpatched upstream model in float32"
#: What each level compares, and with what.
COMPARED = {
    "source": ("the patched PyTorch code", _UNPATCHED),
    "onnx": ("the exported nets in onnxruntime", _UNPATCHED),
    "mlir": ("the compiler's reading of the nets", "the exported nets in onnxruntime"),
    "chip": ("the compiled bmodel on the emulated chip", _UNPATCHED),
    "runtime": ("the vendor's demos, followed call by call", "the same bmodel's nets run one by one"),
}
_MOST_FIGURES = 3


@dataclass(frozen=True)
class Figure:
    """One number of the first screen: ``value`` as it is shown, ``meaning`` what it counts."""

    value: str
    meaning: str


@dataclass(frozen=True)
class FirstScreen:
    """What a reader must know before any table."""

    compared: tuple[str, ...]
    verdict: str
    figures: tuple[Figure, ...]


def first_screen(report: Report) -> FirstScreen:
    """The words for *report*. The figures are of the level nearest to the chip that is compared with the
    unpatched model.
    """
    judged = [level for level in report.levels if COMPARED[level.level][1] == _UNPATCHED]
    last = [level for level in judged if level.level == judged[-1].level]
    makers: tuple[Callable[[list[LevelResult]], Figure | None], ...] = (_answers, _tokens, _blocks, _text)
    figures = [figure for make in makers if (figure := make(last))]
    figures = [*figures[: _MOST_FIGURES - 1], _checks(report)] if len(figures) < _MOST_FIGURES else figures
    return FirstScreen(_compared(report), _verdict(report), tuple(figures[:_MOST_FIGURES]))


def _compared(report: Report) -> tuple[str, ...]:
    kinds: dict[str, list[str]] = {}
    for level in report.levels:
        kinds.setdefault(level.level, []).append(f"{level.mode} {level.name}".strip())
    return tuple(
        f"{COMPARED[kind][0]} ({', '.join(dict.fromkeys(runs))}) with {COMPARED[kind][1]}"
        for kind, runs in kinds.items()
    )


def _verdict(report: Report) -> str:
    if not report.levels:
        return "Nothing was compared."
    missed = [level for level in report.levels if not level.passed]
    if not missed:
        return "Everything that was compared agrees within its tolerance."
    first = missed[0]
    where = f"{first.level} {first.mode} {first.name}".strip()
    if not first.checks:
        return f"Level {where} compared nothing."
    nets = ", ".join(list(dict.fromkeys(check.kind for check in first.missed))[:4])
    return f"It does not agree: the first level that misses a tolerance is {where}, at {nets}."


def _values(levels: Iterable[LevelResult], name: str, wanted: Callable[[Check], bool]) -> list[float]:
    found = (c.values[name] for level in levels for c in level.checks if wanted(c) and name in c.values)
    return [value for value in found if math.isfinite(value)]


def _answers(levels: list[LevelResult]) -> Figure | None:
    pairs = [pair for level in levels for pair in level.answers]
    if not pairs:
        return None
    equal = sum(pair.equal for pair in pairs)
    return Figure(f"{equal} of {len(pairs)}", "answers are the unpatched model's, token by token")


def _tokens(levels: list[LevelResult]) -> Figure | None:
    found = _values(levels, "agreement", lambda c: c.phase == "greedy")
    return Figure(f"{min(found):.0%}", "of the greedy tokens are the unpatched model's") if found else None


def _blocks(levels: list[LevelResult]) -> Figure | None:
    found = _values(levels, "cosine", lambda c: c.layer is not None and c.output == "hidden_states")
    return Figure(_cosine(min(found)), "is the lowest cosine of any layer's hidden states") if found else None


def _cosine(value: float) -> str:
    """With one figure more than it has nines, and no fewer than four."""
    _, _, nines = f"{max(1 - value, 1e-12):.0e}".partition("e-")
    return f"{value:.{max(4, int(nines or 0) + 1)}f}"


def _text(levels: list[LevelResult]) -> Figure | None:
    found = _values(levels, "kl", lambda c: "perplexity" in c.values)
    return Figure(f"{max(found):.1e}", "is the mean KL divergence on the text") if found else None


def _checks(report: Report) -> Figure:
    checks = [check for level in report.levels for check in level.checks]
    return Figure(
        f"{sum(check.passed for check in checks)} of {len(checks)}", "checks are within their tolerance"
    )
