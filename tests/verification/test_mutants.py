"""Every injected error is caught where it is made, and no clean run is flagged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from golden.eras import ERAS
from qwen_surgery import nets
from qwen_surgery.exporting.modules import SampleHead
from qwen_surgery.verification.engines import OrtEngine, TorchEngine
from qwen_surgery.verification.levels import END_TO_END, check_nets
from qwen_surgery.verification.results import Check
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


def flagged(checks: list[Check]) -> set[str]:
    """Names of nets, or ``end-to-end``, that missed."""
    return {check.net for check in checks if not check.passed}


def at_fault(mutant: Mutant, bench: Bench) -> set[str]:
    """Names of all nets of the kinds that the error is in."""
    contract = nets.nets(bench.geometry.layers)
    return {net.name for net in contract if net.name in mutant.nets or net.kind.value in mutant.nets}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_caught(mutant: Mutant, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verify that passes with this error in would ship a model that talks garbage, or slightly worse.

    What is flagged is what is wrong: the nets at fault and no other; where it is none, the conversation.
    """
    engine = mutant.make(bench, monkeypatch)
    found = flagged(bench.judge(engine, mutant.level))
    assert found - {END_TO_END} == at_fault(mutant, bench)
    assert mutant.nets or END_TO_END in found


@pytest.mark.parametrize("name", GROSS)
def test_structural_errors_are_caught_under_int4_tolerances(
    name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = next(m for m in MUTANTS if m.name == name)
    checks = bench.judge(mutant.make(bench, monkeypatch), "chip", "int4", end_to_end=not mutant.nets)
    assert flagged(checks), f"{name} would pass as an int4 bmodel"


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


class Sampler:
    """The generic demos' sampling head alone, in torch; *deaf* to one of its settings."""

    nets = ("sample_head",)

    def __init__(self, deaf: int | None, value: float) -> None:
        self._deaf, self._value = deaf, value

    def run(self, net: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        given = [torch.from_numpy(np.ascontiguousarray(array)) for array in inputs]
        if self._deaf is not None:
            given[self._deaf] = torch.full_like(given[self._deaf], self._value)
        return [output.numpy() for output in SampleHead()(*given)]


@pytest.mark.parametrize(
    ("deaf", "value"),
    [(None, 0), (2, 1), (3, 1), (4, 50), (5, 1)],
    ids=["sound", "penalty", "temperature", "top_k", "top_p"],
)
def test_a_generic_sampling_head_that_ignores_a_setting_is_caught(
    bench: Bench, deaf: int | None, value: float
) -> None:
    limits = bench.limits("onnx")
    checks = check_nets(Sampler(deaf, value), bench.cases, bench.geometry, limits, ["sample_head"])
    assert flagged(checks) == (set() if deaf is None else {"sample_head"})
    assert {check.label.split()[0] for check in checks} == {"prefill", "decode"}
