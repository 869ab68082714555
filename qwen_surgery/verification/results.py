"""What a verification found: single checks, levels, the whole."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from golden.tolerances import Limit
from qwen_surgery.verification.metrics import Distance


@dataclass(frozen=True)
class Check:
    """One thing that was compared, with every limit it was held against.

    ``net`` is a net's name or ``end-to-end``; ``label`` says the phase and length; ``values`` are metric ->
    number; ``missed`` are sentences, empty when it passed.
    """

    net: str
    layer: int | None
    label: str
    output: str
    values: dict[str, float]
    missed: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.missed

    @property
    def phase(self) -> str:
        return self.label.split()[0]

    @property
    def kind(self) -> str:
        """The net's name without its layer."""
        return self.net if self.layer is None else self.net.removesuffix(f"_{self.layer}")

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Check:
        values = {key: math.nan if value is None else value for key, value in row["values"].items()}
        fields = {key: value for key, value in row.items() if key != "passed"}
        return cls(**{**fields, "values": values, "missed": tuple(row["missed"])})


@dataclass(frozen=True)
class AnswerPair:
    """One question's answer by two models: their tokens (without the end token) and their text."""

    question: str
    reference: tuple[int, ...]
    candidate: tuple[int, ...]
    reference_text: str
    candidate_text: str

    @property
    def equal(self) -> bool:
        return self.reference == self.candidate

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> AnswerPair:
        reference, candidate = tuple(row["reference"]), tuple(row["candidate"])
        return cls(row["question"], reference, candidate, row["reference_text"], row["candidate_text"])


@dataclass
class LevelResult:
    """All checks of one level. ``name`` tells two runs of a level apart (raw, cleaned)."""

    level: str
    mode: str
    name: str
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0
    texts: dict[str, list[int]] = field(default_factory=dict)  # greedy tokens: reference and candidate
    answers: list[AnswerPair] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Every check passed, and there was at least one."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def missed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


@dataclass
class Report:
    """A whole verification. ``peak_rss`` is that of its largest process, in bytes."""

    checkout: str
    seq_length: int
    recipe: str
    levels: list[LevelResult] = field(default_factory=list)
    peak_rss: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return bool(self.levels) and all(level.passed for level in self.levels)

    def to_json(self) -> dict[str, Any]:
        """A JSON document; infinite numbers become null."""
        return {
            "passed": self.passed,
            "checkout": self.checkout,
            "recipe": self.recipe,
            "seq_length": self.seq_length,
            "peak_rss_bytes": self.peak_rss,
            "versions": self.versions,
            "levels": [
                {
                    "level": level.level,
                    "mode": level.mode,
                    "name": level.name,
                    "passed": level.passed,
                    "seconds": round(level.seconds, 3),
                    "greedy_tokens": level.texts,
                    "answers": [{**asdict(answer), "equal": answer.equal} for answer in level.answers],
                    "checks": [{**_finite(asdict(check)), "passed": check.passed} for check in level.checks],
                }
                for level in self.levels
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """The report that :meth:`to_json` made *data* of; infinite numbers come back as not a number."""
        report = cls(
            data["checkout"],
            data["seq_length"],
            data["recipe"],
            peak_rss=data["peak_rss_bytes"],
            versions=data["versions"],
        )
        for level in data["levels"]:
            checks = [Check.from_json(row) for row in level["checks"]]
            report.levels.append(
                LevelResult(
                    level["level"],
                    level["mode"],
                    level["name"],
                    checks,
                    level["seconds"],
                    level["greedy_tokens"],
                    [AnswerPair.from_json(row) for row in level.get("answers", [])],
                )
            )
        return report


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def judge(
    limits: dict[str, Limit], what: str, values: dict[str, float], scale: float = 0.0
) -> tuple[str, ...]:
    """Sentences for every limit of *what* (``net``, ``logits``, ...) that *values* miss.

    No limit at all for *what* is itself a miss: nothing passes by not being judged.
    """
    judged = [limit for metric, limit in limits.items() if metric.partition(".")[0] == what]
    if not judged:
        return (f"no tolerance is known for {what}",)
    missed = []
    for limit in judged:
        metric = limit.metric.partition(".")[2]
        value = values.get(metric, math.nan)
        if math.isnan(value):
            missed.append(f"{what} {metric} is not a number")
        elif not limit.holds(value, scale):
            word = "below" if limit.at_least else "above"
            missed.append(f"{what} {metric} {value:.6g} is {word} {limit.allowed(scale):.6g}")
    return tuple(missed)


def net_check(
    limits: dict[str, Limit], net: str, layer: int | None, label: str, output: str, found: Distance, what: str
) -> Check:
    """A check of one output of one net. *what* names the limits: ``net``, ``exact`` or ``probabilities``."""
    values = {"max_abs": found.max_abs, "relative": found.relative, "cosine": found.cosine}
    if what == "exact":
        missed: tuple[str, ...] = () if found.max_abs == 0 else (f"tokens differ by {found.max_abs:g}",)
    elif what == "probabilities":
        values["total_variation"] = found.max_abs
        missed = judge(limits, what, values)
    else:
        missed = judge(limits, what, values, found.scale)
    return Check(net, layer, label, output, values, (*found.faults, *missed))
