"""Compile nets with TPU-MLIR: transform (ONNX to Top dialect), deploy (to a bmodel each), combine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from qwen_surgery.building.graph import Cost, Task
from qwen_surgery.building.inputs import Inputs, code_digest, pass_modules, task_name
from qwen_surgery.building.sizes import MB, bmodel_bytes, packed_bytes, weights_of
from qwen_surgery.building.step import PLACE, Info, Needs, Step
from qwen_surgery.compiling.one import NetJob, combine, deploy, deploy_args, transform, transform_args
from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.compiling.profile import PROFILE, profile_of
from qwen_surgery.nets import Net, NetKind
from qwen_surgery.toolchain import Toolchain

#: What a compiled net's folder holds beside the bmodel and its profile: the text it was made from.
FINAL_MLIR = "final.mlir"


@dataclass(frozen=True)
class NetStep(Step):
    """A step that compiles one net; ``code`` is a digest of the code that does."""

    net: Net
    passes: tuple[str, ...]
    code: str
    onnx: Path = field(metadata=PLACE)
    toolchain: Toolchain = field(metadata=PLACE)
    logs: Path = field(metadata=PLACE)

    @property
    def job(self) -> NetJob:
        return NetJob(self.net, self.onnx, bool(self.passes))


@dataclass(frozen=True)
class Transform(NetStep):
    """ONNX to Top dialect, then the passes on the Top dialect's text. The preflight lint comes first: an
    export that was not cleaned has not been through it."""

    def run(self, needs: Needs, work: Path) -> Info:
        import onnx

        from graph_passes.mlir import apply
        from qwen_surgery.exporting.cleaning import refuse_unfit
        from qwen_surgery.exporting.plain import plain_net

        with TemporaryDirectory(dir=work) as scratch:
            job = replace(self.job, onnx=plain_net(self.onnx, Path(scratch)))
            refuse_unfit(onnx.load(str(job.onnx), load_external_data=False), self.net.name)
            result = transform(job, self.toolchain, work, self.logs)
        sites: dict[str, int] = {}
        # Heads end in TopK, whose two results the passes' reader does not take; no pass has work there.
        if self.passes and self.net.kind.per_layer:
            mlir = work / self.job.mlir
            text, reports = apply(mlir.read_text(), list(self.passes))
            mlir.write_text(text)
            sites = {report.name: len(report.sites) for report in reports if report.sites}
        return {"command": list(result.command), "mlir_passes": sites}


@dataclass(frozen=True)
class Deploy(NetStep):
    """Top dialect to bmodel. The bmodel, the final text and the cycle prediction stay, the rest goes."""

    cores: int
    flags: tuple[str, ...]
    options: CompileOptions = field(metadata=PLACE)

    def run(self, needs: Needs, work: Path) -> Info:
        with _scratch(self.net.kind, work) as scratch:
            for entry in needs[task_name("transform", self.net.name)].iterdir():
                (scratch / entry.name).symlink_to(entry)
            bmodel, result = deploy(self.job, self.options, self.cores, self.toolchain, scratch, self.logs)
            final = max(scratch.glob("*_final.mlir"), key=lambda path: path.stat().st_mtime)
            kept = {bmodel: bmodel.name, final: FINAL_MLIR, profile_of(bmodel): PROFILE}
            for file in list(scratch.iterdir()):
                if file in kept:
                    shutil.move(file, work / kept[file])
                elif file.is_dir() and not file.is_symlink():
                    shutil.rmtree(file)
                else:
                    file.unlink()
        return {"command": list(result.command), "bmodel": bmodel.name}


@contextmanager
def _scratch(kind: NetKind, work: Path) -> Iterator[Path]:
    """Where to run model_deploy: in *work*, but for heads.

    TPU-MLIR leaves a byte of padding unset in what it writes of a head, and which value it has depends on how
    long the path of its folder is (12 of 12 equal with one length, 8 of 10 with ten). So heads, which are
    small, are compiled where the path always has the same length.
    """
    if not kind.chooses:
        yield work
        return
    with TemporaryDirectory(prefix="qwen-surgery-") as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Part:
    """A compiled net: the task that made it, and the file in that task's folder."""

    task: str
    file: str


