"""``qwen-surgery doctor [CHECKOUT]``: what there is, what a build takes, what will fail, what mends it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_surgery import console
from qwen_surgery.checkout import DEFAULT_RECIPE, DEFAULT_SEQ_LENGTH
from qwen_surgery.compiling.flags import compile_options, options_from
from qwen_surgery.errors import Refused

if TYPE_CHECKING:
    from qwen_surgery.doctor.remarks import Remark
    from qwen_surgery.weights import Release

_WIDTH, _NAMES = 80, 19


@click.command("doctor", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkout", required=False, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="As for build."
)
@click.option(
    "--seq-length",
    type=click.IntRange(min=2),
    default=DEFAULT_SEQ_LENGTH,
    show_default=True,
    help="As for build.",
)
@click.option("--recipe", default=DEFAULT_RECIPE, show_default=True, metavar="NAME", help="Source edits.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, alone on stdout.")
@compile_options
def command(
    checkout: Path | None, out: Path, seq_length: int, recipe: str, as_json: bool, **given: Any
) -> int:
    """Say whether a build will work: of this machine, and of CHECKOUT with the options that build would get.

    Nothing is run and nothing is written. Exit codes: 0 nothing will fail, 3 something will. A line marked
    FAIL is followed by what mends it, where anything does. `toolchain doctor` starts TPU-MLIR's tools too.
    """
    from qwen_surgery.building.request import BuildRequest
    from qwen_surgery.doctor import machine, model
    from qwen_surgery.doctor.remarks import Health

    version = given["toolchain"]
    parts, plan = {"machine": list(machine.remarks(version))}, None
    if checkout is not None:
        options = options_from(given, checkout.absolute().name.lower(), _release(checkout))
        request = BuildRequest(checkout, out, options, seq_length, recipe, toolchain=version)
        parts["build"], plan = model.remarks(request)
    well = all(remark.health is not Health.FAIL for part in parts.values() for remark in part)
    if as_json:
        shown = {part: [vars(remark) for remark in found] for part, found in parts.items()}
        console.print_json({"well": well, **shown, "plan": plan})
    else:
        _show(parts, checkout)
    return 0 if well else 3


def _release(checkout: Path) -> Release | None:
    """How *checkout* is quantised; what cannot be kept is said of its weights."""
    from qwen_surgery.weights import Release

    try:
        return Release.of(checkout)
    except Refused:
        return None


def _show(parts: dict[str, list[Remark]], checkout: Path | None) -> None:
    titles = {"machine": "this machine", "build": f"a build of {checkout}"}
    for part, found in parts.items():
        console.line(titles[part])
        for remark in found:
            _line(f"  {remark.health.value:4}  {remark.what:13}", remark.found)
            if remark.mend:
                _line(f"{'':{_NAMES}}->", remark.mend)


def _line(head: str, rest: str) -> None:
    indent = " " * (_NAMES + (3 if head.endswith("->") else 2))
    start = f"{head} " if head.endswith("->") else f"{head:{_NAMES + 2}}"
    wrapped = textwrap.wrap(
        console.printable(rest), _WIDTH - len(indent), break_long_words=False, break_on_hyphens=False
    )
    console.line(start + wrapped[0])
    for more in wrapped[1:]:
        console.line(indent + more)
