"""``qwen-surgery compile ONNX_DIR --out DIR``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qwen_surgery import console, extras
from qwen_surgery.compiling.flags import compile_options, options_from, run_options


@click.command(
    "compile",
    help="Compile the nets in ONNX_DIR (made by export, better also cleaned) to one bmodel with TPU-MLIR.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("onnx_dir", type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder; the bmodel goes to OUT/BM1684X/."
)
@compile_options
@run_options
def command(onnx_dir: Path, out: Path, **given: Any) -> None:
    extras.require("compile")
    from qwen_surgery.building import build, session
    from qwen_surgery.building.display import size
    from qwen_surgery.building.request import CompileRequest, RunRequest
    from qwen_surgery.exporting.manifest import Manifest

    manifest = Manifest.load(onnx_dir)
    name = Path(manifest.checkout).name.lower() or "qwen"
    options = options_from(given, name, manifest.release)
    request = CompileRequest(onnx_dir, out, options, given["toolchain"], RunRequest.of(given))
    if given["dry_run"]:
        session.show_plan(build.plan(request), given["as_json"])
        return
    result = build.build(request)
    if given["as_json"]:
        console.print_json(
            {
                "bmodels": [str(path) for path in result.bmodels],
                "unpacked": result.unpacked,
                "ran": result.ran,
            }
        )
        return
    if result.integers:
        console.out().print(result.integers, soft_wrap=True)
    for path in result.bmodels:
        console.out().print(f"{path} ({size(path.stat().st_size)})")
