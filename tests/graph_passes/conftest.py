"""Templates of real nets at a small geometry, traced once per run and kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from golden import cycles
from golden.eras import ERAS, make_checkout
from qwen_surgery.checkout import Checkout
from qwen_surgery.exporting.export import trace_templates
from qwen_surgery.exporting.template import Template
from qwen_surgery.nets import Geometry, NetKind
from qwen_surgery.patching.sources import Sources
from qwen_surgery.toolchain import Toolchain

SEQ_LENGTH = 128


def tiny(seq_length: int = SEQ_LENGTH) -> Geometry:
    """The geometry that golden/cycles.json calls tiny."""
    sizes = cycles.GEOMETRIES["tiny"]
    head_dim = sizes.hidden // sizes.heads
    return Geometry(1, sizes.hidden, sizes.heads, head_dim, sizes.vocab, sizes.intermediate, seq_length)


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[NetKind, Template]]:
    """Every kind of net as the exporter traces it, by era."""
    made: dict[str, dict[NetKind, Template]] = {}

    def of(era: str = "sdpa") -> dict[NetKind, Template]:
        if era not in made:
            made[era] = _trace(tmp_path_factory.mktemp(era) / "checkout", era)
        return made[era]

    return of


def _trace(folder: Path, era: str) -> dict[NetKind, Template]:
    g = tiny()
    make_checkout(folder, era, 1, hidden=g.hidden, heads=g.heads, intermediate=g.intermediate, vocab=g.vocab)
    sources = Sources.of(Checkout.open(folder), recipe="static", seq_length=g.seq_length)
    kinds = [kind for kind in NetKind if kind is not NetKind.LM_HEAD_TOPK]
    return trace_templates(sources, g, kinds)


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    return Toolchain.find()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "era" in metafunc.fixturenames:
        metafunc.parametrize("era", list(ERAS))
