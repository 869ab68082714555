"""Predicted chip cycles per net, as recorded in ``cycles.json``: what a later change is measured against.

Numbers come from TPU-MLIR's own model of the chip, so they do not depend on the machine that compiled; they
do depend on TPU-MLIR's version, which is recorded with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from golden.damaged import reading, require

FILE = Path(__file__).with_name("cycles.json")
#: A net may become this much slower before a test fails.
ALLOWANCE = 0.01


@dataclass(frozen=True)
class LayerSizes:
    """A geometry by its name: hidden size, heads, config.json's intermediate size, vocabulary.

    ``model_type`` says whose layer it is; ``kv_heads`` and ``head_dim`` are 0 where they follow.
    """

    hidden: int
    heads: int
    intermediate: int
    vocab: int
    model_type: str = "qwen"
    kv_heads: int = 0
    head_dim: int = 0


#: ``tiny`` is small enough for every test run and large enough that every pass applies.
GEOMETRIES = {
    "tiny": LayerSizes(256, 2, 1408, 768),
    "1.8B": LayerSizes(2048, 16, 11008, 151936),
    "7B": LayerSizes(4096, 32, 22016, 151936),
    "14B": LayerSizes(5120, 40, 27392, 152064),
    "72B": LayerSizes(8192, 64, 49152, 152064),
    "Qwen2.5-0.5B": LayerSizes(896, 14, 4864, 151936, "qwen2", 2),
    "Qwen2.5-1.5B": LayerSizes(1536, 12, 8960, 151936, "qwen2", 2),
    "Qwen2.5-7B": LayerSizes(3584, 28, 18944, 152064, "qwen2", 4),
    "Qwen3-4B": LayerSizes(2560, 32, 9728, 151936, "qwen3", 8, 128),
    "Qwen3-8B": LayerSizes(4096, 32, 12288, 151936, "qwen3", 8, 128),
}

#: (geometry, kind, seq_length) -> cycles that TPU-MLIR 1.30.2's own llm_convert predicts for one layer of a
#: random checkpoint of the same sizes (of Qwen2's shape for Qwen v1's), as measured, in thousands for v1's
#: prefill; of the later Qwens' by ``benchmarks/llm_convert.py``:
#: ``llm_convert.py -m DIR -s S -q w4bf16 -g 64 -c bm1684x -o OUT``.
LLM_CONVERT = {
    ("1.8B", "block_cache", 512): 650_762,
    ("1.8B", "block_cache", 2048): 883_776,
    ("1.8B", "block_cache", 4096): 1_194_416,
    ("1.8B", "block_cache", 8192): 1_815_696,
    ("1.8B", "block", 512): 5_490_000,
    ("1.8B", "block", 4096): 56_300_000,
    ("7B", "block_cache", 512): 2_275_780,
    ("7B", "block_cache", 2048): 2_741_740,
    ("7B", "block_cache", 8192): 4_605_404,
    ("7B", "block", 512): 17_710_000,
    ("7B", "block", 2048): 76_410_000,
    ("7B", "block", 8192): 404_190_000,
    ("14B", "block_cache", 512): 3_456_291,
    ("14B", "block_cache", 2048): 4_038_723,
    ("14B", "block_cache", 8192): 6_368_275,
    ("14B", "block", 512): 26_520_000,
    ("14B", "block", 2048): 113_380_000,
    ("14B", "block", 8192): 577_520_000,
    ("Qwen2.5-0.5B", "block_cache", 512): 191_096,
    ("Qwen2.5-0.5B", "block_cache", 2048): 224_880,
    ("Qwen2.5-0.5B", "block_cache", 8192): 347_881,
    ("Qwen2.5-0.5B", "block", 512): 2_370_793,
    ("Qwen2.5-0.5B", "block", 2048): 10_797_956,
    ("Qwen2.5-0.5B", "block", 8192): 76_357_049,
    ("Qwen2.5-1.5B", "block_cache", 512): 521_379,
    ("Qwen2.5-1.5B", "block_cache", 2048): 557_702,
    ("Qwen2.5-1.5B", "block_cache", 8192): 682_538,
    ("Qwen2.5-1.5B", "block", 512): 5_179_291,
    ("Qwen2.5-1.5B", "block", 2048): 22_362_859,
    ("Qwen2.5-1.5B", "block", 8192): 127_748_270,
    ("Qwen2.5-7B", "block_cache", 512): 2_485_923,
    ("Qwen2.5-7B", "block_cache", 2048): 2_558_944,
    ("Qwen2.5-7B", "block_cache", 8192): 2_808_616,
    ("Qwen2.5-7B", "block", 512): 20_697_965,
    ("Qwen2.5-7B", "block", 2048): 87_782_217,
    ("Qwen2.5-7B", "block", 8192): 441_095_187,
    ("Qwen3-4B", "block_cache", 512): 1_114_422,
    ("Qwen3-4B", "block_cache", 2048): 1_257_147,
    ("Qwen3-4B", "block_cache", 8192): 1_756_491,
    ("Qwen3-4B", "block", 512): 10_204_399,
    ("Qwen3-4B", "block", 2048): 46_325_524,
    ("Qwen3-4B", "block", 8192): 288_324_607,
    ("Qwen3-8B", "block_cache", 512): 2_060_727,
    ("Qwen3-8B", "block_cache", 2048): 2_202_007,
    ("Qwen3-8B", "block_cache", 8192): 2_701_351,
    ("Qwen3-8B", "block", 512): 17_007_622,
    ("Qwen3-8B", "block", 2048): 73_826_337,
    ("Qwen3-8B", "block", 8192): 397_941_477,
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
    """The recorded predictions by (geometry, kind, seq_length, mode, toolchain version).

    Raises ValueError when *path* is damaged.
    """
    with reading(path, "holds no predictions"):
        records = [Record(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["nets"]]
        for record in records:
            require(record.kind, str, record.geometry, record.kind, record.mode, record.toolchain)
            require(record.kind, int, record.seq_length, record.cycles, record.nodes, record.top_ops)
            if not 0 < record.cycles < 1 << 63:
                raise ValueError(f"{record.kind} takes {record.cycles!r:.100} cycles")
            require(record.kind, (int, float), record.milliseconds, record.bmodel_bytes)
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
        f"cycles, recorded {recorded.cycles:,}: {cycles / recorded.cycles - 1:.1%} slower"
    )
