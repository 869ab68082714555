"""``demo-checkout``: a small Qwen v1 checkout, with trained weights or with random ones of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qwen_surgery import console, extras
from qwen_surgery.errors import Refused, Usage

#: What the trained model has fixed.
_SIZES = ("layers", "hidden", "heads", "intermediate", "vocab", "trained_length", "seed", "tie", "sparse")


@click.command("demo-checkout")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--era", default="sdpa", show_default=True, help="Which era of upstream's modeling file.")
@click.option("--shards", default=2, show_default=True, type=click.IntRange(1), help="Weight files.")
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice(["bf16", "f16", "f32"]))
@click.option(
    "--gptq",
    type=click.Choice(["int4", "int8"]),
    help="As a quantised release: GPTQ's integers, symmetric, in groups of 128 inputs.",
)
@click.option("--random", "random_weights", is_flag=True, help="Random weights, of the sizes below.")
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
@click.option("--tie", is_flag=True, help="Tie the output layer to the embedding.")
@click.option("--sparse", is_flag=True, help="Zero weights that take no disk, for measuring big geometries.")
@click.pass_context
def command(
    context: click.Context,
    path: Path,
    era: str,
    shards: int,
    dtype: str,
    gptq: str | None,
    random_weights: bool,
    **sizes: Any,
) -> None:
    """Make a small Qwen v1 checkout in PATH: a trained model that answers in words, or, with --random, random
    weights of any size.
    """
    extras.require("demo-checkout")
    from golden.eras import ERAS, make_checkout
    from golden.releases import Scheme, quantise_checkout
    from golden.speaking.model import make_chat_checkout

    if era not in ERAS:
        raise Usage(f"no era {era!r}", hint=f"one of {', '.join(ERAS)}")
    given = [
        name for name in _SIZES if context.get_parameter_source(name) != click.core.ParameterSource.DEFAULT
    ]
    if given and not random_weights:
        raise Usage(
            f"the trained model has its own {given[0].replace('_', ' ')}",
            hint="add --random for random weights",
        )
    if gptq and dtype != "bf16":
        raise Usage("--gptq quantises bf16 weights", hint="leave --dtype out")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise Refused(f"{path} is there and not an empty folder", hint="give a new path; nothing was written")
    try:
        if random_weights:
            make_checkout(path, era=era, shards=shards, weight_dtype=dtype, **sizes)
        else:
            make_chat_checkout(path, era, shards=shards, weight_dtype=dtype)
        if gptq:
            quantise_checkout(path, Scheme(int(gptq.removeprefix("int")), 128))
    except ValueError as error:
        raise Usage(str(error)) from error
    what = (
        f"{sizes['layers']} layers, hidden {sizes['hidden']}, random weights" if random_weights else "trained"
    )
    console.out().print(f"{path}: {what}, era {era}{f', GPTQ {gptq}' if gptq else ''}")
