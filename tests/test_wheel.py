"""The wheel is whole, and with click, libcst and rich alone it does what needs no more."""

from __future__ import annotations

import os
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from email.parser import Parser
from pathlib import Path

import pytest

from golden.eras import make_checkout
from qwen_surgery import extras
from qwen_surgery.cli import COMMANDS
from tests import wheel

pytestmark = pytest.mark.repository

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def required(built: Path) -> list[str]:
    """The wheel's own requirement lines."""
    with zipfile.ZipFile(built) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []


@pytest.fixture(scope="module")
def light(built: Path, required: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The installed program, with what the wheel itself asks for and nothing else."""
    folder = tmp_path_factory.mktemp("light")
    site = wheel.environment(folder / "venv", built)
    wheel.lend(site, wheel.requirements_of(required))
    assert {path.name for path in site.iterdir()} >= {"click", "libcst", "rich", *wheel.PACKAGES}
    assert not (site / "numpy").exists() and not (site / "torch").exists()
    usual = {"PATH": os.environ["PATH"], "HOME": str(folder), "QWEN_SURGERY_HOME": str(folder / "none")}

    def run(*args: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [str(folder / "venv/bin/qwen-surgery"), *map(str, args)]
        env = {**usual, **(env or {})}
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "checkout", layers=1, hidden=16, heads=2, vocab=512)


def test_the_wheel_holds_every_file_of_the_packages(built: Path) -> None:
    """Data left out of a wheel is missed only on the user's machine."""
    tracked = {
        path.relative_to(wheel.ROOT).as_posix()
        for package in wheel.PACKAGES
        for path in (wheel.ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(built) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == tracked


def test_the_table_of_extras_is_that_of_setup_cfg(required: list[str]) -> None:
    """What the table forgets is missed in the middle of the work; what it has too many is asked in vain."""
    for extra, names in extras.EXTRAS.items():
        brought = {name.replace("-", "_") for name in wheel.requirements_of(required, extra)}
        assert brought - {"tomli"} == set(names), extra  # tomli: part of Python from 3.11 on
    assert set(wheel.requirements_of(required)) == {"click", "libcst", "rich"}


def test_light_commands_work(light: Run, checkout: Path) -> None:
    """`pip install qwen-surgery` is enough to see what would become of a checkout, and to patch it."""
    assert "survey" in light("--help").stdout
    version = light("--version")
    assert "qwen-surgery 0." in version.stdout and "TPU-MLIR is not installed" in version.stdout
    diff = light("patch", checkout, "--diff")
    assert diff.returncode == 0, diff.stderr
    assert "+SUPPORT_TORCH2 = False" in diff.stdout
    assert "1 can be patched" in light("survey", checkout).stdout
    assert "Declines when" in light("explain", "early-present").stdout
    assert light("patch", checkout).returncode == 0
    assert light("restore", checkout).returncode == 0
    assert light("toolchain", "list").returncode == 0
    doctor = light("doctor", checkout)
    assert doctor.returncode == 3, doctor.stderr
    assert "FAIL  packages" in doctor.stdout and "era sdpa: 1 layers" in doctor.stdout


def _call(command: str, checkout: Path) -> list[object]:
    """Words that are right but for the extra that is missing."""
    out = checkout / "out"
    return {
        "build": ["build", checkout, "--out", out, "--trust-remote-code"],
        "export": ["export", checkout, "--onnx-path", out, "--trust-remote-code"],
        "clean": ["clean", checkout],
        "compile": ["compile", checkout, "--out", out],
        "verify": ["verify", checkout, "--trust-remote-code"],
        "refit": ["refit", checkout, checkout],
        "inspect": ["inspect", checkout],
        "chat": ["chat", "--onnx", checkout, "--tokenizer", checkout, "--prompt", "x"],
        "tokenizer": ["tokenizer", checkout],
        "golden": ["golden", "check"],
        "demo-checkout": ["demo-checkout", out],
    }[command]


@pytest.mark.parametrize("command", extras.OF_COMMAND)
def test_a_missing_extra_is_one_line_that_installs_it(light: Run, checkout: Path, command: str) -> None:
    """The first thing that a stranger with the light core meets is a command that needs more."""
    done = light(*_call(command, checkout))
    assert done.returncode == 4 and done.stdout == "", done
    (said,) = done.stderr.splitlines()
    named = ",".join(extras.OF_COMMAND[command])
    assert said.startswith(f"error: `{command}` needs numpy, "), said
    assert f"pip install 'qwen-surgery[{named}]'" in said, said
    torch = "torch" in (name for extra in extras.OF_COMMAND[command] for name in extras.EXTRAS[extra])
    assert ("a CPU build of torch" in said) == torch
    assert not (checkout / "out").exists()
    assert light(command, "--help").returncode == 0, "help needs no extra"


def test_every_command_is_light_or_in_the_table() -> None:
    light = {"patch", "restore", "explain", "survey", "toolchain", "fetch", "doctor"}
    assert light | set(extras.OF_COMMAND) >= set(COMMANDS)


@pytest.mark.parametrize(
    ("prefix", "line"),
    [
        ("/home/me/pipx/venvs/qwen-surgery", "pipx runpip qwen-surgery install 'qwen-surgery[report]'"),
        ("/home/me/uv/tools/qwen-surgery", "uv pip install --python /home/me/uv/tools/qwen-surgery '"),
    ],
)  # fmt: skip
def test_the_line_fits_how_the_program_was_installed(
    prefix: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pip install` would put the packages where pipx's and uv's environments do not see them."""
    monkeypatch.setattr("sys.prefix", prefix)
    needed = extras.missing(ModuleNotFoundError("no", name="matplotlib.pyplot"))
    assert needed is not None and needed.hint.startswith(line)
    assert extras.missing(ModuleNotFoundError("no", name="qwen_surgery.gone")) is None, "that is a bug"


def test_completion_offers_commands_and_options(light: Run) -> None:
    """click's own completion, as the page about installing says to switch it on; it must need no extra."""
    for words, offered in (("qwen-surgery bu", "build"), ("qwen-surgery verify --ht", "--html")):
        count = str(len(words.split()) - 1)
        env = {"_QWEN_SURGERY_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": count}
        assert light(env=env).stdout.split() == [f"plain,{offered}"]
