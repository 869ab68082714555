"""Which packages belong to which extra of setup.cfg, and which command needs which: the one place that knows.

The core is click, libcst and rich. What needs more says so at once, with the line that installs it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from qwen_surgery.errors import ToolFailed

#: Extra -> what it brings, as imported.
EXTRAS: dict[str, tuple[str, ...]] = {
    "export": ("numpy", "onnx", "torch", "einops"),
    "compile": (
        "numpy",
        "onnx",
        "onnx_graphsurgeon",
        "onnxsim",
        "onnxruntime",
        "flatbuffers",
        "tiktoken",
        "jinja2",
    ),
    "verify": (
        "numpy",
        "onnx",
        "onnxruntime",
        "torch",
        "transformers",
        "einops",
        "tiktoken",
        "flatbuffers",
        "jinja2",
    ),
    "report": ("jinja2", "matplotlib"),
    "cluster": ("distributed",),
    "fetch": ("huggingface_hub", "modelscope_hub"),
}
#: Command -> the extras it needs; a command that is not here runs with the core alone.
OF_COMMAND: dict[str, tuple[str, ...]] = {
    "build": ("export", "compile", "verify"),
    "export": ("export",),
    "clean": ("compile",),
    "compile": ("compile",),
    "verify": ("verify",),
    "refit": ("compile",),
    "inspect": ("compile",),
    "chat": ("compile",),
    "tokenizer": ("compile",),
    "golden": ("verify",),
    "demo-checkout": ("compile",),
}


def require(command: str) -> None:
    """Raises :class:`ToolFailed` (exit code 4) when a package that *command* needs is not installed."""
    need(f"`{command}`", *OF_COMMAND[command])


def need(what: str, *extras: str) -> None:
    """Raises :class:`ToolFailed` when a package of *extras* is not installed. Imports nothing."""
    if lacking := absent(*extras):
        raise _told(what, lacking, extras)


def absent(*extras: str) -> list[str]:
    """The packages of *extras* that are not installed. Imports nothing."""
    wanted = dict.fromkeys(name for extra in extras for name in EXTRAS[extra])
    return [name for name in wanted if importlib.util.find_spec(name) is None]


def installing(*extras: str) -> str:
    """The command that installs *extras*."""
    return f"{_installer()} 'qwen-surgery[{','.join(extras)}]'"


def missing(error: ModuleNotFoundError) -> ToolFailed | None:
    """What to say when an import failed because an extra is not installed; None when it is a bug of ours."""
    package = (error.name or "").partition(".")[0]
    extra = next((extra for extra, names in EXTRAS.items() if package in names), None)
    return _told("this", [package], (extra,)) if extra else None


def _told(what: str, lacking: list[str], extras: tuple[str, ...]) -> ToolFailed:
    names = ", ".join(lacking)
    verb = "is" if len(lacking) == 1 else "are"
    hint = installing(*extras)
    if "torch" in lacking:
        hint += "; a CPU build of torch, installed before, spares gigabytes of CUDA"
    return ToolFailed(f"{what} needs {names}, which {verb} not installed", hint=hint)


def _installer() -> str:
    """The command that adds packages to where this program runs."""
    parts = Path(sys.prefix).parts
    if "pipx" in parts:
        return "pipx runpip qwen-surgery install"
    if "uv" in parts:
        return f"uv pip install --python {sys.prefix}"
    return "pip install"
