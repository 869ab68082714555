"""How long `qwen-surgery patch`, `--help` and `survey` take as whole processes, against their bars.

    python benchmarks/patch_speed.py [--checkout PATH] [--runs N] [--revisions N]

Without --checkout it takes an own-written checkout, its modeling file padded to 1,400 lines. PATH is copied,
never changed. Prints a line per command: the best and the median wall time, the processor time, the bar.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from golden.eras import ERAS, make_checkout, modeling_source

LINES = 1400
PAD = '''

class Padding{0}(nn.Module):
    """Text of the density of real code, with nothing to edit in it."""

    def __init__(self, config, scale=1.0):
        super().__init__()
        self.inner = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.scale = scale if scale is not None else config.hidden_size ** 0.5

    def forward(self, states, mask=None):
        shaped = self.inner(states).view(states.size(0), -1, states.size(-1))
        if mask is not None:
            shaped = shaped + mask[:, :, None] * self.scale
        for step in range(3):
            shaped = shaped / (1.0 + step) if step else shaped
        return shaped.transpose(1, 2).contiguous()
'''


def padded(era: str) -> str:
    """The modeling file of *era*, padded to at least LINES lines."""
    text = modeling_source(era)
    text = text.decode() if isinstance(text, bytes) else text
    count = 0
    while text.count("\n") < LINES:
        text += PAD.format(count)
        count += 1
    return text


def measure(
    arguments: list[str], runs: int, before: Callable[[], None] = lambda: None
) -> tuple[list[float], list[float]]:
    """Wall and processor seconds of *runs* processes, after one that warms the caches."""
    wall, processor = [], []
    for run in range(runs + 1):
        before()
        started, used = time.perf_counter(), _children()
        subprocess.run(
            [sys.executable, "-m", "qwen_surgery", *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if run:
            wall.append(time.perf_counter() - started)
            processor.append(_children() - used)
    return wall, processor


def _children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def report(name: str, wall: list[float], processor: list[float], bar: float) -> None:
    best, middle = min(wall), statistics.median(wall)
    verdict = "ok" if best <= bar else "OVER"
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if best > bar and load > cores:
        verdict += f" (load {load:.0f} on {cores} cores: measure again on an idle machine)"
    print(
        f"{name:<34} best {best:6.2f} s  median {middle:6.2f} s  processor {min(processor):6.2f} s"
        f"  bar {bar:5.2f} s  {verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--revisions", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, copy = Path(folder, "source"), Path(folder, "copy")
        if options.checkout:
            small = shutil.ignore_patterns("*.safetensors", "*.bin", ".git", ".qwen-surgery")
            shutil.copytree(options.checkout, source, ignore=small)
        else:
            make_checkout(source, era="sdpa", layers=1, hidden=16, heads=2, vocab=512)
            (source / "modeling_qwen.py").write_text(padded("sdpa"))

        def fresh() -> None:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source, copy)

        report("--help", *measure(["--help"], options.runs), 0.25)
        report("patch", *measure(["patch", str(copy)], options.runs, fresh), 1.0)
        report("patch, nothing left to do", *measure(["patch", str(copy)], options.runs), 1.0)
        revisions = Path(folder, "revisions")
        for index in range(options.revisions):
            (revisions / str(index)).mkdir(parents=True)
            text = padded(ERAS[index % len(ERAS)]) + f"# revision {index}\n"
            (revisions / str(index) / "modeling_qwen.py").write_text(text)
        report(f"survey, {options.revisions} revisions", *measure(["survey", str(revisions)], 1), 60.0)


if __name__ == "__main__":
    main()
