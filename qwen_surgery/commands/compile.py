"""``qwen-surgery compile ONNX_DIR --out DIR``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qwen_surgery import console
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
    from qwen_surgery.building import session
    from qwen_surgery.building.drive import (
        Builder,
        compile_exported,
        open_export,
        proof_targets,
    )
    from qwen_surgery.exporting.manifest import Manifest
    from qwen_surgery.toolchain import Toolchain

    manifest = Manifest.load(onnx_dir)
    name = Path(manifest.checkout).name.lower() or "qwen"
    options = options_from(given, name).resolved(manifest.geometry)
    if given["dry_run"]:
        toolchain = Toolchain.find(given["toolchain"])
        builder = Builder(out, options, toolchain, session.planned(given))
        compiling = open_export(builder, onnx_dir)
        graph = builder.whole_graph(compiling, manifest.config)
        session.show_plan(
            session.plan_of(graph, builder.store, proof_targets(graph), builder.jobs), given["as_json"]
        )
        return
    toolchain = Toolchain.find(given["toolchain"])
    with session.running(given) as (running, _):
        built = compile_exported(onnx_dir, out, options, toolchain, running)
    if given["as_json"]:
        console.print_json(
            {"bmodels": [str(path) for path in built.bmodels], "unpacked": built.unpacked, "ran": built.ran}
        )
        return
    for path in built.bmodels:
        console.out().print(f"{path} ({session.size(path.stat().st_size)})")
