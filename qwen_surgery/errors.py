"""Errors a user is meant to read: one line that says what, where and what to do next.

Exit codes (the same for every command):
    0 done or clean; 1 changes pending under ``--check``, or a verification missed; 2 usage;
    3 input refused or an edit declined; 4 a tool failed.
"""

from __future__ import annotations


class SurgeryError(Exception):
    """Base of every error that ends a command. ``hint`` says what to do next, in one sentence."""

    exit_code = 4

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Missed(SurgeryError):
    """A verification missed its tolerance, or ``--check`` found pending changes."""

    exit_code = 1


class Usage(SurgeryError):
    """The command line asks for something that cannot be meant (impossible combination, bad value)."""

    exit_code = 2


class Refused(SurgeryError):
    """The input is not something this program may work on, or an edit was declined."""

    exit_code = 3


class ToolFailed(SurgeryError):
    """A tool of the chain (TPU-MLIR, git, the disk) failed. ``log_tail`` holds the log's last lines,
    ``signal`` is that which killed it (9 often means that the machine ran out of memory)."""

    exit_code = 4

    def __init__(
        self, message: str, *, hint: str = "", log_tail: str = "", signal: int | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.log_tail = log_tail
        self.signal = signal
