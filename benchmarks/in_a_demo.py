"""A bmodel in the newest generic demo's flow, in the vendor's runtime, against the unpatched model's tokens.

    python benchmarks/in_a_demo.py CHECKOUT MODEL.bmodel

No net is run a second time, so a file of real size takes the emulator minutes a token instead of hours. Build
it with --dynamic: the demo then launches the prefill nets at the prompt's own length. It runs the checkout's
code.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np

from qwen_surgery import console


@click.command(help=__doc__.splitlines()[0] if __doc__ else "")
@click.argument("checkout", type=click.Path(path_type=Path))
@click.argument("bmodel", type=click.Path(path_type=Path))
@click.option("--prompt", type=int, default=5, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", type=int, default=3, show_default=True, help="Tokens to choose.")
def main(checkout: Path, bmodel: Path, prompt: int, tokens: int) -> None:
    from qwen_surgery.checkout import Checkout
    from qwen_surgery.packing.report import geometry_of
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.runtime.device import Device
    from qwen_surgery.runtime.flows import OwnLength
    from qwen_surgery.toolchain import Toolchain
    from qwen_surgery.verification.reference import ReferenceModel
    from qwen_surgery.weights import WeightIndex

    out, geometry = console.out(), geometry_of(bmodel)
    text = np.random.default_rng(0).integers(0, geometry.vocab, prompt).tolist()
    sources = Sources.of(Checkout.open(checkout), seq_length=geometry.seq_length)
    reference = ReferenceModel(sources.reference, WeightIndex.open(checkout), modeling=sources.modeling)
    with Device(bmodel, Toolchain.find(), shared=True) as device:
        demo, token = OwnLength(device), 0
        for step in range(tokens):
            started = time.monotonic()
            if step:
                demo.decode(token)
                passed = reference.decode(token)
            else:
                demo.prefill(text)
                passed = reference.prefill(text)
            found, meant, token = demo.logits(), passed.logits, demo.greedy()
            cosine = found @ meant / np.linalg.norm(found) / np.linalg.norm(meant)
            out.print(
                f"token {token}, unpatched {int(np.argmax(meant))}, cosine {cosine:.4f}, "
                f"{time.monotonic() - started:.0f} s"
            )


if __name__ == "__main__":
    main()
