"""What a user asks of ``build`` and ``compile``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.errors import Usage


@dataclass(frozen=True)
class RunRequest:
    """How to run. ``jobs`` tasks side by side (None: one a core) may take ``memory`` bytes together (None:
    most of what is free); ``scheduler`` is a Dask cluster's address (None: this machine). Without ``pack``
    every layer is compiled; ``prove`` layers are compiled as well as packed, and compared.

    Raises Usage for a combination that means nothing.
    """

    jobs: int | None = None
    memory: int | None = None
    scheduler: str | None = None
    pack: bool = True
    prove: int = 0

    def __post_init__(self) -> None:
        if self.prove and not self.pack:
            raise Usage("--prove has no use with --no-pack: every layer is compiled")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> RunRequest:
        """What the options that ``compile`` and ``build`` share say of it."""
        return cls(given["jobs"], given["memory"], given["scheduler"], not given["no_pack"], given["prove"])


@dataclass(frozen=True)
class BuildRequest:
    """A build of *checkout* into the folder *out*.

    ``recipe`` names the source edits; ``skip`` leaves graph passes out, without ``clean`` there are none;
    ``verify`` is ``auto``, ``full``, ``sample``, ``contract`` or ``none``, with so many decode ``steps``;
    ``toolchain`` is a TPU-MLIR version (None: the default one). Without ``twin`` the export is not proven
    against the unpatched model at a tiny width. ``questions`` are put to every engine, ``text`` is read by
    all of them, so many of its tokens. ``calibration`` is the text that ``--quantizer gptq`` reads, with so
    many tokens of it.
    """

    checkout: Path
    out: Path
    options: CompileOptions
    seq_length: int = 512
    recipe: str = "static"
    skip: tuple[str, ...] = ()
    clean: bool = True
    verify: str = "auto"
    steps: int = 8
    twin: bool = True
    trust_remote_code: bool = False
    toolchain: str | None = None
    run: RunRequest = field(default_factory=RunRequest)
    questions: tuple[str, ...] = ()
    text: str = ""
    text_tokens: int = 256
    calibration: str = ""
    calibration_tokens: int = 0


@dataclass(frozen=True)
class CompileRequest:
    """A compile of the exported folder *onnx* into *out*. ``toolchain`` as in :class:`BuildRequest`."""

    onnx: Path
    out: Path
    options: CompileOptions
    toolchain: str | None = None
    run: RunRequest = field(default_factory=RunRequest)