@dataclass(frozen=True)
class Combine(Step):
    """Join the nets, in the order given, with TPU-MLIR's own tool."""

    file: str
    parts: tuple[Part, ...]
    toolchain: Toolchain = field(metadata=PLACE)
    logs: Path = field(metadata=PLACE)

    def run(self, needs: Needs, work: Path) -> Info:
        files = [needs[part.task] / part.file for part in self.parts]
        combine(files, work / self.file, self.toolchain, self.logs)
        return {"file": self.file}


def compile_tasks(inputs: Inputs, nets: Sequence[Net], *, keep: bool) -> list[Task]:
    """Transform and deploy of *nets*. *keep*: the bmodels outlive the build (the next packs from them)."""
    tasks = []
    for net in nets:
        tasks.append(_transform_task(inputs, net))
        tasks += [_deploy_task(inputs, net, cores, keep) for cores in inputs.options.cores]
    return tasks


def _common(inputs: Inputs, net: Net) -> tuple[Net, tuple[str, ...], str, Path, Toolchain, Path]:
    """The fields of :class:`NetStep`."""
    code = code_digest("qwen_surgery.compiling", *pass_modules(inputs.passes))
    return net, inputs.fit_passes(), code, inputs.folder / f"{net.name}.onnx", inputs.toolchain, inputs.logs


def _transform_task(inputs: Inputs, net: Net) -> Task:
    """``model_transform`` holds fp32 weights in memory several times over, and writes them once."""
    count, cleaned = weights_of(net.kind, inputs.geometry), bool(inputs.passes)
    memory = 250 * MB + (17 if cleaned else 42) * count
    seconds = 2.0 + count * (4e-8 if cleaned else 2.4e-7)
    return Task(
        task_name("transform", net.name),
        Transform(*_common(inputs, net)),
        inputs.digests(net),
        cost=Cost(memory, 4 * count + 5 * MB, seconds),
        command="model_transform " + " ".join(transform_args(inputs.job(net), inputs.toolchain)),
    )


def _deploy_task(inputs: Inputs, net: Net, cores: int, keep: bool) -> Task:
    """``model_deploy`` has the lowered weights beside the bmodel while it runs."""
    geometry, options = inputs.geometry, inputs.options
    count = weights_of(net.kind, geometry)
    seconds = 2.5 + count * 4.5e-8 + geometry.seq_length * 0.002
    flags = deploy_args(inputs.job(net), options, cores, inputs.toolchain)
    return Task(
        task_name("deploy", net.name, cores),
        Deploy(*_common(inputs, net), cores, tuple(flags), options),
        {"toolchain": inputs.toolchain.identity},
        needs=(task_name("transform", net.name),),
        cost=Cost(300 * MB + 6 * count, 2 * packed_bytes(net.kind, geometry, options), seconds),
        keep=keep,
        command="model_deploy " + " ".join(flags),
    )


def combine_task(inputs: Inputs, cores: int) -> Task:
    """The bmodel for *cores*, every net of which is compiled."""
    total = bmodel_bytes(inputs.geometry, inputs.options)
    file = inputs.bmodel(cores).name
    parts = [Part(task_name("deploy", net.name, cores), inputs.job(net).bmodel(cores)) for net in inputs.nets]
    return Task(
        task_name("combine", file),
        Combine(file, tuple(parts), inputs.toolchain, inputs.logs),
        {"toolchain": inputs.toolchain.identity},
        needs=tuple(part.task for part in parts),
        cost=Cost(300 * MB + total, total, 1.0 + total / 5e8),
        keep=True,
        command=f"model_tool --combine (of {len(parts)} nets) -o {file}",
    )
