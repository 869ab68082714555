"""Compile a net of the vocabulary (embeddings, lm_head) with a short vocabulary, prove it, extend it.

How and why is in :mod:`qwen_surgery.vocabulary.narrow`. ``embedding_cache`` is extended as ``embedding`` was
(:mod:`qwen_surgery.vocabulary.derive`). A net that cannot go this way says why and is compiled at its full
size, as every other net is.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_surgery.building.graph import Cost, Task
from qwen_surgery.building.inputs import Inputs, code_digest, task_name
from qwen_surgery.building.sizes import MB, packed_bytes, weights_of
from qwen_surgery.building.step import PLACE, Info, Needs, Step
from qwen_surgery.building.step_prove import finding, load_plan, save_plan
from qwen_surgery.compiling.one import NetJob, deploy, deploy_args, transform
from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.compiling.profile import PROFILE, profile_of
from qwen_surgery.errors import Refused, ToolFailed
from qwen_surgery.nets import Net, NetKind
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.toolchain.preload import SPARSE_COPIES, c_compiler

if TYPE_CHECKING:
    import onnx

    from qwen_surgery.exporting.manifest import NetEntry
    from qwen_surgery.packing.plans import PackPlan
    from qwen_surgery.packing.proof import Compiled
    from qwen_surgery.vocabulary.lowered import Steps
    from qwen_surgery.vocabulary.narrow import Vocabulary
    from qwen_surgery.weights import TensorRef

#: Kinds whose weights are a table with a row per token of the vocabulary.
KINDS = (NetKind.EMBEDDING, NetKind.EMBEDDING_CACHE, NetKind.LM_HEAD, NetKind.LM_HEAD_TOPK)
#: Kind -> the kind that looks up the same table and is extended before it. (For one core: two share the work
#: of a long input and not of a short one.)
SAME_TABLE = {NetKind.EMBEDDING_CACHE: NetKind.EMBEDDING}
#: Tables of fewer weights are compiled as they are: nothing would be saved.
WORTHWHILE = 1 << 24
#: What a net leaves for the one with the same table: its narrow bmodel without weights, and the plan of that.
_NARROW, _NARROW_PLAN = "narrow.bmodel", "narrow"


@dataclass(frozen=True)
class Narrow(Step):
    """Compile *net* narrow, prove it, then extend it and prove that; or derive the extended net from what the
    task *like* made, whose net has the same table.

    Leaves the extended bmodel with holes for its weights, its profile and its plan, or finds why it cannot.
    """

    net: Net
    cleaned: bool
    cores: int
    flags: tuple[str, ...]
    like: str | None
    code: str
    copies: str
    export: Path = field(metadata=PLACE)
    options: CompileOptions = field(metadata=PLACE)
    toolchain: Toolchain = field(metadata=PLACE)
    logs: Path = field(metadata=PLACE)

    def run(self, needs: Needs, work: Path) -> Info:
        from qwen_surgery.packing.proof import Unproven
        from qwen_surgery.vocabulary.narrow import CannotExtend

        reason = ""
        try:
            self._run(needs, work)
        except (CannotExtend, Unproven) as error:
            reason = str(error)
        except ToolFailed as error:
            if error.signal == 9:  # too little memory now says nothing of the net
                raise
            reason = f"a tool failed: {error.hint}"
        finally:
            for folder in (work / "narrow", work / "wide"):
                shutil.rmtree(folder, ignore_errors=True)
        return finding(self.net.kind, reason)

    def _run(self, needs: Needs, work: Path) -> None:
        import onnx

        from qwen_surgery.exporting.manifest import Manifest
        from qwen_surgery.packing.proof import Compiled, prove
        from qwen_surgery.vocabulary import narrow as narrowing
        from qwen_surgery.vocabulary.derive import copy_without_weights

        manifest = Manifest.load(self.export)
        entry = manifest.net(self.net.name)
        template = onnx.load(str(self.export / manifest.template_file(entry.kind)))
        vocabulary = narrowing.narrow_vocabulary(manifest.geometry.vocab, narrowing.sizes_of(template))
        if vocabulary is None:
            raise narrowing.CannotExtend("the vocabulary is too small")
        model = narrowing.narrow_model(template, vocabulary)
        refs = narrowing.narrow_refs(entry.weights, vocabulary)
        bmodel, steps = self._compiled(_bound(entry, model, refs, work / "narrow"))
        compiled = Compiled(bmodel, work / "narrow" / steps.final)
        proven = prove(compiled, model, refs)
        plan = None
        if self.like is not None:
            try:
                plan = _derived(compiled, proven, needs[self.like], work)
            except (narrowing.CannotExtend, Refused) as error:
                print(f"extended on its own: {error}", flush=True)
        if plan is None:
            plan = self._extended(compiled, proven, vocabulary, steps, work)
        if self.net.kind in SAME_TABLE.values():
            copy_without_weights(bmodel, proven, work / _NARROW)
            save_plan(work, proven, _NARROW_PLAN)
        save_plan(work, plan)

    def _compiled(self, file: Path) -> tuple[Path, Steps]:
        """The narrow net in *file* compiled as any other, and the steps that took."""
        from qwen_surgery.vocabulary.lowered import Steps

        job, folder = NetJob(self.net, file, self.cleaned), file.parent
        transform(job, self.toolchain, folder, self.logs)
        bmodel, result = deploy(job, self.options, self.cores, self.toolchain, folder, self.logs)
        return bmodel, Steps.read(result.log.read_text(errors="replace"))

    def _extended(
        self, compiled: Compiled, proven: PackPlan, vocabulary: Vocabulary, steps: Steps, work: Path
    ) -> PackPlan:
        """Extend the narrow net *compiled* by the compiler's own last steps, and prove the extended plan."""
        from qwen_surgery.vocabulary.derive import copy_without_weights
        from qwen_surgery.vocabulary.lowered import run_steps
        from qwen_surgery.vocabulary.plan import extend_plan

        wide, final = work / "wide", compiled.final_mlir
        log = self.logs / f"{self.net.name}.{self.cores}core.log"
        probes = run_steps(steps, vocabulary, self.toolchain, final.parent, wide, log, compiled.bmodel.stem)
        texts = (final.read_text(encoding="utf-8"), (wide / final.name).read_text(encoding="utf-8"))
        made = wide / compiled.bmodel.name
        plan = extend_plan(proven, vocabulary, texts, made, probes)
        copy_without_weights(made, plan, work / made.name)
        _keep_profile(made, work)
        return plan


