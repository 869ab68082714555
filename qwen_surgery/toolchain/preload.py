"""C code of this package that is put in front of a tool's libraries, on machines that can compile it.

Without a C compiler, or with one that does not work, tools take longer or more memory, and give the same.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

#: See the files themselves for what they do and why.
EMULATOR_YIELD = Path(__file__).with_name("emulator_yield.c")
SPARSE_COPIES = Path(__file__).with_name("sparse_copies.c")


def c_compiler() -> str | None:
    """The C compiler of this machine, if it has one."""
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def compile_shared(source: Path, folder: Path) -> Path | None:
    """A shared library of one C file, made in *folder*; None where there is no C compiler that works."""
    compiler = c_compiler()
    if compiler is None:
        return None
    out = folder / f"{source.stem}.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(out), str(source), "-ldl", "-lpthread"]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return out if done.returncode == 0 else None
