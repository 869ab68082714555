"""``qwen-surgery golden record`` and ``golden check``: reference values, reproducible from seeds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from qwen_surgery import console, extras, files
from qwen_surgery.errors import Missed, Refused, Usage

_SHARED = (
    click.option("--era", "eras", multiple=True, help="Only this era; may be repeated.  [default: all]"),
    click.option(
        "--stage",
        "stages",
        multiple=True,
        type=click.Choice(["torch", "onnxruntime", "tpu-mlir"]),
        help="Only this stage; may be repeated.  [default: torch, onnxruntime]",
    ),
    click.option("--toolchain", metavar="VERSION", help="TPU-MLIR version for the stage tpu-mlir."),
    click.option("--file", type=click.Path(path_type=Path), help="Another record than the program's own."),
)


def _shared(function: Any) -> Any:
    for option in reversed(_SHARED):
        function = option(function)
    return function


@click.group("golden", help="Record and check reference values. Revisions are recorded by `survey --record`.")
def command() -> None:
    pass


def _compute(eras: tuple[str, ...], stages: tuple[str, ...], toolchain: str | None) -> Any:
    from golden.eras import ERAS
    from qwen_surgery.verification.references import run_all

    for era in eras:
        if era not in ERAS:
            raise Usage(f"there is no era {era}", hint=f"eras are {', '.join(ERAS)}")
    with console.err().status("golden") as status:
        return run_all(
            eras or ERAS,
            stages or ("torch", "onnxruntime"),
            toolchain,
            progress=lambda what: status.update(f"golden {what}"),
        )


def _load(file: Path | None) -> tuple[Path, Any]:
    from golden import record

    path = file or record.FILE
    try:
        return path, record.load(path)
    except ValueError as error:
        raise Refused(str(error), hint="record it again") from error


@command.command("record", help="Compute the references and write digests and statistics.")
@_shared
def record_command(
    eras: tuple[str, ...], stages: tuple[str, ...], toolchain: str | None, file: Path | None
) -> None:
    extras.require("golden")
    from golden import record

    path, known = _load(file)
    for era, found in _compute(eras, stages, toolchain).items():
        known.setdefault(era, {}).update(found)
    files.write_whole(path, record.dump(known))
    tensors = sum(len(stage.tensors) for stages_ in known.values() for stage in stages_.values())
    console.out().print(f"{path}: {tensors} tensors of {len(known)} eras")


@command.command("check", help="Compute the references again: same, drift (rounding) or changed (exit 1).")
@_shared
@click.option("--json", "as_json", is_flag=True, help="Print every tensor's verdict to stdout as JSON.")
def check_command(
    eras: tuple[str, ...], stages: tuple[str, ...], toolchain: str | None, file: Path | None, as_json: bool
) -> None:
    extras.require("golden")
    from dataclasses import asdict

    from qwen_surgery.verification.references import judge

    path, known = _load(file)
    if not known:
        raise Refused(f"{path} records nothing", hint="run `qwen-surgery golden record`")
    computed = _compute(eras, stages, toolchain)
    verdicts = [
        verdict
        for era, found in computed.items()
        for stage, result in found.items()
        for verdict in judge(era, stage, known.get(era, {}).get(stage), result)
    ]
    if as_json:
        console.print_json([asdict(verdict) for verdict in verdicts])
    else:
        for era, found in computed.items():
            for stage in found:
                mine = [v for v in verdicts if (v.era, v.stage) == (era, stage)]
                counts = Counter(v.status for v in mine)
                said = ", ".join(f"{n} {status}" for status, n in counts.items())
                moved = mine[0].versions if mine else ""
                if not moved and counts["drift"]:
                    moved = "the same versions: another processor or number of threads"
                console.out().print(f"{era} {stage}: {said}" + (f" ({moved})" if moved else ""))
    bad = [v for v in verdicts if v.status in ("changed", "new")]
    if bad:
        first = bad[0]
        raise Missed(
            f"{len(bad)} references changed, the first is {first.era} {first.stage} {first.tensor}",
            hint="if that was meant, run `qwen-surgery golden record`",
        )
