"""The command line as a whole: help, usage errors and their exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qwen_surgery.cli import COMMANDS


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "qwen_surgery", *args], capture_output=True, text=True)


def test_help_lists_every_command() -> None:
    """A command missing from --help cannot be found by a user."""
    done = _run("--help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("name", list(COMMANDS))
def test_each_command_has_help(name: str) -> None:
    """A name in the table without a command behind it would end in a traceback."""
    done = _run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("args", [("nonsense",), ("patch",), ("patch", "x", "--no-such-option")])
def test_usage_errors_exit_2_without_a_traceback(args: tuple[str, ...]) -> None:
    """Scripts tell a wrong call (2) from a refused input (3) by the exit code."""
    done = _run(*args)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_refused_input_is_one_line_on_stderr(tmp_path: object) -> None:
    """A user who mistypes a path reads one line, and stdout stays clean for --json readers."""
    done = _run("patch", f"{tmp_path}/missing", "--json")
    assert done.returncode == 3
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ")


def test_debug_shows_the_traceback(tmp_path: object) -> None:
    """Only --debug shows where in the program an error came from."""
    done = _run("--debug", "patch", f"{tmp_path}/missing")
    assert "Traceback" in done.stderr
