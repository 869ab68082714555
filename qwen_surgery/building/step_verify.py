"""Verify a bmodel against the unpatched model, at the depth that this machine can afford."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qwen_surgery.building.graph import Cost, Task
from qwen_surgery.building.inputs import Inputs, code_digest, task_name
from qwen_surgery.building.request import BuildRequest
from qwen_surgery.building.sizes import MB, bmodel_bytes, weights_of
from qwen_surgery.building.step import PLACE, Info, Needs, Step
from qwen_surgery.building.step_export import ONNX
from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.nets import Geometry, Net, NetKind
from qwen_surgery.nets import inputs as net_inputs
from qwen_surgery.runtime.generations import FUSED, LOGITS, SAMPLERS, conversations
from qwen_surgery.toolchain.preload import c_compiler

#: What the emulator takes, measured: a 1.8B prefill block at S=512 is 5 minutes; the smallest net 0.05
#: seconds, or 0.9 where its idle threads cannot be made to step aside (``emulator_yield.c``).
EMULATED_RATE = 7e7  # multiply-adds a second
EMULATED_START, EMULATED_START_BUSY = 0.05, 0.9  # seconds a forward
#: A layer that two devices share is attention, its sum, MLP, and its sum: on each a net of its own.
_STEPS = 4
#: Seconds of emulation that a build spends unasked: the demos' conversations take more than half of them.
UNASKED = 600.0
#: What the unpatched model and the levels without an emulator take, about.
_REFERENCE = 30.0

_REPORT = "report.json"


@dataclass(frozen=True)
class Verify(Step):
    """Verify the bmodel that the task *made* left. Leaves the report. ``full`` runs everything against the
    unpatched model, and the demos of *runtime* in the vendor's own runtime; ``contract`` reads what the
    bmodel says of its nets.

    *exports* are the tasks with the exported folders, *toolchain* is TPU-MLIR's version where known.
    """

    file: str
    made: str
    exports: tuple[str, ...]
    depth: str
    steps: int
    recipe: str
    mode: str
    runtime: str
    geometry: Geometry
    nets: tuple[Net, ...]
    devices: int
    questions: tuple[str, ...]
    text: str
    text_tokens: int
    code: str
    checkout: Path = field(metadata=PLACE)
    trust_remote_code: bool = field(metadata=PLACE)
    toolchain: str | None = field(metadata=PLACE)

    def run(self, needs: Needs, work: Path) -> Info:
        bmodel = needs[self.made] / self.file
        if self.depth == "contract":
            report = self._contract(bmodel)
        else:
            report = self._full(bmodel, tuple(needs[task] / ONNX for task in self.exports))
        return leave_report(report, work)

    def _full(self, bmodel: Path, exported: tuple[Path, ...]) -> dict[str, Any]:
        from qwen_surgery.verification.session import Request, verify

        length = self.geometry.seq_length
        request = Request(
            checkout=self.checkout,
            onnx=exported,
            bmodels=(bmodel,),
            # The vendor's runtime finds one emulated chip: it cannot be followed on several.
            levels=("source", "onnx", "chip", *(("runtime",) if self.devices == 1 else ())),
            runtime=self.runtime,
            # A prompt of a third of S, which leaves room for decoding, and one that fills it.
            prompt_lengths=(length // 3 + 1, length),
            steps=self.steps,
            recipe=self.recipe,
            mode=self.mode,
            toolchain=self.toolchain,
            trust_remote_code=self.trust_remote_code,
            questions=self.questions,
            text=self.text,
            text_tokens=self.text_tokens,
        )
        log = partial(print, flush=True)
        return verify(request, progress=log, say=log).to_json()

    def _contract(self, bmodel: Path) -> dict[str, Any]:
        """Names, order, shapes and types of every net, against the contract and this model's sizes."""
        from qwen_surgery.packing.report import inspect

        report = inspect(bmodel)
        problems = list(report.contract)
        if [net.name for net in report.nets] != [net.name for net in self.nets]:
            problems.append("the nets are not those that were asked for, or in another order")
        for net, wanted in zip(report.nets, self.nets, strict=False):
            shapes = list(net.whole_inputs)
            expected = [tensor.shape for tensor in net_inputs(wanted.kind, self.geometry)]
            if shapes != expected:
                problems.append(f"{net.name}: inputs of {shapes}, this model has {expected}")
        return {"passed": not problems, "depth": "contract", "nets": len(report.nets), "problems": problems}


def leave_report(report: dict[str, Any], work: Path) -> Info:
    """Leave *report* in *work* for :func:`load_report`; what the task's record says of it."""
    (work / _REPORT).write_text(json.dumps(report))
    return {"passed": report["passed"]}


