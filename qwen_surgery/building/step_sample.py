"""Compare the first and the last layer of a model with the unpatched model's, in seconds for any depth."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from qwen_surgery.building.graph import Cost, Task
from qwen_surgery.building.inputs import Inputs, code_digest, task_name
from qwen_surgery.building.request import BuildRequest
from qwen_surgery.building.sizes import MB, weights_of
from qwen_surgery.building.step import PLACE, Info, Needs, Step
from qwen_surgery.building.step_export import ONNX
from qwen_surgery.nets import Geometry, NetKind

#: A prefill net computes [heads, S, S] scores in float32, and holds three such arrays. Beyond this many bytes
#: of them it is left out: the decode net has the same weights.
_SCORES = 4 << 30
#: Measured on two cores, the wall seconds a block takes: 1.3e9 weights a second are read, converted and
#: bound, and 2e10 multiply-adds a second run.
_READ_RATE, _COMPUTE_RATE = 2e8, 2e10
#: What torch, the checkout's code and onnxruntime take before anything runs.
_START = 6.0
_REPORT = "report.json"


@dataclass(frozen=True)
class Sample(Step):
    """Verify the blocks of *layers* at the levels source and onnx, which need no emulator: each net with its
    own weights against the unpatched model's layer. Leaves the report.

    *exports* are the tasks with the exported folders.
    """

    exports: tuple[str, ...]
    layers: tuple[int, ...]
    nets: tuple[str, ...]
    prompt: int
    recipe: str
    code: str
    checkout: Path = field(metadata=PLACE)
    trust_remote_code: bool = field(metadata=PLACE)

    def run(self, needs: Needs, work: Path) -> Info:
        from qwen_surgery.verification.session import Request, verify

        request = Request(
            checkout=self.checkout,
            onnx=tuple(needs[task] / ONNX for task in self.exports),
            layers=self.layers,
            nets=self.nets,
            prompt_lengths=(self.prompt,),
            recipe=self.recipe,
            sample=True,
            trust_remote_code=self.trust_remote_code,
        )
        report = verify(request, progress=partial(print, flush=True)).to_json()
        (work / _REPORT).write_text(json.dumps(report))
        return {"passed": report["passed"]}


def sampled_nets(geometry: Geometry) -> tuple[NetKind, ...]:
    """The kinds of block whose nets this machine can run: without prefill where that takes much memory."""
    fits = 3 * 4 * geometry.heads * geometry.seq_length**2 <= _SCORES
    return (NetKind.BLOCK, NetKind.BLOCK_CACHE) if fits else (NetKind.BLOCK_CACHE,)


def sample_task(inputs: Inputs, exports: tuple[str, ...], request: BuildRequest) -> Task:
    """Verify the first and the last layer of what the tasks *exports* leave."""
    geometry = inputs.geometry
    layers = tuple(sorted({0, geometry.layers - 1}))
    nets = tuple(kind.value for kind in sampled_nets(geometry))
    return Task(
        task_name("sample", "blocks"),
        Sample(
            exports=exports,
            layers=layers,
            nets=nets,
            prompt=geometry.seq_length // 3 + 1,
            recipe=request.recipe,
            code=code_digest(
                "qwen_surgery.verification", "qwen_surgery.exporting", "qwen_surgery.nets", "golden"
            ),
            checkout=request.checkout.absolute(),
            trust_remote_code=request.trust_remote_code,
        ),
        needs=exports,
        cost=_cost(geometry, len(layers), len(nets), len(exports)),
        keep=True,
        command=f"qwen-surgery verify {request.checkout} --layers {','.join(map(str, layers))} "
        f"--nets {','.join(nets)} --sample",
    )


def _cost(geometry: Geometry, layers: int, nets: int, folders: int) -> Cost:
    """The unpatched layers run twice (prompt and step), every other engine's net once."""
    weights = weights_of(NetKind.BLOCK, geometry)
    prompt = geometry.seq_length // 3 + 1
    engines = 1 + folders
    loads = layers * (2 + nets * engines)
    rows = layers * (prompt + (geometry.seq_length * engines if nets > 1 else engines))
    seconds = _START + loads * weights / _READ_RATE + rows * weights / _COMPUTE_RATE
    scores = 3 * 4 * geometry.heads * geometry.seq_length**2 if nets > 1 else 0
    return Cost(800 * MB + 8 * weights + scores, MB, seconds)
