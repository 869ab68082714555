"""Make, list, check and remove isolated TPU-MLIR environments.

An environment lies at ``<install root>/toolchains/<version>`` and counts as installed only once its record
(``toolchain.json``) is there, which is written last, after the smoke test. What an interrupted install left
is swept by the next one. A lock file keeps two installs of one version apart.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwen_surgery.errors import ToolFailed, Usage
from qwen_surgery.files import locked, require_disk
from qwen_surgery.toolchain import python310, standins
from qwen_surgery.toolchain.environment import RECORD, Toolchain, log_tail, run_guarded, toolchains_dir
from qwen_surgery.toolchain.pins import BUNDLED_GLIBC, BUNDLED_GLIBC_VERSION, DEFAULT_VERSION, PINS, Pin

Say = Callable[[str], None]
#: Bytes an environment takes, with room for pip's temporary copies.
NEEDS = {"lean": 2_600_000_000, "full": 6_000_000_000}

_SMOKE = """
import numpy, pymlir, pyruntime_bm
import onnx, onnxruntime
from transform.OnnxConverter import OnnxConverter
print("smoke test passed: numpy", numpy.__version__, "onnx", onnx.__version__)
"""


def host_glibc() -> tuple[int, int]:
    """Version of this machine's C library; (0, 0) where it is not glibc."""
    name, version = platform.libc_ver()
    if name != "glibc":
        return 0, 0
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _pin(version: str) -> Pin:
    if version not in PINS:
        raise Usage(
            f"TPU-MLIR {version} is not a version this program knows", hint="known: " + ", ".join(PINS)
        )
    return PINS[version]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of *folder*'s version; a second install waits for the first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    lock.touch()
    with locked(lock, wait=True):
        yield


def install(
    version: str = DEFAULT_VERSION, *, full: bool = False, force: bool = False, say: Say = print
) -> Toolchain:
    """Install TPU-MLIR *version* (once; *force* makes it anew) and return it.

    Raises :class:`Usage` for an unknown version, :class:`ToolFailed` when Python 3.10 is missing, the disk
    is too small, pip fails or the smoke test fails; nothing then counts as installed.
    """
    pin = _pin(version)
    folder = toolchains_dir() / version
    with _locked(folder):
        present = _read_record(folder)
        if present and not force and (present.get("kind") == "full" or not full):
            say(f"TPU-MLIR {version} is already installed in {folder}")
            return next(chain for chain in Toolchain.installed() if chain.version == version)
        python = python310.find()
        kind = "full" if full else "lean"
        require_disk(
            folder.parent,
            NEEDS[kind],
            f"TPU-MLIR {version}",
            "free some space or set QWEN_SURGERY_HOME to a larger disk",
        )
        started = time.monotonic()
        # The record goes first, so that a kill from here on leaves nothing that looks whole.
        (folder / RECORD).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        say(f"installing TPU-MLIR {version} ({kind}) into {folder} with {python}")
        log = toolchains_dir() / f"{version}.install.log"
        log.unlink(missing_ok=True)
        _step([str(python), "-m", "venv", str(folder)], log, "venv")
        _pip(folder, pin, full, log)
        chain = _finish(folder, pin, full, log)
        record = {
            "version": version,
            "kind": kind,
            "root": str(chain.root.relative_to(folder)),
            "python": str(python),
            "glibc": ".".join(map(str, host_glibc())),
            "seconds": round(time.monotonic() - started, 1),
        }
        _write_record(folder, record)
        say(f"TPU-MLIR {version} is ready after {record['seconds']} s")
        return chain


def _pip(folder: Path, pin: Pin, full: bool, log: Path) -> None:
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check"]
    if full:
        _step([*pip, *pin.full], log, "pip")
        if pin.full_no_deps:
            _step([*pip, "--no-deps", *pin.full_no_deps], log, "pip")
    else:
        _step([*pip, "--no-deps", "--no-compile", *pin.lean], log, "pip")


def _finish(folder: Path, pin: Pin, full: bool, log: Path) -> Toolchain:
    """What pip cannot do: stand-ins, the bundled C library out of the way, the smoke test."""
    packages = folder / "lib/python3.10/site-packages"
    if not full:
        standins.write(packages, pin.standins)
    chain = Toolchain(folder / "bin/python", packages / "tpu_mlir", pin.version)
    move_glibc_aside(chain.root)
    smoke_test(chain, log)
    return chain


def _step(command: list[str], log: Path, what: str) -> None:
    """Run one install step with its output appended to *log*."""
    keep = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with log.open("ab") as stream:
        status, _ = run_guarded(command, Path("/"), keep, stream.fileno())
    if status:
        raise ToolFailed(
            f"{what} failed with status {status}: {' '.join(command)}",
            hint=f"log: {log}",
            log_tail=log_tail(log),
        )


