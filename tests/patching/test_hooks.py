"""The pre-commit hooks: what the definition runs must do what its description says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.patching.conftest import Result, git

pytestmark = pytest.mark.repository

HOOKS = Path(__file__).parents[2] / ".pre-commit-hooks.yaml"


def _commands() -> dict[str, list[str]]:
    """Hook id -> entry and args. (No YAML parser among the dependencies; the file is ours and flat.)"""
    found = {}
    for block in re.split(r"^- ", HOOKS.read_text(), flags=re.M)[1:]:
        fields = dict(re.findall(r"^\s*(\w+): (.*)$", block, flags=re.M))
        arguments = re.findall(r'"([^"]*)"', fields["args"])
        assert fields["pass_filenames"] == "false", "patch takes a checkout, not the names of its files"
        found[fields["id"]] = [*shlex.split(fields["entry"]), *arguments]
    return found


def test_hooks_pass_and_fail_as_described(
    checkout: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = _commands()
    assert set(commands) == {"qwen-surgery-patched", "qwen-surgery-survey"}
    git("init", cwd=checkout)
    git("add", ".", cwd=checkout)
    git("commit", "-m", "upstream", cwd=checkout)
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("GIT_DIR", "/nonexistent")  # as git sets it for hooks, to its own idea of a repository
    program, *patched = commands["qwen-surgery-patched"]
    assert program == "qwen-surgery"
    assert cli(*patched).code == 1
    assert cli("patch", ".").code == 0
    assert cli(*patched).code == 0
    assert cli(*commands["qwen-surgery-survey"][1:]).code == 0