def _bound(entry: NetEntry, model: onnx.ModelProto, refs: dict[str, TensorRef], folder: Path) -> Path:
    """The narrow net with its weights inside, as a file in *folder*."""
    import onnx

    from qwen_surgery.exporting.placement import InlinePlacement
    from qwen_surgery.exporting.template import Template, bind

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{entry.name}.onnx"
    onnx.save(bind(Template(entry.kind, model), refs, InlinePlacement()), str(file))
    return file


def _derived(compiled: Compiled, proven: PackPlan, like: Path, work: Path) -> PackPlan:
    """Extend the narrow net *compiled* as the one was whose outputs are in *like*."""
    from qwen_surgery.vocabulary.derive import Known, derive
    from qwen_surgery.vocabulary.narrow import CannotExtend

    wide = next((file for file in like.glob("*.bmodel") if file.name != _NARROW), None)
    plan = load_plan(like)
    if wide is None or plan is None:
        raise CannotExtend("the net with the same table was not extended")
    if proven != load_plan(like, _NARROW_PLAN):
        raise CannotExtend("the net with the same table stores the weights differently")
    bmodel = compiled.bmodel
    derive(Known(like / _NARROW, wide, bmodel), plan, work / bmodel.name)
    _keep_profile(bmodel, work)  # looking up rows takes as long in a longer table
    return plan


def _keep_profile(bmodel: Path, work: Path) -> None:
    if profile_of(bmodel).exists():
        profile_of(bmodel).replace(work / PROFILE)


def worth_narrowing(inputs: Inputs) -> tuple[Net, ...]:
    """The nets of the vocabulary that are large enough to be worth narrowing."""
    nets = [net for net in inputs.first_nets if net.kind in KINDS]
    return tuple(net for net in nets if weights_of(net.kind, inputs.geometry) >= WORTHWHILE)


def narrow_task(inputs: Inputs, net: Net, cores: int) -> Task:
    """Compile *net* narrow for *cores*, and extend it."""
    other = SAME_TABLE.get(net.kind) if cores == 1 else None
    like = next((task_name("narrow", one.name) for one in worth_narrowing(inputs) if one.kind is other), None)
    flags = deploy_args(inputs.job(net), inputs.options, cores, inputs.toolchain)
    return Task(
        task_name("narrow", net.name, cores),
        Narrow(
            net=net,
            cleaned=bool(inputs.passes),
            cores=cores,
            flags=tuple(flags),
            like=like,
            code=code_digest(
                "qwen_surgery.compiling", "qwen_surgery.vocabulary", "qwen_surgery.packing", __name__
            ),
            copies=hashlib.sha256(SPARSE_COPIES.read_bytes()).hexdigest(),
            export=inputs.folder,
            options=inputs.options,
            toolchain=inputs.toolchain,
            logs=inputs.logs,
        ),
        inputs.digests(net),
        needs=(like,) if like else (),
        cost=_cost(inputs, net, derived=like is not None),
        keep=True,
        command="model_deploy " + " ".join(flags) + " (with a short vocabulary, then extended)",
        expected=finding(net.kind),
    )


def _cost(inputs: Inputs, net: Net, *, derived: bool) -> Cost:
    """TPU-MLIR copies a net's packed bytes several times over while it writes the bmodel; with a C compiler
    those copies take next to no memory (``sparse_copies.c``)."""
    packed = packed_bytes(net.kind, inputs.geometry, inputs.options)
    copies = 1 if c_compiler() else 4
    extending = 0.0 if derived else 1.0 + packed * 6e-9
    return Cost(600 * MB + copies * packed, 2 * packed, 2.0 + extending)
