"""Predicted chip cycles of the cleaned nets, the ablation of every pass, and the record in
golden/cycles.json.

    python benchmarks/cycles.py --geometry 1.8B --seq-length 512 --seq-length 4096
    python benchmarks/cycles.py --geometry 1.8B --seq-length 512 --ablation
    python benchmarks/cycles.py --geometry tiny --seq-length 128 --mode all --record

Needs the TPU-MLIR toolchain. A 1.8B net takes about 20 s and 2 GB, a 7B one about a minute and 6 GB.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import click

from golden import cycles
from qwen_surgery import console
from qwen_surgery.nets import Geometry, NetKind

MODES = ("bf16", "int8", "int4")


@click.command(help=__doc__.splitlines()[0] if __doc__ else "")
@click.option("--geometry", type=click.Choice(list(cycles.GEOMETRIES)), default="1.8B", show_default=True)
@click.option("--seq-length", "lengths", type=int, multiple=True, default=(512,), show_default=True)
@click.option("--mode", type=click.Choice([*MODES, "all"]), default="int4", show_default=True)
@click.option("--kind", "kinds", type=click.Choice(["block", "block_cache"]), multiple=True)
@click.option("--raw/--no-raw", default=True, show_default=True, help="Measure the nets as exported, too.")
@click.option("--ablation", is_flag=True, help="Each pass alone and each pass left out.")
@click.option("--record", is_flag=True, help="Write the cleaned nets' predictions to golden/cycles.json.")
def main(
    geometry: str,
    lengths: tuple[int, ...],
    mode: str,
    kinds: tuple[str, ...],
    raw: bool,
    ablation: bool,
    record: bool,
) -> None:
    from qwen_surgery.toolchain import Toolchain

    toolchain = Toolchain.find()
    bench = Bench(geometry, toolchain)
    modes = MODES if mode == "all" else (mode,)
    console.out().print(f"TPU-MLIR {toolchain.version}, {geometry} geometry, bm1684x")
    console.out().print("| net | S | mode | passes | nodes | Top ops | cycles | ms | bmodel bytes |")
    console.out().print("|---|---|---|---|---|---|---|---|---|")
    records = []
    for length in lengths:
        for kind in kinds or ("block", "block_cache"):
            for one in modes:
                if raw:
                    bench.row(kind, length, one, None, "none: as exported")
                records.append(bench.row(kind, length, one, bench.everything, "all"))
                if ablation:
                    bench.ablate(kind, length, one)
    if record:
        cycles.save(records)
        console.err().print(f"recorded in {cycles.FILE}")


class Bench:
    """Compiles nets of one geometry and prints a table row each."""

    def __init__(self, geometry: str, toolchain: object) -> None:
        from graph_passes.framework import recipe

        self.name, self.sizes, self.toolchain = geometry, cycles.GEOMETRIES[geometry], toolchain
        self.everything = recipe.without(())
        self._templates: dict[tuple[str, int], object] = {}

    def template(self, kind: str, length: int) -> object:
        from qwen_surgery.predicting import templates_of

        if (kind, length) not in self._templates:
            sizes = self.sizes
            g = Geometry(
                1,
                sizes.hidden,
                sizes.heads,
                sizes.hidden // sizes.heads,
                sizes.vocab,
                sizes.intermediate,
                length,
            )
            with tempfile.TemporaryDirectory() as folder:
                made = templates_of(g, [NetKind(kind)], Path(folder) / "checkout")
            self._templates[kind, length] = made[NetKind(kind)]
        return self._templates[kind, length]

    def row(
        self, kind: str, length: int, mode: str, passes: Iterable[str] | None, label: str
    ) -> cycles.Record:
        from qwen_surgery.compiling.options import CompileOptions
        from qwen_surgery.predicting import compile_template

        work = Path(tempfile.mkdtemp(prefix="qwen-surgery-cycles-"))
        try:
            options = CompileOptions(mode=mode).resolved()
            _, found = compile_template(self.template(kind, length), passes, options, self.toolchain, work)  # type: ignore[arg-type]
        finally:
            shutil.rmtree(work, ignore_errors=True)
        console.out().print(
            f"| {kind} | {length} | {mode} | {label} | {found.nodes} | {found.top_ops} | {found.cycles:,} | "
            f"{found.milliseconds:.3f} | {found.bmodel_bytes:,} |"
        )
        sys.stdout.flush()
        version = self.toolchain.version  # type: ignore[attr-defined]
        return cycles.Record(self.name, kind, length, mode, version, **found.to_json())

    def ablate(self, kind: str, length: int, mode: str) -> None:
        """Every pass left out; every pass alone (behind the folding and sorting that all of them need)."""
        base = ("fold-constants", "dead-code")
        self.row(kind, length, mode, base, "only " + " and ".join(base))
        for name in self.everything:
            if name in base:
                continue
            self.row(kind, length, mode, (*base, name), f"{name} alone")
            self.row(kind, length, mode, [n for n in self.everything if n != name], f"all but {name}")


if __name__ == "__main__":
    main()
