"""How large each error may be, per level and mode, and why. The numbers are in ``tolerances.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golden.damaged import reading, require

_FILE = Path(__file__).with_name("tolerances.json")
#: Metrics of which more is better; of all others less is.
_AT_LEAST = ("cosine", "agreement")
#: Magnitude up to which max_abs limits hold as they are; larger outputs are allowed proportionally more,
#: since the spacing of float32 grows with them (at 16 it is 1e-6).
PLAIN_SCALE = 16.0


@dataclass(frozen=True)
class Limit:
    """One tolerance: *metric* is such as ``net.cosine``; the value must be at least or at most *limit*."""

    metric: str
    limit: float
    reason: str

    @property
    def at_least(self) -> bool:
        return self.metric.rpartition(".")[2] in _AT_LEAST

    def holds(self, value: float, scale: float = 0.0) -> bool:
        """Whether *value* is within the limit; NaN never is. *scale* is the reference's largest magnitude."""
        if self.at_least:
            return value >= self.limit
        return value <= self.allowed(scale)

    def allowed(self, scale: float = 0.0) -> float:
        """The limit for an output of magnitude *scale*."""
        if self.metric.endswith("max_abs"):
            return self.limit * max(1.0, scale / PLAIN_SCALE)
        return self.limit


def load(path: Path = _FILE) -> dict[tuple[str, str], dict[str, Limit]]:
    """(level, mode) -> metric -> Limit. Raises ValueError when the file is damaged."""
    with reading(path, "holds no tolerances"):
        return {
            (level, mode): {metric: _limit(metric, entry) for metric, entry in metrics.items()}
            for level, modes in json.loads(path.read_text(encoding="utf-8")).items()
            for mode, metrics in modes.items()
        }


def _limit(metric: str, entry: dict[str, Any]) -> Limit:
    require(metric, (int, float), entry["limit"])
    require(metric, str, entry["reason"])
    return Limit(metric, float(entry["limit"]), entry["reason"])
