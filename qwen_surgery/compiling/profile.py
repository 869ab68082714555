"""Read what model_deploy predicts for the chip: cycles and time, from ``compiler_profile_0.txt``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PROFILE = "compiler_profile_0.txt"


@dataclass(frozen=True)
class CycleProfile:
    """Predicted cost of one run of a net on one core of the chip, whatever machine compiled it."""

    cycles: int
    milliseconds: float


def profile_of(bmodel: Path) -> Path:
    """Where the prediction for *bmodel* lies beside it; TPU-MLIR 1.6 puts the bmodel's name in front."""
    named = bmodel.with_name(f"{bmodel.name}.{PROFILE}")
    return named if named.exists() else bmodel.with_name(PROFILE)


def read_profile(path: Path) -> CycleProfile | None:
    """The prediction in *path*; None when it is missing or has none, as that of a net of one memory copy."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    cycles = [int(found) for found in re.findall(r"^TCYC : (\d+)", text, re.MULTILINE)]
    times = [float(found) for found in re.findall(r"runtime: ([\d.]+)ms", text)]
    if not cycles or not times:
        return None
    return CycleProfile(sum(cycles), sum(times))
