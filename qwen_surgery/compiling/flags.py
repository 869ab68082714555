"""The command-line options that ``compile`` and ``build`` share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from qwen_surgery.chips import CHIPS, DEFAULT_CHIP, with_ability
from qwen_surgery.compiling.options import (
    ADDR_MODES,
    QUANTIZE,
    QUANTIZERS,
    RUNTIMES,
    CompileOptions,
    release_mode,
)
from qwen_surgery.weights.quantised import Release

Command = TypeVar("Command", bound=Callable[..., Any])


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Size(click.ParamType):
    """Bytes, as ``6G``, ``800M`` or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(value).strip().upper())
        if found is None:
            self.fail(f"{value!r} is not a size; write 6G or 800M", param, ctx)
        return int(float(found[1]) * _UNITS[found[2]])


_COMPILE = (
    click.option(
        "--mode",
        type=click.Choice(list(QUANTIZE)),
        default=None,
        help="Weights of blocks.  [default: int4, or as the checkpoint is quantised]",
    ),
    click.option(
        "--target",
        type=click.Choice(list(CHIPS)),
        default=DEFAULT_CHIP,
        show_default=True,
        help="The chip.",
    ),
    click.option(
        "--runtime",
        type=click.Choice(list(RUNTIMES)),
        default=None,
        help="Which demo will run it: fixes nets, order and flags.  [default: llm-tpu where it runs, else "
        "sophon-demo]",
    ),
    click.option(
        "--num-device",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Chips that share the model: 1, 2, 4, 6 or 8.",
    ),
    click.option(
        "--num-core",
        type=click.IntRange(1, max(max(chip.cores) for chip in CHIPS.values())),
        default=None,
        help="Cores of a chip that has several.  [default: a file for each count]",
    ),
    click.option(
        "--addr-mode",
        type=click.Choice(ADDR_MODES),
        default="io_alone",
        show_default=True,
        help="Addresses of inputs and outputs: of each net's own (but for the prefill blocks), so that the "
        "KV cache stays in place and no net's inputs lie over another's results, or anywhere.",
    ),
    click.option(
        "--dynamic",
        is_flag=True,
        help=f"Prefill at each prompt's own length ({with_ability('dynamic')}).",
    ),
    click.option(
        "--q-group-size",
        type=int,
        default=None,
        help="Input features per scale of the blocks' integers.  [default: 64 for int4, TPU-MLIR's for int8, "
        "or as the checkpoint is quantised]",
    ),
    click.option("--symmetric", is_flag=True, help="Symmetric int4, without zero points."),
    click.option(
        "--lm-head-mode",
        type=click.Choice(list(QUANTIZE)),
        default=None,
        help="Keep the lm_head at a higher precision.  [default: as --mode; int8 where the checkpoint is "
        "quantised]",
    ),
    click.option(
        "--quantizer",
        type=click.Choice(QUANTIZERS),
        default=QUANTIZERS[0],
        show_default=True,
        help="How integers are chosen: rtn rounds as TPU-MLIR does; search takes for each group of weights "
        "the scale that loses least; gptq (build and refit) makes up for each error by what a text shows of "
        "the model.",
    ),
    click.option("--name", default=None, help="First part of the file name.  [default: the folder's name]"),
    click.option("--toolchain", metavar="VERSION", default=None, help="TPU-MLIR version to use."),
)

_RUN = (
    click.option(
        "--jobs",
        type=click.IntRange(1),
        default=None,
        help="Tasks side by side.  [default: one a core]",
    ),
    click.option(
        "--memory",
        type=Size(),
        metavar="SIZE",
        default=None,
        help="What tasks side by side may take together, as 6G.  [default: most of what is free]",
    ),
    click.option(
        "--scheduler",
        metavar="tcp://HOST:PORT",
        default=None,
        help="Run on a Dask cluster that shares the output folder.",
    ),
    click.option("--no-pack", is_flag=True, help="Compile every layer instead of packing layers 1, 2, ..."),
    click.option(
        "--prove",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        metavar="N",
        help="Also compile N packed layers and compare every byte.",
    ),
    click.option(
        "--dry-run",
        is_flag=True,
        help="Print the plan: tasks, commands, memory, disk, time. Nothing is done.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the result (or the plan) as JSON to stdout."),
)


def compile_options(command: Command) -> Command:
    """Add the options that say what to compile."""
    for option in reversed(_COMPILE):
        command = option(command)
    return command


def run_options(command: Command) -> Command:
    """Add the options that say how to run."""
    for option in reversed(_RUN):
        command = option(command)
    return command


def options_from(given: dict[str, Any], name: str, release: Release | None) -> CompileOptions:
    """The compile options of a command's parameters (not yet resolved); *name* where the user gave none.

    *release* is how the checkpoint is quantised, where it is.
    """
    mode = given["mode"] or ("int4" if release is None else release_mode(release))
    names = ["target", "runtime", "num_device", "num_core", "addr_mode", "dynamic", "q_group_size"]
    names += ["symmetric", "lm_head_mode", "quantizer"]
    return CompileOptions(mode=mode, name=given["name"] or name, **{key: given[key] for key in names})
