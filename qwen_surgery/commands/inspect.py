"""``qwen-surgery inspect``: what is inside a bmodel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen_surgery import console
from qwen_surgery.errors import Missed

if TYPE_CHECKING:
    from rich.table import Table

    from qwen_surgery.packing.report import NetReport, Report, TensorReport


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _tensors(tensors: tuple[TensorReport, ...]) -> str:
    return "\n".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in tensors)


def _like(one: NetReport, other: NetReport) -> bool:
    return one.name.rstrip("0123456789") == other.name.rstrip("0123456789") and one.inputs == other.inputs


def _table(report: Report, every: bool) -> Table:
    from rich.table import Table

    table = Table("net", "inputs", "outputs", "weights", "instructions", "runtime memory", "flags")
    shown: list[NetReport] = []
    for net in report.nets:
        if not every and any(_like(net, other) for other in shown):
            continue
        shown.append(net)
        flags = [f for f, on in (("dynamic", net.dynamic), ("io_alone", net.io_alone)) if on]
        weights = "shared" if net.shared else _size(net.weight_bytes)
        table.add_row(
            net.name, _tensors(net.inputs), _tensors(net.outputs), weights,
            _size(net.instruction_bytes), _size(net.runtime_bytes), " ".join(flags),
        )  # fmt: skip
    return table


def _print(report: Report, every: bool) -> None:
    out = console.out()
    out.print(
        f"{report.path}: {_size(report.size)}, {report.chip}, {report.devices} device(s), "
        f"{report.layers} layers, {len(report.nets)} nets, TPU-MLIR format {report.version}, {report.created}"
    )
    out.print(_table(report, every))
    if not every and len(report.nets) > len({n.name.rstrip("0123456789") for n in report.nets}):
        out.print("layers after the first are alike and left out (--all shows them)")
    if report.speed:
        out.print(
            f"predicted by TPU-MLIR: first token {report.speed.first_token_ms:.2f} ms, then "
            f"{report.speed.token_ms:.2f} ms a token ({report.speed.tokens_per_second:.1f} tokens/s)"
        )
    else:
        out.print("no predicted speed was recorded for it")
    for name, text in report.notes.items():
        out.print(f"{name}: {text}")
    out.print(f"can be refitted: {report.refit}")
    for problem in report.contract:
        out.print(f"contract: {problem}", style="red")
    if not report.contract:
        out.print("contract with the runtimes: kept", style="green")


@click.command(name="inspect", help="Show the nets of MODEL.bmodel and check the contract with the runtimes.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON to stdout.")
@click.option("--all", "every", is_flag=True, help="Show every layer, not only the first.")
def command(model: Path, as_json: bool, every: bool) -> None:
    """Exit code 1 when the contract is not kept, 3 when MODEL is not a whole bmodel."""
    from qwen_surgery.packing.report import inspect

    report = inspect(model)
    if as_json:
        console.print_json(report.to_json())
    else:
        _print(report, every)
    if report.contract:
        raise Missed(f"{model} does not keep the contract with the vendor's runtimes")
