"""What one device holds of a layer that several share, by geometry and number of devices.

    python benchmarks/devices.py Qwen2.5-7B 1.8B                    on 1, 2, 4 and 8 devices
    python benchmarks/devices.py 72B --devices 8                    minutes, and some 10 GB of memory

One layer of random weights (S = 512, int4 in groups of 64, a vocabulary of 8,192) is built, its contract is
checked, and `inspect` says what the devices hold. A number that the model's heads refuse is a dash. A table
goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from peer import make

from golden.cycles import GEOMETRIES
from golden.eras import make_checkout
from qwen_surgery.packing.report import inspect

VOCABULARY = 8192


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("geometries", nargs="+", choices=GEOMETRIES)
    parser.add_argument("--devices", type=int, action="append")
    parser.add_argument("--work", type=Path, default=Path("bench-devices"))
    args = parser.parse_args()
    counts = args.devices or [1, 2, 4, 8]
    print("| layer of |" + "".join(f" {count} |" for count in counts) + "\n|---|" + "---|" * len(counts))
    for name in args.geometries:
        source = checkpoint(args.work.resolve() / name, name)
        cells = [held(source, count) for count in counts]
        print(f"| {name} |" + "".join(f" {cell} |" for cell in cells), flush=True)
        shutil.rmtree(source.parent)
    return 0


def checkpoint(folder: Path, name: str) -> Path:
    """One layer of *name*'s sizes."""
    sizes, path = GEOMETRIES[name], folder / "model"
    if sizes.model_type != "qwen":
        return make(path, sizes, 1, vocab=VOCABULARY)
    make_checkout(
        path, era="sdpa", layers=1, hidden=sizes.hidden, heads=sizes.heads, intermediate=sizes.intermediate,
        vocab=VOCABULARY, trained_length=8192, shards=2, sparse=True,
    )  # fmt: skip
    return path


def held(source: Path, devices: int) -> str:
    """MB of weights of the decode net on one of *devices*; a dash where they cannot share it."""
    out = source.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "qwen_surgery", "build", source, "--out", out, "--seq-length", 512]
    command += ["--mode", "int4", "--num-device", devices, "--verify", "contract", "--no-twin", "--json"]
    done = subprocess.run([*map(str, command), "--trust-remote-code"], capture_output=True, check=False)
    if done.returncode == 2:
        return "-"
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    report = inspect(Path(json.loads(done.stdout)["bmodels"][0]))
    (net,) = [net for net in report.nets if net.name == "block_cache_0"]
    return f"{net.weight_bytes / 1e6:.2f}"


if __name__ == "__main__":
    sys.exit(main())
