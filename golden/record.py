"""Reference tensors as digests and statistics: small enough for git, and able to tell drift from change.

A tensor is recorded as the SHA-256 of its float32 bytes, a few statistics and a few of its values. Another
version of a library, or another processor, changes last bits and so the digest, but not the statistics: that
is *drift*. When the statistics move too, the reference itself has *changed*.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golden.damaged import reading, require

if TYPE_CHECKING:
    import numpy as np

FILE = Path(__file__).with_name("references.jsonl")
#: Statistics and samples may differ by this much of the tensor's spread and still be drift: float32 rounding
#: through a two-layer model moves values by about 1e-6 of it.
DRIFT = 1e-4
SAMPLES = 8
_NONE = "holds no references"


@dataclass(frozen=True)
class RecordSummary:
    """One tensor. ``samples`` are values at evenly spread places of the flattened array."""

    shape: tuple[int, ...]
    sha256: str
    mean: float
    spread: float
    lowest: float
    highest: float
    samples: tuple[float, ...]


def summarise(array: np.ndarray) -> RecordSummary:
    """The summary of a float array."""
    import numpy as np

    exact = np.ascontiguousarray(array, dtype="<f4")
    flat = exact.astype(np.float64).ravel()
    places = np.linspace(0, flat.size - 1, SAMPLES).astype(int)
    return RecordSummary(
        shape=tuple(exact.shape),
        sha256=hashlib.sha256(exact.tobytes()).hexdigest(),
        mean=_short(flat.mean()),
        spread=_short(flat.std()),
        lowest=_short(flat.min()),
        highest=_short(flat.max()),
        samples=tuple(_short(flat[i]) for i in places),
    )


def compare(recorded: RecordSummary, found: RecordSummary) -> str:
    """``same`` (bit for bit), ``drift`` (rounding only) or ``changed``."""
    if recorded.sha256 == found.sha256 and recorded.shape == found.shape:
        return "same"
    if recorded.shape != found.shape:
        return "changed"
    room = DRIFT * max(recorded.spread, 1e-6)
    pairs = [
        (recorded.mean, found.mean),
        (recorded.spread, found.spread),
        (recorded.lowest, found.lowest),
        (recorded.highest, found.highest),
        *zip(recorded.samples, found.samples, strict=True),
    ]
    # Written so that NaN counts as changed.
    return "drift" if all(abs(a - b) <= room for a, b in pairs) else "changed"


@dataclass(frozen=True)
class Stage:
    """What one stage gave for one era: versions of what computed it, digest of the weights, tensors."""

    versions: dict[str, str]
    weights: str
    tensors: dict[str, RecordSummary]


def load(path: Path = FILE) -> dict[str, dict[str, Stage]]:
    """era -> stage -> what was recorded; empty when *path* does not exist. ValueError when damaged.

    The file has one JSON document a line: a head for each era and stage, then its tensors.
    """
    try:
        with reading(path, _NONE):
            lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    references: dict[str, dict[str, Stage]] = {}
    tensors: dict[str, RecordSummary] = {}
    with reading(path, _NONE):
        for line in lines:
            row = json.loads(line)
            if "era" in row:
                tensors = {}
                require("a stage", dict, row["versions"])
                require("a stage", str, row["weights"], row["era"], row["stage"])
                stage = Stage(row["versions"], row["weights"], tensors)
                references.setdefault(row["era"], {})[row["stage"]] = stage
            else:
                name = row.pop("tensor")
                tensors[name] = _summary(row)
    return references


def _summary(row: dict[str, Any]) -> RecordSummary:
    found = RecordSummary(**{**row, "shape": tuple(row["shape"]), "samples": tuple(row["samples"])})
    require("a tensor", str, found.sha256)
    require("a tensor", int, *found.shape)
    require("a tensor", float, found.mean, found.spread, found.lowest, found.highest, *found.samples)
    if len(found.samples) != SAMPLES:
        raise ValueError(f"{len(found.samples)} samples of a tensor")
    return found


def _short(value: float) -> float:
    """Nine significant digits: what a float32 holds."""
    return float(f"{value:.9g}")


def dump(references: Mapping[str, Mapping[str, Stage]]) -> bytes:
    """The file's text; the inverse of :func:`load`."""
    lines = []
    for era, stages in references.items():
        for name, stage in stages.items():
            head = {"era": era, "stage": name, "versions": stage.versions, "weights": stage.weights}
            lines.append(json.dumps(head))
            lines += [json.dumps({"tensor": key, **asdict(row)}) for key, row in stage.tensors.items()]
    return ("\n".join(lines) + "\n").encode()
