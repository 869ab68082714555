"""The GitHub Action: its script, run as the runner does, with this program in place of the installed one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.patching.conftest import git

pytestmark = pytest.mark.repository

ACTION = Path(__file__).parents[2] / "action.yml"
Job = Callable[[Mapping[str, str]], int]


@pytest.fixture(scope="module")
def action() -> dict[str, Any]:
    return yaml.safe_load(ACTION.read_text(encoding="utf-8"))


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    """$RUNNER_TEMP with the program where the first step installs it."""
    program = tmp_path / "runner" / "qwen-surgery" / "bin" / "qwen-surgery"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m qwen_surgery "$@"\n')
    program.chmod(0o755)
    return tmp_path / "runner"


@pytest.fixture
def job(action: dict[str, Any], runner: Path, checkout: Path) -> Job:
    """Runs the survey's step in a committed checkout, with inputs as a workflow gives them."""
    git("init", cwd=checkout)
    git("add", ".", cwd=checkout)
    git("commit", "-m", "upstream", cwd=checkout)
    (step,) = (step for step in action["runs"]["steps"] if step.get("id") == "survey")

    def run(given: Mapping[str, str]) -> int:
        inputs = {name: str(one["default"]) for name, one in action["inputs"].items()} | dict(given)
        values = {
            name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: inputs[found[1]], text)
            for name, text in step["env"].items()
        }
        files = {"GITHUB_STEP_SUMMARY": runner / "page.md", "GITHUB_OUTPUT": runner / "output"}
        env = {**os.environ, **values, "RUNNER_TEMP": str(runner), **{k: str(v) for k, v in files.items()}}
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        return subprocess.run(command, cwd=checkout, env=env, check=False).returncode

    return run


def test_a_job_passes_and_shows_the_matrix(job: Job, runner: Path) -> None:
    assert job({}) == 0
    assert "| applied |" in (runner / "page.md").read_text()
    (name, _, file) = (runner / "output").read_text().strip().partition("=")
    assert name == "json" and len(json.loads(Path(file).read_text())["revisions"]) == 1


def test_a_job_fails_where_an_edit_is_declined(job: Job, checkout: Path) -> None:
    modeling = checkout / "modeling_qwen.py"
    modeling.write_text(modeling.read_text().replace("SUPPORT_TORCH2 = ", "SUPPORT_TORCH2 = OTHER = ", 1))
    git("commit", "-am", "in a form that is not known", cwd=checkout)
    assert job({}) == 1
    assert job({"fail-on": ""}) == 0
    assert job({"since": "HEAD"}) == 0
    assert job({"since": "0" * 40}) == 1, "a branch's first push"


def test_an_input_is_a_value_and_no_piece_of_the_script(job: Job, runner: Path, checkout: Path) -> None:
    """A branch's or a fork's name must not run."""
    assert job({"since": "$(touch ran)", "path": "; touch ran"}) != 0
    assert job({"path": "--help"}) != 0
    assert not (checkout / "ran").exists()


def test_steps_name_only_inputs_that_exist(action: dict[str, Any]) -> None:
    text = ACTION.read_text(encoding="utf-8")
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == set(action["inputs"])
    for step in action["runs"]["steps"]:
        assert "${{" not in step["run"]
