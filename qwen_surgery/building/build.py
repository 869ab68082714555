"""``build`` and ``compile`` as functions: from a checkout, or an exported folder, to bmodels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_surgery.building import session
from qwen_surgery.building.builder import Builder, BuildResult
from qwen_surgery.building.digests import Identity, reading_early
from qwen_surgery.building.graph import Answer, Expansion, Graph, Task, peak_disk, stale
from qwen_surgery.building.inputs import source_digests
from qwen_surgery.building.request import BuildRequest, CompileRequest
from qwen_surgery.building.resources import require_disk
from qwen_surgery.building.session import Running
from qwen_surgery.building.step_export import ONNX, export_tasks
from qwen_surgery.building.step_verify import depth_for, load_report, verify_task
from qwen_surgery.compiling.options import refuse_uncleaned
from qwen_surgery.errors import Refused
from qwen_surgery.toolchain import Toolchain

if TYPE_CHECKING:
    from qwen_surgery.weights import TensorRef

Early = Callable[[], Mapping[Identity, str]]


@dataclass(frozen=True)
class Opened:
    """A build that has been checked; nothing has run. ``depth`` is how it will be verified, ``config`` the
    unpatched config.json, ``weights`` what the checkpoint holds."""

    request: BuildRequest
    builder: Builder
    exporting: list[Task]
    passes: tuple[str, ...]
    config: dict[str, Any]
    depth: str
    weights: list[TensorRef]

    @classmethod
    def of(cls, request: BuildRequest, running: Running) -> Opened:
        """Open and check everything; raises for whatever cannot work before anything runs."""
        from qwen_surgery.checkout import Checkout
        from qwen_surgery.weights import WeightIndex

        checkout = Checkout.open(request.checkout)
        geometry = checkout.geometry(request.seq_length)
        options = request.options.resolved(geometry)
        toolchain = Toolchain.find(request.toolchain)
        sources = checkout.sources(recipe=request.recipe, seq_length=request.seq_length)
        index = WeightIndex.open(request.checkout)
        builder = Builder(request.out, geometry, options, toolchain, running)
        passes = _passes(request, toolchain)
        refuse_uncleaned(options, passes)
        digests = source_digests(sources, index)
        exporting = export_tasks(request, digests, geometry, passes, fused_head=options.fused_head)
        depth = depth_for(request.verify, geometry, options, request.steps)
        config = dict(json.loads(sources.reference["config.json"]))
        return cls(request, builder, exporting, passes, config, depth, [ref for _, ref in index.items()])

    @property
    def exports(self) -> tuple[str, ...]:
        """The tasks that leave exported folders, the one that is compiled last."""
        return tuple(task.name for task in self.exporting)

    def graph(self, early: Early = dict, say: Callable[[str], None] = lambda text: None) -> Graph:
        """Export and clean, and what follows from that. *early* then gives digests of weights that are known
        already."""

        def exported(answers: Mapping[str, Answer]) -> Iterable[Task | Expansion]:
            answer = answers[self.exports[-1]]
            folder = answer.folder / ONNX
            if answer.planned:
                inputs = self.builder.planned_inputs(folder, self.passes)
            else:
                inputs = self.builder.inputs(folder, early())
            return self.builder.tasks(inputs, self.config, say)

        return Graph([*self.exporting, Expansion(self.exports, exported)])

    def planned(self) -> Graph:
        """The whole graph but for the verification, as it will be if all goes as expected."""
        graph = self.graph()
        graph.grow(self.builder.outputs.store, plan=True)
        return graph

    def verify_tasks(self) -> list[Task]:
        """Verify each bmodel, unless that is impossible or not wanted."""
        if self.depth == "none":
            return []
        inputs = self.builder.planned_inputs(Path(), self.passes)
        made = zip(self.builder.options.cores, self.builder.bmodels(), strict=True)
        return [
            verify_task(inputs, cores, task, self.exports, self.request, self.depth) for cores, task in made
        ]


def _passes(request: BuildRequest, toolchain: Toolchain) -> tuple[str, ...]:
    from qwen_surgery.cleaning import chosen_passes

    version = toolchain.version if toolchain.version != "unknown" else None
    return chosen_passes(skip=request.skip, toolchain=version) if request.clean else ()


def build(request: BuildRequest) -> BuildResult:
    """Make the bmodels that *request* asks for, and verify them.

    Raises Usage and Refused before anything runs, ToolFailed when a tool fails; what was done stays done.
    """
    with session.running(request.run) as running:
        opened = Opened.of(request, running)
        outputs = opened.builder.outputs
        with outputs.alone():
            new = bool(stale(opened.graph(), outputs.store))
            if new:
                graph = opened.planned()
                require_disk(outputs.state, peak_disk(graph, graph.order))
            with reading_early(opened.weights if new else []) as early:
                graph = opened.graph(early, running.say)
                result = opened.builder.make(graph)
            _verify(opened, graph, result)
            outputs.retire()  # last: what the verification left is part of the build
        for note in _notes(opened, result):
            running.say(note)
    return result


def _verify(opened: Opened, graph: Graph, result: BuildResult) -> None:
    """Verify the bmodels, which are in their place whatever comes out."""
    tasks = opened.verify_tasks()
    if not tasks:
        return
    graph.add(tasks)
    verified = opened.builder.make(graph)
    result.done, result.ran = verified.done, [*result.ran, *verified.ran]
    reports = [load_report(opened.builder.outputs.store.folder(graph.keys[task.name])) for task in tasks]
    result.report = next((report for report in reports if not report["passed"]), reports[0])
    result.depth = opened.depth


def _notes(opened: Opened, result: BuildResult) -> Iterable[str]:
    """What the user should know of how the bmodels were verified."""
    asked = opened.request.verify
    if opened.depth == "none" and asked != "none":
        yield "not verified: the emulator is one chip, this bmodel needs several"
    elif 2 in opened.builder.options.cores:
        yield (
            "the two-core bmodel is checked for nets, shapes and types only: on two cores, TPU-MLIR's "
            "emulator gives other numbers from run to run"
        )
    if opened.depth == "contract" and asked == "auto":
        yield (
            "verified: nets, shapes and types. The emulator would need long for this size; sample it with "
            f"`qwen-surgery verify {opened.request.checkout} --bmodel {result.bmodels[0]} "
            "--layers 0 --nets block_cache`"
        )


def plan(request: BuildRequest) -> dict[str, Any]:
    """What :func:`build` would do, as :func:`.session.plan_of` gives it. Before the first export the compile
    steps are planned from the checkout alone."""
    opened = Opened.of(request, Running(request.run))
    graph = opened.planned()
    graph.add(opened.verify_tasks())
    return session.plan_of(graph, opened.builder.outputs.store, opened.builder.running.jobs)


def compile_exported(request: CompileRequest) -> BuildResult:
    """Compile an exported (and cleaned) folder to bmodels.

    Raises Refused when the folder's parts do not match its manifest or its nets are not those that the
    options want; ToolFailed when a tool fails.
    """
    with session.running(request.run) as running:
        builder, graph = _open_exported(request, running)
        with builder.outputs.alone():
            result = builder.make(graph)
            builder.outputs.retire()
    return result


def plan_compile(request: CompileRequest) -> dict[str, Any]:
    """What :func:`compile_exported` would do, as :func:`.session.plan_of` gives it."""
    builder, graph = _open_exported(request, Running(request.run))
    graph.grow(builder.outputs.store, plan=True)
    return session.plan_of(graph, builder.outputs.store, builder.running.jobs)


def _open_exported(request: CompileRequest, running: Running) -> tuple[Builder, Graph]:
    from qwen_surgery.exporting.manifest import Manifest

    folder = request.onnx.absolute()
    manifest = Manifest.load(folder)
    manifest.check(folder)
    options = request.options.resolved(manifest.geometry)
    builder = Builder(request.out, manifest.geometry, options, Toolchain.find(request.toolchain), running)
    refuse_uncleaned(options, manifest.passes)
    have = {net.name: net.kind for net in manifest.nets}
    for net in options.nets(manifest.geometry.layers):
        if have.get(net.name) is not net.kind:
            raise Refused(
                f"{folder} lacks net {net.name} ({net.kind.value}), which --runtime {options.runtime} needs",
                hint="export " + ("with" if options.fused_head else "without") + " --multi-device",
            )
    return builder, Graph(builder.tasks(builder.inputs(folder, {}), manifest.config, running.say))
