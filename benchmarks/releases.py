"""The edited layers beside the unedited ones, in every release of transformers that has them.

    python benchmarks/releases.py                  the last of each minor release from 4.37 on
    python benchmarks/releases.py 4.57.1 5.0.0     these

Wheels are downloaded by pip, without what they depend on. Each release runs in a process of its own: one
layer with the edits and without, in prefill and decode, and a tiny random model through ``verify`` at level
source. Prints the largest differences of both in float32; exits 1 unless every layer's is 0.0.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.families.release import unpacked

ROOT = Path(__file__).resolve().parents[1]
#: model_type -> the first release that has it.
FIRST = {"qwen2": (4, 37), "qwen3": (4, 51)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="*")
    parser.add_argument("--work", type=Path, default=Path("bench-releases"))
    args = parser.parse_args()
    print("| transformers | family | edited layer | whole model |\n|---|---|---|---|")
    wrong = 0
    for version in args.versions or last_of_minors():
        folder = unpacked(version, args.work.resolve() / version)
        for kind, first in FIRST.items():
            if numbers(version)[:2] >= first:
                row, held = compared(folder, kind)
                wrong += not held
                print(f"| {version} | {kind} | {row} |", flush=True)
    return 1 if wrong else 0


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def last_of_minors() -> list[str]:
    """The newest patch of every minor release that has a family, oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    versions = sorted(map(numbers, set(re.findall(r"\b\d+\.\d+\.\d+\b(?=,|\s|$)", said))))
    newest = {version[:2]: version for version in versions if version[:2] >= min(FIRST.values())}
    return [".".join(map(str, version)) for version in newest.values()]


def compared(folder: Path, kind: str) -> tuple[str, bool]:
    """The cells of one row, and whether the layers are equal and the model verified."""
    command = [sys.executable, str(ROOT / "tests/families/release.py"), str(folder), kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{done.stderr.strip().splitlines()[-1]} | ", False
    found = json.loads(done.stdout.splitlines()[-1])
    held = found["layer"] == 0.0 and found["passed"]
    return f"{found['layer']} | {found['worst']:.1e}{'' if found['passed'] else ', missed'}", held


if __name__ == "__main__":
    sys.exit(main())
