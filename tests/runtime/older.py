"""Bmodels with the memory of this project's first files, and of the vendor's documented flow, from parts that
are compiled today: only block_cache has addresses of its own, dynamic nets keep their constant shapes, and
the decode nets are dynamic too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from graph_passes.mlir import apply
from qwen_surgery.compiling.one import NetJob, combine, deploy_args, transform
from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.nets import Net, NetKind
from qwen_surgery.toolchain import Toolchain
from tests.building.test_build import cli


@dataclass(frozen=True)
class OlderNets:
    """Nets exported and cleaned into *folder* by the passes of then; *work* is where they are compiled."""

    folder: Path
    work: Path
    layers: int
    passes: tuple[str, ...]

    def bmodel(self, mode: str, *, dynamic: bool = False, runtime: str = "llm-tpu") -> Path:
        """All of them in one file."""
        toolchain = Toolchain.find()
        options = CompileOptions(mode, dynamic=dynamic, runtime=runtime).resolved()
        work = self.work / f"{mode}{'-dynamic' if dynamic else ''}"
        work.mkdir(parents=True)
        parts = [self._compiled(net, options, work, toolchain) for net in options.nets(self.layers)]
        bmodel = work / f"older_{mode}_1dev.bmodel"
        combine(parts, bmodel, toolchain, work)
        return bmodel

    def _compiled(self, net: Net, options: CompileOptions, work: Path, toolchain: Toolchain) -> Path:
        job = NetJob(net, self.folder / f"{net.name}.onnx", cleaned=True)
        transform(job, toolchain, work, work)
        if net.kind.per_layer:
            mlir = work / job.mlir
            mlir.write_text(apply(mlir.read_text(), self.passes)[0])
        decode = net.kind is NetKind.BLOCK_CACHE
        then = replace(options, addr_mode="io_alone" if decode else "basic")
        arguments = deploy_args(job, then, 1, toolchain)
        if decode and options.dynamic:
            arguments.append("--dynamic")
        toolchain.run("model_deploy", arguments, work, work / f"{net.name}.log", net=net.name)
        return work / job.bmodel(1)


def older_nets(checkout: Path, folder: Path, seq_length: int, *flags: str) -> OlderNets:
    """The nets of *checkout* in *folder*; *flags* are those of its export."""
    nets = folder / "nets"
    size = ("--seq-length", seq_length, "--no-twin", "--trust-remote-code")
    cli("export", checkout, "--onnx-path", nets, *size, *flags)
    cli("clean", nets, "--skip", "free-length")
    manifest = json.loads((nets / "manifest.json").read_text())
    return OlderNets(nets, folder, manifest["geometry"]["layers"], tuple(manifest["passes"]))
