"""Predicted chip cycles of the cleaned nets, the ablation of every pass, and the record in
golden/cycles.json.

    python benchmarks/cycles.py --geometry 1.8B --seq-length 512 --seq-length 4096
    python benchmarks/cycles.py --geometry 1.8B --seq-length 512 --ablation
    python benchmarks/cycles.py --geometry tiny --seq-length 128 --mode all --record
    python benchmarks/cycles.py --geometry Qwen3-4B --seq-length 2048 --kind block --fused-from 1

Needs the TPU-MLIR toolchain. A 1.8B net takes about 20 s and 2 GB, a 7B one about a minute and 6 GB.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import click

from golden import cycles
from qwen_surgery import console
from qwen_surgery.chips import CHIPS, DEFAULT_CHIP
from qwen_surgery.nets import NetKind

if TYPE_CHECKING:
    from qwen_surgery.measuring.prediction import NetPrediction
    from qwen_surgery.toolchain import Toolchain

MODES = ("bf16", "int8", "int4")


@click.command(help=__doc__.splitlines()[0] if __doc__ else "")
@click.option("--geometry", type=click.Choice(list(cycles.GEOMETRIES)), default="1.8B", show_default=True)
@click.option("--seq-length", "lengths", type=int, multiple=True, default=(512,), show_default=True)
@click.option("--mode", type=click.Choice([*MODES, "all"]), default="int4", show_default=True)
@click.option("--kind", "kinds", type=click.Choice(["block", "block_cache"]), multiple=True)
@click.option("--raw/--no-raw", default=True, show_default=True, help="Measure the nets as exported, too.")
@click.option("--ablation", is_flag=True, help="Each pass alone and each pass left out.")
@click.option("--pass", "passes", multiple=True, help="Ablate these only; may be repeated.")
@click.option("--fused-from", type=int, help="Where fused-attention begins, in place of its own length.")
@click.option("--target", type=click.Choice(list(CHIPS)), default=DEFAULT_CHIP, show_default=True)
@click.option("--toolchain", "version", default=None, help="TPU-MLIR version.")
@click.option("--record", is_flag=True, help="Write the cleaned nets' predictions to golden/cycles.json.")
def main(
    geometry: str,
    lengths: tuple[int, ...],
    mode: str,
    kinds: tuple[str, ...],
    raw: bool,
    ablation: bool,
    passes: tuple[str, ...],
    fused_from: int | None,
    target: str,
    version: str | None,
    record: bool,
) -> None:
    from graph_passes.framework import registry
    from qwen_surgery.toolchain import Toolchain

    if record and (fused_from is not None or target != DEFAULT_CHIP):
        raise click.UsageError(f"--record is for the passes as they are, on {DEFAULT_CHIP}")
    if fused_from is not None:
        (fused,) = registry.select(registry.mlir_passes(), ["fused-attention"])
        fused.from_length = fused_from
    toolchain = Toolchain.find(version)
    bench = Bench(geometry, toolchain, target)
    modes = MODES if mode == "all" else (mode,)
    console.out().print(f"TPU-MLIR {toolchain.version}, {geometry} geometry, {target}")
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
                    bench.ablate(kind, length, one, passes or bench.everything)
    if record:
        cycles.save(records)
        console.err().print(f"recorded in {cycles.FILE}")


class Bench:
    """Compiles nets of one geometry and prints a table row each."""

    def __init__(self, geometry: str, toolchain: Toolchain, target: str) -> None:
        from graph_passes.framework import recipe, registry

        self.name, self.sizes, self.toolchain = geometry, cycles.GEOMETRIES[geometry], toolchain
        self.target = target
        self.everything = recipe.without(registry.unfit(toolchain.version))
        self._templates: dict[tuple[str, int], object] = {}
        self._found: dict[tuple[str, ...], NetPrediction] = {}

    def template(self, kind: str, length: int) -> object:
        from qwen_surgery.measuring.prediction import templates_of

        if (kind, length) not in self._templates:
            with tempfile.TemporaryDirectory() as folder:
                made = templates_of(self.sizes, length, [NetKind(kind)], Path(folder) / "checkout")
            self._templates[kind, length] = made[NetKind(kind)]
        return self._templates[kind, length]

    def row(
        self, kind: str, length: int, mode: str, passes: Iterable[str] | None, label: str
    ) -> cycles.Record:
        found = self.predict(kind, length, mode, passes)
        self.show(kind, length, mode, label, found)
        version = self.toolchain.version
        return cycles.Record(self.name, kind, length, mode, version, **found.to_json())

    def predict(self, kind: str, length: int, mode: str, passes: Iterable[str] | None) -> NetPrediction:
        """Compile once per graph: passes that change nothing give what the others give. Raises ToolFailed."""
        from qwen_surgery.compiling.one import supports
        from qwen_surgery.compiling.options import CompileOptions
        from qwen_surgery.measuring.prediction import compile_template

        key = self.key(kind, length, mode, passes)
        if key not in self._found:
            work = Path(tempfile.mkdtemp(prefix="qwen-surgery-cycles-"))
            try:
                address = "io_alone" if supports(self.toolchain, "model_deploy", "--addr_mode") else "basic"
                options = CompileOptions(mode=mode, target=self.target, addr_mode=address).resolved()
                _, self._found[key] = compile_template(
                    self.template(kind, length),
                    passes,
                    options,
                    self.toolchain,
                    work,  # type: ignore[arg-type]
                )
            finally:
                shutil.rmtree(work, ignore_errors=True)
        return self._found[key]

    def key(self, kind: str, length: int, mode: str, passes: Iterable[str] | None) -> tuple[str, ...]:
        from graph_passes import clean
        from graph_passes.framework import registry

        if passes is None:
            return kind, str(length), mode
        model = clean(self.template(kind, length).model, passes, check="off").model  # type: ignore[attr-defined]
        text = [p.name for p in registry.select(registry.mlir_passes(), passes)]
        return kind, str(length), mode, sha256(model.SerializeToString(deterministic=True)).hexdigest(), *text

    def show(self, kind: str, length: int, mode: str, label: str, found: NetPrediction) -> None:
        console.out().print(
            f"| {kind} | {length} | {mode} | {label} | {found.nodes} | {found.top_ops} | {found.cycles:,} | "
            f"{found.milliseconds:.3f} | {found.bmodel_bytes:,} |",
            soft_wrap=True,
        )
        sys.stdout.flush()

    def ablate(self, kind: str, length: int, mode: str, passes: Iterable[str]) -> None:
        """Each of *passes* left out, and alone (behind the folding that all of them need)."""
        base = ("fold-constants",)
        self.try_row(kind, length, mode, base, "only fold-constants")
        for name in passes:
            if name not in base:
                self.try_row(kind, length, mode, (*base, name), f"{name} alone")
            self.try_row(kind, length, mode, [n for n in self.everything if n != name], f"all but {name}")

    def try_row(self, kind: str, length: int, mode: str, passes: Iterable[str], label: str) -> None:
        """A row, or what TPU-MLIR says when it cannot compile that graph."""
        from qwen_surgery.errors import ToolFailed

        try:
            self.row(kind, length, mode, passes, label)
        except ToolFailed as error:
            console.out().print(f"| {kind} | {length} | {mode} | {label} | {error} | | | | |", soft_wrap=True)


if __name__ == "__main__":
    main()
