"""What the unpatched model costs as a reference: its twin at any size, and the whole of it.

    python benchmarks/reference.py --geometry 1.8B --geometry 7B --geometry 72B     the twin of each export
    python benchmarks/reference.py --checkout PATH --prompt 171     the whole model: a prompt and two steps

``python benchmarks/build.py 7B --keep`` leaves a checkout of random weights at 7B's sizes in bench-build.
Each figure is of a process of its own: wall and processor seconds, peak memory.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import click

from golden import cycles
from golden.eras import make_checkout
from qwen_surgery import console
from qwen_surgery.checkout import Checkout
from qwen_surgery.patching.sources import Sources
from qwen_surgery.weights import WeightIndex

SEQ_LENGTH = 512
LAYERS = {"1.8B": 24, "7B": 32, "14B": 40, "72B": 80}
Result = TypeVar("Result")


@click.command(help=__doc__)
@click.option("--geometry", "names", multiple=True, type=click.Choice(list(LAYERS)))
@click.option("--checkout", type=click.Path(exists=True, path_type=Path))
@click.option("--prompt", default=171, show_default=True, help="Tokens of the prompt.")
def main(names: tuple[str, ...], checkout: Path | None, prompt: int) -> None:
    for name in names:
        console.out().print(f"twin of {name}: {_alone(twin, name)}")
    if checkout is not None:
        for line in _alone(whole, checkout, prompt).splitlines():
            console.out().print(line)
    if not names and checkout is None:
        sys.exit("give --geometry or --checkout")


def _alone(work: Callable[..., Result], *arguments: object) -> Result:
    """The result of *work* in a new process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def twin(name: str) -> str:
    """The proof of one export of *name*'s sizes; its weights are not read, so they are zeros on no disk."""
    from qwen_surgery.twin.twin import check_twin

    sizes = cycles.GEOMETRIES[name]
    with tempfile.TemporaryDirectory() as scratch:
        path = make_checkout(
            Path(scratch) / "checkout",
            layers=LAYERS[name], hidden=sizes.hidden, heads=sizes.heads, intermediate=sizes.intermediate,
            vocab=sizes.vocab, trained_length=8192, sparse=True,
        )  # fmt: skip
        opened = Checkout.open(path)
        sources = Sources.of(opened, seq_length=SEQ_LENGTH)
        report = check_twin(sources, WeightIndex.open(path), opened.geometry(SEQ_LENGTH))
    return f"{report.seconds:.1f} s, {_peak()}, {report.passes} passes, largest difference {report.worst:.1e}"


def whole(path: Path, length: int) -> str:
    """The whole model, one layer in memory at a time where it is big."""
    from qwen_surgery.verification.reference import ReferenceModel

    index = WeightIndex.open(path)
    sources = Sources.of(Checkout.open(path), seq_length=SEQ_LENGTH)
    model = ReferenceModel(sources.reference, index, modeling=sources.modeling, layers=())
    passes: dict[str, Callable[[], object]] = {
        f"prompt of {length} tokens": lambda: model.prefill(range(1, length + 1)),
        "a step": lambda: model.decode(1),
        "another": lambda: model.decode(2),
    }
    lines = []
    for what, run in passes.items():
        started, before = time.perf_counter(), time.process_time()
        run()
        taken, cpu = time.perf_counter() - started, time.process_time() - before
        lines.append(f"{what}: {taken:.1f} s, processor {cpu:.1f} s, {_peak()}")
    return "\n".join(lines)


def _peak() -> str:
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
