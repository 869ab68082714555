"""Small checkouts without weights (patching never looks at them) and a way to call the command line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from golden.eras import make_checkout
from qwen_surgery.cli import main


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(era: str) -> Path:
        if era not in made:
            path = tmp_path_factory.mktemp("eras") / era
            make_checkout(path, era=era, layers=1, hidden=16, heads=2, vocab=512)
            for shard in path.glob("*.safetensors"):
                shard.unlink()
            made[era] = path
        return made[era]

    return make


@pytest.fixture
def make(tmp_path: Path, _made: Callable[[str], Path]) -> Callable[..., Path]:
    """A fresh checkout of an era, e.g. ``make("sdpa")``."""

    def fresh(era: str = "sdpa", name: str = "checkout") -> Path:
        return Path(shutil.copytree(_made(era), tmp_path / name))

    return fresh


@pytest.fixture
def checkout(make: Callable[..., Path]) -> Path:
    return make()


@pytest.fixture
def cli(capfdbinary: pytest.CaptureFixture[bytes]) -> Callable[..., Result]:
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> Result:
        capfdbinary.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        captured = capfdbinary.readouterr()
        code = stop.value.code
        assert isinstance(code, int)
        return Result(code, captured.out.decode(), captured.err.decode())

    return run


def process(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command line as a process of its own."""
    command = [sys.executable, "-m", "qwen_surgery", *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file of *folder* (its receipts too) with bytes and permission bits."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mode & 0o7777)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def git(*arguments: str, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run git in *cwd* with a fixed identity."""
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    return subprocess.run([*command, *arguments], cwd=cwd, input=stdin, capture_output=True, check=False)
