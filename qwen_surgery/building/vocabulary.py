"""The nets of the vocabulary (embeddings, lm_head) in a build: compiled narrow, proven, widened.

How and why is in :mod:`qwen_surgery.vocabulary.narrow`; here it becomes a task. ``embedding_cache`` is
widened as ``embedding`` was (:mod:`qwen_surgery.vocabulary.derive`). A net that cannot go this way says why
and is compiled at its full size, as every other net is.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_surgery.errors import Refused, ToolFailed
from qwen_surgery.nets import Net, NetKind

if TYPE_CHECKING:
    import onnx

    from qwen_surgery.compiling.one import NetJob
    from qwen_surgery.exporting.manifest import NetEntry
    from qwen_surgery.packing.plans import PackPlan
    from qwen_surgery.packing.proof import Compiled
    from qwen_surgery.toolchain import Toolchain
    from qwen_surgery.vocabulary.lowered import Steps
    from qwen_surgery.vocabulary.narrow import Vocabulary
    from qwen_surgery.weights import TensorRef

#: Kinds whose weights are a table with a row per token of the vocabulary.
KINDS = (NetKind.EMBEDDING, NetKind.EMBEDDING_CACHE, NetKind.LM_HEAD, NetKind.LM_HEAD_TOPK)
#: Kind -> the kind that looks up the same table and is widened before it (for one core: two share the work of
#: a long input and not of a short one).
SIBLINGS = {NetKind.EMBEDDING_CACHE: NetKind.EMBEDDING}
#: What a net leaves for its sibling: its narrow bmodel, without weights.
_NARROW = "narrow.bmodel"
#: Tables of fewer weights are compiled as they are: nothing would be saved.
WORTHWHILE = 1 << 24


def compile_narrow(params: dict[str, Any], needs: dict[str, Path], work: Path) -> dict[str, Any]:
    """Task: compile one net of the vocabulary narrow, prove it, widen it (and prove that) or derive the
    widened net from its sibling's.

    Leaves the widened bmodel with holes for its weights, its profile and ``plan.json``; or, when the net
    cannot go this way, ``{"widened": False, "reason": ...}`` as the task's answer. *needs* holds its
    sibling's outputs.
    """
    from qwen_surgery.packing.proof import Unproven
    from qwen_surgery.vocabulary.narrow import CannotExtend

    try:
        return _compile_narrow(params, needs, work)
    except (CannotExtend, Unproven) as error:
        return {"widened": False, "reason": str(error)}
    except ToolFailed as error:
        if "signal 9" in str(error):  # too little memory now says nothing of the net
            raise
        return {"widened": False, "reason": f"a tool failed: {error.hint}"}
    finally:
        for folder in (work / "narrow", work / "wide"):
            shutil.rmtree(folder, ignore_errors=True)


def _compile_narrow(params: dict[str, Any], needs: dict[str, Path], work: Path) -> dict[str, Any]:
    import onnx

    from qwen_surgery.building.actions import toolchain_of
    from qwen_surgery.exporting.manifest import Manifest
    from qwen_surgery.packing.proof import Compiled, prove
    from qwen_surgery.vocabulary import narrow as narrowing
    from qwen_surgery.vocabulary.derive import copy_without_weights
    from qwen_surgery.vocabulary.narrow import CannotExtend

    folder, chain = Path(params["export"]), toolchain_of(params)
    manifest = Manifest.load(folder)
    entry = manifest.net(params["net"])
    template = onnx.load(str(folder / manifest.template_file(entry.kind)))
    vocabulary = narrowing.narrow_vocabulary(manifest.geometry.vocab, narrowing.sizes_of(template))
    if vocabulary is None:
        raise CannotExtend("the vocabulary is too small")
    model = narrowing.narrow_model(template, vocabulary)
    refs = narrowing.narrow_refs(entry.weights, vocabulary)
    narrow, logs = work / "narrow", Path(params["logs"])
    job = _bound(entry, model, refs, narrow, params["cleaned"])
    bmodel, steps = _compiled(job, params, chain, narrow, logs)
    compiled = Compiled(bmodel, narrow / steps.final)
    proven = prove(compiled, model, refs)

    def widen() -> PackPlan:
        log = logs / f"{entry.name}.{params['cores']}core.log"
        return _widened(compiled, proven, vocabulary, steps, chain, work, log)

    if entry.kind in SIBLINGS and needs:
        (sibling,) = needs.values()
        try:
            plan = _like_sibling(compiled, proven, sibling, work)
        except (CannotExtend, Refused) as error:
            print(f"widened on its own: {error}", flush=True)
            plan = widen()
    else:
        plan = widen()
    if entry.kind in SIBLINGS.values():
        copy_without_weights(bmodel, proven, work / _NARROW)
    plans = {"plan": plan.to_json(), "narrow": proven.to_json()}
    (work / "plan.json").write_text(json.dumps(plans))
    return {"widened": True, "narrow": vocabulary.narrow, "weights": plan.weights}


def _widened(
    compiled: Compiled,
    proven: PackPlan,
    vocabulary: Vocabulary,
    steps: Steps,
    chain: Toolchain,
    work: Path,
    log: Path,
) -> PackPlan:
    """Widen the narrow net *compiled* by the compiler's own last steps, and prove the widened plan."""
    from qwen_surgery.vocabulary.derive import copy_without_weights
    from qwen_surgery.vocabulary.lowered import run_steps
    from qwen_surgery.vocabulary.plan import extend_plan

    wide, final = work / "wide", compiled.final_mlir
    probes = run_steps(steps, vocabulary, chain, final.parent, wide, log, compiled.bmodel.stem)
    texts = (final.read_text(encoding="utf-8"), (wide / final.name).read_text(encoding="utf-8"))
    made = wide / compiled.bmodel.name
    plan = extend_plan(proven, vocabulary, texts, made, probes)
    copy_without_weights(made, plan, work / made.name)
    _keep_profile(made, work)
    return plan


