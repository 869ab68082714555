"""Cosine to float32 of every net on the emulated chip: the documented flow's graph against the cleaned one.

    python benchmarks/exactness.py
    python benchmarks/exactness.py --toolchain 1.6

The documented flow compiles the graph as exported (TPU-MLIR simplifies it with onnxsim); we compile the
cleaned one. Same random weights, same inputs, both compared with float32. Each figure is the mean over the
prompts; the outputs of a layer are hidden_states, past_k, past_v. A few seconds a row.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
import numpy as np

from golden import cycles
from qwen_surgery import console
from qwen_surgery.nets import NetKind

MODES = ("bf16", "int8", "int4")
KINDS = (NetKind.BLOCK, NetKind.BLOCK_CACHE, NetKind.LM_HEAD)


@click.command(help=__doc__.splitlines()[0] if __doc__ else "")
@click.option("--geometry", type=click.Choice(list(cycles.GEOMETRIES)), default="tiny", show_default=True)
@click.option("--seq-length", "length", type=int, default=64, show_default=True)
@click.option("--prompt", type=int, default=40, show_default=True, help="Tokens of the padded prompt.")
@click.option("--inputs", "count", type=int, default=4, show_default=True)
@click.option("--toolchain", "version", default=None, help="TPU-MLIR version.")
def main(geometry: str, length: int, prompt: int, count: int, version: str | None) -> None:
    from qwen_surgery.measuring.prediction import templates_of
    from qwen_surgery.toolchain import Toolchain

    toolchain = Toolchain.find(version)
    sizes = cycles.GEOMETRIES[geometry]
    out = console.out()
    out.print(f"TPU-MLIR {toolchain.version}, hidden {sizes.hidden}, S={length}, {count} prompts of {prompt}")
    out.print("| net | mode | documented flow | qwen-surgery | worse by |")
    out.print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for kind, template in templates_of(sizes, length, KINDS, Path(work) / "checkout").items():
            for mode in MODES:
                raw, cleaned = (
                    measured(
                        template,
                        mode,
                        toolchain,
                        Path(work) / f"{kind.value}-{mode}-{how}",
                        how,
                        prompt,
                        count,
                    )
                    for how in ("raw", "cleaned")
                )
                out.print(
                    f"| {kind.value} | {mode} | {shown(raw)} | {shown(cleaned)} | {max(raw - cleaned):.1e} |",
                    soft_wrap=True,
                )
                sys.stdout.flush()


def measured(
    template: object, mode: str, toolchain: object, work: Path, how: str, prompt: int, count: int
) -> np.ndarray:
    """The cosine of each output, mean over the prompts."""
    from graph_passes.framework import recipe, registry
    from qwen_surgery.compiling.one import supports
    from qwen_surgery.compiling.options import CompileOptions
    from qwen_surgery.measuring import accuracy
    from qwen_surgery.measuring.prediction import compile_template, random_weights
    from qwen_surgery.toolchain.emulator import ChipEngine

    kind = template.kind  # type: ignore[attr-defined]
    address = "io_alone" if supports(toolchain, "model_deploy", "--addr_mode") else "basic"  # type: ignore[arg-type]
    options = CompileOptions(mode=mode, addr_mode=address).resolved()
    passes = recipe.without(registry.unfit(toolchain.version)) if how == "cleaned" else None  # type: ignore[attr-defined]
    bmodel, _ = compile_template(template, passes, options, toolchain, work)  # type: ignore[arg-type]
    weights = random_weights(template)  # type: ignore[arg-type]
    found = []
    with ChipEngine(bmodel, toolchain) as chip:  # type: ignore[arg-type]
        for seed in range(count):
            inputs = accuracy.inputs_of(template, prompt, seed)  # type: ignore[arg-type]
            wanted = accuracy.reference(template, weights, inputs)  # type: ignore[arg-type]
            found.append(accuracy.cosines(kind, wanted, chip.run(kind.value, inputs), prompt))
    return np.mean(found, axis=0)


def shown(values: np.ndarray) -> str:
    return " ".join(f"{v:.7f}" for v in values)


if __name__ == "__main__":
    main()
