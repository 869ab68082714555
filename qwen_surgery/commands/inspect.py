"""``qwen-surgery inspect``: what is inside a bmodel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from qwen_surgery import console, extras
from qwen_surgery.compiling.options import RUNTIMES
from qwen_surgery.errors import Missed

if TYPE_CHECKING:
    from qwen_surgery.packing.report import BmodelReport, NetReport, TensorReport
    from qwen_surgery.runtime.memory import NetMemory


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _like(one: NetReport, other: NetReport) -> bool:
    return one.name.rstrip("0123456789") == other.name.rstrip("0123456789") and one.inputs == other.inputs


def _lines(net: NetReport) -> Iterator[str]:
    weights = "weights shared" if net.shared else f"weights {_size(net.weight_bytes)}"
    flags = "".join(f", {name}" for name, on in (("dynamic", net.dynamic), ("io_alone", net.io_alone)) if on)
    flags += f", on each of {len(net.devices)} devices" if len(net.devices) > 1 else ""
    yield (
        f"[bold]{escape(net.name)}[/bold]  {weights}, instructions {_size(net.instruction_bytes)}, "
        f"runtime memory {_size(net.runtime_bytes)}{flags}"
    )
    shown: list[list[str]] = []
    for device in net.devices:
        lines = list(_tensor_lines(*net.on(device)))
        if lines and lines not in shown:
            if shown:
                yield f"  on device {device}"
            shown.append(lines)
            yield from lines


def _tensor_lines(given: tuple[TensorReport, ...], gives: tuple[TensorReport, ...]) -> Iterator[str]:
    for arrow, tensors in (("in ", given), ("out", gives)):
        for tensor in tensors:
            share = ", each device's share" if tensor.share else ""
            yield f"  {arrow} {escape(tensor.name)}  {tensor.dtype} {escape(str(list(tensor.shape)))}{share}"


def _nets(report: BmodelReport, every: bool) -> Iterator[str]:
    shown: list[NetReport] = []
    for net in report.nets:
        if every or not any(_like(net, other) for other in shown):
            shown.append(net)
            yield from _lines(net)
    if len(shown) < len(report.nets):
        yield f"{len(report.nets) - len(shown)} more nets of further layers, alike (--all shows them)"


def _print(report: BmodelReport, every: bool) -> None:
    from qwen_surgery.packing.sidefile import integers_line

    out = console.out()
    out.print(
        f"{report.path}: {_size(report.size)}, {report.chip}, {report.devices} device(s), "
        f"{report.layers} layers, {len(report.nets)} nets, TPU-MLIR format {report.version}, {report.created}"
    )
    for line in _nets(report, every):
        out.print(console.styled(line))
    if report.speed:
        out.print(
            f"predicted by TPU-MLIR: first token {report.speed.first_token_ms:.2f} ms, then "
            f"{report.speed.token_ms:.2f} ms a token ({report.speed.tokens_per_second:.1f} tokens/s)"
            + (f", without {', '.join(report.speed.uncounted)}" if report.speed.uncounted else "")
        )
    else:
        out.print("no predicted speed was recorded for it")
    if report.integers:
        out.print(integers_line(report.integers, report.notes), soft_wrap=True)
    for name, text in report.notes.items():
        out.print(f"{name}: {text}")
    out.print(f"can be refitted: {report.refit}")
    for one in report.runtimes:
        verdict = f"cannot run it: {one.refusal}" if one.refusal else "wrong" if one.hazards else "runs it"
        out.print(f"{one.generation} ({one.demo}): {verdict}")
    for problem in report.contract:
        out.print(f"contract: {problem}", style="red")
    if not report.contract:
        out.print("contract with the runtimes: kept", style="green")


def _print_regions(nets: tuple[NetMemory, ...], every: bool) -> None:
    """Where inputs and outputs lie when nets share memory, in bytes from the region's start."""
    out = console.out()
    out.print("\nmemory of each net when a runtime shares it: place and size in bytes")
    seen: list[str] = []
    for net in nets:
        kind = net.name.rstrip("0123456789")
        if kind in seen and not every:
            continue
        seen.append(kind)
        region = "of its own" if net.io_alone else "shared"
        work = f", works in {net.work.size:,} shared bytes" if net.work and net.work.size else ""
        out.print(console.styled(f"[bold]{escape(net.name)}[/bold]  inputs and outputs {region}{work}"))
        for arrow, places in (("in ", net.inputs), ("out", net.outputs)):
            for place in places:
                step = f", step {place.step}" if place.step else ""
                out.print(f"  {arrow} {place.name}  {place.memory.offset:,} + {place.memory.size:,}{step}")


def _bundle(model: Path, folder: Path) -> None:
    from qwen_surgery.errors import Usage
    from qwen_surgery.packing.report import geometry_of, inspect
    from qwen_surgery.toolchain.emulator import ChipEngine
    from qwen_surgery.verification.bundle import write_bundle

    if inspect(model).devices > 1:
        raise Usage(f"--bundle is for one device, and {model.name} is for several")
    with ChipEngine(model) as chip, console.err().status("bundle") as status:
        write_bundle(model, chip, geometry_of(model), folder, lambda net: status.update(f"bundle {net}"))
    console.err().print(f"bundle: {folder}; copy it to the board with its files and run run.sh")


@click.command(name="inspect", help="Show the nets of MODEL.bmodel and check the contract with the runtimes.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON to stdout.")
@click.option("--all", "every", is_flag=True, help="Show every layer, not only the first.")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Also write inputs and expected outputs of every net, for bmrt_test on a board (runs the emulator: "
    "small models take seconds, a 1.8B one hours).",
)
@click.option("--regions", is_flag=True, help="Show where inputs and outputs lie under shared memory.")
@click.option(
    "--runtime",
    type=click.Choice(list(RUNTIMES)),
    help="Only judge by the demos that this --runtime of a build is for.  [default: by all that can read it]",
)
def command(
    model: Path, as_json: bool, every: bool, bundle: Path | None, regions: bool, runtime: str | None
) -> None:
    """Exit code 1 when the contract is not kept, 3 when MODEL is not a whole bmodel."""
    extras.require("inspect")
    from qwen_surgery.packing.report import inspect
    from qwen_surgery.runtime.memory import layout

    report = inspect(model, runtime)
    if as_json:
        console.print_json(report.to_json())
    else:
        _print(report, every)
    if regions and not as_json:
        _print_regions(layout(model, shared=True), every)
    if bundle is not None:
        _bundle(model, bundle)
    if report.contract:
        raise Missed(f"{model} does not keep the contract with the vendor's runtimes")
