"""golden record and check: the same seeds give the same references; rounding is drift, more is a change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from golden import record
from qwen_surgery.cli import main
from qwen_surgery.verification.references import compute, judge


def check(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["golden", *map(str, args)])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_rounding_is_drift_and_more_is_a_change() -> None:
    array = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    summary = record.summarise(array)
    assert record.compare(summary, record.summarise(array.copy())) == "same"
    assert record.compare(summary, record.summarise(array * np.float32(1 + 1e-6))) == "drift"
    assert record.compare(summary, record.summarise(array * np.float32(1.01))) == "changed"
    assert record.compare(summary, record.summarise(array.T)) == "changed"
    assert record.compare(summary, record.summarise(np.where(array > 2, np.nan, array))) == "changed"


def test_the_shipped_references_hold_on_this_machine() -> None:
    """What the program ships is what it computes, up to rounding: otherwise eras or recorder have changed."""
    recorded = record.load()
    assert set(recorded) == set(record.load(record.FILE)) and recorded
    for stage in ("torch", "onnxruntime"):
        found = compute("sdpa", stage)
        verdicts = judge("sdpa", stage, recorded["sdpa"][stage], found)
        assert verdicts and {v.status for v in verdicts} <= {"same", "drift"}


def test_record_then_check_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "references.jsonl"
    limits = ("--era", "late", "--stage", "torch", "--file", file)
    assert check("check", *limits) == 3, "nothing recorded is not a pass"
    assert check("record", *limits) == 0
    assert check("check", *limits) == 0
    assert "late torch" in capsys.readouterr().out
    stages = record.load(file)
    stage = stages["late"]["torch"]
    assert record.load(file) == stages

    name = next(iter(stage.tensors))
    moved = replace(stage.tensors[name], sha256="0" * 64)
    newer = replace(stage, versions={**stage.versions, "torch": "0"}, tensors={**stage.tensors, name: moved})
    file.write_bytes(record.dump({"late": {"torch": newer}}))
    capsys.readouterr()
    assert check("check", *limits) == 0, "another version's rounding is drift, no failure"
    assert "1 drift" in (said := capsys.readouterr().out) and "torch 0 to" in said

    wrong = replace(moved, mean=moved.mean + 1)
    file.write_bytes(record.dump({"late": {"torch": replace(newer, tensors={**newer.tensors, name: wrong})}}))
    assert check("check", *limits) == 1
