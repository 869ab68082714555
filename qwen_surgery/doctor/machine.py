"""What this machine has for a build. Nothing heavy is imported: packages are looked for, not loaded."""

from __future__ import annotations

import platform
from collections.abc import Iterator

from qwen_surgery import extras
from qwen_surgery.building import resources
from qwen_surgery.building.display import size
from qwen_surgery.doctor.remarks import Remark, fail, failed, note, ok
from qwen_surgery.errors import ToolFailed
from qwen_surgery.files import free_disk
from qwen_surgery.toolchain import Toolchain, install, preload, python310
from qwen_surgery.toolchain.environment import toolchains_dir
from qwen_surgery.toolchain.pins import BUNDLED_GLIBC_VERSION, DEFAULT_VERSION

COMPILER = "sudo apt-get install gcc libc6-dev, or what your system calls them"


def remarks(version: str | None = None) -> Iterator[Remark]:
    """A remark on each thing that a build with TPU-MLIR *version* needs of this machine."""
    yield ok("Python", f"{platform.python_version()}")
    yield from _packages()
    yield from _toolchain(version)
    yield _compiler()
    yield _glibc()
    yield ok("cores", str(resources.cores()))
    yield ok("memory", f"{size(resources.free_memory())} free")


def _packages() -> Iterator[Remark]:
    """Those of the extras: a build cannot do without its own, the others are there for single commands."""
    needed = extras.OF_COMMAND["build"]
    if lacking := extras.absent(*needed):
        yield fail("packages", f"`build` needs {', '.join(lacking)}", extras.installing(*needed))
    else:
        yield ok("packages", f"{', '.join(needed)} are installed")
    other = [extra for extra in extras.EXTRAS if extra not in needed and extras.absent(extra)]
    if other:
        yield note("extras", f"not installed: {', '.join(other)}", extras.installing(*other))


def _toolchain(version: str | None) -> Iterator[Remark]:
    try:
        chain = Toolchain.find(version)
    except ToolFailed as error:
        yield failed("TPU-MLIR", error)
        yield from _before_installing(version or DEFAULT_VERSION)
        return
    if not chain.python.exists():
        again = f"qwen-surgery toolchain install --version {chain.version} --force"
        yield fail("TPU-MLIR", f"{chain.version}: its Python, {chain.python}, is gone", again)
        yield from _before_installing(chain.version)
        return
    yield ok("TPU-MLIR", f"{chain.version} ({chain.origin})")


def _before_installing(version: str) -> Iterator[Remark]:
    """What installing TPU-MLIR needs."""
    try:
        yield ok("Python 3.10", str(python310.find()))
    except ToolFailed as error:
        yield failed("Python 3.10", error)
    needed, free = install.NEEDS["lean"], free_disk(toolchains_dir())
    if free < needed:
        found = f"TPU-MLIR {version} needs {size(needed)}, {toolchains_dir()} has {size(free)} free"
        yield fail("its disk", found, "free some space or set QWEN_SURGERY_HOME to a larger disk")


def _compiler() -> Remark:
    compiler = preload.c_compiler()
    if compiler is None:
        return note("C compiler", "none: builds take more memory, the emulator more time", COMPILER)
    return ok("C compiler", compiler)


def _glibc() -> Remark:
    glibc = install.host_glibc()
    wanted = ".".join(map(str, BUNDLED_GLIBC_VERSION))
    found = f"glibc {glibc[0]}.{glibc[1]}" if any(glibc) else "not glibc"
    if glibc < BUNDLED_GLIBC_VERSION:
        mend = "build on Ubuntu 22.04, Debian 12 or newer, or in a container of one"
        return fail("C library", f"{found}, TPU-MLIR's tools need {wanted}", mend)
    return ok("C library", found)
