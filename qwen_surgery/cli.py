"""The command line: one table of commands, each loaded only when it is called.

A command lives in ``qwen_surgery/commands/<name>.py`` as a click command called ``command``; this file
must stay free of heavy imports so that ``--help`` answers at once.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from qwen_surgery import __version__, console, extras
from qwen_surgery.errors import SurgeryError, ToolFailed, Usage

# name -> (module under qwen_surgery.commands, one-line help). The order is that of the work.
COMMANDS: dict[str, tuple[str, str]] = {
    "fetch": ("fetch", "Get a checkout from a hub: only what is needed, checked."),
    "doctor": ("doctor", "Say whether a build will work here, and what mends it."),
    "build": ("build", "Do all steps: patch, export, clean, compile, verify."),
    "patch": ("patch", "Apply the source and config edits to a checkout (--diff previews)."),
    "restore": ("restore", "Bring back the original bytes of a patched checkout."),
    "explain": ("explain", "Say what a codemod does, why, and when it declines."),
    "survey": ("survey", "Try every codemod on every revision of a repository or folder."),
    "export": ("export", "Export every net of a checkout to ONNX."),
    "clean": ("clean", "Run the graph passes over exported nets."),
    "compile": ("compile", "Compile cleaned nets to one bmodel with TPU-MLIR."),
    "verify": ("verify", "Prove each stage against the unpatched model."),
    "refit": ("refit", "Put another fine-tune's weights into an existing bmodel."),
    "inspect": ("inspect", "Show what is inside a bmodel."),
    "chat": ("chat", "Talk to an exported or compiled model."),
    "tokenizer": ("tokenizer", "Collect and check the tokenizer files a demo needs."),
    "toolchain": ("toolchain", "Install, list and check TPU-MLIR toolchains."),
    "golden": ("golden", "Record and check reference values and known revisions."),
    "demo-checkout": ("demo_checkout", "Make a small Qwen v1 checkout with random weights."),
}


class LazyGroup(click.Group):
    """A click group that imports a command's module only when that command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"qwen_surgery.commands.{COMMANDS[cmd_name][0]}")
        return module.command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click would import every command to read its help line; the table already has it.
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, help_) in COMMANDS.items()])


def _print_versions(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value:
        return
    from qwen_surgery.toolchain.environment import Toolchain

    console.line(f"qwen-surgery {__version__}")
    try:
        chain = Toolchain.find()
        console.line(f"TPU-MLIR {chain.version} ({chain.origin})")
    except ToolFailed as error:
        console.line(f"{error}  ({error.hint})")
    context.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_versions,
    help="Show the version, and TPU-MLIR's.",
)  # fmt: skip
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
@click.pass_context
def root(ctx: click.Context, debug: bool) -> None:
    """From an upstream Qwen v1 checkout to a verified bmodel for Sophgo TPUs."""
    ctx.obj = {"debug": debug}


def _report(error: SurgeryError) -> None:
    console.line(f"error: {error}" + (f"  ({error.hint})" if error.hint else ""), err=True)
    tail = getattr(error, "log_tail", "")
    if tail:
        console.text(tail, err=True)


@dataclass(frozen=True)
class _Call:
    """One call of the command line: its words, and how many JSON documents were out before it."""

    args: list[str]
    documents: int

    def end(self, message: str, exit_code: int, hint: str = "") -> NoReturn:
        """Leave with *exit_code*; under ``--json`` stdout gets the reason, unless it has its one document."""
        options = self.args[: self.args.index("--")] if "--" in self.args else self.args
        if "--json" in options and console.documents() == self.documents:
            more = {"hint": hint} if hint else {}
            console.print_json({"error": message, **more, "exit_code": exit_code})
        sys.exit(exit_code)

    def end_wrong(self, error: click.ClickException) -> NoReturn:
        """Leave after words that make no call."""
        usage = io.StringIO()
        error.show(usage)
        console.text(usage.getvalue().rstrip("\n"), err=True)
        self.end(error.format_message(), Usage.exit_code)

    def end_failed(self, error: Exception) -> NoReturn:
        """Leave after *error*, in one line; with its traceback under ``--debug``."""
        if "--debug" in self.args:
            traceback.print_exc()
        said = _as_surgery_error(error)
        _report(said)
        self.end(str(said), said.exit_code, said.hint)


def _as_surgery_error(error: Exception) -> SurgeryError:
    """What to say about *error*: our own errors as they are, the system's and bugs as a tool's failure."""
    if isinstance(error, SurgeryError):
        return error
    if isinstance(error, ModuleNotFoundError) and (needed := extras.missing(error)):
        return needed
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return ToolFailed(f"{where}{error.strerror or error}")
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    return ToolFailed(f"unexpected {said}", hint="a bug; run again with --debug and report it")


def main(argv: list[str] | None = None) -> Any:
    """Run the command line; never returns (exits with the codes of :mod:`qwen_surgery.errors`)."""
    args = list(sys.argv[1:] if argv is None else argv)
    if "--debug" in args[1:]:  # it may stand anywhere
        args.remove("--debug")
        args.insert(0, "--debug")
    call = _Call(args, console.documents())
    try:
        sys.exit(root.main(args=args, standalone_mode=False) or 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        call.end_wrong(error)
    except (KeyboardInterrupt, click.Abort):
        console.line("interrupted; nothing half-written is left behind", err=True)
        call.end("interrupted", 130)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; Python must not complain about it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        call.end_failed(error)
