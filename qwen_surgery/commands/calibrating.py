"""The options by which ``build`` and ``refit`` are given a text to choose integers by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from qwen_surgery.commands.words import read_text
from qwen_surgery.compiling.options import GPTQ
from qwen_surgery.errors import Usage

_OPTIONS = (
    click.option(
        "--calibration",
        type=click.Path(path_type=Path, dir_okay=False),
        help="The text (UTF-8) that --quantizer gptq reads.  [default: one in English and Chinese that comes "
        "with this program]",
    ),
    click.option(
        "--calibration-tokens",
        type=click.IntRange(64),
        default=None,
        help="Of that text, at most.  [default: 8192]",
    ),
)


def calibration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options; their values go through :func:`calibration_from`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def calibration_from(given: Mapping[str, Any], quantizer: str) -> dict[str, Any]:
    """``calibration`` (the text) and ``calibration_tokens`` of the options; no text for other quantisers.

    Raises Usage for a text that nobody reads, Refused for a file that cannot be read.
    """
    from qwen_surgery.quantising import TEXT, TOKENS

    if quantizer != GPTQ:
        for name in ("calibration", "calibration_tokens"):
            if given[name] is not None:
                option = "--" + name.replace("_", "-")
                raise Usage(
                    f"{option} has no effect on --quantizer {quantizer}", hint=f"add --quantizer {GPTQ}"
                )
        return {"calibration": "", "calibration_tokens": 0}
    text = read_text(given["calibration"] or TEXT)
    return {"calibration": text, "calibration_tokens": given["calibration_tokens"] or TOKENS}