def load_report(folder: Path) -> dict[str, Any]:
    """The report that :func:`leave_report` left in *folder*, as JSON."""
    return dict(json.loads((folder / _REPORT).read_text()))


def depth_for(asked: str, geometry: Geometry, options: CompileOptions, steps: int) -> str:
    """What ``auto`` means for this model: ``full`` where the emulator is quick enough, else ``sample``."""
    if asked != "auto":
        return asked
    return "full" if emulated_seconds(geometry, options, steps) < UNASKED else "sample"


def emulated_seconds(geometry: Geometry, options: CompileOptions, steps: int) -> float:
    """What the emulator takes for a full verification of a bmodel of resolved *options*. Devices that share a
    layer do its work together, in more and smaller nets.

    Level chip: two prompts net by net, and end to end greedy and sampled. Level runtime: two prompts net by
    net, and in every demo's conversations.
    """
    stepped = 2 + 2 * (1 + _conversations(options))
    prefills, decodes = 2 + stepped, stepped * steps
    layers = geometry.layers * weights_of(NetKind.BLOCK, geometry)
    head = weights_of(NetKind.LM_HEAD, geometry)
    work = prefills * (geometry.seq_length * layers + head) + decodes * (layers + head)
    start = EMULATED_START if c_compiler() else EMULATED_START_BUSY
    nets = geometry.layers + 5
    if options.num_device > 1:
        nets *= _STEPS * options.num_device
    return work / EMULATED_RATE + (prefills + decodes) * nets * start


def _conversations(options: CompileOptions) -> int:
    """How many the level runtime has of one prompt; none where devices share the nets."""
    return 0 if options.num_device > 1 else conversations(options.runtime or "", _kind(options))


def _kind(options: CompileOptions) -> str:
    """What demos take a bmodel of *options* for."""
    if options.fused_head:
        return FUSED
    if not options.chip.heads:
        return LOGITS
    return next(kind for kind, head in SAMPLERS.items() if head == options.runs_on.sampler.value)


def verify_task(
    inputs: Inputs, cores: int, made: str, exports: tuple[str, ...], request: BuildRequest, depth: str
) -> Task:
    """Verify the bmodel for *cores*, which the task *made* makes, at *depth*. *exports*: see :class:`Verify`.

    On two cores TPU-MLIR's emulator gives other numbers from run to run: there it is the contract only.
    """
    file, version = inputs.bmodel(cores).name, inputs.toolchain.version
    depth = "contract" if cores > 1 or depth == "sample" else depth
    return Task(
        task_name("verify", file),
        Verify(
            file=file,
            made=made,
            exports=exports,
            depth=depth,
            steps=request.steps,
            recipe=request.recipe,
            mode=inputs.options.mode,
            runtime=inputs.options.runtime or "",
            geometry=inputs.geometry,
            nets=inputs.nets,
            devices=inputs.options.num_device,
            questions=request.questions,
            text=request.text,
            text_tokens=request.text_tokens,
            code=code_digest(
                "qwen_surgery.verification",
                "qwen_surgery.packing",
                "qwen_surgery.runtime",
                "qwen_surgery.nets",
                "qwen_surgery.tokenizer",
                "golden",
            ),
            checkout=request.checkout.absolute(),
            trust_remote_code=request.trust_remote_code,
            toolchain=None if version == "unknown" else version,
        ),
        needs=(*exports, made),
        cost=_cost(inputs, request.steps, depth),
        keep=True,
        command=_command(inputs, file, depth),
    )


def _cost(inputs: Inputs, steps: int, depth: str) -> Cost:
    if depth == "contract":
        return Cost(200 * MB, MB, 1.0)
    # For several devices the emulator gets a copy of the file.
    copied = bmodel_bytes(inputs.geometry, inputs.options) if inputs.options.num_device > 1 else 0
    seconds = _REFERENCE + emulated_seconds(inputs.geometry, inputs.options, steps)
    return Cost(2000 * MB, MB + copied, seconds)


def _command(inputs: Inputs, file: str, depth: str) -> str:
    """What is done, for a plan."""
    if depth == "contract":
        return f"check the nets, shapes and types of {file}"
    if inputs.options.num_device > 1:
        return f"verify {file} against the unpatched model, each device's part on the emulated chip"
    count = 2 * _conversations(inputs.options)
    return (
        f"verify {file} against the unpatched model, and in the vendor's runtime: {count} conversations as "
        f"the demos of {inputs.options.runtime} have them"
    )
