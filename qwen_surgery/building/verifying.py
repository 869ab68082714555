"""The last step of a build: is what came out the unpatched model? At the depth that this machine can
afford.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_surgery.building import costs
from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.errors import Usage
from qwen_surgery.nets import Geometry, NetKind
from qwen_surgery.toolchain.preload import c_compiler

#: What the emulator takes, measured: a 1.8B prefill block at S=512 is 5 minutes; the smallest net 0.05
#: seconds, or 0.9 where its idle threads cannot be made to step aside (``emulator_yield.c``).
EMULATED_RATE = 7e7  # multiply-adds a second
EMULATED_START, EMULATED_START_BUSY = 0.05, 0.9  # seconds a forward
#: Seconds of emulation that a build spends unasked.
PATIENCE = 240.0


def depth(asked: str, geometry: Geometry, options: CompileOptions, steps: int) -> str:
    """What ``auto`` means for this model: ``full`` where the emulator is quick enough, else ``contract``;
    ``none`` for several chips, which the emulator does not have. Raises Usage when that was asked for.
    """
    if options.num_device > 1 and asked not in ("auto", "none"):
        raise Usage(f"--verify {asked} is impossible: the emulator is one chip", hint="use --verify none")
    if options.num_device > 1:
        return "none"
    if asked != "auto":
        return asked
    # two prompt lengths net by net, and end to end greedy and sampled; the decode steps cost their starts
    prefill = 4 * geometry.layers * geometry.seq_length * costs.weights_of(NetKind.BLOCK, geometry)
    forwards = (4 + 2 * steps) * (geometry.layers + 5)
    start = EMULATED_START if c_compiler() else EMULATED_START_BUSY
    seconds = prefill / EMULATED_RATE + forwards * start
    return "full" if seconds < PATIENCE else "contract"


def run(params: dict[str, Any], bmodel: Path, folder: Path) -> dict[str, Any]:
    """Verify *bmodel* as *params* say; the report as JSON. ``contract`` reads what it says of its nets."""
    if params["depth"] == "contract":
        return _contract(params, bmodel)
    from qwen_surgery.verification.session import Request, verify

    folders = tuple(Path(path) for path in params["folders"])
    geometry = Geometry(**params["geometry"])
    request = Request(
        checkout=Path(params["checkout"]),
        onnx=folders,
        bmodels=(bmodel,),
        # A prompt of a third of S, which leaves room for decoding, and one that fills it.
        prompt_lengths=(geometry.seq_length // 3 + 1, geometry.seq_length),
        steps=params["steps"],
        recipe=params["recipe"],
        mode=params["mode"],
        toolchain=params["toolchain"],
        trust_remote_code=params["trust_remote_code"],
    )
    report = verify(request, progress=lambda what: print(what, flush=True))
    return report.to_json()


def _contract(params: dict[str, Any], bmodel: Path) -> dict[str, Any]:
    """Names, order, shapes and types of every net, against the contract and this model's sizes."""
    from qwen_surgery import nets
    from qwen_surgery.packing.report import inspect

    report, geometry = inspect(bmodel), Geometry(**params["geometry"])
    problems = list(report.contract)
    wanted = [(net["name"], NetKind(net["kind"])) for net in params["nets"]]
    if [net.name for net in report.nets] != [name for name, _ in wanted]:
        problems.append("the nets are not those that were asked for, or in another order")
    for net, (_, kind) in zip(report.nets, wanted, strict=False):
        shapes = [tensor.shape for tensor in net.inputs]
        expected = [tensor.shape for tensor in nets.inputs(kind, geometry)]
        if shapes != expected:
            problems.append(f"{net.name}: inputs of {shapes}, this model has {expected}")
    return {"passed": not problems, "depth": "contract", "nets": len(report.nets), "problems": problems}


def restored(data: dict[str, Any]) -> Any:
    """The verification's Report, made again from its JSON."""
    from qwen_surgery.verification.results import Check, LevelResult, Report

    report = Report(data["checkout"], data["seq_length"], data["recipe"])
    report.peak_rss, report.versions = data["peak_rss_bytes"], data["versions"]
    for level in data["levels"]:
        checks = []
        for row in level["checks"]:
            fields = {key: value for key, value in row.items() if key != "passed"}
            values = {
                key: float("nan") if value is None else value for key, value in fields["values"].items()
            }
            checks.append(Check(**{**fields, "values": values, "missed": tuple(fields["missed"])}))
        report.levels.append(
            LevelResult(
                level["level"], level["mode"], level["name"], checks, level["seconds"], level["greedy_tokens"]
            )
        )
    return report