def move_glibc_aside(root: Path) -> list[str]:
    """Move the bundled C library out of the loader's path when this machine's is newer; the files moved.

    TPU-MLIR bundles three files of glibc 2.35. Beside a newer dynamic loader they make every tool die
    (``GLIBC_2.36 not found``, ``stack smashing detected``); the host's own then serve. Moved, not deleted:
    ``lib/aside`` keeps them.
    """
    if host_glibc() <= BUNDLED_GLIBC_VERSION:
        return []
    aside = root / "lib/aside"
    moved = []
    for name in BUNDLED_GLIBC:
        file = root / "lib/third_party" / name
        if file.exists():
            aside.mkdir(exist_ok=True)
            file.replace(aside / name)
            moved.append(name)
    return moved


def smoke_test(chain: Toolchain, log: Path) -> None:
    """Import the compiler's and the emulator's libraries in the toolchain's Python and start the optimiser.

    Raises :class:`ToolFailed` with the log's last lines.
    """
    commands = {
        "importing TPU-MLIR": [str(chain.python), "-c", _SMOKE],
        "model_transform": chain.command("model_transform", ["--help"]),
        "model_deploy": chain.command("model_deploy", ["--help"]),
        "tpuc-opt": [str(chain.root / "bin/tpuc-opt"), "--version"],
    }
    for what, command in commands.items():
        with log.open("ab") as stream:
            status, _ = run_guarded(command, Path("/"), chain.environ(), stream.fileno(), timeout=180)
        if status:
            raise ToolFailed(
                f"{what} fails in {chain.root} (status {status})", hint=f"log: {log}", log_tail=log_tail(log)
            )


def _write_record(folder: Path, record: dict[str, object]) -> None:
    temporary = folder / f".{RECORD}.{os.getpid()}"
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(folder / RECORD)


def _read_record(folder: Path) -> dict[str, object] | None:
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None


def remove(version: str) -> Path:
    """Remove an installed (or half-installed) version; its folder. Raises :class:`Usage` without one."""
    folder = toolchains_dir() / version
    if not folder.is_dir() or Path(version).name != version:
        names = ", ".join(chain.version for chain in Toolchain.installed()) or "none"
        raise Usage(f"TPU-MLIR {version} is not installed", hint=f"installed: {names}")
    with _locked(folder):
        (folder / RECORD).unlink(missing_ok=True)
        shutil.rmtree(folder)
    return folder


@dataclass(frozen=True)
class Listed:
    """A row of ``toolchain list``. ``bytes`` is the space on disk."""

    version: str
    kind: str
    folder: Path
    bytes: int


def listed() -> list[Listed]:
    """The installed toolchains."""
    rows = []
    for chain in Toolchain.installed():
        folder = toolchains_dir() / chain.version
        record = _read_record(folder) or {}
        rows.append(Listed(chain.version, str(record.get("kind", "?")), folder, _size(folder)))
    return rows


def _size(folder: Path) -> int:
    return sum(
        entry.stat().st_size for entry in folder.rglob("*") if entry.is_file() and not entry.is_symlink()
    )


@dataclass(frozen=True)
class Finding:
    """One line of ``toolchain doctor``: what was looked at, whether it is well, what was found."""

    what: str
    ok: bool
    text: str


def doctor(version: str | None = None) -> list[Finding]:
    """Look at everything the toolchain needs; never raises, each problem is a finding with its remedy."""
    findings = []
    try:
        findings.append(Finding("Python 3.10", True, str(python310.find())))
    except ToolFailed as error:
        findings.append(Finding("Python 3.10", False, f"{error} ({error.hint})"))
    glibc = host_glibc()
    findings.append(Finding("C library", glibc >= BUNDLED_GLIBC_VERSION, f"glibc {glibc[0]}.{glibc[1]}"))
    for folder in sorted(toolchains_dir().glob("*")):
        if folder.is_dir() and _read_record(folder) is None:
            text = f"{folder} was not finished; `toolchain install --version {folder.name}` makes it anew"
            findings.append(Finding("half install", False, text))
    try:
        chain = Toolchain.find(version)
    except ToolFailed as error:
        return [*findings, Finding("TPU-MLIR", False, f"{error} ({error.hint})")]
    findings.append(Finding("TPU-MLIR", True, f"{chain.version} ({chain.origin}) {chain.root}"))
    left = [name for name in BUNDLED_GLIBC if (chain.root / "lib/third_party" / name).exists()]
    if left and glibc > BUNDLED_GLIBC_VERSION:
        text = (
            f"{', '.join(left)} in {chain.root}/lib/third_party are older than this machine's: move them away"
        )
        findings.append(Finding("bundled glibc", False, text))
    log = toolchains_dir() / "doctor.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        smoke_test(chain, log)
        findings.append(Finding("smoke test", True, "compiler and emulator libraries load"))
    except (ToolFailed, OSError, subprocess.SubprocessError) as error:
        tail = getattr(error, "log_tail", "").splitlines()[-1:]
        findings.append(Finding("smoke test", False, " ".join([str(error), *tail])))
    return findings
