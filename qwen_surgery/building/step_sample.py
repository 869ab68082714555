"""Compare the first and the last layer of a model with the unpatched model's, in seconds for any depth."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from qwen_surgery.building.graph import Cost, Task
from qwen_surgery.building.inputs import Inputs, code_digest, task_name
from qwen_surgery.building.request import BuildRequest
from qwen_surgery.building.sizes import MB, weights_of
from qwen_surgery.building.step import PLACE, Info, Needs, Step
from qwen_surgery.building.step_export import ONNX
from qwen_surgery.building.step_verify import leave_report
from qwen_surgery.nets import Geometry, NetKind
from qwen_surgery.verification import duration

#: A prefill net whose scores take more bytes is left out: the decode net has the same weights.
_MOST_SCORES = 4 << 30
#: Seconds that torch, the checkout's code and onnxruntime take before anything runs.
_START = 6.0


@dataclass(frozen=True)
class Sample(Step):
    """Verify the blocks of *layers* at the levels source and onnx, which need no emulator: each net with its
    own weights against the unpatched model's layer. Leaves the report.

    *exported* is the task with the exported folder: where it is cleaned, the clean one, as cleaning compares
    the two.
    """

    exported: str
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
            onnx=(needs[self.exported] / ONNX,),
            layers=self.layers,
            nets=self.nets,
            prompt_lengths=(self.prompt,),
            recipe=self.recipe,
            sample=True,
            trust_remote_code=self.trust_remote_code,
        )
        return leave_report(verify(request, progress=partial(print, flush=True)).to_json(), work)


def _sampled_nets(geometry: Geometry) -> tuple[NetKind, ...]:
    """The kinds of block whose nets a machine can run: without prefill where that takes much memory."""
    fits = _scores(geometry) <= _MOST_SCORES
    return (NetKind.BLOCK, NetKind.BLOCK_CACHE) if fits else (NetKind.BLOCK_CACHE,)


def _scores(geometry: Geometry) -> int:
    """Bytes of a prefill net's scores: about three float32 arrays [heads, S, S] live at once."""
    return 3 * 4 * geometry.heads * geometry.seq_length**2


def sample_task(inputs: Inputs, exported: str, request: BuildRequest) -> Task:
    """Verify the first and the last layer of what the task *exported* leaves."""
    geometry = inputs.geometry
    layers = tuple(sorted({0, geometry.layers - 1}))
    kinds = _sampled_nets(geometry)
    return Task(
        task_name("sample", "blocks"),
        Sample(
            exported=exported,
            layers=layers,
            nets=tuple(kind.value for kind in kinds),
            prompt=geometry.seq_length // 3 + 1,
            recipe=request.recipe,
            code=code_digest("qwen_surgery.verification", "qwen_surgery.nets", "golden"),
            checkout=request.checkout.absolute(),
            trust_remote_code=request.trust_remote_code,
        ),
        needs=(exported,),
        cost=_cost(geometry, len(layers), kinds),
        keep=True,
        command=f"compare the {' and '.join(kind.value for kind in kinds)} of layers "
        f"{' and '.join(map(str, layers))} with the unpatched model's, in torch and onnxruntime",
    )


def _cost(geometry: Geometry, layers: int, kinds: tuple[NetKind, ...]) -> Cost:
    """The unpatched layer and each engine's nets read a prompt and a step; a prefill net reads S rows."""
    weights = weights_of(NetKind.BLOCK, geometry)
    prefill = NetKind.BLOCK in kinds
    engine = [geometry.seq_length, 1] if prefill else [1]
    passes = [geometry.seq_length // 3 + 1, 1, *engine * 2]
    memory = 800 * MB + 8 * weights + (_scores(geometry) if prefill else 0)
    return Cost(memory, MB, _START + layers * duration.seconds(weights, passes))
