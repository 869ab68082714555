"""``qwen-surgery refit``: another fine-tune's weights in an existing bmodel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from qwen_surgery import console, extras
from qwen_surgery.commands.calibrating import calibration_from, calibration_options
from qwen_surgery.compiling.options import GPTQ, QUANTIZERS, SEARCH

if TYPE_CHECKING:
    from qwen_surgery.checkout import Checkout
    from qwen_surgery.packing.refit import Choose

#: Shows a phase, how much of it is done and of how much.
Bars = Callable[[str, int, int], None]


@click.command(name="refit", help="Put the weights of CHECKOUT into MODEL.bmodel, without TPU-MLIR.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("checkout", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="File to write (default: MODEL is replaced).")
@click.option(
    "--quantizer",
    type=click.Choice(QUANTIZERS),
    help="How integers are chosen: rtn rounds as the compiler does, search takes for each group of weights "
    "the scale that loses least, gptq makes up for each error by what a text shows of the model (it runs the "
    "checkout's code).  [default: as MODEL was made]",
)
@calibration_options
@click.option("--trust-remote-code", is_flag=True, help="Allow gptq to run the checkout's Python files.")
@click.option("--jobs", type=click.IntRange(min=1), help="Threads that pack (default: all cores).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON to stdout.")
def command(
    model: Path,
    checkout: Path,
    out: Path | None,
    quantizer: str | None,
    trust_remote_code: bool,
    jobs: int | None,
    as_json: bool,
    **calibration: Any,
) -> None:
    """The checkout has to be of the same model: sizes, rotary base, epsilon and so on are compared."""
    extras.require("refit")
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
    text = calibration_from(calibration, chosen)
    if chosen == GPTQ:
        _check_gptq(opened, trust_remote_code)
    with console.progress_bars() as bars, _choosing(opened, out or model, chosen, text, bars) as choose:
        result = refit(
            model,
            opened,
            index,
            out or model,
            quantise=by_name(chosen),
            quantizer=chosen,
            choose=choose,
            workers=jobs,
            progress=lambda _net, done, total: bars("packing", done, total),
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


def _check_gptq(opened: Checkout, trusted: bool) -> None:
    """Raises Usage where gptq cannot run, or has nothing to choose."""
    from qwen_surgery.errors import Usage
    from qwen_surgery.exporting.remote_code import require_trust
    from qwen_surgery.weights import Release

    extras.need(f"--quantizer {GPTQ}", "export", "compile", "verify")
    release = Release.of(opened.path)
    if release is not None:
        raise Usage(
            f"--quantizer {GPTQ} does not go with this checkpoint ({release}): its integers are kept",
            hint=f"use --quantizer {SEARCH} for the lm_head",
        )
    require_trust(trusted, f"--quantizer {GPTQ}", lent=opened.lent)


@contextmanager
def _choosing(
    opened: Checkout, output: Path, quantizer: str, text: dict[str, Any], bars: Bars
) -> Iterator[Choose | None]:
    """What chooses integers before any is packed, and where they lie meanwhile: beside *output*."""
    if quantizer != GPTQ:
        yield None
        return
    from qwen_surgery.quantising.whole import quantise

    with TemporaryDirectory(prefix=".quantised-", dir=output.absolute().parent) as folder:
        yield lambda side, tensors: quantise(
            opened,
            text["calibration"],
            text["calibration_tokens"],
            side,
            tensors,
            Path(folder),
            lambda _net, done, total: bars("quantising", done, total),
        )
