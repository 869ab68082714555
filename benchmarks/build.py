"""What a whole build costs at real sizes, and what a second one costs.

    python benchmarks/build.py 1.8B --layers 4     wall, RSS, bytes written; then again, nothing changed
    python benchmarks/build.py 1.8B                all 24 layers
    python benchmarks/build.py 7B                  all 32 layers
    python benchmarks/build.py 7B --verify sample  as a build does unasked: first and last layer compared
    python benchmarks/build.py 7B --refit          also refit to other weights and back
    python benchmarks/build.py 7B --change         also build again after one layer's weights changed
    python benchmarks/build.py 1.8B --llm-convert PYTHON   and the vendor's newer tool on the same sizes

Weights are random. Peak RSS is that of the largest process, TPU-MLIR's tools included, and of all together,
sampled 20 times a second (pages that processes share count for each). Bytes written are what went to disk
(``write_bytes`` of /proc/PID/io, in which the kernel counts finished children). ``cpu`` is processor seconds,
which other work on the machine changes little. Nothing runs on the emulator.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from golden.cycles import LayerSizes
from golden.eras import make_checkout
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.weights import WeightIndex


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, as in its config.json."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    shards: int


GEOMETRIES = {
    "tiny": Sizes(2, 128, 2, 512, 1),
    "1.8B": Sizes(24, 2048, 16, 11008, 2),
    "7B": Sizes(32, 4096, 32, 22016, 8),
    "14B": Sizes(40, 5120, 40, 27392, 15),
}
VOCABULARY = {"tiny": 512}


class Memory:
    """Peak resident memory of a process and all its descendants together, in bytes, sampled from /proc."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            total = 0
            for pid in self._tree():
                try:
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                except (OSError, ValueError, IndexError):
                    continue
                total += pages * os.sysconf("SC_PAGE_SIZE")
            self.peak = max(self.peak, total)

    def _tree(self) -> list[int]:
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                except (OSError, ValueError, IndexError):
                    continue
        found, todo = [], [self.pid]
        while todo:
            pid = todo.pop()
            found.append(pid)
            todo += [child for child, parent in parents.items() if parent == pid]
        return found

    def stop(self) -> int:
        """The peak."""
        self._stop.set()
        self._thread.join()
        return self.peak


Costs = dict[str, float]


def run(command: list[str], log: Path, **more: Any) -> Costs:
    """Run *command*: wall and processor seconds, peak RSS, bytes written."""
    started = time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, **more)
        memory = Memory(process.pid)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - started
        # What a finished child wrote is added to its parent; not yet waited for, the first process has all.
        written = int(Path(f"/proc/{process.pid}/io").read_text().split("write_bytes: ")[1].split()[0])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode, together = os.waitstatus_to_exitcode(status), memory.stop()
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text(errors='replace')[-3000:]}")
    return {
        "seconds": round(seconds, 1),
        "cpu": round(usage.ru_utime + usage.ru_stime, 1),
        "rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "rss_together_gb": round(together / 1e9, 2),
        "written_gb": round(written / 1e9, 2),
    }


def checkpoint(work: Path, name: str, layers: int, seed: int) -> Path:
    """A checkout of random weights, made once."""
    folder = work / f"ckpt-{name}-{layers}-{seed}"
    if not (folder / "config.json").exists():
        sizes = GEOMETRIES[name]
        shutil.rmtree(folder, ignore_errors=True)
        make_checkout(
            folder, era="sdpa", layers=layers, hidden=sizes.hidden, heads=sizes.heads,
            intermediate=sizes.intermediate, vocab=VOCABULARY.get(name, 151936), trained_length=8192,
            shards=min(sizes.shards, 2 * layers), sparse=True,
        )  # fmt: skip
        for number, shard in enumerate(sorted(folder.glob("*.safetensors"))):
            fill(shard, [seed, number])
    return folder


