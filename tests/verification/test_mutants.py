"""Every injected error is caught where it is made, and no clean run is flagged."""

from __future__ import annotations

from pathlib import Path

import pytest

from golden.eras import ERAS
from qwen_surgery.verification.engines import OrtEngine, TorchEngine
from tests.verification.conftest import Bench, make_bench
from tests.verification.mutants import MUTANTS, Mutant, Tampered

# Structural errors, far beyond what any quantisation does: the loosest tolerance must see them too.
GROSS = (
    "dropped mask",
    "rotary the other way",
    "dropped residual",
    "query and key exchanged",
    "another layer's weights",
    "NaN in one value",
    "constant output",
    "wrong shape",
    "missing net",
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_caught(mutant: Mutant, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verify that passes with this error in would ship a model that talks garbage, or slightly worse."""
    engine = mutant.make(bench, monkeypatch)
    missed = [check for check in bench.judge(engine, mutant.level) if not check.passed]
    caught_by = {"end-to-end" if check.net == "end-to-end" else "net" for check in missed}
    assert mutant.where in caught_by, f"not caught by {mutant.where}: {missed}"


@pytest.mark.parametrize("name", GROSS)
def test_structural_errors_are_caught_under_int4_tolerances(
    name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = next(m for m in MUTANTS if m.name == name)
    engine = mutant.make(bench, monkeypatch)
    checks = bench.judge(engine, "chip", "int4", end_to_end=False)
    assert any(not check.passed for check in checks), f"{name} would pass as an int4 bmodel"


@pytest.mark.parametrize("era", ERAS)
def test_clean_runs_are_not_flagged(era: str, tmp_path: Path) -> None:
    """Source within 1e-5 and onnx within 1e-4 on every era: ragged prefill, decode, end to end."""
    clean = make_bench(tmp_path, era)
    engines = {
        "source": TorchEngine(clean.sources, clean.index, clean.geometry),
        "onnx": OrtEngine(clean.folder),
    }
    for level, engine in engines.items():
        checks = clean.judge(engine, level)
        assert len(checks) > 60, "a run that compares little proves little"
        assert not [check for check in checks if not check.passed], (era, level)


def test_an_error_in_one_layer_is_named(bench: Bench) -> None:
    """The report points at the layer at fault and at no other."""
    wrong = Tampered(OrtEngine(bench.folder), names={"block_1": "block_0"})
    missed = {check.net for check in bench.judge(wrong, "onnx", end_to_end=False) if not check.passed}
    assert missed == {"block_1"}
