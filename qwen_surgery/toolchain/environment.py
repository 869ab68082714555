"""An installed TPU-MLIR and how to run its tools: clean environment, one log per run, clear failures."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwen_surgery.errors import ToolFailed
from qwen_surgery.toolchain.pins import DEFAULT_VERSION

RECORD = "toolchain.json"
LOG_TAIL_LINES = 15
#: Origin of a toolchain that is not there yet.
EXPECTED = "expected"

#: Variables of the caller that a tool may see. Everything else (PYTHONPATH, LD_LIBRARY_PATH, conda's,
#: pip's) stays out.
_PASSED = ("HOME", "TMPDIR", "LANG", "LC_ALL", "TERM", "OMP_NUM_THREADS")

#: The tools copy weights several times over, and half their time was the kernel clearing pages for that. So
#: small blocks that they free stay with them, the heap grows in large steps, and all memory comes in huge
#: pages (glibc from 2.35 on): model_transform of a 1.8B block takes 1.6 s instead of 4.6 s.
_FEWER_FAULTS = {
    "GLIBC_TUNABLES": ":".join(
        (
            "glibc.malloc.mmap_threshold=16777216",
            "glibc.malloc.trim_threshold=17179869184",
            "glibc.malloc.top_pad=16777216",
            "glibc.malloc.hugetlb=1",
        )
    )
}


def home(environ: Mapping[str, str] | None = None) -> Path:
    """Where toolchains live: ``$QWEN_SURGERY_HOME``, or ``qwen-surgery`` in the user's cache directory."""
    env = os.environ if environ is None else environ
    if env.get("QWEN_SURGERY_HOME"):
        return Path(env["QWEN_SURGERY_HOME"]).expanduser().absolute()
    cache = env.get("XDG_CACHE_HOME") or Path(env.get("HOME", "~")).expanduser() / ".cache"
    return Path(cache) / "qwen-surgery"


def toolchains_dir(environ: Mapping[str, str] | None = None) -> Path:
    """The folder that holds one environment per TPU-MLIR version."""
    return home(environ) / "toolchains"


@dataclass(frozen=True)
class ToolResult:
    """One finished tool run. ``seconds`` is wall time, ``peak_rss`` bytes of its largest process."""

    command: tuple[str, ...]
    log: Path
    seconds: float
    peak_rss: int


