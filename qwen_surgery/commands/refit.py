"""``qwen-surgery refit``: another fine-tune's weights in an existing bmodel."""

from __future__ import annotations

import time
from pathlib import Path

import click

from qwen_surgery import console, extras


@click.command(name="refit", help="Put the weights of CHECKOUT into MODEL.bmodel, without TPU-MLIR.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("checkout", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="File to write (default: MODEL is replaced).")
@click.option("--jobs", type=click.IntRange(min=1), help="Threads that pack (default: all cores).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON to stdout.")
def command(model: Path, checkout: Path, out: Path | None, jobs: int | None, as_json: bool) -> None:
    """The checkout has to be of the same model: sizes, rotary base, epsilon and so on are compared."""
    extras.require("refit")
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from qwen_surgery.checkout import Checkout
    from qwen_surgery.packing.refit import refit
    from qwen_surgery.weights import WeightIndex

    began = time.monotonic()
    opened = Checkout.open(checkout)
    index = WeightIndex.open(opened.path)
    columns = (TextColumn("packing {task.fields[net]}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console.err(), transient=True, disable=not console.err().is_terminal
    ) as bar:
        task = bar.add_task("pack", total=None, net="")

        def show(net: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, net=net)

        result = refit(model, opened, index, out or model, workers=jobs, progress=show)
    seconds = time.monotonic() - began
    if as_json:
        console.print_json(
            {
                "path": str(result.path),
                "size": result.size,
                "weights": result.packed,
                "untouched": list(result.untouched),
                "seconds": round(seconds, 3),
            }
        )
        return
    console.out().print(
        f"{result.path}: {result.packed / 1e6:.1f} million weights packed, {result.size / 1e6:.1f} MB, "
        f"{seconds:.1f} s"
    )
