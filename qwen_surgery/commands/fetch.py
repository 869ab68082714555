"""``qwen-surgery fetch NAME``: get a checkout from a hub."""

from __future__ import annotations

from pathlib import Path

import click

from qwen_surgery import console


@click.command("fetch")
@click.argument("name")
@click.argument("dest", required=False, type=click.Path(path_type=Path))
@click.option(
    "--from",
    "source",
    type=click.Choice(["hf", "modelscope"]),
    default="hf",
    show_default=True,
    help="Which hub: Hugging Face or ModelScope.",
)
@click.option("--revision", metavar="REV", help="A branch, a tag or a commit (default: the newest).")
@click.option("--code-only", is_flag=True, help="No weights: enough for survey, patch and a dry run.")
@click.option(
    "--endpoint",
    metavar="URL",
    help="Another address of the hub, such as a mirror's. It gets no token of yours; HF_ENDPOINT and"
    " MODELSCOPE_ENDPOINT, which the clients read themselves, may.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was fetched as JSON, alone on stdout.")
def command(
    name: str,
    dest: Path | None,
    source: str,
    revision: str | None,
    code_only: bool,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Get the files of NAME that are needed into DEST (default: ./ and the model's name).

    NAME is ORG/REPOSITORY, or a Qwen model's name alone: Qwen-7B-Chat. The hub's own client transfers, and
    goes on where an earlier run stopped; sizes and hashes are checked after it. Only config.json,
    generation_config.json, tokenizer files, Python files, and weights in one format are fetched. Nothing is
    overwritten and nothing is run.

    The vendor's dfss is no choice here: it tells neither sizes nor hashes and cannot go on where it stopped
    (docs/fetch.md).
    """
    from qwen_surgery.fetching.fetch import fetch
    from qwen_surgery.fetching.hubs import HUBS
    from qwen_surgery.fetching.names import repository

    repo = repository(name)
    folder = dest or Path(repo.rpartition("/")[2])
    done = fetch(
        HUBS[source](endpoint),
        repo,
        folder,
        revision=revision,
        code_only=code_only,
        say=lambda text: console.line(text, err=True),
    )
    if as_json:
        console.print_json(done.to_json())
    else:
        console.line(str(folder))
