"""Predicted chip cycles per net, as recorded in ``cycles.json``: what a later change is measured against.

Numbers come from TPU-MLIR's own model of the chip, so they do not depend on the machine that compiled; they
do depend on TPU-MLIR's version, which is recorded with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("cycles.json")
#: A net may become this much slower before a test fails.
ALLOWANCE = 0.01


@dataclass(frozen=True)
class Sizes:
    """A geometry by its name: hidden size, heads, config.json's intermediate size, vocabulary."""

    hidden: int
    heads: int
    intermediate: int
    vocab: int


#: ``tiny`` is small enough for every test run and large enough that every pass applies.
GEOMETRIES = {
    "tiny": Sizes(256, 2, 1408, 768),
    "1.8B": Sizes(2048, 16, 11008, 151936),
    "7B": Sizes(4096, 32, 22016, 151936),
    "14B": Sizes(5120, 40, 27392, 152064),
    "72B": Sizes(8192, 64, 49152, 152064),
}


@dataclass(frozen=True)
class Record:
    """The prediction for one net: *kind* of net at *geometry* and *seq_length*, quantised as *mode*."""

    geometry: str
    kind: str
    seq_length: int
    mode: str
    toolchain: str
    cycles: int
    milliseconds: float
    nodes: int
    top_ops: int
    bmodel_bytes: int

    @property
    def key(self) -> tuple[str, str, int, str, str]:
        return self.geometry, self.kind, self.seq_length, self.mode, self.toolchain


def load(path: Path = FILE) -> dict[tuple[str, str, int, str, str], Record]:
    """The recorded predictions by (geometry, kind, seq_length, mode, toolchain version)."""
    data = json.loads(path.read_text(encoding="utf-8"))
    records = [Record(**entry) for entry in data["nets"]]
    return {record.key: record for record in records}


def save(records: Iterable[Record], path: Path = FILE) -> None:
    """Put *records* into the file, replacing those of the same key and keeping the others."""
    known = load(path) if path.exists() else {}
    known |= {record.key: record for record in records}
    entries = [vars(known[key]) for key in sorted(known)]
    path.write_text(json.dumps({"nets": entries}, indent=1) + "\n", encoding="utf-8")


def worse(recorded: Record, cycles: int, allowance: float = ALLOWANCE) -> str:
    """Empty when *cycles* is at most *allowance* above the record, else one line that says by how much."""
    limit = recorded.cycles * (1 + allowance)
    if cycles <= limit:
        return ""
    return (
        f"{recorded.kind} ({recorded.geometry}, S={recorded.seq_length}, {recorded.mode}): {cycles:,} "
        f"cycles, "
        f"recorded {recorded.cycles:,}: {cycles / recorded.cycles - 1:.1%} slower"
    )
