"""What exporting costs: wall time, peak memory and new disk of whole processes.

    python benchmarks/export.py geometries            7B, 14B and 72B, over sparse weight files
    python benchmarks/export.py layers                8 against 80 layers
    python benchmarks/export.py documented EXPORTER   1.8B sizes, 4 layers, against the documented exporter

EXPORTER is the path of export_onnx_qwen.py in a clone of the vendor's repository (sophon-demo,
sample/Qwen/tools); it is run from there, never copied. ``--exporter-python`` names an interpreter with a
transformers that it accepts. ``--json`` prints the figures; a missed limit gives exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from golden.eras import make_checkout

VOCABULARY = 151_936


@dataclass(frozen=True)
class Sizes:
    """A real model's sizes; ``intermediate`` is config.json's number."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    shards: int


@dataclass(frozen=True)
class Limits:
    """What an export may take at most."""

    seconds: float
    megabytes_rss: float
    megabytes_disk: float


@dataclass(frozen=True)
class Cost:
    """What a whole process took. ``disk`` counts allocated bytes of new files, hard links not.

    ``cpu`` is user and system time of all threads: it tells more than ``seconds`` on a busy machine.
    """

    seconds: float
    cpu: float
    rss: int
    disk: int

    def __str__(self) -> str:
        time_taken = f"{self.seconds:6.1f} s ({self.cpu:5.1f} s CPU)"
        return f"{time_taken}  {self.rss / 1e6:8.0f} MB RSS  {self.disk / 1e6:9.1f} MB new disk"


GEOMETRIES = {
    "1.8B": Sizes(24, 2048, 16, 11008, 2),
    "7B": Sizes(32, 4096, 32, 22016, 8),
    "14B": Sizes(40, 5120, 40, 27392, 15),
    "72B": Sizes(80, 8192, 64, 49152, 82),
}
LIMITS = {"7B": Limits(30, 1500, 50), "14B": Limits(30, 1500, 50), "72B": Limits(60, 3000, 100)}


def checkout(folder: Path, sizes: Sizes, layers: int | None = None) -> Path:
    """A sparse checkout of *sizes* under *folder*."""
    return make_checkout(
        folder,
        era="sdpa",
        layers=layers or sizes.layers,
        hidden=sizes.hidden,
        heads=sizes.heads,
        intermediate=sizes.intermediate,
        vocab=VOCABULARY,
        trained_length=8192,
        shards=min(sizes.shards, 2 * (layers or sizes.layers)),
        sparse=True,
    )


def measure(command: list[str], out: Path, cwd: Path, log: Path) -> Cost:
    """Run *command* and say what it took; *out* is the folder it writes."""
    with log.open("wb") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=cwd, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text(errors='replace')[-3000:]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, new_bytes(out))


def new_bytes(folder: Path) -> int:
    """Allocated bytes of the files under *folder* that have no other name."""
    stats = [path.lstat() for path in folder.rglob("*") if path.is_file()]
    return sum(stat.st_blocks * 512 for stat in stats if stat.st_nlink == 1)


def export(source: Path, out: Path, seq_length: int, work: Path) -> Cost:
    """Cost of ``qwen-surgery export`` of *source* to *out*."""
    command = [sys.executable, "-m", "qwen_surgery", "export", str(source), "--onnx-path", str(out)]
    command += ["--seq-length", str(seq_length), "--trust-remote-code"]
    return measure(command, out, Path(__file__).resolve().parent.parent, work / "export.log")


def run_geometries(names: list[str], seq_length: int, work: Path) -> dict[str, object]:
    """Whole exports at real sizes against their limits."""
    results: dict[str, object] = {}
    for name in names:
        source = checkout(work / f"checkout-{name}", GEOMETRIES[name])
        cost = export(source, work / f"onnx-{name}", seq_length, work)
        limit = LIMITS.get(name)
        met = limit is None or (
            cost.seconds <= limit.seconds
            and cost.rss <= limit.megabytes_rss * 1e6
            and cost.disk <= limit.megabytes_disk * 1e6
        )
        results[name] = {**asdict(cost), "limit": asdict(limit) if limit else None, "met": met}
        print(f"{name:>5}  {cost}  {'ok' if met else 'MISSED ' + str(limit)}", file=sys.stderr)
    return results


