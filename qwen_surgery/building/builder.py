"""Which tasks follow from an export, and running them into the output folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qwen_surgery.building.digests import Identity, tensor_digests
from qwen_surgery.building.graph import Answer, Done, Expansion, Graph, Task
from qwen_surgery.building.inputs import Inputs, Verb, task_name
from qwen_surgery.building.outputs import Outputs
from qwen_surgery.building.runner import Runner
from qwen_surgery.building.session import Running
from qwen_surgery.building.step_assemble import Previous, assemble_task, compare_task, signatures
from qwen_surgery.building.step_compile import combine_task, compile_tasks
from qwen_surgery.building.step_narrow import narrow_task, worth_narrowing
from qwen_surgery.building.step_prove import Prove, load_plan, prove_task, refused
from qwen_surgery.building.step_quantise import Calibration, Forms, quantise_tasks
from qwen_surgery.compiling.one import refuse_unsupported
from qwen_surgery.compiling.options import QUANTIZERS, CompileOptions
from qwen_surgery.errors import Refused, Usage
from qwen_surgery.nets import Geometry, Net, NetKind
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.weights.quantised import Release

Items = list[Task | Expansion]
Early = Callable[[], Mapping[Identity, str]]


@dataclass
class BuildResult:
    """A finished build: its bmodels in the order of core counts, the record of every task, and which of them
    ran; kind of net -> why all its layers were compiled; the verification's depth and its report as JSON."""

    bmodels: list[Path]
    done: dict[str, Done]
    ran: list[str]
    unpacked: dict[str, str] = field(default_factory=dict)
    depth: str = "none"
    report: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        return self.report is None or bool(self.report["passed"])

    @property
    def integers(self) -> str:
        """A line on the integers that the bmodels hold; empty where there are none, or no side file."""
        from qwen_surgery.packing import sidefile

        if not sidefile.path_for(self.bmodels[0]).is_file():
            return ""
        side = sidefile.load(self.bmodels[0])
        return sidefile.integers_line(side.integers(), side.notes)

    def to_json(self) -> dict[str, Any]:
        return {
            "bmodels": [str(path) for path in self.bmodels],
            "integers": self.integers,
            "passed": self.passed,
            "verified": self.depth,
            "unpacked": self.unpacked,
            "tasks": {
                name: {"seconds": round(done.seconds, 3), "peak_rss": done.peak_rss, "ran": name in self.ran}
                for name, done in self.done.items()
            },
            "report": self.report,
        }


@dataclass(frozen=True)
class Packing:
    """A build that compiles one net of each kind and packs the others: its tasks, as they come to be known.

    *config* is the unpatched config.json, *previous* what earlier builds made, by file name. The *compared*
    layers are compiled as well. *say* gets notes on nets that cannot go this way. *calibration* is there
    where a text decides the integers.
    """

    inputs: Inputs
    config: Mapping[str, Any]
    previous: Mapping[str, Previous]
    compared: tuple[int, ...]
    say: Callable[[str], None]
    calibration: Calibration | None = None

    def tasks(self) -> Items:
        """Compile and prove the first net of each kind."""
        narrow = worth_narrowing(self.inputs)
        kinds = frozenset(net.kind for net in narrow)
        layers = (None, 0, *self.compared)
        whole = [net for net in self.inputs.nets if net.kind not in kinds and net.layer in layers]
        narrowing = [
            narrow_task(self.inputs, net, cores) for cores in self.inputs.options.cores for net in narrow
        ]
        proving = self._prove([net for net in self.inputs.first_nets if net.kind not in kinds])
        return [
            *narrowing,
            *compile_tasks(self.inputs, whole, keep=True),
            *proving,
            Expansion(_names(narrowing), partial(self._narrowed, kinds, _names(proving))),
        ]

    def _narrowed(
        self, kinds: frozenset[NetKind], proofs: tuple[str, ...], answers: Mapping[str, Answer]
    ) -> Items:
        """The narrow nets are compiled: compile and prove those whole that could not be extended."""
        failed = refused(answer.info for answer in answers.values())
        for kind, why in failed.items():
            self.say(f"{kind.value}: compiled at its full size, which takes longer ({why})")
        nets = [net for net in self.inputs.first_nets if net.kind in failed]
        proving = self._prove(nets)
        proven = partial(self._proven, kinds - failed.keys(), answers)
        ready = Expansion((*proofs, *_names(proving)), proven)
        return [*compile_tasks(self.inputs, nets, keep=True), *proving, ready]

    def _proven(
        self, narrow: Collection[NetKind], narrowed: Mapping[str, Answer], answers: Mapping[str, Answer]
    ) -> Items:
        """All is proven that can be: compile every layer of the other kinds, and write the bmodels."""
        reasons = refused(answer.info for answer in answers.values())
        self._refuse_rounding(reasons)
        for kind, why in reasons.items():
            then = "every layer of it is compiled instead" if kind.per_layer else "refit will not be possible"
            self.say(f"{kind.value}: packing is not proven ({why}); {then}")
        compiled = (None, 0, *self.compared)
        rest = [net for net in self.inputs.nets if net.kind in reasons and net.layer not in compiled]
        items: Items = [*compile_tasks(self.inputs, rest, keep=True)]
        if self.calibration is not None:
            forms = self._forms(narrow, {**narrowed, **answers})
            items += quantise_tasks(self.inputs, self.calibration, forms)
        for cores in self.inputs.options.cores:
            previous = self.previous.get(self.inputs.bmodel(cores).name)
            items.append(assemble_task(self.inputs, cores, self.config, narrow, reasons, previous))
            packed = [net for net in self.inputs.nets if net.layer in self.compared]
            items += [compare_task(self.inputs, net, cores) for net in packed]
        return items

    def _forms(self, narrow: Collection[NetKind], answers: Mapping[str, Answer]) -> dict[NetKind, Forms]:
        """By kind, how the weights whose integers are to be chosen are stored. (Nothing in a plan, before any
        of it is proven.)"""
        from qwen_surgery.quantising.chosen import forms

        found: dict[NetKind, Forms] = {}
        for net in self.inputs.first_nets:
            if self.inputs.options.integer(net.kind):
                verb: Verb = "narrow" if net.kind in narrow else "prove"
                name = task_name(verb, net.name, self.inputs.options.cores[0])
                plan = load_plan(answers[name].folder)
                found[net.kind] = {} if plan is None else forms(plan)
        return found

    def _refuse_rounding(self, reasons: Mapping[NetKind, str]) -> None:
        """A net that cannot be packed would get the compiler's integers, where others are wanted."""
        for kind, why in reasons.items():
            if not self.inputs.chosen(kind):
                continue
            stored = f"how TPU-MLIR stores those of {kind.value} is not proven ({why})"
            if self.inputs.release is not None and kind.per_layer:
                raise Refused(
                    f"the integers of this checkpoint ({self.inputs.release}) cannot be kept: {stored}",
                    hint="start from the bf16 or fp16 checkpoint",
                )
            quantizer = self.inputs.options.quantizer
            raise Refused(
                f"--quantizer {quantizer} cannot place its integers: {stored}", hint="use --quantizer rtn"
            )

    def _prove(self, nets: list[Net]) -> list[Task]:
        return [prove_task(self.inputs, net, cores) for cores in self.inputs.options.cores for net in nets]


