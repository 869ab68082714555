"""The record of predicted cycles: what counts as worse, and what stays when a net is measured anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from golden import cycles

RECORD = cycles.Record("1.8B", "block", 512, "int4", "1.30.2", 1_000_000, 1.0, 69, 37, 33_000_000)


def test_more_than_one_percent_is_worse_and_named() -> None:
    assert cycles.worse(RECORD, 1_010_000) == "" and cycles.worse(RECORD, 900_000) == ""
    line = cycles.worse(RECORD, 1_010_001)
    assert "block (1.8B, S=512, int4)" in line and "1.0% slower" in line


def test_a_new_measurement_replaces_its_own_record_only(tmp_path: Path) -> None:
    file = tmp_path / "cycles.json"
    cycles.save([RECORD, replace(RECORD, kind="block_cache")], file)
    cycles.save([replace(RECORD, cycles=999_000)], file)
    known = cycles.load(file)
    assert len(known) == 2 and known[RECORD.key].cycles == 999_000


def test_every_net_that_the_readme_compares_is_on_record() -> None:
    """int4, both kinds of layer net, in the sizes that llm_convert was measured in."""
    known = cycles.load()
    lengths = {"1.8B": (512, 2048, 4096, 8192), "7B": (512, 2048, 8192), "14B": (512, 2048, 8192)}
    later = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen3-4B", "Qwen3-8B")
    lengths |= dict.fromkeys(later, (512, 2048, 8192))
    for geometry, some in lengths.items():
        for length in some:
            for kind in ("block", "block_cache"):
                assert (geometry, kind, length, "int4", "1.30.2") in known


def test_no_net_on_record_is_slower_than_llm_converts() -> None:
    """What ``llm_convert.py -q w4bf16 -g 64`` of TPU-MLIR 1.30.2 predicts for layers of the same sizes."""
    known = cycles.load()
    slower = [
        (geometry, kind, length)
        for (geometry, kind, length), theirs in cycles.LLM_CONVERT.items()
        if known[geometry, kind, length, "int4", "1.30.2"].cycles >= theirs
    ]
    assert not slower
