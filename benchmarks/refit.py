"""Measure packing and refit at real geometry: build a bmodel, refit it to other weights and back, compare
bytes.

    python benchmarks/refit.py --geometry 7b --work FOLDER [--layers N] [--mode int4]

Makes a checkout of random weights (15 GB for 7b), builds a bmodel from it without running it, refits that
bmodel to a checkout of zeros (which takes no disk) and back, and checks that the first file's bytes come
back. Times are wall time; memory is the peak of the whole process tree's largest process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from golden.eras import make_checkout
from qwen_surgery.weights import WeightIndex

#: name -> layers, hidden, heads, config.json's intermediate size
GEOMETRIES = {
    "1.8b": (24, 2048, 16, 11008),
    "7b": (32, 4096, 32, 22016),
    "14b": (40, 5120, 40, 27392),
}
VOCAB = 151936


def _run(*arguments: str) -> dict[str, float]:
    """Run one command of this program; its seconds, CPU seconds and the peak memory (MiB) of its largest
    process."""
    began = time.monotonic()
    command = [sys.executable, "-m", "qwen_surgery", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _fill(checkout: Path) -> None:
    """Give a checkout of zeros random bfloat16 weights, different in every tensor: slices of one random
    pool."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1 << 25, dtype=np.float32) * np.float32(0.02)
    pool = (values.view(np.uint32) >> 16).astype(np.uint16)
    for ref in WeightIndex.open(checkout).values():
        with ref.file.open("r+b", buffering=0) as file:
            file.seek(ref.offset)
            left = ref.numel
            while left:
                start = int(rng.integers(0, len(pool) // 2))
                piece = pool[start : start + min(left, len(pool) // 2)]
                file.write(piece.tobytes())
                left -= len(piece)


def _checkout(path: Path, geometry: str, layers: int, *, zeros: bool) -> Path:
    if path.exists():
        return path
    _, hidden, heads, intermediate = GEOMETRIES[geometry]
    new = path.with_name(path.name + ".new")
    make_checkout(
        new, layers=layers, hidden=hidden, heads=heads, intermediate=intermediate, vocab=VOCAB, shards=8,
        sparse=True,
    )  # fmt: skip
    if not zeros:
        _fill(new)
    return new.rename(path)


def measure(geometry: str, layers: int, mode: str, work: Path) -> dict[str, object]:
    """Build, refit to zeros, refit back; the figures of each step and whether the bytes came back."""
    full = _checkout(work / "random", geometry, layers, zeros=False)
    zeros = _checkout(work / "zeros", geometry, layers, zeros=True)
    out = work / "out"
    flags = ["--mode", mode, "--verify", "none", "--trust-remote-code", "--name", "bench"]
    figures: dict[str, object] = {
        "geometry": geometry,
        "layers": layers,
        "mode": mode,
        "cores": os.cpu_count(),
    }
    refitted, back = work / "zeros.bmodel", work / "back.bmodel"
    built = next((p for p in out.glob("*/*.bmodel")), None)
    if built is None:
        figures["build"] = _run("build", str(full), "--out", str(out), *flags)
        built = next(p for p in out.glob("*/*.bmodel"))
    figures["refit to zeros"] = _run("refit", str(built), str(zeros), "--out", str(refitted))
    figures["refit back"] = _run("refit", str(refitted), str(full), "--out", str(back))
    figures["bytes"] = built.stat().st_size
    figures["same bytes"] = _sha256(built) == _sha256(back)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=GEOMETRIES, default="7b")
    parser.add_argument("--layers", type=int, help="default: the model's own number")
    parser.add_argument("--mode", default="int4")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything this makes")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    layers = arguments.layers or GEOMETRIES[arguments.geometry][0]
    print(json.dumps(measure(arguments.geometry, layers, arguments.mode, arguments.work), indent=2))


if __name__ == "__main__":
    main()