def _names(tasks: list[Task]) -> tuple[str, ...]:
    return tuple(task.name for task in tasks)


class Builder:
    """Builds of a model of *geometry* into *out*. *options* must be resolved; *release* says how its
    checkpoint is quantised, where it is; *calibration* is what ``--quantizer gptq`` goes by.

    Raises Usage and ToolFailed when *toolchain* cannot do what they ask for.
    """

    def __init__(
        self,
        out: Path,
        geometry: Geometry,
        options: CompileOptions,
        toolchain: Toolchain,
        running: Running,
        release: Release | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        refuse_unsupported(options, toolchain)
        self.release, self.calibration = release, calibration
        self.geometry, self.options, self.toolchain, self.running = geometry, options, toolchain, running
        self.outputs = Outputs(out, json.dumps([asdict(options), toolchain.identity], sort_keys=True))
        self.pack = running.request.pack and options.num_device == 1
        if self.pack != running.request.pack:
            running.say("several chips: TPU-MLIR compiles every layer, and splits it over them")
        self._refuse_compiled_layers()

    def _refuse_compiled_layers(self) -> None:
        """Raise Usage where layers would be compiled whose integers are not the compiler's."""
        wrong = "--prove" if self.running.request.prove else "" if self.pack else "--no-pack"
        if wrong and self.release is not None:
            raise Usage(
                f"{wrong} does not go with this checkpoint ({self.release}): compiling rounds again",
                hint="leave it out",
            )
        if wrong and self.options.quantizer != QUANTIZERS[0]:
            raise Usage(
                f"{wrong} does not go with --quantizer {self.options.quantizer}: compiled layers are rounded "
                "by TPU-MLIR",
                hint="leave one of them out",
            )

    def inputs(self, folder: Path, passes: tuple[str, ...], early: Early | None = None) -> Inputs:
        """The nets in *folder* as what is compiled; without *early*, before they are exported. Reads the
        weights once to know what they are, but for those whose digests *early* has."""
        from qwen_surgery.exporting.manifest import Manifest

        planned = Inputs(
            folder,
            self.geometry,
            passes,
            self.options,
            self.toolchain,
            self.outputs.logs,
            release=self.release,
        )
        if early is None:
            return planned
        manifest = Manifest.load(folder)
        refs = {part for net in manifest.nets for ref in net.weights.values() for part in ref.parts}
        digests = tensor_digests(refs, self.outputs.digests, self.running.progress, early())
        return planned.exported(manifest, digests)

    def tasks(self, inputs: Inputs, config: Mapping[str, Any], say: Callable[[str], None]) -> Items:
        """Everything behind the export."""
        if not self.pack:
            combining = [combine_task(inputs, cores) for cores in self.options.cores]
            return [*compile_tasks(inputs, inputs.nets, keep=False), *combining]
        layers = inputs.drawn_layers(self.running.request.prove)
        return Packing(inputs, config, self.outputs.previous(), layers, say, self.calibration).tasks()

    def bmodels(self) -> dict[str, Path]:
        """The tasks that make bmodels, by core count, and where in the output folder these go."""
        verb: Verb = "assemble" if self.pack else "combine"
        files = [self.options.file_name(self.geometry.seq_length, cores) for cores in self.options.cores]
        return {task_name(verb, file.name): file for file in files}

    def make(self, graph: Graph) -> BuildResult:
        """Run *graph* and put the bmodels in their place."""
        out, run = self.outputs, self.running
        runner = Runner(graph, out.store, out.logs, run.jobs, run.memory, run.executor, run.watch)
        runner.grown = lambda grown: out.want(grown.keys.values())
        done, keys = runner.run(), graph.keys
        bmodels = [
            out.place(path, keys[task], signatures(done[task].info), keys.values())
            for task, path in self.bmodels().items()
        ]
        proofs = [name for name, task in graph.tasks.items() if isinstance(task.step, Prove)]
        unpacked = {kind.value: why for kind, why in refused(done[name].info for name in proofs).items()}
        return BuildResult(bmodels, done, list(runner.progress.states), unpacked)
