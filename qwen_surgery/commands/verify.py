"""``qwen-surgery verify CHECKOUT``: every stage against the unpatched model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_surgery import console, extras
from qwen_surgery.commands.words import word_options, words_from
from qwen_surgery.compiling.options import RUNTIMES
from qwen_surgery.errors import Missed, Usage

if TYPE_CHECKING:
    from qwen_surgery.verification.results import Report


def _numbers(
    _context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(",") if part.strip())
    except ValueError:
        raise click.BadParameter("whole numbers, comma-separated", param=parameter) from None


@click.command("verify", help="Compare patched code, exported nets and bmodel with the unpatched model.")
@click.argument("checkout", type=click.Path(path_type=Path))
@click.option(
    "--onnx",
    "onnx",
    multiple=True,
    type=click.Path(path_type=Path),
    help="An exported folder; give it twice for raw and cleaned.",
)
@click.option(
    "--bmodel",
    "bmodels",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A compiled model, run on the emulator (slow); may be repeated, one for each mode.",
)
@click.option(
    "--level",
    "levels",
    multiple=True,
    type=click.Choice(["source", "onnx", "mlir", "chip", "runtime"]),
    help="Only these levels (runtime follows the vendor's demos call by call).  "
    "[default: source, and what --onnx and --bmodel allow]",
)
@click.option(
    "--runtime",
    type=click.Choice(list(RUNTIMES)),
    help="Level runtime: only the demos that this --runtime of a build is for.  "
    "[default: all that can read the bmodel]",
)
@click.option("--layers", callback=_numbers, help="Only these layers, such as 0,15,31 (no end-to-end then).")
@click.option(
    "--nets", default="", help="Only these nets or kinds, such as lm_head,block (no end-to-end then)."
)
@click.option(
    "--sample",
    is_flag=True,
    help="With --layers and --nets: run no layer between the chosen ones, and hold one net in memory. Quick, "
    "but their inputs are not the whole model's.",
)
@click.option(
    "--steps", default=8, show_default=True, type=click.IntRange(0), help="Decode steps end to end."
)
@click.option("--prompt-lengths", callback=_numbers, help="Prompt lengths.  [default: 1, S/3+1, S-1, S]")
@click.option("--seq-length", type=click.IntRange(2), help="Export length S.  [default: as exported, or 512]")
@click.option("--recipe", help="Source edits to verify.  [default: as exported, or static]")
@click.option(
    "--mode",
    type=click.Choice(["bf16", "f16", "int8", "int4"]),
    help="The bmodel's mode.  [default: by its name]",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), help="For prompts and sampling."
)
@word_options
@click.option("--toolchain", metavar="VERSION", help="TPU-MLIR version for levels mlir, chip and runtime.")
@click.option("--every-net", is_flag=True, help="A table row for every single check.")
@click.option("--json", "as_json", is_flag=True, help="Print the report to stdout as JSON.")
@click.option("--html", type=click.Path(path_type=Path), help="Also write a page with plots, one file.")
@click.option("--trust-remote-code", is_flag=True, help="Allow running the checkout's Python files.")
def command(
    checkout: Path,
    onnx: tuple[Path, ...],
    bmodels: tuple[Path, ...],
    levels: tuple[str, ...],
    runtime: str | None,
    layers: tuple[int, ...] | None,
    nets: str,
    sample: bool,
    steps: int,
    prompt_lengths: tuple[int, ...] | None,
    seq_length: int | None,
    recipe: str | None,
    mode: str | None,
    seed: int,
    toolchain: str | None,
    every_net: bool,
    as_json: bool,
    html: Path | None,
    trust_remote_code: bool,
    **words: Any,
) -> None:
    extras.require("verify")
    if html is not None:  # said before the work, not after it
        extras.need("--html", "report")
    from qwen_surgery.verification.measured import remember
    from qwen_surgery.verification.session import Request, verify

    if layers == () or prompt_lengths == ():
        raise Usage("an empty list of layers or lengths would compare nothing")
    if runtime is not None and "runtime" not in levels:
        raise Usage("--runtime is for level runtime", hint="add --level runtime")
    if sample and not (layers and nets and all(name.startswith("block") for name in nets.split(","))):
        raise Usage("--sample is for some layers' blocks", hint="add --layers and --nets block,block_cache")
    request = Request(
        checkout=checkout,
        onnx=onnx,
        bmodels=bmodels,
        levels=levels,
        runtime=runtime,
        layers=layers,
        nets=tuple(name.strip() for name in nets.split(",") if name.strip()),
        sample=sample,
        steps=steps,
        prompt_lengths=prompt_lengths or (),
        seq_length=seq_length,
        recipe=recipe,
        mode=mode,
        seed=seed,
        toolchain=toolchain,
        trust_remote_code=trust_remote_code,
        **words_from(words),
    )
    with console.err().status("verify") as status:
        report = verify(
            request,
            progress=lambda what: status.update(f"verify {what}"),
            say=lambda text: console.err().print(text),
        )
    remember(report, bmodels)
    _show(report, as_json=as_json, every_net=every_net)
    if html is not None:
        from qwen_surgery.verification.page import write_page

        write_page(report, html, request)
        console.err().print(f"page: {html}")
    if not report.passed:
        raise Missed(f"{sum(len(level.missed) for level in report.levels)} checks missed their tolerance")


def _show(report: Report, *, as_json: bool, every_net: bool) -> None:
    from qwen_surgery.verification.table import make_table, misses, said_lines

    if as_json:
        console.print_json(report.to_json())
        return
    console.out().print(make_table(report, every_net=every_net))
    for line in said_lines(report):
        console.out().print(line, soft_wrap=True)
    seconds = ", ".join(
        f"{level.level} {level.mode} {level.name} {level.seconds:.1f} s" for level in report.levels
    )
    console.err().print(f"{seconds}; largest process {report.peak_rss / 2**20:.0f} MiB")
    for line in misses(report):
        console.err().print(f"missed: {line}")
