"""Compile one net: model_transform, then model_deploy once per core count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_surgery.compiling.options import CompileOptions, deploy_flags
from qwen_surgery.errors import ToolFailed, Usage
from qwen_surgery.nets import Net, NetKind
from qwen_surgery.toolchain import Toolchain, ToolResult
from qwen_surgery.toolchain.environment import EXPECTED


@dataclass(frozen=True)
class NetJob:
    """One net to compile: its ONNX file, whether graph passes have cleaned it, and TPU-MLIR's name for it."""

    net: Net
    onnx: Path
    cleaned: bool

    @property
    def mlir(self) -> str:
        return f"{self.net.name}.mlir"

    def bmodel(self, cores: int) -> str:
        """File name of the compiled net."""
        return f"{self.net.name}.bmodel" if cores == 1 else f"{self.net.name}_{cores}core.bmodel"


def transform_args(job: NetJob, toolchain: Toolchain) -> list[str]:
    """``model_transform``'s arguments. A cleaned graph goes through as it is: simplifying it again costs
    time and memory and may undo what the passes arranged. ``--do_onnx_sim=`` (an empty string) is the off
    switch; the word False would mean True. TPU-MLIR 1.6 has no such switch.
    """
    args = ["--model_name", job.net.name, "--model_def", str(job.onnx)]
    if job.cleaned and supports(toolchain, "model_transform", "--do_onnx_sim"):
        args += ["--do_onnx_sim="]
    return [*args, "--mlir", job.mlir]


def deploy_args(job: NetJob, options: CompileOptions, cores: int, toolchain: Toolchain) -> list[str]:
    """``model_deploy``'s arguments."""
    flags = deploy_flags(job.net.kind, options, cores)
    if "--addr_mode" not in flags:
        flags += _plain_addresses(options, toolchain)
    return ["--mlir", job.mlir, *flags, *_precision(job, toolchain), "--model", job.bmodel(cores)]


def supports(toolchain: Toolchain, tool: str, flag: str) -> bool:
    """Whether *tool* of this toolchain knows *flag* (read from the tool's own script).

    Raises ToolFailed when the script is not there.
    """
    if toolchain.origin == EXPECTED:
        return True  # the default version has every flag that is used here
    script = toolchain.root / "python/tools" / f"{tool}.py"
    try:
        return f'"{flag}"' in script.read_text(errors="replace")
    except OSError as error:
        raise ToolFailed(
            f"TPU-MLIR {toolchain.version} is incomplete: {script}: {error.strerror}",
            hint="run `qwen-surgery toolchain install --force`",
        ) from error


def refuse_unsupported(options: CompileOptions, toolchain: Toolchain) -> None:
    """Raise :class:`Usage` for an option that this TPU-MLIR version does not have."""
    wanted = {
        "--addr_mode": options.addr_mode == "io_alone",
        "--q_symmetric": options.symmetric,
        "--num_device": options.num_device > 1,
        "--num_core": 2 in options.cores,
        "--dynamic": options.dynamic or options.runs_on.sampler is NetKind.SAMPLE_HEAD,
    }
    for flag, asked in wanted.items():
        if asked and not supports(toolchain, "model_deploy", flag):
            option = (
                "--addr-mode io_alone"
                if flag == "--addr_mode"
                else flag.replace("_", "-").replace("q-s", "s")
            )
            remedy = "use --addr-mode basic, or" if flag == "--addr_mode" else "leave it out, or"
            raise Usage(
                f"TPU-MLIR {toolchain.version} has no {flag}, which {option} needs",
                hint=f"{remedy} use a newer toolchain",
            )


def transform(job: NetJob, toolchain: Toolchain, work: Path, logs: Path) -> ToolResult:
    """ONNX to Top dialect: writes ``<net>.mlir`` and its weight file into *work*."""
    args = transform_args(job, toolchain)
    return toolchain.run(
        "model_transform", args, work, logs / f"{job.net.name}.transform.log", net=job.net.name
    )


def deploy(
    job: NetJob, options: CompileOptions, cores: int, toolchain: Toolchain, work: Path, logs: Path
) -> tuple[Path, ToolResult]:
    """Top dialect to bmodel."""
    suffix = "" if cores == 1 else f".{cores}core"
    log = logs / f"{job.net.name}.deploy{suffix}.log"
    args = deploy_args(job, options, cores, toolchain)
    result = toolchain.run("model_deploy", args, work, log, net=job.net.name)
    return work / job.bmodel(cores), result


def _plain_addresses(options: CompileOptions, toolchain: Toolchain) -> list[str]:
    """``--addr_mode basic`` where TPU-MLIR would choose tagged addresses unasked: the
    vendor's demos know basic and io_alone, and take a tag for an address.
    """
    wanted = options.chip.tags_addresses and supports(toolchain, "model_deploy", "--addr_mode")
    return ["--addr_mode", "basic"] if wanted else []


def _precision(job: NetJob, toolchain: Toolchain) -> list[str]:
    """``--high_precision`` for a cleaned decode net: its fused attention then sums in float32, and in smaller
    chunks of history. That is more exact and hides more of its arithmetic (1.8B geometry, S=4096: 642,447
    cycles of attention instead of 652,263; S=512: 98,793 instead of 96,041). Prefill would get slower.
    """
    wanted = job.cleaned and job.net.kind is NetKind.BLOCK_CACHE
    return ["--high_precision"] if wanted and supports(toolchain, "model_deploy", "--high_precision") else []


def combine(bmodels: Sequence[Path], out: Path, toolchain: Toolchain, logs: Path) -> ToolResult:
    """``model_tool --combine``: one file, nets in the order given, equal weights stored once."""
    args = ["--combine", *map(str, bmodels), "-o", str(out)]
    return toolchain.run("model_tool", args, out.parent, logs / f"combine.{out.name}.log", net=out.name)
