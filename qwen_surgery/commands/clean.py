"""``qwen-surgery clean ONNX_DIR``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from qwen_surgery import console, extras

if TYPE_CHECKING:
    from qwen_surgery.exporting.cleaning import Cleaning, KindReport


@click.command(
    help="Run the graph passes over the nets in ONNX_DIR (made by export), each checked for equal results."
)
@click.argument("onnx_dir", type=click.Path(path_type=Path), required=False)
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Folder to write (default: in place)."
)
@click.option(
    "--passes",
    "passes_file",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="TOML file that says which passes run.",
)
@click.option("--skip", multiple=True, metavar="NAME", help="Leave out the pass NAME; may be repeated.")
@click.option(
    "--for-toolchain",
    metavar="VERSION",
    default=None,
    help="Leave out what this TPU-MLIR version cannot take.",
)
@click.option(
    "--multi-device",
    is_flag=True,
    help="Run the passes that let TPU-MLIR split the nets over several devices (export has the same option).",
)
@click.option(
    "--check",
    type=click.Choice(["each", "end", "off"]),
    default="each",
    show_default=True,
    help="Compare results after each pass (only what it rewrote runs), or once at the end (the whole net, "
    "finding the pass that broke it by bisection).",
)
@click.option("--explain", is_flag=True, help="Say per pass what it did and why that helps the chip.")
@click.option("--json", "as_json", is_flag=True, help="Print the report to stdout.")
def command(
    onnx_dir: Path | None,
    out: Path | None,
    passes_file: Path | None,
    skip: tuple[str, ...],
    for_toolchain: str | None,
    multi_device: bool,
    check: str,
    explain: bool,
    as_json: bool,
) -> None:
    extras.require("clean")
    from qwen_surgery.errors import Usage
    from qwen_surgery.exporting.cleaning import chosen_passes, clean_export

    if multi_device and passes_file is not None:
        raise Usage("--multi-device says itself which passes run", hint="leave --passes out, or use --skip")
    names = chosen_passes(passes_file, skip, for_toolchain, several=multi_device)
    if onnx_dir is None:
        if not explain:
            raise Usage("ONNX_DIR is missing", hint="or ask for --explain alone to read about the passes")
        _explain_passes(names)
        return
    with console.progress_bars() as progress:
        cleaning = clean_export(onnx_dir, out, passes=names, check=check, progress=progress)
    if as_json:
        console.print_json(
            {
                "onnx_dir": str(out or onnx_dir),
                "passes": list(cleaning.manifest.passes),
                "kinds": [kind.to_json() for kind in cleaning.kinds],
            }
        )
        return
    _table(cleaning)
    if explain:
        for kind in cleaning.kinds:
            _explain_kind(kind)
        _explain_compile_passes(names)


def _table(cleaning: Cleaning) -> None:
    from rich.table import Table

    table = Table("net", "nodes before", "after", "fewer ops", title="cleaned templates")
    for kind in cleaning.kinds:
        fewer = [
            f"{op} {n}->{kind.after.get(op, 0)}"
            for op, n in sorted(kind.before.items())
            if kind.after.get(op, 0) < n
        ]
        before, after = sum(kind.before.values()), sum(kind.after.values())
        table.add_row(kind.kind.value, str(before), str(after), ", ".join(fewer) or "-")
    console.out().print(table)


def _explain_kind(kind: KindReport) -> None:
    from graph_passes.framework import registry

    known = {p.name: p for p in registry.onnx_passes()}
    out = console.out()
    out.print(console.styled(f"\n[bold]{kind.kind.value}[/bold]"))
    for report in kind.passes:
        if not report.changed:
            continue
        ops = ", ".join(f"{op} {a}->{b}" for op, (a, b) in report.ops.items())
        what = f"{len(report.sites)} site(s); {ops or 'same ops, other places'}"
        out.print(console.styled(f"  [cyan]{escape(report.name)}[/cyan]: {escape(what)}"))
        out.print(f"    {known[report.name].summary}")
        out.print(f"    why: {known[report.name].why}")
        out.print(f"    at: {_short(report.sites)}")


def _explain_compile_passes(names: tuple[str, ...]) -> None:
    from graph_passes.framework import registry

    passes = registry.select(registry.mlir_passes(), names)
    if passes:
        console.out().print("\nwhile compiling, on the Top dialect", style="bold")
    for one in passes:
        console.out().print(console.styled(f"  [cyan]{escape(one.name)}[/cyan]: {escape(one.summary)}"))
        console.out().print(f"    why: {one.why}")


def _explain_passes(names: tuple[str, ...]) -> None:
    from graph_passes.framework import registry

    for one in registry.select(registry.all_passes(), names):
        out = console.out()
        out.print(console.styled(f"[bold cyan]{escape(one.name)}[/bold cyan]: {escape(one.summary)}"))
        out.print(f"  why: {one.why}")
        out.print(f"  only where: {one.precondition}")


def _short(sites: tuple[str, ...], limit: int = 4) -> str:
    rest = f" and {len(sites) - limit} more" if len(sites) > limit else ""
    return ", ".join(sites[:limit]) + rest
