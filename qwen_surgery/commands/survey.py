"""``qwen-surgery survey``: every codemod on every revision of a repository, a folder or a file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen_surgery import console
from qwen_surgery.checkout import DEFAULT_RECIPE, DEFAULT_SEQ_LENGTH
from qwen_surgery.errors import Missed, Refused

if TYPE_CHECKING:
    from qwen_surgery.patching.survey import SurveyRow


@click.command("survey")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--recipe", default=DEFAULT_RECIPE, show_default=True, metavar="NAME", help="Which edits to try."
)
@click.option(
    "--seq-length",
    type=click.IntRange(min=1),
    default=DEFAULT_SEQ_LENGTH,
    show_default=True,
    help="The export length for the config edits.",
)
@click.option("--since", metavar="REV", help="Only revisions that REV does not contain (git repositories).")
@click.option(
    "--fail-on",
    multiple=True,
    type=click.Choice(["declined", "failed", "absent"]),
    help="Exit 1 when any site of any revision has this outcome; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, alone on stdout.")
@click.option("--markdown", is_flag=True, help="Print the matrix as Markdown.")
@click.option(
    "--summary",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="GITHUB_STEP_SUMMARY",
    show_envvar=True,
    help="Append the matrix as Markdown to FILE as well: the page of a CI job.",
)
@click.option("--jobs", "-j", type=click.IntRange(min=1), help="Processes to use (default: one per core).")
@click.option(
    "--record",
    metavar="ORIGIN",
    help="Add the revisions to golden's catalogue as coming from ORIGIN, with their outcomes under every"
    " built-in recipe as the expected ones.",
)
def command(
    path: Path,
    recipe: str,
    seq_length: int,
    since: str | None,
    fail_on: tuple[str, ...],
    as_json: bool,
    markdown: bool,
    summary: Path | None,
    jobs: int | None,
    record: str | None,
) -> int:
    """Try every codemod on every revision of every Qwen modeling file in PATH; change nothing.

    PATH is a git repository (bare or not; its objects are read, its work tree is not touched), a folder that
    is searched through, or one file. Files are judged by content, whatever their names.
    """
    from qwen_surgery.patching import edits, history, matrix, survey

    if as_json and markdown:
        raise click.UsageError("--json and --markdown exclude each other")
    edits.check_names(recipe, ())
    recipes = [recipe, *(r for r in edits.RECIPES if record is not None and r != recipe)]
    source = history.open_source(path, since)
    with console.progress_bars() as bars:
        rows = survey.run(source, recipes, seq_length, partial(bars, "trying the codemods"), jobs)
    if not rows and since is None:
        raise Refused(f"{path} holds no modeling code of a known family (judged by content)")
    if as_json:
        console.print_json(matrix.to_json(rows, recipe, seq_length))
    elif markdown:
        console.text(matrix.to_markdown(rows, recipe))
    else:
        matrix.show(rows, recipe)
    if summary is not None:
        with summary.open("a", encoding="utf-8") as page:
            page.write(matrix.to_page(rows, recipe, path, since))
    if record is not None:
        console.line(matrix.record(rows, record), err=True)
    return _verdict(rows, recipe, fail_on)


def _verdict(rows: list[SurveyRow], recipe: str, fail_on: tuple[str, ...]) -> int:
    from qwen_surgery.patching import matrix

    hits = matrix.having(rows, recipe, fail_on)
    if hits:
        row, outcome = hits[0]
        more = f" (and {len(hits) - 1} more)" if len(hits) > 1 else ""
        where = matrix.label(row) + (f":{outcome.line}" if outcome.line else "")
        raise Missed(f"{where}: {outcome.codemod} {outcome.status.value}: {outcome.reason}{more}")
    return 0