def _like_sibling(compiled: Compiled, proven: PackPlan, sibling: Path, work: Path) -> PackPlan:
    """Widen the narrow net *compiled* as its *sibling* (that task's outputs) was."""
    from qwen_surgery.packing.plans import PackPlan
    from qwen_surgery.vocabulary.derive import Known, derive
    from qwen_surgery.vocabulary.narrow import CannotExtend

    wide = next((file for file in sibling.glob("*.bmodel") if file.name != _NARROW), None)
    if wide is None:
        raise CannotExtend("its sibling was not widened")
    plans = json.loads((sibling / "plan.json").read_text())
    if proven != PackPlan.from_json(plans["narrow"]):
        raise CannotExtend("its sibling stores the weights differently")
    plan = PackPlan.from_json(plans["plan"])
    bmodel = compiled.bmodel
    derive(Known(sibling / _NARROW, wide, bmodel), plan, work / bmodel.name)
    _keep_profile(bmodel, work)  # looking up rows takes as long in a longer table
    return plan


def _keep_profile(bmodel: Path, work: Path) -> None:
    from qwen_surgery.compiling.profile import PROFILE, profile_of

    if profile_of(bmodel).exists():
        profile_of(bmodel).replace(work / PROFILE)


def _bound(
    entry: NetEntry, model: onnx.ModelProto, refs: dict[str, TensorRef], folder: Path, cleaned: bool
) -> NetJob:
    """The narrow net with its weights inside, as a file."""
    import onnx

    from qwen_surgery.compiling.one import NetJob
    from qwen_surgery.exporting.placement import InlinePlacement
    from qwen_surgery.exporting.template import Template, bind

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{entry.name}.onnx"
    onnx.save(bind(Template(entry.kind, model), refs, InlinePlacement()), str(file))
    return NetJob(Net(entry.name, entry.kind, entry.layer), file, cleaned)


def _compiled(
    job: NetJob, params: dict[str, Any], chain: Toolchain, folder: Path, logs: Path
) -> tuple[Path, Steps]:
    """The narrow net compiled as any other, and the steps that took."""
    from qwen_surgery.compiling.one import deploy, transform
    from qwen_surgery.compiling.options import CompileOptions
    from qwen_surgery.vocabulary.lowered import Steps

    transform(job, chain, folder, logs)
    bmodel, result = deploy(job, CompileOptions(**params["options"]), params["cores"], chain, folder, logs)
    return bmodel, Steps.read(result.log.read_text(errors="replace"))
