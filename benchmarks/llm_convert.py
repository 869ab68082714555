"""This program and the vendor's newer tool on one checkpoint, one after the other.

    python benchmarks/llm_convert.py PYTHON Qwen2.5-1.5B                        all layers: what a build costs
    python benchmarks/llm_convert.py PYTHON Qwen2.5-1.5B --layers 1 --vocab 4096 \\
        --seq-length 512 --seq-length 2048 --seq-length 8192                    predicted cycles of a layer

PYTHON is an interpreter that can run TPU-MLIR's tool: it has torch and transformers, and tpu_mlir unless the
toolchain installed here shall be taken; GNU parallel is on PATH. int4 in groups of 64, bm1684x, random
weights. What a figure means is said in build.py; ``load`` is the machine's when a tool had ended. Lines of
JSON go to stderr, a table to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from build import Costs, llm_convert, run
from peer import make

from golden.cycles import GEOMETRIES
from qwen_surgery.compiling.profile import PROFILE, read_profile
from qwen_surgery.packing import sidefile


@dataclass(frozen=True)
class Model:
    """How many layers a model of GEOMETRIES has, and whether its head is its table."""

    layers: int
    tied: bool


MODELS = {
    "Qwen2.5-0.5B": Model(24, True),
    "Qwen2.5-1.5B": Model(28, True),
    "Qwen2.5-7B": Model(28, False),
    "Qwen3-4B": Model(36, True),
    "Qwen3-8B": Model(36, False),
}
KINDS = ("block", "block_cache")


@dataclass(frozen=True)
class Side:
    """What one tool took for a checkpoint, and the predicted cycles of its nets by kind."""

    costs: Costs
    cycles: dict[str, int]
    bmodel_gb: float
    load: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python", type=Path)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=0, help="rows of the table, where only layers matter")
    parser.add_argument("--seq-length", type=int, action="append")
    parser.add_argument("--memory", help="bound for this program's tasks side by side, as 6G")
    parser.add_argument("--work", type=Path, default=Path("bench-llm-convert"))
    args = parser.parse_args()
    model, work = MODELS[args.model], args.work.resolve()
    layers = args.layers or model.layers
    source = make(
        work / f"{args.model}-{layers}-{args.vocab}",
        GEOMETRIES[args.model],
        layers,
        tied=model.tied,
        vocab=args.vocab,
    )
    print("| model | layers | S | what | qwen-surgery | llm_convert | ratio |\n|---|---|---|---|---|---|---|")
    for length in args.seq_length or [512]:
        ours = surgery(source, length, work, args.memory)
        theirs = vendor(args.python, source, length, work)
        for what, one, other in pairs(ours, theirs):
            ratio = f"{one / other:.3f}" if other else "-"
            figures = f"{what} | {one:,} | {other:,} | {ratio} |"
            print(f"| {args.model} | {layers} | {length} | {figures}", flush=True)
    shutil.rmtree(source)
    return 0


def pairs(ours: Side, theirs: Side) -> list[tuple[str, float, float]]:
    """(what, ours, theirs) for every figure that both have."""
    found: list[tuple[str, float, float]] = [(key, ours.costs[key], theirs.costs[key]) for key in ours.costs]
    found += [("bmodel_gb", ours.bmodel_gb, theirs.bmodel_gb), ("load", ours.load, theirs.load)]
    return found + [(f"cycles of {kind}", ours.cycles[kind], theirs.cycles[kind]) for kind in KINDS]


def surgery(source: Path, length: int, work: Path, memory: str | None) -> Side:
    """``qwen-surgery build`` with its contract checked, nothing run on the emulator."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "qwen_surgery", "build", str(source), "--out", str(out)]
    command += ["--mode", "int4", "--seq-length", str(length), "--verify", "contract", "--json"]
    command += ["--memory", memory] if memory else []
    costs = run(command, work / "build.log")
    (bmodel,) = out.glob("BM1684X/*.bmodel")
    predicted = sidefile.load(bmodel).predictions
    side = Side(costs, {kind: predicted[kind].cycles for kind in KINDS}, _gb(bmodel), os.getloadavg()[0])
    shutil.rmtree(out)
    return said("qwen-surgery", source, length, side)


def vendor(python: Path, source: Path, length: int, work: Path) -> Side:
    """``llm_convert.py``; its profiles lie beside its nets' bmodels."""
    out = work / "llm-convert"
    costs = llm_convert(python, source, length, out, work / "llm.log")
    (bmodel,) = out.glob("*.bmodel")
    cycles = {}
    for kind in KINDS:
        (file,) = out.glob(f"*/{kind}_0/{PROFILE}")
        profile = read_profile(file)
        assert profile is not None, f"{file} predicts nothing"
        cycles[kind] = profile.cycles
    side = Side(costs, cycles, _gb(bmodel), os.getloadavg()[0])
    shutil.rmtree(out)
    return said("llm_convert", source, length, side)


def said(who: str, source: Path, length: int, side: Side) -> Side:
    print(json.dumps({"who": who, "checkpoint": source.name, "S": length, **vars(side)}), file=sys.stderr)
    return side


def _gb(path: Path) -> float:
    return round(path.stat().st_size / 1e9, 3)


if __name__ == "__main__":
    sys.exit(main())
