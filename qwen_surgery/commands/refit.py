"""``qwen-surgery refit``: another fine-tune's weights in an existing bmodel."""

from __future__ import annotations

import time
from pathlib import Path

import click

from qwen_surgery import console, extras
from qwen_surgery.compiling.options import QUANTIZERS


@click.command(name="refit", help="Put the weights of CHECKOUT into MODEL.bmodel, without TPU-MLIR.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("checkout", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="File to write (default: MODEL is replaced).")
@click.option(
    "--quantizer",
    type=click.Choice(QUANTIZERS),
    help="How integers are chosen: rtn rounds as the compiler does, search takes for each group of weights "
    "the scale that loses least.  [default: as MODEL was made]",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Threads that pack (default: all cores).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON to stdout.")
def command(
    model: Path, checkout: Path, out: Path | None, quantizer: str | None, jobs: int | None, as_json: bool
) -> None:
    """The checkout has to be of the same model: sizes, rotary base, epsilon and so on are compared."""
    extras.require("refit")
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from qwen_surgery.checkout import Checkout
    from qwen_surgery.errors import Usage
    from qwen_surgery.packing import sidefile
    from qwen_surgery.packing.refit import quantised, refit
    from qwen_surgery.quantising import by_name
    from qwen_surgery.weights import WeightIndex

    began = time.monotonic()
    opened = Checkout.open(checkout)
    index = WeightIndex.open(opened.path)
    side = sidefile.load(model)
    if quantizer is not None and not quantised(side):
        raise Usage(f"--quantizer has no effect: {model} keeps no weight as integers", hint="leave it out")
    chosen = quantizer or side.notes.get("quantizer", QUANTIZERS[0])
    columns = (TextColumn("packing {task.fields[net]}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console.err(), transient=True, disable=not console.err().is_terminal
    ) as bar:
        task = bar.add_task("pack", total=None, net="")

        def show(net: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, net=net)

        result = refit(
            model,
            opened,
            index,
            out or model,
            quantise=by_name(chosen),
            quantizer=chosen,
            workers=jobs,
            progress=show,
        )
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
