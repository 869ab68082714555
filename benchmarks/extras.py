"""``python benchmarks/extras.py [EXTRA ...]``: what each extra takes, in an environment of its own.

Builds the wheel, installs it with pip as a user would, and prints megabytes on disk (pip itself not counted),
how many packages come, and pip's processor time. With ``--torch SPEC`` that torch is installed first, in an
environment whose extra needs torch; its time is not counted, its size is.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen_surgery import extras
from tests import wheel

CORE = "core"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("extra", nargs="*", default=[CORE, *extras.EXTRAS, "all"])
    parser.add_argument("--torch", metavar="SPEC", help="such as torch==2.13.0+cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        built = wheel.build(Path(name))
        print(f"{'':8} {'MB':>6} {'packages':>8} {'pip, s':>7}")
        for extra in options.extra:
            with tempfile.TemporaryDirectory() as folder:
                size, packages, seconds = measure(Path(folder), built, extra, options.torch)
            print(f"{extra:8} {size / 1e6:6.0f} {packages:8} {seconds:7.1f}", flush=True)


def measure(folder: Path, built: Path, extra: str, torch: str | None) -> tuple[int, int, float]:
    """Bytes on disk, packages and pip's processor seconds of *extra*."""
    venv.create(folder, with_pip=True)
    before, there = disk(folder), count(folder)
    if torch and "torch" in extras.EXTRAS.get(extra, ("torch",) if extra == "all" else ()):
        install(folder, torch)
    seconds = install(folder, str(built) if extra == CORE else f"{built}[{extra}]")
    return disk(folder) - before, count(folder) - there, seconds


def install(folder: Path, what: str) -> float:
    """Let pip install *what*; its processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", what]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def disk(folder: Path) -> int:
    """Bytes that *folder* takes on the disk, in whole blocks."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def count(folder: Path) -> int:
    """How many packages are installed."""
    return len(list(folder.glob("lib/python3*/site-packages/*.dist-info")))


if __name__ == "__main__":
    main()
