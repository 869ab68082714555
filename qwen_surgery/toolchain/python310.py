"""Find a Python 3.10, which TPU-MLIR's wheels need, wherever the machine keeps it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from qwen_surgery.errors import ToolFailed
from qwen_surgery.toolchain.pins import PYTHON

HINT = (
    "install one (`uv python install 3.10`, `pyenv install 3.10`, `conda create -n py310 python=3.10`), "
    "or name one in QWEN_SURGERY_PYTHON310"
)


def _version(python: Path) -> tuple[int, int] | None:
    """Major and minor version of *python*; None when it does not run or has no venv module."""
    code = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
    try:
        done = subprocess.run(
            [python, "-I", "-c", code], capture_output=True, text=True, timeout=30, check=False, cwd="/"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    major, minor = done.stdout.split()
    return int(major), int(minor)


def candidates(environ: dict[str, str] | None = None) -> Iterator[Path]:
    """Every place a Python 3.10 may lie: PATH, pyenv, uv's own Pythons, conda environments. In that order."""
    env = dict(os.environ) if environ is None else environ
    home = Path(env.get("HOME", "~")).expanduser()
    for name in ("python3.10", "python3", "python"):
        found = shutil.which(name, path=env.get("PATH", os.defpath))
        # pyenv's shims answer for versions that are not active; the real ones are looked up below.
        if found and Path(found).parent.name != "shims":
            yield Path(found)
    pyenv = Path(env.get("PYENV_ROOT", home / ".pyenv"))
    yield from sorted(pyenv.glob("versions/3.10*/bin/python3.10"), reverse=True)
    data = Path(env.get("XDG_DATA_HOME") or home / ".local/share")
    uv = Path(env.get("UV_PYTHON_INSTALL_DIR") or data / "uv/python")
    yield from sorted(uv.glob("cpython-3.10*/bin/python3.10"), reverse=True)
    roots = [Path(env["CONDA_PREFIX"])] if env.get("CONDA_PREFIX") else []
    names = ("miniconda3", "anaconda3", "miniforge3", "mambaforge", "micromamba", ".conda")
    roots += [home / name for name in names]
    roots += [Path("/opt/conda"), Path("/opt/miniconda3"), Path("/opt/anaconda3")]
    for root in roots:
        yield root / "bin/python3.10"
        yield from sorted(root.glob("envs/*/bin/python3.10"))


def find(environ: dict[str, str] | None = None) -> Path:
    """The first working Python 3.10 (one that can make virtual environments).

    ``QWEN_SURGERY_PYTHON310`` names one and is then the only candidate. Raises :class:`ToolFailed` when
    there is none.
    """
    env = dict(os.environ) if environ is None else environ
    named = env.get("QWEN_SURGERY_PYTHON310")
    if named:
        if _version(Path(named)) == PYTHON:
            return Path(named)
        raise ToolFailed(f"QWEN_SURGERY_PYTHON310={named} is not a working Python 3.10", hint=HINT)
    tried: set[Path] = set()
    for python in candidates(env):
        if python in tried or not python.is_file():
            continue
        tried.add(python)
        if _version(python) == PYTHON:
            return python
    raise ToolFailed(
        "TPU-MLIR needs Python 3.10 and none was found on PATH, in pyenv, uv or conda", hint=HINT
    )
