"""The nets of the vocabulary (embeddings, lm_head) in a build: compiled narrow, proven, widened.

How and why is in :mod:`qwen_surgery.compiling.narrow`; here it becomes a task. A net that cannot go this way
says why and is compiled at its full size, as every other net is.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_surgery.errors import ToolFailed
from qwen_surgery.nets import Net, NetKind

if TYPE_CHECKING:
    import onnx

    from qwen_surgery.compiling.narrow import Steps
    from qwen_surgery.compiling.one import NetJob
    from qwen_surgery.exporting.manifest import NetEntry
    from qwen_surgery.toolchain import Toolchain
    from qwen_surgery.weights import TensorRef

#: Kinds whose weights are a table with a row per token of the vocabulary.
KINDS = (NetKind.EMBEDDING, NetKind.EMBEDDING_CACHE, NetKind.LM_HEAD, NetKind.LM_HEAD_TOPK)
#: Tables of fewer weights are compiled as they are: nothing would be saved.
WORTHWHILE = 1 << 24


def compile_narrow(params: dict[str, Any], needs: dict[str, Path], work: Path) -> dict[str, Any]:
    """Task: compile one net of the vocabulary narrow, prove it, widen it, prove that.

    Leaves the widened bmodel, its profile and ``plan.json``; or, when the net cannot go this way,
    ``{"widened": False, "reason": ...}`` as the task's answer.
    """
    from qwen_surgery.compiling.narrow import CannotWiden
    from qwen_surgery.packing.proof import Unproven

    try:
        return _compile_narrow(params, work)
    except (CannotWiden, Unproven) as error:
        return {"widened": False, "reason": str(error)}
    except ToolFailed as error:
        if "signal 9" in str(error):  # too little memory now says nothing of the net
            raise
        return {"widened": False, "reason": f"a tool failed: {error.hint}"}
    finally:
        for folder in (work / "narrow", work / "wide"):
            shutil.rmtree(folder, ignore_errors=True)


def _compile_narrow(params: dict[str, Any], work: Path) -> dict[str, Any]:
    import onnx

    from qwen_surgery.building.actions import toolchain_of
    from qwen_surgery.compiling import narrow as narrowing
    from qwen_surgery.compiling.profile import PROFILE, profile_of
    from qwen_surgery.exporting.manifest import Manifest
    from qwen_surgery.packing.proof import Compiled, prove
    from qwen_surgery.packing.widen import widen_plan

    folder, chain = Path(params["export"]), toolchain_of(params)
    manifest = Manifest.load(folder)
    entry = manifest.net(params["net"])
    template = onnx.load(str(folder / manifest.template_file(entry.kind)))
    sizes = narrowing.sizes_of(template)
    vocabulary = narrowing.narrow_vocabulary(manifest.geometry.vocab, sizes)
    if vocabulary is None:
        raise narrowing.CannotWiden("the vocabulary is too small")
    model = narrowing.narrow_model(template, vocabulary)
    refs = narrowing.narrow_refs(entry.weights, vocabulary)
    narrow, wide, logs = work / "narrow", work / "wide", Path(params["logs"])
    job = _bound(entry, model, refs, narrow, params["cleaned"])
    bmodel, steps = _compiled(job, params, chain, narrow, logs)
    final = narrow / steps.final
    plan = prove(Compiled(bmodel, final), model, refs)
    log = logs / f"{entry.name}.{params['cores']}core.log"
    probes = narrowing.run_steps(steps, vocabulary, chain, narrow, wide, log, entry.name)
    texts = (final.read_text(encoding="utf-8"), (wide / final.name).read_text(encoding="utf-8"))
    plan = widen_plan(plan, vocabulary, texts, wide / bmodel.name, probes)
    (work / "plan.json").write_text(json.dumps({"plan": plan.to_json()}))
    (wide / bmodel.name).replace(work / bmodel.name)
    profile = profile_of(wide / bmodel.name)
    if profile.exists():
        profile.replace(work / PROFILE)
    return {"widened": True, "narrow": vocabulary.narrow, "weights": plan.weights}


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
    from qwen_surgery.compiling.narrow import Steps
    from qwen_surgery.compiling.one import deploy, transform
    from qwen_surgery.compiling.options import CompileOptions

    transform(job, chain, folder, logs)
    bmodel, result = deploy(job, CompileOptions(**params["options"]), params["cores"], chain, folder, logs)
    return bmodel, Steps.read(result.log.read_text(errors="replace"))
