"""What cleaning an export costs: wall time, processor time and peak memory of ``qwen-surgery clean``.

    python benchmarks/clean.py --geometry 7B --seq-length 512 --seq-length 2048 --seq-length 8192

Makes a sparse checkout (a few megabytes whatever the geometry), exports it, and cleans the export in a
process of its own, with the equality check after every pass.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import click

from golden import cycles
from qwen_surgery import console

LAYERS = {"tiny": 2, "1.8B": 24, "7B": 32, "14B": 40, "72B": 80}


@click.command(help=__doc__.splitlines()[0] if __doc__ else "")
@click.option("--geometry", type=click.Choice(list(LAYERS)), default="7B", show_default=True)
@click.option(
    "--seq-length", "lengths", type=int, multiple=True, default=(512, 2048, 8192), show_default=True
)
@click.option("--check", type=click.Choice(["each", "end", "off"]), default="each", show_default=True)
def main(geometry: str, lengths: tuple[int, ...], check: str) -> None:
    console.out().print("| geometry | layers | S | nets | wall s | CPU s | peak MB |")
    console.out().print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for length in lengths:
            folder = Path(work) / str(length)
            nets = exported(geometry, length, folder)
            wall, processor, peak = measured(folder / "onnx", folder / "cleaned", check)
            console.out().print(
                f"| {geometry} | {LAYERS[geometry]} | {length} | {nets} | {wall:.1f} | {processor:.1f} | "
                f"{peak:.0f} |"
            )


def exported(geometry: str, length: int, folder: Path) -> int:
    """Export a sparse checkout to *folder*/onnx; the number of nets."""
    from golden.eras import make_checkout
    from qwen_surgery.checkout import Checkout
    from qwen_surgery.exporting.export import export
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.weights import WeightIndex

    sizes = cycles.GEOMETRIES[geometry]
    make_checkout(
        folder / "checkout",
        layers=LAYERS[geometry],
        hidden=sizes.hidden,
        heads=sizes.heads,
        intermediate=sizes.intermediate,
        vocab=sizes.vocab,
        trained_length=max(length, 2048),
        sparse=True,
    )
    checkout = Checkout.open(folder / "checkout")
    sources = Sources.of(checkout, recipe="static", seq_length=length)
    index = WeightIndex.open(folder / "checkout")
    manifest = export(sources, index, checkout.geometry(length), folder / "onnx", trust_remote_code=True)
    return len(manifest.nets)


def measured(source: Path, out: Path, check: str) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak megabytes of cleaning *source* from a cold start."""
    command = [
        sys.executable,
        "-m",
        "qwen_surgery",
        "clean",
        str(source),
        "--out",
        str(out),
        "--check",
        check,
    ]
    started = time.perf_counter()
    child = os.posix_spawn(
        command[0],
        [*command, "--json"],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(child, 0)
    wall = time.perf_counter() - started
    if status:
        raise click.ClickException("cleaning failed")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6 * 1024


if __name__ == "__main__":
    main()
