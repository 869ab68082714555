"""A tiny checkout and its export, made once; tests that damage files get copies of their own."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from golden.eras import make_checkout
from qwen_surgery.checkout import Checkout
from qwen_surgery.exporting.export import export
from qwen_surgery.exporting.manifest import Manifest
from qwen_surgery.nets import Geometry
from qwen_surgery.patching.sources import Sources
from qwen_surgery.weights import WeightIndex

LENGTH = 24  # the export length of every tiny export


@dataclass(frozen=True)
class Tiny:
    """A checkout on disk with what an export takes from it."""

    path: Path
    sources: Sources
    index: WeightIndex
    geometry: Geometry

    @classmethod
    def open(cls, path: Path, length: int = LENGTH, recipe: str = "static") -> Tiny:
        opened = Checkout.open(path)
        return cls(path, Sources.of(opened, recipe, length), WeightIndex.open(path), opened.geometry(length))

    def export(self, folder: Path, **options: Any) -> Manifest:
        return export(self.sources, self.index, self.geometry, folder, trust_remote_code=True, **options)


def small_checkout(path: Path, **options: Any) -> Path:
    """Two layers of 32 wide, whose weights take a fraction of a megabyte."""
    defaults = {"hidden": 32, "heads": 2, "vocab": 512}
    return make_checkout(path, **{**defaults, **options})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.open(small_checkout(tmp_path_factory.mktemp("checkout")))


@pytest.fixture(scope="session")
def exported(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with linked weights. Read-only for tests."""
    folder = tmp_path_factory.mktemp("export") / "onnx"
    tiny.export(folder)
    return folder


@pytest.fixture
def own_checkout(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the tiny checkout that a test may damage."""
    path = tmp_path / "checkout"
    shutil.copytree(tiny.path, path)
    return path