@dataclass(frozen=True)
class Toolchain:
    """A TPU-MLIR environment that can be run.

    ``python`` is its interpreter, ``root`` the ``tpu_mlir`` package (what envsetup.sh calls TPUC_ROOT),
    ``version`` the version string, ``origin`` where it came from: ``installed``, ``QWEN_SURGERY_TOOLCHAIN``,
    ``envsetup.sh``, or ``expected`` for one that is not there yet. ``extra`` holds variables that only a
    sourced envsetup.sh knows.
    """

    python: Path
    root: Path
    version: str
    origin: str = "installed"
    extra: tuple[tuple[str, str], ...] = field(default=())

    @property
    def identity(self) -> str:
        """What tells two compilers apart: the version, and the compiler's size."""
        try:
            return f"{self.version} {(self.root / 'bin/tpuc-opt').stat().st_size}"
        except OSError:
            return self.version

    # ---- finding
    # -------------------------------------------------------------------------------------------------

    @staticmethod
    def find(version: str | None = None, environ: Mapping[str, str] | None = None) -> Toolchain:
        """The toolchain to use: ``$QWEN_SURGERY_TOOLCHAIN``, an installed one, or a sourced envsetup.sh.

        Without *version* the default version is taken, or the newest installed one. Raises
        :class:`ToolFailed` when there is none, or the named one is not what was asked for.
        """
        env = os.environ if environ is None else environ
        if env.get("QWEN_SURGERY_TOOLCHAIN"):
            found = Toolchain._from_venv(Path(env["QWEN_SURGERY_TOOLCHAIN"]).expanduser())
            return found._checked(version, "QWEN_SURGERY_TOOLCHAIN")
        installed = {chain.version: chain for chain in Toolchain.installed(env)}
        wanted = version or (DEFAULT_VERSION if DEFAULT_VERSION in installed else None)
        if wanted is None and installed:
            wanted = max(installed, key=version_key)
        if wanted in installed:
            return installed[wanted]
        if env.get("TPUC_ROOT"):
            return Toolchain._from_envsetup(env)._checked(version, "the sourced envsetup.sh")
        which = f"TPU-MLIR {version}" if version else "TPU-MLIR"
        flag = f" --version {version}" if version else ""
        raise ToolFailed(
            f"{which} is not installed",
            hint=f"run `qwen-surgery toolchain install{flag}`, or point QWEN_SURGERY_TOOLCHAIN at one",
        )

    @staticmethod
    def expected() -> Toolchain:
        """The default version as it would be installed: enough to plan with, not to run."""
        return Toolchain(Path("python3.10"), Path("tpu_mlir"), DEFAULT_VERSION, EXPECTED)

    @staticmethod
    def installed(environ: Mapping[str, str] | None = None) -> list[Toolchain]:
        """Every completely installed toolchain under the install root, oldest version first."""
        found = []
        for record in toolchains_dir(environ).glob(f"*/{RECORD}"):
            try:
                data = json.loads(record.read_text())
                chain = Toolchain(record.parent / "bin/python", record.parent / data["root"], data["version"])
            except (OSError, ValueError, KeyError):
                continue
            if chain.root.is_dir():
                found.append(chain)
        return sorted(found, key=lambda chain: version_key(chain.version))

    @staticmethod
    def _from_venv(folder: Path) -> Toolchain:
        python = folder.absolute() / "bin/python"
        packages = next(iter(sorted(folder.absolute().glob("lib/python3.10/site-packages"))), None)
        if not python.exists() or packages is None or not (packages / "tpu_mlir").is_dir():
            raise ToolFailed(
                f"QWEN_SURGERY_TOOLCHAIN={folder} is not a Python 3.10 environment with tpu_mlir in it",
                hint="name the folder that holds bin/python, or unset the variable",
            )
        infos = sorted(packages.glob("tpu_mlir-*.dist-info"))
        version = infos[-1].name.split("-")[1].removesuffix(".dist") if infos else "unknown"
        return Toolchain(
            python, packages / "tpu_mlir", version.removesuffix(".dist"), "QWEN_SURGERY_TOOLCHAIN"
        )

    @staticmethod
    def _from_envsetup(env: Mapping[str, str]) -> Toolchain:
        import shutil

        root = Path(env["TPUC_ROOT"])
        python = shutil.which("python3.10", path=env.get("PATH")) or shutil.which(
            "python3", path=env.get("PATH")
        )
        if not (root / "python/tools/model_transform.py").is_file() or python is None:
            raise ToolFailed(
                f"TPUC_ROOT={root} holds no python/tools/model_transform.py, or no python3 is on PATH",
                hint="source TPU-MLIR's envsetup.sh again, or unset TPUC_ROOT",
            )
        version = "unknown"
        for file in (root / "python/VERSION", root / "VERSION"):
            if file.is_file():
                version = file.read_text().strip()
        infos = sorted(root.parent.glob("tpu_mlir-*.dist-info"))
        if infos:
            version = infos[-1].name.removeprefix("tpu_mlir-").removesuffix(".dist-info")
        keep = tuple((name, env[name]) for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if env.get(name))
        return Toolchain(Path(python), root, version, "envsetup.sh", keep)

    def _checked(self, version: str | None, where: str) -> Toolchain:
        if version and self.version not in (version, "unknown"):
            raise ToolFailed(
                f"TPU-MLIR {version} was asked for, but {where} names version {self.version}",
                hint="unset it, or leave the version out",
            )
        return self

    # ---- running
    # -------------------------------------------------------------------------------------------------

    def environ(self) -> dict[str, str]:
        """The variables a tool runs with; nothing is inherited but a short list."""
        root = self.root
        env = {name: os.environ[name] for name in _PASSED if name in os.environ}
        extra = dict(self.extra)
        ppl = root / "cross_toolchains/ppl_compile"
        paths = [self.python.parent, root / "bin", root / "python/tools", root / "python/utils"]
        paths += [root / "python/test", root / "customlayer/python", ppl / "bin"]
        python_path = [root, root / "python", root / "customlayer/python"]
        libraries = [root / "lib", root / "lib/capi", root / "lib/third_party"]
        env["PATH"] = _join(paths, extra.get("PATH", "/usr/local/bin:/usr/bin:/bin"))
        env["PYTHONPATH"] = _join(python_path, extra.get("PYTHONPATH", ""))
        env["LD_LIBRARY_PATH"] = _join(libraries, extra.get("LD_LIBRARY_PATH", ""))
        env["TPUC_ROOT"] = str(root)
        env["PROJECT_ROOT"] = str(root)
        env["PPL_PROJECT_ROOT"] = str(ppl)
        env["PPL_RUNTIME_PATH"] = str(ppl / "deps")
        env["TPUKERNEL_CUSTOM_FIRMWARE_PATH"] = str(root / "lib/libcmodel_custom.so")
        env.setdefault("OMP_NUM_THREADS", "4")
        env.setdefault("HOME", "/")
        env["PYTHONNOUSERSITE"] = "1"
        return env

    def command(self, tool: str, args: Sequence[str]) -> list[str]:
        """The command line that runs *tool* (``model_transform``, ``model_deploy``, ``model_tool``, ...)."""
        script = self.root / "python/tools" / f"{tool}.py"
        if script.is_file():
            return [str(self.python), str(script), *map(str, args)]
        return [str(self.root / "bin" / tool), *map(str, args)]

    def run(
        self,
        tool: str,
        args: Sequence[str],
        cwd: Path,
        log: Path,
        *,
        net: str = "",
        timeout: float | None = None,
        preload: Path | None = None,
    ) -> ToolResult:
        """Run *tool* with *args* in *cwd*; stdout and stderr go to the file *log*, after the command itself.

        *net* names what is worked on, for the error; *preload* is a library in *cwd* to put before the tool's
        own (see :mod:`.preload`). The tool and everything it starts dies with this process. Raises
        :class:`ToolFailed` with the net, the command and the log's last lines.
        """
        command = self.command(tool, args)
        if not Path(command[0]).exists():
            raise ToolFailed(
                f"{command[0]} is missing: the TPU-MLIR toolchain is gone or incomplete",
                hint="run `qwen-surgery toolchain doctor`",
            )
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with log.open("wb") as stream:
            stream.write(f"$ cd {shlex.quote(str(cwd))}\n$ {shlex.join(command)}\n".encode())
            stream.flush()
            env = {**self.environ(), **_FEWER_FAULTS}
            if preload is not None:
                # Huge pages would fill the holes that it leaves. Relative: the loader splits at : and space.
                env["LD_PRELOAD"] = f"./{preload.relative_to(cwd)}"
                del env["GLIBC_TUNABLES"]
            status, peak = run_guarded(command, cwd, env, stream.fileno(), timeout)
        seconds = time.monotonic() - started
        if status:
            raise _failure(tool, net, command, log, status)
        return ToolResult(tuple(command), log, seconds, peak)


