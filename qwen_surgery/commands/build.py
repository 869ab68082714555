"""``qwen-surgery build CHECKOUT --out DIR``: the whole road."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_surgery import console
from qwen_surgery.compiling.flags import compile_options, options_from, run_options
from qwen_surgery.errors import Missed

if TYPE_CHECKING:
    from qwen_surgery.building.road import Outcome


@click.command(
    "build",
    help="Walk the whole road: patch (in memory), export, clean, compile, verify. CHECKOUT is never written.",
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
    type=click.Choice(["auto", "full", "contract", "none"]),
    default="auto",
    show_default=True,
    help="full: every stage against the unpatched model, on the emulator too; contract: nets, shapes and "
    "types of the bmodel; auto: full where the emulator needs minutes, not hours.",
)
@click.option("--steps", type=click.IntRange(0), default=8, show_default=True, help="Decode steps verified.")
@click.option("--trust-remote-code", is_flag=True, help="Allow running the checkout's Python files.")
@compile_options
@run_options
def command(checkout: Path, out: Path, **given: Any) -> None:
    from qwen_surgery.building import road, session
    from qwen_surgery.exporting.remote_code import require_trust

    require_trust(given["trust_remote_code"], "build")
    if given["dry_run"]:
        plan = road.plan(checkout, out, options_from(given, checkout.absolute().name.lower()), given)
        session.show_plan(plan, given["as_json"])
        return
    outcome = road.walk(checkout, out, options_from(given, checkout.absolute().name.lower()), given)
    _show(outcome, given["as_json"])
    if not outcome.passed:
        raise Missed(
            "the verification missed a tolerance", hint="the bmodel is there; the table says where it differs"
        )


def _show(outcome: Outcome, as_json: bool) -> None:
    from qwen_surgery.building.display import size

    if as_json:
        console.print_json(outcome.to_json())
        return
    if outcome.depth == "contract" and outcome.report is not None:
        for problem in outcome.report["problems"]:
            console.err().print(f"missed: {problem}", markup=False)
        if outcome.passed:
            console.out().print(f"{outcome.report['nets']} nets as the runtimes count them")
    elif outcome.report is not None:
        from qwen_surgery.building.verifying import restored
        from qwen_surgery.verification.table import make_table, misses, token_lines

        report = restored(outcome.report)
        console.out().print(make_table(report))
        for line in token_lines(report):
            console.out().print(line, markup=False, soft_wrap=True)
        for line in misses(report):
            console.err().print(f"missed: {line}", markup=False)
    for path in outcome.built.bmodels:
        console.out().print(f"{path} ({size(path.stat().st_size)})", markup=False)
