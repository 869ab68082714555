"""Every stage of the road on every era of upstream's code: one table with the worst figure of each level.

    python benchmarks/verify_eras.py                          seven eras in bf16, int8 and int4
    python benchmarks/verify_eras.py --era sdpa --mode bf16   one of each

For each era a checkout of the small trained chat model is made, built in each mode by ``qwen-surgery build
--verify full`` and so compared with its own unpatched model: patched code, onnxruntime on the raw and the
cleaned nets, and the bmodel on the emulator. Blocks are fed with the reference's inputs; then the model
answers questions that it was not taught and reads a text that was kept out of its training. Ends with exit
code 1 when anything misses its tolerance (``golden/tolerances.json``). Needs the TPU-MLIR toolchain.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from golden.eras import ERAS
from golden.speaking.model import HERE, make_chat_checkout

ROOT = Path(__file__).resolve().parent.parent
MODES = ("bf16", "int8", "int4")
SEQ_LENGTH = 128
QUESTIONS = ("So what is a bmodel?", "Please count to 5.", "What is 2 + 7?", "请问 bmodel 是什么？")


def verified(checkout: Path, out: Path, mode: str) -> dict[str, Any]:
    """The verification's report (JSON) of a build of *checkout* in *mode*; misses are in it, not raised."""
    command = [sys.executable, "-m", "qwen_surgery", "build", str(checkout), "--out", str(out)]
    command += ["--mode", mode, "--seq-length", str(SEQ_LENGTH), "--verify", "full"]
    command += [word for question in QUESTIONS for word in ("--ask", question)]
    command += ["--text", str(HERE / "heldout.txt"), "--trust-remote-code", "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(f"{checkout.name} {mode}: {done.stderr[-3000:]}")
    return json.loads(done.stdout)["report"]


def level_of(report: dict[str, Any], level: str) -> list[dict[str, Any]]:
    """Every check of *level*, of all its runs."""
    return [check for one in report["levels"] if one["level"] == level for check in one["checks"]]


def worst_difference(checks: list[dict[str, Any]]) -> float:
    """Largest absolute difference of one net's output, fed with the reference's inputs."""
    nets = [check for check in checks if check["net"] != "end-to-end" and "max_abs" in check["values"]]
    return max(check["values"]["max_abs"] for check in nets)


def worst_cosine(checks: list[dict[str, Any]]) -> float:
    """Smallest cosine of a block's hidden states, prefill and decode, fed with the reference's inputs."""
    return min(check["values"]["cosine"] for check in checks if check["output"] == "hidden_states")


def said(checks: list[dict[str, Any]], what: str) -> dict[str, float]:
    """What the check called *what* (``answers`` or ``text``) measured."""
    return next(check["values"] for check in checks if check["label"] == what)


def row(era: str, reports: dict[str, dict[str, Any]]) -> list[str]:
    first = next(iter(reports.values()))
    cells = [era, *(f"{worst_difference(level_of(first, level)):.1e}" for level in ("source", "onnx"))]
    for report in reports.values():
        chip = level_of(report, "chip")
        equal = round(said(chip, "answers")["agreement"] * len(QUESTIONS))
        cells += [
            f"{worst_cosine(chip):.6f}",
            f"{equal} of {len(QUESTIONS)}",
            f"{said(chip, 'text')['kl']:.1e}",
        ]
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--era", action="append", choices=ERAS)
    parser.add_argument("--mode", action="append", choices=MODES)
    parser.add_argument("--json", type=Path, help="also write all reports here")
    args = parser.parse_args()
    modes = args.mode or MODES
    heads = ["era", "source max abs", "onnx max abs"]
    heads += [f"{mode} {what}" for mode in modes for what in ("cosine", "answers", "KL")]
    for line in (heads, ["---"] * len(heads)):
        print(f"| {' | '.join(line)} |", flush=True)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="qwen-surgery-eras-") as work:
        for era in args.era or ERAS:
            started = time.perf_counter()
            checkout = make_chat_checkout(Path(work) / f"qwen-{era}", era)
            out = Path(work) / f"out-{era}"
            found[era] = {mode: verified(checkout, out, mode) for mode in modes}
            print(f"| {' | '.join(row(era, found[era]))} |", flush=True)
            if args.json:
                args.json.write_text(json.dumps(found), encoding="utf-8")
            print(f"{era}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    missed = [
        (era, mode) for era, modes_ in found.items() for mode, one in modes_.items() if not one["passed"]
    ]
    for era, mode in missed:
        print(f"{era} {mode}: missed its tolerance", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