def _join(paths: Sequence[Path], rest: str) -> str:
    return os.pathsep.join([*(str(path) for path in paths), *([rest] if rest else [])])


def version_key(version: str) -> tuple[int, ...]:
    """Sort key of a dotted version; parts that are no numbers count as 0."""
    return tuple(int(part) if part.isdigit() else 0 for part in version.split("."))


def log_tail(log: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The last non-empty *lines* of a log file."""
    try:
        with log.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - 64_000))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def _failure(tool: str, net: str, command: Sequence[str], log: Path, status: int) -> ToolFailed:
    how = f"was killed by signal {-status}" if status < 0 else f"failed with status {status}"
    subject = f"{net}: " if net else ""
    hint = f"log: {log}"
    if status == -9:
        hint = f"signal 9 often means the machine ran out of memory; fewer --jobs need less; {hint}"
    return ToolFailed(
        f"{subject}{tool} {how}: {shlex.join(command)}",
        hint=hint,
        log_tail=log_tail(log),
        signal=-status if status < 0 else None,
    )


_live: set[subprocess.Popen[bytes]] = set()
_live_lock = threading.Lock()


def stop_all() -> None:
    """Kill every tool now running under this process (Ctrl-C, fail-fast)."""
    with _live_lock:
        running = list(_live)
    for process in running:
        _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin:
        process.stdin.close()


def run_guarded(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], output: int, timeout: float | None = None
) -> tuple[int, int]:
    """Run *command* under the launcher: exit status (negative: a signal), peak RSS of its largest process.

    The peak is in bytes.
    """
    launcher = Path(__file__).with_name("launcher.py")
    read_end, write_end = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(launcher), str(write_end), *command],
            # A session of its own: whoever kills our whole group leaves the launcher alive to end the tool.
            cwd=cwd, env=dict(env), pass_fds=(write_end,), start_new_session=True,
            stdin=subprocess.PIPE, stdout=output, stderr=output,
        )  # fmt: skip
    finally:
        os.close(write_end)
    with _live_lock:
        _live.add(process)
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.write(output, f"stopped: no end after {timeout:.0f} s\n".encode())
    finally:
        _close(process)
        process.wait()
        with _live_lock:
            _live.discard(process)
        with os.fdopen(read_end, "rb") as stream:
            report = stream.read().decode().split()
    if len(report) != 2:  # the launcher itself was killed
        return process.returncode or -9, 0
    return int(report[0]), int(report[1]) * 1024
