"""``build`` and ``compile`` as functions: from a checkout, or an exported folder, to bmodels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_surgery.building import session
from qwen_surgery.building.builder import Builder, BuildResult, Early
from qwen_surgery.building.digests import reading_early
from qwen_surgery.building.graph import Answer, Expansion, Graph, Task, peak_disk, stale
from qwen_surgery.building.inputs import file_digests, source_digests
from qwen_surgery.building.request import BuildRequest, CompileRequest
from qwen_surgery.building.session import Running
from qwen_surgery.building.step_export import ONNX, export_tasks
from qwen_surgery.building.step_quantise import Calibration
from qwen_surgery.building.step_sample import sample_task
from qwen_surgery.building.step_verify import depth_for, load_report, verify_task
from qwen_surgery.compiling.options import (
    GPTQ,
    CompileOptions,
    needed_passes,
    refuse_for_runtime,
    refuse_uncleaned,
    unsuited,
)
from qwen_surgery.errors import Refused, ToolFailed, Usage
from qwen_surgery.files import require_disk
from qwen_surgery.nets import NetKind
from qwen_surgery.toolchain import Toolchain

if TYPE_CHECKING:
    from qwen_surgery.checkout import Checkout
    from qwen_surgery.nets import Geometry
    from qwen_surgery.weights import TensorRef


@dataclass(frozen=True)
class Opened:
    """A build that has been checked; nothing has run.

    The tasks ``exporting`` leave exported folders, of which the last is compiled; where there are none,
    ``folder`` is. ``passes`` clean it. ``config`` is the unpatched config.json, ``weights`` are all tensors.
    ``sampling`` needs nothing but the export, and is done beside the compiling.
    """

    builder: Builder
    passes: tuple[str, ...]
    config: dict[str, Any]
    folder: Path = Path()
    exporting: tuple[Task, ...] = ()
    sampling: tuple[Task, ...] = ()
    verifying: tuple[Task, ...] = ()
    weights: tuple[TensorRef, ...] = ()
    depth: str = "none"

    def graph(self, early: Early = dict, say: Callable[[str], None] = lambda text: None) -> Graph:
        """What has to be done before the verification. *early* is asked, once the export is there, for
        digests of weights that are known already."""

        exports = tuple(task.name for task in self.exporting)

        def exported(answers: Mapping[str, Answer]) -> Iterable[Task | Expansion]:
            folder, planned = self.folder, False
            if exports:
                folder, planned = answers[exports[-1]].folder / ONNX, answers[exports[-1]].planned
            inputs = self.builder.inputs(folder, self.passes, None if planned else early)
            return self.builder.tasks(inputs, self.config, say)

        return Graph([*self.exporting, *self.sampling, Expansion(exports, exported)])

    def planned(self) -> Graph:
        """The same as it will be if all goes as expected."""
        graph = self.graph()
        graph.grow(self.builder.outputs.store, plan=True)
        return graph


def build(request: BuildRequest | CompileRequest) -> BuildResult:
    """Make the bmodels that *request* asks for, and verify them if it asks for that.

    Raises Usage and Refused before anything runs, ToolFailed when a tool fails; what was done stays done.
    """
    with session.running(request.run) as running:
        opened = _open(request, running)
        outputs = opened.builder.outputs
        with outputs.alone():
            new = bool(stale(opened.graph(), outputs.store))
            if new:
                graph = opened.planned()
                require_disk(outputs.state, peak_disk(graph, graph.order), "the build")
            with reading_early(opened.weights if new else ()) as early:
                graph = opened.graph(early, running.say)
                result = opened.builder.make(graph)
            _verify(opened, graph, result)
            outputs.retire()  # last: what the verification left is part of the build
        if note := unsuited(opened.builder.options):
            running.say(note)
        if isinstance(request, BuildRequest):
            for note in _notes(request, opened, result):
                running.say(note)
    return result


def plan(request: BuildRequest | CompileRequest) -> dict[str, Any]:
    """What :func:`build` would do, as :func:`.session.plan_of` gives it. Before the first export the compile
    steps are planned from the checkout alone. ``notes`` say what is not there yet and planned without, and
    what the bmodel will not suit."""
    lacking: list[str] = []
    opened = _open(request, Running(request.run), lacking)
    graph = opened.planned()
    graph.add(opened.verifying)
    done = session.plan_of(graph, opened.builder.outputs.store, opened.builder.running.jobs)
    note = unsuited(opened.builder.options)
    return done | {"notes": [*lacking, *([note] if note else [])]}


def _open(
    request: BuildRequest | CompileRequest, running: Running, lacking: list[str] | None = None
) -> Opened:
    """Open and check everything; raises for whatever cannot work before anything runs. A checkout's plan can
    do without weights and without TPU-MLIR: what is not there goes into *lacking*, if that is given."""
    if isinstance(request, BuildRequest):
        return _open_checkout(request, running, lacking)
    return _open_exported(request, running)


def _find_toolchain(version: str | None, lacking: list[str] | None) -> Toolchain:
    try:
        return Toolchain.find(version)
    except ToolFailed as error:
        if lacking is None:
            raise
        expected = Toolchain.expected()
        lacking.append(f"{error}; planned as for {expected.version}  ({error.hint})")
        return expected


def _find_weights(checkout: Path, lacking: list[str] | None) -> Mapping[str, TensorRef]:
    from qwen_surgery.weights.index import NoWeights, WeightIndex

    try:
        return WeightIndex.open(checkout)
    except NoWeights as error:
        if lacking is None:
            raise
        lacking.append(f"{error}; planned as a first build, and whether they fit cannot be told")
        return {}


def _open_checkout(request: BuildRequest, running: Running, lacking: list[str] | None) -> Opened:
    from qwen_surgery.checkout import Checkout
    from qwen_surgery.exporting.cleaning import chosen_passes
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.verification.cases import longest_prompt
    from qwen_surgery.weights import Release

    checkout = Checkout.open(request.checkout)
    geometry = checkout.geometry(request.seq_length)
    release = Release.of(request.checkout)
    options = request.options.resolved(geometry, release)
    toolchain = _find_toolchain(request.toolchain, lacking)
    sources = Sources.of(checkout, recipe=request.recipe, seq_length=request.seq_length)
    index = _find_weights(request.checkout, lacking)
    calibration = _calibration(request, checkout, geometry) if options.quantizer == GPTQ else None
    builder = Builder(request.out, geometry, options, toolchain, running, release, calibration)
    version = toolchain.version if toolchain.version != "unknown" else None
    needed = needed_passes(options)
    several = options.num_device > 1
    passes = (
        chosen_passes(skip=request.skip, toolchain=version, also=needed, several=several)
        if request.clean
        else ()
    )
    refuse_uncleaned(options, passes)
    refuse_for_runtime(options, passes)
    digests = source_digests(sources, index)
    exporting = export_tasks(
        request,
        digests,
        geometry,
        passes,
        fused_head=options.fused_head,
        sampler=options.runs_on.sampler,
    )
    depth = depth_for(request.verify, geometry, options, request.steps)
    if depth != "full" and (request.questions or request.text):
        raise Usage(f"with --verify {depth} no model answers or reads a text", hint="add --verify full")
    if depth == "full":
        longest_prompt(geometry.seq_length, request.steps)  # refused now, not when all is built
    inputs, exports = builder.inputs(Path(), passes), tuple(task.name for task in exporting)
    made = zip(options.cores, builder.bmodels(), strict=True) if depth != "none" else ()
    return Opened(
        builder,
        passes,
        config=sources.facts.written_out(),
        exporting=tuple(exporting),
        sampling=(sample_task(inputs, exports[-1], request),) if depth == "sample" else (),
        verifying=tuple(verify_task(inputs, cores, task, exports, request, depth) for cores, task in made),
        weights=tuple(part for ref in index.values() for part in ref.parts),
        depth=depth,
    )


def _calibration(request: BuildRequest, checkout: Checkout, geometry: Geometry) -> Calibration:
    """What the integers are chosen by. Raises Refused where an edit is declined."""
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.quantising import WINDOW

    window = min(WINDOW, geometry.seq_length)
    sources = Sources.of(checkout, recipe=request.recipe, seq_length=window)
    return Calibration(
        request.checkout,
        request.recipe,
        request.trust_remote_code,
        request.calibration,
        request.calibration_tokens,
        file_digests(sources),
    )


def _open_exported(request: CompileRequest, running: Running) -> Opened:
    """Raises Refused when the folder's parts are not those of its manifest, or its nets not those wanted."""
    from qwen_surgery.exporting.manifest import Manifest

    folder = request.onnx.absolute()
    manifest = Manifest.load(folder)
    manifest.check(folder)
    options = request.options.resolved(manifest.geometry, manifest.release)
    if options.quantizer == GPTQ:
        raise Usage(
            f"--quantizer {GPTQ} runs the model, and an exported folder is not all of it",
            hint="use `qwen-surgery build`, or compile with rtn and then `qwen-surgery refit`",
        )
    toolchain = Toolchain.find(request.toolchain)
    builder = Builder(request.out, manifest.geometry, options, toolchain, running, manifest.release)
    refuse_uncleaned(options, manifest.passes)
    have = {net.name: net.kind for net in manifest.nets}
    for net in options.nets(manifest.geometry.layers):
        if have.get(net.name) is not net.kind:
            raise Refused(
                f"{folder} lacks net {net.name} ({net.kind.value}), which --runtime {options.runtime} needs",
                hint=_export_hint(options),
            )
    refuse_for_runtime(options, manifest.passes)
    return Opened(builder, manifest.passes, manifest.config, folder)


