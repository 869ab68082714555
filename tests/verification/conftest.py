from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from golden import tolerances
from golden.eras import make_checkout
from qwen_surgery.checkout import Checkout
from qwen_surgery.exporting.export import export
from qwen_surgery.nets import Geometry
from qwen_surgery.patching.sources import Sources
from qwen_surgery.runtime.host import Sampling
from qwen_surgery.verification.cases import CaseMaker, NetCase, Selection
from qwen_surgery.verification.engines import Engine
from qwen_surgery.verification.levels import check_end_to_end, check_nets
from qwen_surgery.verification.reference import ReferenceModel
from qwen_surgery.verification.results import Check
from qwen_surgery.weights import WeightIndex

os.environ.setdefault("OMP_NUM_THREADS", "1")

SEQ_LENGTH = 32
LENGTHS = (1, 6, SEQ_LENGTH - 1, SEQ_LENGTH)


@dataclass
class Bench:
    """A tiny checkout with everything that verification compares, made once."""

    path: Path
    sources: Sources
    index: WeightIndex
    geometry: Geometry
    reference: ReferenceModel
    cases: list[NetCase]
    folder: Path

    def limits(self, level: str, mode: str = "fp32") -> dict[str, tolerances.Limit]:
        return tolerances.load()[level, mode]

    def judge(
        self, engine: Engine, level: str, mode: str = "fp32", *, end_to_end: bool = True
    ) -> list[Check]:
        """Every check of *engine*, net by net and end to end, under a level's limits."""
        limits = self.limits(level, mode)
        wanted = Selection(LENGTHS).net_names(self.geometry)
        checks = check_nets(engine, self.cases, self.geometry, limits, wanted)
        if end_to_end:
            found, _ = check_end_to_end(
                engine, self.reference, self.geometry, limits, [3, 400, 77, 9, 300], 6, Sampling()
            )
            checks += found
        return checks


def make_bench(root: Path, era: str) -> Bench:
    path = make_checkout(root / "checkout", era=era)
    opened = Checkout.open(path)
    sources = Sources.of(opened, seq_length=SEQ_LENGTH)
    index = WeightIndex.open(path)
    geometry = opened.geometry(SEQ_LENGTH)
    reference = ReferenceModel(sources.reference, index)
    cases = list(CaseMaker(reference, geometry, Selection(LENGTHS)).cases())
    export(sources, index, geometry, root / "nets", trust_remote_code=True)
    return Bench(path, sources, index, geometry, reference, cases, root / "nets")


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("bench"), "sdpa")
