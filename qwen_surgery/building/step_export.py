"""Export a checkout (patched in memory, never written) and clean what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qwen_surgery import __version__
from qwen_surgery.building.graph import Cost, Task
from qwen_surgery.building.inputs import code_digest, pass_modules
from qwen_surgery.building.request import BuildRequest
from qwen_surgery.building.sizes import MB
from qwen_surgery.building.step import PLACE, Info, Needs, Step
from qwen_surgery.nets import Geometry, NetKind

EXPORT, CLEAN = "export", "clean"
#: Where both leave the nets, inside their task's folder.
ONNX = "onnx"


@dataclass(frozen=True)
class Export(Step):
    """Export *checkout*, patched by *recipe*; ``version`` and ``code`` say which program does."""

    recipe: str
    seq_length: int
    fused_head: bool
    sampler: NetKind
    twin: bool
    version: str
    code: str
    checkout: Path = field(metadata=PLACE)
    trust_remote_code: bool = field(metadata=PLACE)

    def run(self, needs: Needs, work: Path) -> Info:
        from qwen_surgery.checkout import Checkout
        from qwen_surgery.exporting.export import export
        from qwen_surgery.patching.sources import Sources
        from qwen_surgery.twin.twin import prove, skipped
        from qwen_surgery.weights import WeightIndex

        checkout = Checkout.open(self.checkout)
        manifest = export(
            Sources.of(checkout, recipe=self.recipe, seq_length=self.seq_length),
            WeightIndex.open(self.checkout),
            checkout.geometry(self.seq_length),
            work / ONNX,
            trust_remote_code=self.trust_remote_code,
            prove=prove if self.twin else skipped,
            multi_device=self.fused_head,
            sampler=self.sampler,
        )
        return {"nets": len(manifest.nets), "weights": manifest.weights["mode"]}


@dataclass(frozen=True)
class Clean(Step):
    """Run the graph passes over the exported templates and bind every net again."""

    passes: tuple[str, ...]
    version: str
    code: str

    def run(self, needs: Needs, work: Path) -> Info:
        from qwen_surgery.exporting.cleaning import clean_export

        cleaning = clean_export(needs[EXPORT] / ONNX, work / ONNX, passes=self.passes, check="each")
        nodes = {
            report.kind.value: [sum(report.before.values()), sum(report.after.values())]
            for report in cleaning.kinds
        }
        return {"passes": list(cleaning.manifest.passes), "nodes": nodes}


def export_tasks(
    request: BuildRequest,
    digests: Mapping[str, str],
    geometry: Geometry,
    passes: tuple[str, ...],
    *,
    fused_head: bool,
    sampler: NetKind,
) -> list[Task]:
    """The export, and cleaning it unless there are no *passes*. *digests* are the sources'."""
    length, checkout = geometry.seq_length, request.checkout
    code = code_digest("qwen_surgery.exporting", "qwen_surgery.families", *pass_modules(passes))
    proof = code_digest("qwen_surgery.exporting", "qwen_surgery.twin", "qwen_surgery.runtime")
    tables = 8 * length * geometry.head_dim * (2 * geometry.layers + 4)
    graphs = (2 * geometry.layers + 10) * 100_000 + tables
    trusted = request.trust_remote_code
    made = Export(
        recipe=request.recipe,
        seq_length=length,
        fused_head=fused_head,
        sampler=sampler,
        twin=request.twin,
        version=__version__,
        code=f"{code} {proof}" if request.twin else code,
        checkout=checkout.absolute(),
        trust_remote_code=trusted,
    )
    export = Task(
        EXPORT,
        made,
        digests,
        cost=Cost(1500 * MB, graphs, 8.0),
        keep=True,
        command=f"qwen-surgery export {checkout} --seq-length {length}",
    )
    clean = Task(
        CLEAN,
        Clean(passes, __version__, code),
        needs=(EXPORT,),
        cost=Cost(1000 * MB, graphs, 6.0),
        keep=True,
        command="qwen-surgery clean (passes: " + ", ".join(passes) + ")",
    )
    return [export, clean] if passes else [export]
