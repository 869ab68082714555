"""The command line as a whole: help, usage errors and their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from golden.eras import make_checkout, modeling_source
from qwen_surgery.cli import COMMANDS, main
from qwen_surgery.errors import ToolFailed


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
    """A user who mistypes a path reads one line, and stdout stays clean for what reads it."""
    done = _run("patch", f"{tmp_path}/missing")
    assert done.returncode == 3
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ")


def _refusals(path: Path) -> list[tuple[int, tuple[str, ...]]]:
    """Wrong calls and refused inputs, with the exit code that each must end with."""
    missing = str(path / "missing")
    file = path / "file"
    file.write_text("not a model\n")
    untrusted = str(make_checkout(path / "checkout"))
    return [
        *((2, (name, "--no-such-option", "--json")) for name in COMMANDS),
        (2, ("nonsense", "--json")),
        (2, ("patch", "--json")),
        (2, ("build", missing, "--json")),
        (2, ("survey", missing, "--json", "--markdown")),
        (2, ("explain", "no-such-codemod", "--json")),
        (2, ("chat", "--tokenizer", missing, "--json")),  # which has no such option
        (2, ("build", untrusted, "--out", missing, "--json")),
        (3, ("patch", missing, "--json")),
        (3, ("restore", missing, "--json")),
        (3, ("survey", missing, "--json")),
        (3, ("export", missing, "--onnx-path", missing, "--trust-remote-code", "--json")),
        (3, ("clean", missing, "--json")),
        (3, ("compile", missing, "--out", missing, "--json")),
        (3, ("verify", missing, "--trust-remote-code", "--json")),
        (3, ("build", missing, "--out", str(path / "out"), "--trust-remote-code", "--json")),
        (3, ("refit", missing, missing, "--json")),
        (3, ("inspect", str(file), "--json")),
        (3, ("tokenizer", missing, "--json")),
        (3, ("golden", "check", "--file", str(file), "--json")),
        (4, ("toolchain", "doctor", "--version", "0.0", "--json")),
    ]


def _ends(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, Any, str]:
    """Exit code, the one JSON document on stdout, and stderr of a call in this process."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    said = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, json.loads(said.out), said.err


def test_json_is_printed_on_refusal_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A script that reads --json must not meet an empty stdout, nor two documents, whatever went wrong."""
    for expected, args in _refusals(tmp_path):
        code, found, human = _ends(capsys, *args)
        assert code == expected, (args, human)
        assert human.strip(), "people read the line on stderr"
        if isinstance(found, dict):
            assert found["exit_code"] == code and found["error"].splitlines()[0] in human, args
        else:
            assert args[0] == "toolchain", "its answer is the list of what is wrong"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PermissionError(13, "Permission denied", "file"), 4, "file: Permission denied"),
        (RuntimeError("a bug"), 4, "unexpected RuntimeError: a bug"),
        (ToolFailed("no room", hint="make room"), 4, "no room"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_json_is_printed_on_failures_too(
    error: BaseException,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bugs, the disk and Ctrl-C end like refusals: one document, one line, the documented exit code."""

    def fail() -> None:
        raise error

    monkeypatch.setattr("qwen_surgery.patching.explaining.everything", fail)
    ended, found, human = _ends(capsys, "explain", "--json")
    assert (ended, found["exit_code"], found["error"]) == (code, code, said)
    assert said in human and "Traceback" not in human


def test_an_answer_with_findings_stays_one_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What has answered and then ends with 1 must not add a second document."""
    (tmp_path / "modeling_qwen.py").write_text(modeling_source("late"))
    code, found, human = _ends(capsys, "survey", str(tmp_path), "--fail-on", "absent", "--json")
    assert (code, len(found["revisions"])) == (1, 1)
    assert human.startswith("error: ")


def test_json_as_a_file_name_asks_for_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Behind `--` there are only names."""
    with pytest.raises(SystemExit) as stop:
        main(["explain", "--", "--json"])
    assert (stop.value.code, capsys.readouterr().out) == (2, "")


def test_debug_shows_the_traceback(tmp_path: object) -> None:
    """Only --debug shows where in the program an error came from."""
    done = _run("--debug", "patch", f"{tmp_path}/missing")
    assert "Traceback" in done.stderr
    assert done.returncode == 3, "the exit code stays the documented one"
