"""What ``--quantizer gptq`` takes for a layer, step by step: ``python benchmarks/gptq.py CHECKOUT [--head]``.

CHECKOUT is a real one or one of random weights (``build.py 7B --keep`` leaves it). Reads 8,192 random tokens
in windows of 512, int4 in groups of 64; ``--head`` does the output layer instead, in int8. Runs the
checkout's code. Prints wall and processor seconds of each step, and the largest memory up to it.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qwen_surgery.checkout import Checkout
from qwen_surgery.exporting.planning import bind
from qwen_surgery.families.family import HEAD, TABLE
from qwen_surgery.nets import nets
from qwen_surgery.packing.formats import Quantisation
from qwen_surgery.patching.sources import Sources
from qwen_surgery.quantising import TOKENS, WINDOW, calibration, chosen, gptq, layerwise
from qwen_surgery.weights import WeightIndex
from qwen_surgery.weights.integers import Integers

INT4, INT8 = (Quantisation(bits, 64, False, "BF16", 64) for bits in (4, 8))


class Clock:
    """Says what each step took."""

    def __init__(self) -> None:
        self._wall, self._busy = time.perf_counter(), time.process_time()

    def lap(self, what: str) -> None:
        wall, busy = time.perf_counter(), time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"| {what} | {wall - self._wall:.1f} | {busy - self._busy:.1f} | {peak:.2f} |", flush=True)
        self._wall, self._busy = wall, busy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--head", action="store_true")
    args = parser.parse_args()
    checkout, index = Checkout.open(args.checkout), WeightIndex.open(args.checkout)
    sources, geometry = Sources.of(checkout, seq_length=WINDOW), checkout.geometry(WINDOW)
    _, refs = bind(sources, index, geometry, nets(geometry.layers))
    tokens = np.random.default_rng(0).integers(0, geometry.vocab, (TOKENS // WINDOW, WINDOW))
    print("| step | wall, s | processor, s | peak, GB |\n|---|---|---|---|")
    clock = Clock()
    states = calibration.embedded(refs["embedding"][TABLE], tokens)
    layers = calibration.Layers(sources, geometry, WINDOW)
    clock.lap("the text's rows of the table")
    if args.head:
        layerwise.head_integers(layers, refs["lm_head"], {HEAD: INT8}, states)
        clock.lap("the output layer")
    else:
        layer(layers, refs["block_0"], states, clock)


def layer(layers: calibration.Layers, weights: layerwise.Weights, states: np.ndarray, clock: Clock) -> None:
    """The turn of one layer, in the order of :func:`layerwise.layer_integers`."""
    floats = {slot: layerwise.read(ref) for slot, ref in weights.items()}
    matrices = [slot for slot, ref in weights.items() if len(ref.shape) == 2]
    hessians = layers.hessians(floats, states, matrices)
    clock.lap("the text through the layer, inputs summed up")
    found: dict[str, Integers] = {}
    for slots, hessian in hessians.items():
        factor = hessian.factor()
        clock.lap(f"factors of {len(factor.order):,} inputs")
        for slot in slots:
            rows = floats[slot].numpy()
            found[slot] = gptq.quantise(lambda a, b, r=rows: r[a:b], rows.shape, INT4, factor)  # type: ignore[misc]
            clock.lap(f"integers of {rows.shape[0]:,} rows of {rows.shape[1]:,}")
    with TemporaryDirectory() as folder:
        file = Path(folder) / chosen.FILE
        chosen.save(file, found)
        layerwise.states_behind(layers, weights, chosen.refs(file, weights), states)
    clock.lap("the text through the chosen integers")


if __name__ == "__main__":
    main()
