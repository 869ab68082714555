"""``qwen-surgery patch``: apply the source and config edits to a checkout, or show what they would be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_surgery import console
from qwen_surgery.checkout import DEFAULT_RECIPE, DEFAULT_SEQ_LENGTH, Checkout
from qwen_surgery.errors import SurgeryError
from qwen_surgery.patching import edits

if TYPE_CHECKING:
    from qwen_surgery.patching.plan import Patch


@click.command("patch")
@click.argument("checkout", type=click.Path(path_type=Path))
@click.option(
    "--seq-length",
    type=click.IntRange(min=1),
    default=DEFAULT_SEQ_LENGTH,
    show_default=True,
    help="The export length S, written into config.json.",
)
@click.option(
    "--recipe",
    default=DEFAULT_RECIPE,
    show_default=True,
    metavar="NAME",
    help="Which edits: 'static' reproduces the unpatched model at every position, 'documented' makes the"
    " vendor guide's five edits and no more; or one that an installed package provides.",
)
@click.option(
    "--modeling",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="The modeling file to patch a copy of, where CHECKOUT has none of its own (default: the one of the"
    " installed transformers).",
)
@click.option("--skip", multiple=True, metavar="NAME", help="Leave out the edit NAME; may be repeated.")
@click.option("--diff", "show_diff", is_flag=True, help="Write nothing; print a diff that git apply takes.")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 when something would change.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcomes as JSON, alone on stdout.")
@click.option(
    "--sarif", type=click.Path(path_type=Path, dir_okay=False), help="Write the outcomes as SARIF 2.1.0."
)
@click.option("--quiet", "-q", is_flag=True, help="Print no outcomes and no notes, only errors.")
def command(
    checkout: Path,
    seq_length: int,
    recipe: str,
    modeling: Path | None,
    skip: tuple[str, ...],
    show_diff: bool,
    check: bool,
    as_json: bool,
    sarif: Path | None,
    quiet: bool,
) -> int:
    """Apply the source and config edits to CHECKOUT, atomically, with the originals kept for restore.

    Nothing in CHECKOUT is executed. Exit codes: 0 done or nothing to do, 1 something would change (--check),
    3 refused or a required edit declined (nothing is written), 4 the files could not be written.
    """
    from qwen_surgery.patching import plan as planning
    from qwen_surgery.patching import write

    edits.check_names(recipe, skip, Checkout.open(checkout, modeling).family)
    dry = show_diff or check
    notes: tuple[str, ...] = ()
    if dry:
        plan = planning.make(Checkout.open(checkout, modeling), recipe, seq_length, skip)
        if write.pending(checkout):
            notes = (
                "an earlier run was interrupted; patch (without --diff) or restore will finish or undo it",
            )
        _report(plan, notes, show_diff, as_json, sarif, quiet, written=False)
        planning.refuse_declined(plan)
        return 1 if check and plan.changed else 0
    try:
        done = write.patch(checkout, recipe, seq_length, skip, modeling=modeling)
    except planning.Declined as declined:
        _report(declined.plan, (), show_diff, as_json, sarif, quiet, written=False)
        raise
    _report(done.plan, done.notes, show_diff, as_json, sarif, quiet, written=True)
    return 0


def _report(
    plan: Patch,
    notes: tuple[str, ...],
    show_diff: bool,
    as_json: bool,
    sarif: Path | None,
    quiet: bool,
    *,
    written: bool,
) -> None:
    """Results to stdout (the diff, the JSON, else the outcomes), all else to stderr."""
    from qwen_surgery.patching import explaining, report, where

    prefix = where.prefix(plan.checkout.path, Path.cwd())
    diff = plan.diff(prefix) if show_diff else b""
    if sarif is not None:
        _write_sarif(sarif, report.to_sarif(plan.shown, prefix, explaining.descriptions()))
    if as_json:
        console.print_json(
            _to_json(plan, notes, diff.decode("utf-8", "replace") if show_diff else None, written)
        )
        return
    if show_diff:
        report.show_diff(diff)
    if quiet:
        return
    stream = sys.stderr if show_diff else sys.stdout
    report.show(plan.shown, stream)
    stream.flush()
    for note in (plan.revision_line(), *plan.notes, *notes, *_build_notes(plan), _last_line(plan, written)):
        console.line(note, err=True)


def _build_notes(plan: Patch) -> tuple[str, ...]:
    """Where a build of the checkout will be refused, that and why."""
    from qwen_surgery.doctor.model import why_not_build

    error = None if plan.blocking else why_not_build(plan)
    if error is None:
        return ()
    return (f"build will refuse this checkout: {error}" + (f"  ({error.hint})" if error.hint else ""),)


def _last_line(plan: Patch, written: bool) -> str:
    from qwen_surgery.patching import report

    said = report.summary(plan.shown)
    if plan.blocking:
        return f"{said}; nothing written"
    if not plan.changed:
        return f"{said}; nothing to change"
    verb = "written" if written else "would change"
    return f"{said}; {verb}: {', '.join(plan.changed)}"


def _to_json(plan: Patch, notes: tuple[str, ...], diff: str | None, written: bool) -> dict[str, Any]:
    from qwen_surgery.patching import report

    known = plan.known()
    data: dict[str, Any] = {
        "checkout": str(plan.checkout.path),
        "modeling_file": plan.checkout.modeling,
        "recipe": plan.recipe,
        "seq_length": plan.seq_length,
        "skip": list(plan.skip),
        "era": plan.era(),
        "known_revision": vars(known) | {"expected": known.expected} if known else None,
        "changed": list(plan.changed),
        "written": written and bool(plan.changed),
        "declined": bool(plan.blocking),
        "counts": report.counts(plan.shown),
        "outcomes": report.to_json(plan.shown),
        "notes": [*plan.notes, *notes, *_build_notes(plan)],
    }
    if diff is not None:
        data["diff"] = diff
    return data


def _write_sarif(path: Path, log: dict[str, Any]) -> None:
    from qwen_surgery import files

    if not path.parent.is_dir():
        raise SurgeryError(f"cannot write {path}: no such directory")
    files.write_whole(path, (json.dumps(log, indent=2) + "\n").encode())