def run_layers(seq_length: int, work: Path) -> dict[str, object]:
    """CPU time of tracing 8 and 80 layers of the 7B sizes, in processes of their own, best of three."""
    code = (
        "import json, sys, time\n"
        "from qwen_surgery.checkout import Checkout\n"
        "from qwen_surgery.exporting.export import trace_templates\n"
        "from qwen_surgery.nets import NetKind, nets\n"
        "from qwen_surgery.patching.sources import Sources\n"
        "opened = Checkout.open(sys.argv[1]); length = int(sys.argv[2])\n"
        "sources, geometry = Sources.of(opened, seq_length=length), opened.geometry(length)\n"
        "import torch, onnx, transformers\n"
        "start = time.process_time()\n"
        "trace_templates(sources, geometry, dict.fromkeys(n.kind for n in nets(geometry.layers)))\n"
        "print(json.dumps(time.process_time() - start))\n"
    )
    results: dict[str, object] = {}
    seconds = {}
    root = Path(__file__).resolve().parent.parent
    for layers in (8, 80):
        source = checkout(work / f"layers-{layers}", GEOMETRIES["7B"], layers)
        command = [sys.executable, "-c", code, str(source), str(seq_length)]
        times = [float(subprocess.check_output(command, cwd=root)) for _ in range(3)]
        seconds[layers] = min(times)
        results[str(layers)] = {"trace_seconds": times}
        print(f"{layers:>5} layers  trace {min(times):5.2f} s CPU", file=sys.stderr)
    ratio = seconds[80] / seconds[8]
    results |= {"ratio": ratio, "met": ratio <= 1.2}
    print(f"80 / 8 layers, tracing: {ratio:.2f} (at most 1.20)", file=sys.stderr)
    return results


def run_documented(exporter: Path, python: str, seq_length: int, work: Path) -> dict[str, object]:
    """Both exporters on 1.8B sizes with 4 layers; limits are 10x, 5x and 50x."""
    source = checkout(work / "checkout", GEOMETRIES["1.8B"], layers=4)
    ours = export(source, work / "onnx", seq_length, work)
    print(f"qwen-surgery  {ours}", file=sys.stderr)
    root = Path(__file__).resolve().parent.parent
    patch = [sys.executable, "-m", "qwen_surgery", "patch", str(source), "--recipe", "documented"]
    subprocess.run([*patch, "--seq-length", str(seq_length)], cwd=root, check=True, stdout=subprocess.DEVNULL)
    # The exporter predates torch's new default exporter, whose output TPU-MLIR does not take.
    code = (
        "import functools, runpy, sys, torch\n"
        "torch.onnx.export = functools.partial(torch.onnx.export, dynamo=False)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    folder = work / "documented"
    folder.mkdir()
    threads = str(os.cpu_count() or 1)
    command = [
        python,
        "-c",
        code,
        str(exporter.resolve()),
        "-m",
        str(source),
        "-s",
        str(seq_length),
        "-n",
        threads,
    ]
    theirs = measure(command, folder / "models", folder, work / "documented.log")
    print(f"documented    {theirs}", file=sys.stderr)
    ratios = {
        "seconds": theirs.seconds / ours.seconds,
        "cpu": theirs.cpu / ours.cpu,
        "rss": theirs.rss / ours.rss,
        "disk": theirs.disk / ours.disk,
    }
    met = ratios["seconds"] >= 10 and ratios["rss"] >= 5 and ratios["disk"] >= 50
    print(
        f"ratios: {ratios['seconds']:.1f}x faster ({ratios['cpu']:.1f}x in CPU time), "
        f"{ratios['rss']:.1f}x less memory, {ratios['disk']:.0f}x less disk  {'ok' if met else 'MISSED'}",
        file=sys.stderr,
    )
    return {"qwen-surgery": asdict(ours), "documented": asdict(theirs), "ratios": ratios, "met": met}


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["geometries", "layers", "documented"])
    parser.add_argument("exporter", nargs="?", type=Path, help="path of export_onnx_qwen.py")
    parser.add_argument("--only", action="append", choices=list(GEOMETRIES), help="only this geometry")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--exporter-python", default=sys.executable)
    parser.add_argument("--work", type=Path, help="folder to work in (default: a temporary one)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="qwen-surgery-bench-", dir=options.work))
    try:
        if options.what == "geometries":
            results = run_geometries(options.only or list(LIMITS), options.seq_length, work)
            met = all(entry["met"] for entry in results.values())  # type: ignore[index]
        elif options.what == "layers":
            results = run_layers(options.seq_length, work)
            met = bool(results["met"])
        else:
            if options.exporter is None:
                parser.error("documented needs the path of export_onnx_qwen.py")
            results = run_documented(options.exporter, options.exporter_python, options.seq_length, work)
            met = bool(results["met"])
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.json:
        print(json.dumps(results, indent=2))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
