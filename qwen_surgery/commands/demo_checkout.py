"""``demo-checkout``: a small Qwen v1 checkout with random weights, to try everything on."""

from __future__ import annotations

from pathlib import Path

import click

from qwen_surgery import console
from qwen_surgery.errors import Refused, Usage


@click.command("demo-checkout", help="Make a small Qwen v1 checkout with random weights in PATH.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--era", default="sdpa", show_default=True, help="Which era of upstream's modeling file.")
@click.option("--layers", default=2, show_default=True, type=click.IntRange(1))
@click.option("--hidden", default=128, show_default=True, type=click.IntRange(2), help="Hidden size.")
@click.option("--heads", default=2, show_default=True, type=click.IntRange(1), help="Attention heads.")
@click.option("--intermediate", type=click.IntRange(2), help="config.json's number.  [default: 4 x hidden]")
@click.option("--vocab", default=768, show_default=True, type=click.IntRange(320), help="Vocabulary rows.")
@click.option(
    "--trained-length",
    default=2048,
    show_default=True,
    type=click.IntRange(1),
    help="config.json's seq_length.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--shards", default=2, show_default=True, type=click.IntRange(1), help="Weight files.")
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice(["bf16", "f16", "f32"]))
@click.option("--tie", is_flag=True, help="Tie the output layer to the embedding.")
@click.option(
    "--lead",
    default=2.5,
    show_default=True,
    type=click.FloatRange(0),
    help="How clearly the best next token leads; bf16 and int4 want about 8.",
)
@click.option("--sparse", is_flag=True, help="Zero weights that take no disk, for measuring big geometries.")
def command(
    path: Path,
    era: str,
    layers: int,
    hidden: int,
    heads: int,
    intermediate: int | None,
    vocab: int,
    trained_length: int,
    seed: int,
    shards: int,
    dtype: str,
    tie: bool,
    lead: float,
    sparse: bool,
) -> None:
    from golden.eras import ERAS, make_checkout

    if era not in ERAS:
        raise Usage(f"no era {era!r}", hint=f"one of {', '.join(ERAS)}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise Refused(f"{path} is there and not an empty folder", hint="give a new path; nothing was written")
    try:
        make_checkout(
            path,
            era=era,
            layers=layers,
            hidden=hidden,
            heads=heads,
            intermediate=intermediate,
            vocab=vocab,
            trained_length=trained_length,
            seed=seed,
            shards=shards,
            weight_dtype=dtype,
            tie=tie,
            lead=lead,
            sparse=sparse,
        )
    except ValueError as error:
        raise Usage(str(error)) from error
    console.out().print(f"{path}: {layers} layers, hidden {hidden}, vocabulary {vocab}, era {era}")
