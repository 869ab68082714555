"""What the lint reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LintFinding:
    """One form the compiler cannot take. ``node`` is a node's name, or "" for the model as a whole.

    ``miscompiled`` is true where TPU-MLIR would accept the form and compute something else.
    """

    rule: str
    node: str
    message: str
    remedy: str
    miscompiled: bool = False

    def __str__(self) -> str:
        where = f"node {self.node}: " if self.node else ""
        return f"{where}{self.message} [{self.rule}]"
