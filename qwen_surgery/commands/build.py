"""``qwen-surgery build CHECKOUT --out DIR``: all steps, from a checkout to verified bmodels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_surgery import console, extras
from qwen_surgery.commands.calibrating import calibration_from, calibration_options
from qwen_surgery.commands.words import word_options, words_from
from qwen_surgery.compiling.flags import compile_options, options_from, run_options
from qwen_surgery.errors import Missed

if TYPE_CHECKING:
    from qwen_surgery.building.builder import BuildResult


@click.command(
    "build",
    help="Do all steps: patch (in memory), export, clean, compile, verify. CHECKOUT is never written.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("checkout", type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder; the bmodel goes to OUT/BM1684X/, what makes a build resumable to OUT/.build/.",
)
@click.option(
    "--seq-length",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Export length S: the most tokens of a conversation.",
)
@click.option("--recipe", default="static", show_default=True, help="Source edits.")
@click.option("--skip", multiple=True, metavar="NAME", help="Leave out the graph pass NAME; may be repeated.")
@click.option("--no-clean", is_flag=True, help="No graph passes at all.")
@click.option(
    "--verify",
    "depth",
    type=click.Choice(["auto", "full", "sample", "contract", "none"]),
    default="auto",
    show_default=True,
    help="full: every stage against the unpatched model, on the emulator too, and in the vendor's runtime as "
    "its demos drive it; contract: nets, shapes and types of the bmodel; sample: that, and the blocks of the "
    "first and last layer before they are compiled; auto: full where the emulator needs minutes, not hours, "
    "else sample.",
)
@click.option("--steps", type=click.IntRange(0), default=8, show_default=True, help="Decode steps verified.")
@click.option(
    "--no-twin", is_flag=True, help="Skip the proof that nets and unpatched model agree at a tiny size."
)
@click.option("--trust-remote-code", is_flag=True, help="Allow running the checkout's Python files.")
@word_options
@calibration_options
@compile_options
@run_options
def command(checkout: Path, out: Path, **given: Any) -> None:
    extras.require("build")
    from qwen_surgery.building import build, session
    from qwen_surgery.building.request import BuildRequest, RunRequest
    from qwen_surgery.checkout import Checkout
    from qwen_surgery.exporting.remote_code import require_trust
    from qwen_surgery.weights import Release

    if not given["dry_run"]:  # which runs nothing
        require_trust(given["trust_remote_code"], "build", lent=Checkout.open(checkout).lent)
    request = BuildRequest(
        checkout=checkout,
        out=out,
        options=options_from(given, checkout.absolute().name.lower(), Release.of(checkout)),
        seq_length=given["seq_length"],
        recipe=given["recipe"],
        skip=given["skip"],
        clean=not given["no_clean"],
        verify=given["depth"],
        steps=given["steps"],
        twin=not given["no_twin"],
        trust_remote_code=given["trust_remote_code"],
        toolchain=given["toolchain"],
        run=RunRequest.of(given),
        **words_from(given),
        **calibration_from(given, given["quantizer"]),
    )
    if given["dry_run"]:
        session.show_plan(build.plan(request), given["as_json"])
        return
    result = build.build(request)
    _show(result, given["as_json"])
    if not result.passed:
        raise Missed(
            "the verification missed a tolerance", hint="the bmodel is there; the table says where it differs"
        )


def _show(result: BuildResult, as_json: bool) -> None:
    from qwen_surgery.building.display import size

    if as_json:
        console.print_json(result.to_json())
        return
    found = result.report or {}
    for problem in found.get("problems", ()):
        console.err().print(f"missed: {problem}")
    if found.get("problems") == []:
        console.out().print(f"{found['nets']} nets as the runtimes count them")
    for compared in (found, found.get("sampled", {})):
        if "levels" in compared:
            _show_compared(compared)
    if result.integers:
        console.out().print(result.integers, soft_wrap=True)
    for path in result.bmodels:
        console.out().print(f"{path} ({size(path.stat().st_size)})")


def _show_compared(found: dict[str, Any]) -> None:
    from qwen_surgery.verification.results import Report
    from qwen_surgery.verification.table import make_table, misses, said_lines

    report = Report.from_json(found)
    console.out().print(make_table(report))
    for line in said_lines(report):
        console.out().print(line, soft_wrap=True)
    for line in misses(report):
        console.err().print(f"missed: {line}")
