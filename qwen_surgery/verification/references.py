"""Computes the reference tensors that ``golden/references.jsonl`` records, from seeds alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from golden import record
from golden.eras import make_checkout
from qwen_surgery.verification.runtime import Runtime
from qwen_surgery.verification.session import versions

if TYPE_CHECKING:
    from qwen_surgery.nets import Geometry
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.verification.cases import NetCase
    from qwen_surgery.verification.reference import ReferenceModel
    from qwen_surgery.weights import WeightIndex

_LIBRARY = {"torch": ("torch", "numpy"), "onnxruntime": ("onnxruntime", "numpy"), "tpu-mlir": ()}
_SEQ_LENGTH = 32
_STEPS = 4


@dataclass(frozen=True)
class Verdict:
    """How one tensor compares with its record: ``same``, ``drift``, ``changed`` or ``new``."""

    era: str
    stage: str
    tensor: str
    status: str
    versions: str  #: what the two were computed with, where that differs


def compute(era: str, stage: str, toolchain: str | None = None) -> record.Stage:
    """Run *era*'s tiny checkout (seed 0, two layers) through *stage*: a prefill of 5 tokens, 4 decode steps.

    The era's own-written code runs; no trust is needed. ``tpu-mlir`` runs one layer's nets on the prompt's
    states in the Top dialect's interpreter. Raises ToolFailed when that stage has no toolchain.
    """
    with TemporaryDirectory(prefix="qwen-surgery-golden-") as scratch:
        checkout = make_checkout(Path(scratch) / "checkout", era=era)
        digest = hashlib.sha256()
        for shard in sorted(checkout.glob("*.safetensors")):
            digest.update(shard.read_bytes())
        run = {"torch": _torch, "onnxruntime": _onnxruntime, "tpu-mlir": _tpu_mlir}[stage]
        tensors, extra = run(checkout, Path(scratch), toolchain)
        known = versions()
        used = {name: known[name] for name in _LIBRARY[stage]} | extra
        summaries = {name: record.summarise(array) for name, array in tensors.items()}
    return record.Stage(used, digest.hexdigest(), summaries)


_Tensors = tuple[dict[str, np.ndarray], dict[str, str]]


def _open(checkout: Path) -> tuple[Sources, WeightIndex, Geometry, ReferenceModel]:
    from qwen_surgery.checkout import Checkout
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.verification.reference import ReferenceModel
    from qwen_surgery.weights import WeightIndex

    opened = Checkout.open(checkout)
    sources = Sources.of(opened, seq_length=_SEQ_LENGTH)
    index = WeightIndex.open(checkout)
    reference = ReferenceModel(sources.reference, index, modeling=sources.modeling)
    return sources, index, opened.geometry(_SEQ_LENGTH), reference


def _prompt(geometry: Geometry) -> list[int]:
    return [int(t) for t in np.random.default_rng(0).integers(0, geometry.vocab, 5)]


def _torch(checkout: Path, _scratch: Path, _toolchain: str | None) -> _Tensors:
    _, _, geometry, reference = _open(checkout)
    found: dict[str, np.ndarray] = {}
    one = reference.prefill(_prompt(geometry))
    for step in range(_STEPS + 1):
        assert one.logits is not None
        found[f"logits.{step}"] = one.logits
        for i, states in one.block_outputs.items():
            found[f"hidden.{i}.{step}"] = states
            found[f"key.{i}.{step}"] = one.keys[i]
            found[f"value.{i}.{step}"] = one.values[i]
        if step < _STEPS:
            one = reference.decode(int(np.argmax(one.logits)))
    return found, {}


def _onnxruntime(checkout: Path, scratch: Path, _toolchain: str | None) -> _Tensors:
    from qwen_surgery.verification.engines import OrtEngine

    sources, index, geometry, reference = _open(checkout)
    _export(sources, index, geometry, scratch / "nets")
    run = Runtime(OrtEngine(scratch / "nets"), geometry)
    one, logits = reference.prefill(_prompt(geometry)), run.prefill(_prompt(geometry))
    found = {"logits.0": logits}
    for step in range(1, _STEPS + 1):
        assert one.logits is not None
        token = int(np.argmax(one.logits))
        one, found[f"logits.{step}"] = reference.decode(token), run.decode(token)
    return found, {}


def _tpu_mlir(checkout: Path, scratch: Path, toolchain: str | None) -> _Tensors:
    from qwen_surgery.toolchain import Toolchain
    from qwen_surgery.verification.cases import CaseMaker, Selection
    from qwen_surgery.verification.engines import OrtEngine
    from qwen_surgery.verification.mlir import MlirEngine

    chain = Toolchain.find(toolchain)
    sources, index, geometry, reference = _open(checkout)
    _export(sources, index, geometry, scratch / "nets")
    selection = Selection((5,), layers=(0,), names=("block", "block_cache"))
    cases: Iterator[NetCase] = CaseMaker(reference, geometry, selection).cases()
    found: dict[str, np.ndarray] = {}
    with MlirEngine(OrtEngine(scratch / "nets"), chain, geometry) as engine:
        for case in cases:
            for i, array in enumerate(engine.run(case.net, case.inputs)):
                found[f"{case.net}.{i}"] = array
    return found, {"tpu-mlir": chain.version}


def _export(sources: Sources, index: WeightIndex, geometry: Geometry, folder: Path) -> None:
    from qwen_surgery.exporting.export import export

    export(sources, index, geometry, folder, trust_remote_code=True)


def judge(era: str, stage: str, recorded: record.Stage | None, found: record.Stage) -> list[Verdict]:
    """Compare what was computed with what was recorded, tensor by tensor.

    A tensor that is recorded and no longer computed has changed. When the weights differ, every tensor has.
    """
    if recorded is None:
        return [Verdict(era, stage, name, "new", "") for name in found.tensors]
    changed = sorted(recorded.versions.items() ^ found.versions.items())
    moves = [
        f"{name} {recorded.versions.get(name, '-')} to {found.versions.get(name, '-')}"
        for name in dict.fromkeys(name for name, _ in changed)
    ]
    verdicts = []
    for name in dict.fromkeys([*recorded.tensors, *found.tensors]):
        if name not in found.tensors or found.weights != recorded.weights:
            status = "changed"
        elif name not in recorded.tensors:
            status = "new"
        else:
            status = record.compare(recorded.tensors[name], found.tensors[name])
        verdicts.append(Verdict(era, stage, name, status, ", ".join(moves)))
    return verdicts


def run_all(
    eras: Sequence[str],
    stages: Sequence[str],
    toolchain: str | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, dict[str, record.Stage]]:
    """Compute every stage of every era."""
    result: dict[str, dict[str, record.Stage]] = {}
    for era in eras:
        for stage in stages:
            progress(f"{era} {stage}")
            result.setdefault(era, {})[stage] = compute(era, stage, toolchain)
    return result
