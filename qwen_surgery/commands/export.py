"""``qwen-surgery export CHECKOUT --onnx-path DIR``."""

from __future__ import annotations

import atexit
import gc
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from qwen_surgery import console, extras
from qwen_surgery.errors import Usage
from qwen_surgery.nets import NetKind


@click.command(help="Export every net of CHECKOUT to ONNX (opset 15), one trace per kind of net.")
@click.argument("checkout", type=click.Path(path_type=Path))
@click.option(
    "--onnx-path", required=True, type=click.Path(path_type=Path), help="Folder to write; replaced whole."
)
@click.option(
    "--seq-length",
    type=click.IntRange(min=2),
    default=None,
    help="Export length S (default: the one CHECKOUT was patched for, else 512).",
)
@click.option(
    "--recipe",
    default=None,
    help="Source edits to trace the nets with (default: those CHECKOUT was patched with, else static).",
)
@click.option(
    "--weights",
    type=click.Choice(["link", "copy", "inline"]),
    default=None,
    help="link: hard links of the shards, nothing copied (default where the disk allows it); copy: one copy "
    "shared by all nets; inline: each file holds its own.",
)
@click.option(
    "--nets", "wanted", default="", help="Only these nets or kinds, comma-separated (block,lm_head,block_3)."
)
@click.option("--multi-device", is_flag=True, help="The lm_head with the top-1 inside, and no heads.")
@click.option("--generic", is_flag=True, help="The sampling head of --runtime llm-tpu-generic.")
@click.option(
    "--no-twin", is_flag=True, help="Skip the proof that nets and unpatched model agree at a tiny size."
)
@click.option("-v", "--verbose", is_flag=True, help="List the branches of the model's code that no twin ran.")
@click.option("--trust-remote-code", is_flag=True, help="Allow running the checkout's Python files.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest to stdout.")
def command(
    checkout: Path,
    onnx_path: Path,
    seq_length: int | None,
    recipe: str | None,
    weights: str | None,
    wanted: str,
    multi_device: bool,
    generic: bool,
    no_twin: bool,
    verbose: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    if generic and multi_device:
        raise Usage("--generic has no use with --multi-device, which exports no heads")
    extras.require("export")
    from qwen_surgery.checkout import DEFAULT_RECIPE, DEFAULT_SEQ_LENGTH, Checkout
    from qwen_surgery.exporting.export import export
    from qwen_surgery.exporting.meanwhile import meanwhile
    from qwen_surgery.exporting.placement import WeightMode
    from qwen_surgery.exporting.remote_code import require_trust
    from qwen_surgery.patching.receipt import Receipt
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.weights import WeightIndex

    opened = Checkout.open(checkout)
    require_trust(trust_remote_code, "export", lent=opened.lent)
    receipt = Receipt.load(checkout)
    patching = meanwhile(
        partial(
            Sources.of,
            opened,
            recipe=recipe or (receipt.recipe if receipt else DEFAULT_RECIPE),
            seq_length=seq_length or (receipt.seq_length if receipt else DEFAULT_SEQ_LENGTH),
        )
    )
    index = WeightIndex.open(checkout)
    # At exit torch's objects die with the process; to collect among them first takes 0.8 s of a 3 s export.
    atexit.register(gc.freeze)
    gc.disable()  # an import's objects stay: collecting among them takes a seventh of its time
    try:
        import_module("torch")
        import_module("onnx")
    finally:
        gc.enable()
    sources = patching()
    from qwen_surgery.twin.twin import prove, skipped

    with console.progress_bars() as progress:
        manifest = export(
            sources,
            index,
            opened.geometry(sources.seq_length),
            onnx_path,
            trust_remote_code=trust_remote_code,
            mode=WeightMode(weights) if weights else None,
            multi_device=multi_device,
            sampler=NetKind.SAMPLE_HEAD if generic else NetKind.PENALTY_SAMPLE_HEAD,
            wanted=[name.strip() for name in wanted.split(",") if name.strip()],
            prove=skipped if no_twin else prove,
            announce=console.err().print,
            progress=progress,
        )
    _say_twin(manifest.twin, verbose=verbose)
    if as_json:
        console.print_json(manifest.to_json())
    else:
        console.out().print(f"{len(manifest.nets)} nets in {onnx_path} (weights: {manifest.weights['mode']})")


def _say_twin(twin: dict[str, Any], *, verbose: bool) -> None:
    """One line about the proof; with *verbose* the branches that it says nothing about."""
    if "skipped" in twin:
        console.err().print(
            f"no proof that the nets compute what the unpatched model does ({twin['skipped']})"
        )
        return
    branches = twin["branches_not_entered"]
    console.err().print(
        f"twin: {twin['passes']} passes of the unpatched model agree with the nets within "
        f"{twin['worst']:.0e} ({twin['seconds']:.1f} s); {len(branches)} branches of its code did not run"
    )
    for line in branches if verbose else ():
        console.err().print(f"  {line}", markup=False)
