"""Export a checkout: plan the bindings, trace each kind of net once, write the folder.

The order of work is the order of cost: everything that can be refused is refused before the checkout's code
runs or a byte is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from codemods.config.facts import ModelFacts
from qwen_surgery.errors import Refused, SurgeryError
from qwen_surgery.exporting.manifest import Manifest
from qwen_surgery.exporting.model_code import ModelCode
from qwen_surgery.exporting.placement import WeightMode
from qwen_surgery.exporting.planning import plan, require_space
from qwen_surgery.exporting.remote_code import require_trust
from qwen_surgery.exporting.template import Template
from qwen_surgery.exporting.writing import Progress, Provenance, no_progress, write_folder
from qwen_surgery.nets import Geometry, NetKind
from qwen_surgery.weights import WeightIndex

if TYPE_CHECKING:
    from qwen_surgery.patching.sources import Sources

Made = TypeVar("Made")
#: What a proof takes, and gives for the manifest; raises Refused where nets and model differ.
Prove = Callable[["Sources", WeightIndex, Geometry], dict[str, Any]]


def export(
    sources: Sources,
    index: WeightIndex,
    geometry: Geometry,
    onnx_path: str | Path,
    *,
    trust_remote_code: bool,
    mode: WeightMode | None = None,
    multi_device: bool = False,
    sampler: NetKind = NetKind.PENALTY_SAMPLE_HEAD,
    wanted: Iterable[str] = (),
    prove: Prove | None = None,
    announce: Callable[[str], None] = lambda text: None,
    progress: Progress = no_progress,
) -> Manifest:
    """Write every net of the contract into *onnx_path* (see :class:`ExportPlan` for what it takes).

    The folder appears whole or not at all. *announce* gets the cost before work starts, *progress* what is
    being done with how much of how much. *prove* compares the unpatched model with the
    nets first and gives what the manifest tells of it. Raises Usage without trust, Refused for input that
    does not fit, ToolFailed when the disk or torch fails.
    """
    require_trust(trust_remote_code, "export", lent=sources.lent)
    onnx_path = Path(onnx_path)
    todo = plan(
        sources,
        index,
        geometry,
        onnx_path=onnx_path,
        mode=mode,
        multi_device=multi_device,
        sampler=sampler,
        wanted=wanted,
    )
    announce(todo.cost)
    require_space(todo, onnx_path)
    proof = prove(sources, index, geometry) if prove else {"skipped": "not asked for"}
    kinds = tuple(dict.fromkeys(binding.kind for binding in todo.bindings))
    progress("trace", 0, len(kinds))
    templates = trace_templates(sources, geometry, kinds)
    progress("trace", len(kinds), len(kinds))
    origin = Provenance(
        checkout=str(index.path),
        recipe=str(sources.recipe),
        trained_length=sources.facts.trained_length,
        sources={"reference": _hashes(sources.reference), "patched": _hashes(sources.patched)},
        config=sources.facts.written_out(),
        twin=proof,
    )
    return write_folder(onnx_path, templates, todo, origin, progress)


def trace_templates(
    sources: Sources, geometry: Geometry, kinds: Iterable[NetKind]
) -> dict[NetKind, Template]:
    """One weight-free template per kind. Runs the checkout's code (callers asked for trust)."""
    kinds = tuple(kinds)
    return with_or_without_transformers(
        sources, lambda installed: _trace(sources, geometry, kinds, installed=installed)
    )


def with_or_without_transformers(sources: Sources, work: Callable[[bool], Made]) -> Made:
    """Do *work*, which runs layers of *sources*; it is told whether these get the installed transformers.

    The code runs without transformers first, which its layers do not need. Code of a fork that does need it
    gets the installed one; what fails then is the real reason.
    """
    if sources.family.home:
        return work(True)
    try:
        return work(False)
    except Exception as error:
        try:
            return work(True)
        except SurgeryError as reason:
            raise reason from error


def _trace(
    sources: Sources, geometry: Geometry, kinds: Iterable[NetKind], *, installed: bool
) -> dict[NetKind, Template]:
    from qwen_surgery.exporting.modules import ModuleFactory
    from qwen_surgery.exporting.tracing import trace

    patched = ModelCode.load(sources.patched, sources.modeling, installed=installed)
    reference = ModelCode.load(sources.reference, sources.modeling, installed=installed)
    _refuse_other_facts(sources.facts, reference.config)
    factory = ModuleFactory(patched, reference, geometry)
    return {kind: Template(kind, trace(factory.build(kind), geometry)) for kind in kinds}


def _refuse_other_facts(facts: ModelFacts, config: Any) -> None:
    """The class, now that it has run, must say what was read from its source."""
    for key in facts.upstream:
        run = getattr(config, key, facts[key])
        if run != facts[key]:
            raise Refused(
                f"config.json and the source of its configuration class say {key} is {facts[key]!r}; "
                f"the class makes it {run!r}",
                hint=f"write {key} into config.json",
            )


def _hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