def _export_hint(options: CompileOptions) -> str:
    """How to export what a runtime needs."""
    if options.runs_on.sampler is NetKind.SAMPLE_HEAD:
        return "export with --generic"
    return "export " + ("with" if options.fused_head else "without") + " --multi-device and without --generic"


def _verify(opened: Opened, graph: Graph, result: BuildResult) -> None:
    """Verify the bmodels, which are in their place whatever comes out."""
    from qwen_surgery.verification.measured import remember
    from qwen_surgery.verification.results import Report

    result.depth = opened.depth
    if opened.verifying:
        graph.add(opened.verifying)
        verified = opened.builder.make(graph)
        result.done, result.ran = verified.done, [*result.ran, *verified.ran]
    store = opened.builder.outputs.store
    reports, sampled = (
        [load_report(store.folder(graph.keys[task.name])) for task in tasks]
        for tasks in (opened.verifying, opened.sampling)
    )
    for bmodel, report in zip(result.bmodels, reports, strict=False):
        if "levels" in report:
            remember(Report.from_json(report), [bmodel])
    if reports:
        result.report = next((report for report in reports if not report["passed"]), reports[0])
    for report in sampled:
        before = result.report or {"passed": True}
        result.report = {**before, "passed": before["passed"] and report["passed"], "sampled": report}


def _notes(request: BuildRequest, opened: Opened, result: BuildResult) -> Iterator[str]:
    """What the user should know of how the bmodels were verified."""
    if 2 in opened.builder.options.cores:
        yield (
            "the two-core bmodel is checked for nets, shapes and types only: on two cores, TPU-MLIR's "
            "emulator gives other numbers from run to run"
        )
    if opened.verifying and opened.depth == "sample" and request.verify == "auto":
        yield (
            "verified: first and last layer before compiling, nets, shapes and types after it. The emulator "
            f"would need long for this size; sample it with `qwen-surgery verify {request.checkout} "
            f"--bmodel {result.bmodels[0]} --layers 0 --nets block_cache`"
        )
