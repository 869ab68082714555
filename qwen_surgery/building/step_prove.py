"""Prove how a kind of net stores its weights, byte for byte: what packing the other layers stands on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_surgery.building.graph import Cost, Task
from qwen_surgery.building.inputs import Inputs, code_digest, task_name
from qwen_surgery.building.sizes import MB, weights_of
from qwen_surgery.building.step import PLACE, Info, Needs, Step
from qwen_surgery.building.step_compile import FINAL_MLIR
from qwen_surgery.nets import Net, NetKind

if TYPE_CHECKING:
    from qwen_surgery.packing.plans import PackPlan


@dataclass(frozen=True)
class Prove(Step):
    """Find and prove the plan by which *net* stores its weights. Leaves it, unless there is none."""

    net: str
    compiled: str
    bmodel: str
    packer: str
    export: Path = field(metadata=PLACE)

    def run(self, needs: Needs, work: Path) -> Info:
        import onnx

        from qwen_surgery.exporting.manifest import Manifest
        from qwen_surgery.packing.proof import Compiled, Unproven, prove

        manifest = Manifest.load(self.export)
        entry = manifest.net(self.net)
        template = onnx.load(str(self.export / manifest.template_file(entry.kind)))
        compiled = needs[self.compiled]
        try:
            plan = prove(Compiled(compiled / self.bmodel, compiled / FINAL_MLIR), template, entry.weights)
        except Unproven as error:
            return finding(entry.kind, str(error))
        save_plan(work, plan)
        return finding(entry.kind)


def save_plan(folder: Path, plan: PackPlan, name: str = "plan") -> None:
    """Leave *plan* in a task's folder."""
    (folder / f"{name}.json").write_text(json.dumps(plan.to_json()))


def load_plan(folder: Path, name: str = "plan") -> PackPlan | None:
    """A plan that a task left in its folder; None where nothing was proven."""
    from qwen_surgery.packing.plans import PackPlan

    file = folder / f"{name}.json"
    return PackPlan.from_json(json.loads(file.read_text())) if file.exists() else None


def finding(kind: NetKind, reason: str = "") -> Info:
    """What a proof says: whether *kind* can be packed, and why not."""
    return {"kind": kind.value, "reason": reason}


def refused(answers: Iterable[Mapping[str, Any]]) -> dict[NetKind, str]:
    """Kind -> why it cannot be packed, of those that findings say so of."""
    return {NetKind(said["kind"]): said["reason"] for said in answers if said["reason"]}


def prove_task(inputs: Inputs, net: Net, cores: int) -> Task:
    """The proof of *net*, which is the first of its kind, for *cores*."""
    count = weights_of(net.kind, inputs.geometry)
    compiled, bmodel = task_name("deploy", net.name, cores), inputs.job(net).bmodel(cores)
    return Task(
        task_name("prove", net.name, cores),
        Prove(net.name, compiled, bmodel, code_digest("qwen_surgery.packing"), inputs.folder),
        {"template": inputs.templates.get(net.kind, "")},
        needs=(compiled,),
        cost=Cost(200 * MB + 14 * count, 1 * MB, 0.5 + count * 5e-8),
        keep=True,
        command=f"pack {net.name} and compare every byte with TPU-MLIR's",
        expected=finding(net.kind),
    )
