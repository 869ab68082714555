"""What a text has shown of a bmodel on the emulated chip, kept in its side file for ``inspect``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen_surgery.errors import SurgeryError
from qwen_surgery.packing import sidefile
from qwen_surgery.verification.results import Report


def remember(report: Report, bmodels: Sequence[Path]) -> None:
    """Note perplexity and KL of *bmodels*, in the order of the report's chip levels, in their side files.

    A bmodel without a side file, or with one that cannot be written, is left as it is: what was measured is
    in the report.
    """
    levels = [level for level in report.levels if level.level == "chip"]
    for bmodel, level in zip(bmodels, levels, strict=False):
        for check in level.checks:
            if check.label == "text" and check.values and sidefile.path_for(bmodel).is_file():
                try:
                    sidefile.note(bmodel, sidefile.MEASURED, _said(check.values))
                except (SurgeryError, OSError):
                    continue


def _said(values: Mapping[str, float]) -> str:
    return (
        f"perplexity {values['perplexity']:.4g} ({values['reference_perplexity']:.4g} unpatched), "
        f"KL {values['kl']:.3g} nats, {values['agreement']:.1%} of the best tokens equal, on "
        f"{values['tokens']:.0f} tokens of a text on the emulated chip"
    )
