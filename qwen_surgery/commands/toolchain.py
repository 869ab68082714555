"""``qwen-surgery toolchain``: install, list, remove and check TPU-MLIR environments."""

from __future__ import annotations

import click

from qwen_surgery import console
from qwen_surgery.errors import ToolFailed
from qwen_surgery.toolchain.pins import DEFAULT_VERSION, PINS


@click.group("toolchain", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Install, list, remove and check TPU-MLIR environments.

    They live in $QWEN_SURGERY_HOME (default: the cache directory). $QWEN_SURGERY_TOOLCHAIN names an existing
    Python 3.10 environment to use instead; a sourced envsetup.sh (TPUC_ROOT) is used when nothing is
    installed.
    """


@command.command("install")
@click.option(
    "--version", default=DEFAULT_VERSION, show_default=True, help=f"TPU-MLIR version ({', '.join(PINS)})."
)
@click.option("--full", is_flag=True, help="Install every package the wheel declares, and torch (3.6 GB).")
@click.option("--force", is_flag=True, help="Make the environment anew even if it is there.")
def install(version: str, full: bool, force: bool) -> None:
    """Create an isolated environment with TPU-MLIR in it, and test it."""
    from qwen_surgery.toolchain import install as installing

    chain = installing.install(version, full=full, force=force, say=console.err().print)
    console.out().print(str(chain.root))


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout.")
def list_(as_json: bool) -> None:
    """List the installed versions."""
    from qwen_surgery.toolchain import install as installing

    rows = installing.listed()
    if as_json:
        console.print_json([{**vars(row), "folder": str(row.folder)} for row in rows])
        return
    for row in rows:
        console.out().print(f"{row.version:8} {row.kind:5} {row.bytes / 1e9:5.2f} GB  {row.folder}")
    if not rows:
        console.err().print("no TPU-MLIR is installed  (run `qwen-surgery toolchain install`)")


@command.command("remove")
@click.argument("version")
def remove(version: str) -> None:
    """Remove an installed version."""
    from qwen_surgery.toolchain import install as installing

    console.err().print(f"removed {installing.remove(version)}")


@command.command("doctor")
@click.option("--version", default=None, help="Look at this version; the one that would be used otherwise.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout.")
def doctor(version: str | None, as_json: bool) -> None:
    """Check everything TPU-MLIR needs; exit 4 when something is wrong."""
    from qwen_surgery.toolchain import install as installing

    findings = installing.doctor(version)
    if as_json:
        console.print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            mark = "ok  " if finding.ok else "FAIL"
            console.out().print(f"{mark} {finding.what}: {finding.text}")
    bad = [finding.what for finding in findings if not finding.ok]
    if bad:
        raise ToolFailed(f"not well: {', '.join(bad)}", hint="each line above says what to do")