def fill(shard: Path, seed: list[int]) -> None:
    """Random bfloat16 values of magnitude 2**-7 to 2**-4 into every tensor of a sparse *shard*. (Normal draws
    would take longer than the builds they are for.)"""
    random = np.random.Generator(np.random.SFC64(seed))
    with shard.open("r+b") as file:
        first = 8 + int.from_bytes(file.read(8), "little")
        file.seek(first)
        left = shard.stat().st_size - first
        while left:
            bits = np.frombuffer(random.bytes(min(left, 1 << 24)), np.uint16)
            left -= file.write(((bits & 0x81FF) | 0x3C00).astype(np.uint16).data)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("geometry", choices=GEOMETRIES)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--mode", default="int4")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--work", type=Path, default=Path("bench-build"))
    parser.add_argument("--verify", choices=("contract", "sample"), default="contract")
    parser.add_argument("--memory", help="bound for tasks side by side, as 6G")
    parser.add_argument("--refit", action="store_true")
    parser.add_argument("--change", action="store_true", help="build again with one weight changed")
    parser.add_argument(
        "--llm-convert", metavar="PYTHON", help="also run the vendor's tool: its environment's python"
    )
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint and the output")
    args = parser.parse_args()
    layers = args.layers or GEOMETRIES[args.geometry].layers
    args.work.mkdir(parents=True, exist_ok=True)
    work = args.work.resolve()
    source, out = (
        checkpoint(work, args.geometry, layers, 0),
        work / f"out-{args.geometry}-{layers}-{args.mode}",
    )
    shutil.rmtree(out, ignore_errors=True)
    tool = [sys.executable, "-m", "qwen_surgery"]
    build = [
        *tool,
        "build",
        str(source),
        "--out",
        str(out),
        "--mode",
        args.mode,
        "--seq-length",
        str(args.seq_length),
    ]
    build += ["--verify", args.verify, "--trust-remote-code", "--json"]
    build += ["--memory", args.memory] if args.memory else []
    result: dict[str, object] = {"geometry": args.geometry, "layers": layers, "mode": args.mode}
    result["build"] = run(build, work / "build.log")
    result["again"] = run(build, work / "again.log")
    result["load"] = os.getloadavg()
    (bmodel,) = out.glob("BM1684X/*.bmodel")
    result["bmodel_gb"] = round(bmodel.stat().st_size / 1e9, 3)
    if args.change:
        change_a_weight(source, layers // 2)
        result["changed"] = run(build, work / "changed.log")
    if args.refit:
        result |= refit(tool, bmodel, source, checkpoint(work, args.geometry, layers, 1), work)
    if args.llm_convert:
        theirs = peer(Path(args.llm_convert), args.geometry, layers, args.seq_length, work)
        ours = result["build"]
        assert isinstance(ours, dict)
        ratios = {key: round(ours[key] / theirs[key], 3) for key in theirs}
        result |= {"llm_convert": theirs, "ratios": ratios}
    print(json.dumps(result))
    if not args.keep:
        shutil.rmtree(out)
        for folder in [*work.glob("ckpt-*"), *work.glob("qwen2-*")]:
            shutil.rmtree(folder)
    return 0


def change_a_weight(source: Path, layer: int) -> None:
    """Turn over one bit of a weight of *layer* in the checkpoint *source*."""
    ref = WeightIndex.open(source)[f"transformer.h.{layer}.mlp.w1.weight"]
    with ref.file.open("r+b") as shard:
        shard.seek(ref.offset)
        first = shard.read(1)[0]
        shard.seek(ref.offset)
        shard.write(bytes([first ^ 1]))


def peer(python: Path, name: str, layers: int, seq_length: int, work: Path) -> Costs:
    """The vendor's newer tool on a Qwen2-shaped checkpoint of the same sizes."""
    from peer import make

    own = GEOMETRIES[name]
    width, vocab = own.intermediate // 2, VOCABULARY.get(name, 151936)
    sizes = LayerSizes(own.hidden, own.heads, width, vocab, "qwen2")
    source, out = make(work / f"qwen2-{name}-{layers}", sizes, layers), work / "llm-convert"
    costs = llm_convert(python, source, seq_length, out, work / "llm.log")
    shutil.rmtree(out)
    return costs


def llm_convert(python: Path, source: Path, seq_length: int, out: Path, log: Path) -> Costs:
    """The vendor's newer tool on the checkpoint *source*, int4 in groups of 64, into a new folder *out*.

    *python* runs it: that of an environment with torch and transformers, and TPU-MLIR unless the installed
    one shall be taken.
    """
    shutil.rmtree(out, ignore_errors=True)
    root = next(python.absolute().parent.parent.glob("lib/python3*/site-packages/tpu_mlir"), None)
    tool = Toolchain(python.absolute(), root or Toolchain.find().root, "unknown")
    environ = tool.environ()
    environ["PATH"] = os.pathsep.join((environ["PATH"], os.environ["PATH"]))  # GNU parallel
    flags = ["-m", source, "-s", seq_length, "-q", "w4bf16", "-g", "64", "-c", "bm1684x", "-o", out]
    return run(tool.command("llm_convert", [str(flag) for flag in flags]), log, env=environ)


def refit(tool: list[str], bmodel: Path, source: Path, other: Path, work: Path) -> dict[str, object]:
    """Refit to *other* and back to *source*: costs, and whether the first file's bytes came back."""
    there, back = work / "there.bmodel", work / "back.bmodel"
    costs = run([*tool, "refit", str(bmodel), str(other), "--out", str(there)], work / "refit.log")
    run([*tool, "refit", str(there), str(source), "--out", str(back)], work / "refit-back.log")
    same = subprocess.run(["cmp", "-s", str(bmodel), str(back)], check=False).returncode == 0
    for file in work.glob("*.bmodel*"):
        file.unlink()
    return {"refit": costs, "refit_back_gives_the_same_bytes": same}


if __name__ == "__main__":
    sys.exit(main())
