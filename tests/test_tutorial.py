"""The tutorial, followed by copy and paste: every command runs, and prints what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.repository, pytest.mark.tpu]

DOCS = Path(__file__).resolve().parent.parent / "docs"


def steps(page: str) -> list[tuple[str, str]]:
    """Each command of a page's console blocks, and what it prints."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```$", text, re.M | re.S)
    parts = [part for block in blocks for part in re.split(r"^\$ ", block, flags=re.M) if part]
    return [(command, printed) for command, _, printed in (part.partition("\n") for part in parts)]


def fits(printed: str, shown: str) -> bool:
    """Whether *printed* is what the page shows, where `...` stands for anything: in its line, or as lines."""
    lines = [line.rstrip() for line in shown.splitlines()]
    patterns = ["(?:.*\n)*?" if line == "..." else _line(line) for line in lines]
    said = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
    return re.fullmatch("".join(patterns), said) is not None


def _line(shown: str) -> str:
    pieces = [r"\s+".join(map(re.escape, piece.split(" "))) for piece in shown.split("...")]
    return ".*".join(pieces) + "\n"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in, with the program on PATH."""
    folder = tmp_path_factory.mktemp("tutorial")
    program = folder / "bin" / "qwen-surgery"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m qwen_surgery "$@"\n')
    program.chmod(0o755)
    return folder


def test_what_the_page_shows_is_compared() -> None:
    assert fits("a  1\nb\nc\n", "a ...\n...\nc\n")
    assert fits("c\n", "...\nc\n")
    assert not fits("a  1\nb\nd\n", "a ...\n...\nc\n")
    assert not fits("a  1\nb\nc\nd\n", "a ...\n...\nc\n"), "nothing comes after the end"


def test_the_tutorial_runs_as_it_is_written(bench: Path) -> None:
    """A newcomer's first hour: from a checkout to a verified bmodel that answers."""
    env = {**os.environ, "PATH": f"{bench / 'bin'}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1"}
    done = steps("tutorial.md")
    assert len(done) >= 9
    for command, shown in done:
        run = subprocess.run(
            ["bash", "-c", command],
            cwd=bench,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert run.returncode == 0, f"$ {command}\n{run.stdout}"
        assert fits(run.stdout, shown), f"$ {command}\n{run.stdout}"


def test_the_chinese_tutorial_has_the_same_commands() -> None:
    assert [c for c, _ in steps("tutorial.zh-CN.md")] == [c for c, _ in steps("tutorial.md")]
