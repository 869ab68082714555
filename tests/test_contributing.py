"""The page's recipes for a contributor, followed to the letter in a copy of the repository."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.repository

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("codemods", "graph_passes", "golden", "qwen_surgery", "tests", "docs", "pyproject.toml", "setup.cfg")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository's files in a folder of their own."""
    root = tmp_path / "repository"
    root.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, root)
    return root


def follow(heading: str, root: Path) -> dict[str, str]:
    """Do in ``root`` what the section says: write its files, add its lines, run its commands (-> output)."""
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", page.partition(f"\n## {heading}\n")[2], maxsplit=1, flags=re.M)[0]
    printed = {}
    for before, language, block in re.findall(r"([^\n]*)\n\n```(\w*)\n(.*?)^```$", section, re.M | re.S):
        if language:
            (name,) = re.findall(r"`([\w/]+\.py)`[^`]*:$", before)
            write = {"python": add_file, "diff": add_lines}[language]
            write(root / name, block)
        else:
            printed |= {line: run(line, root) for line in block.splitlines()}
    return printed


def add_file(path: Path, text: str) -> None:
    assert not path.exists()
    path.write_text(text, encoding="utf-8")


def add_lines(path: Path, diff: str) -> None:
    """A diff without line numbers: its context must be there, once."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] == " ")
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} does not hold, once: {old}"
    path.write_text(text.replace(old, "".join(line[1:] for line in lines)), encoding="utf-8")


def run(line: str, root: Path) -> str:
    words = shlex.split(line)
    programs = {"python": [sys.executable], "qwen-surgery": [sys.executable, "-m", "qwen_surgery"]}
    environment = {**os.environ, "PYTHONPATH": str(root), "NO_COLOR": "1", "COLUMNS": "200"}
    command = [*programs[words[0]], *words[1:]]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_the_page_s_codemod_can_be_added(copy: Path) -> None:
    """Whoever follows the page must end with a codemod that is tested, documented and applied."""
    printed = follow("Add a codemod", copy)
    run("python -m ruff check codemods", copy)
    run("python -m ruff format --check codemods", copy)
    assert "6 passed" in printed["python -m pytest tests/codemods/test_rules.py -k drop-embedding-dropout"]
    assert "Remove the dropout" in printed["qwen-surgery explain drop-embedding-dropout"]
    assert "drop-embedding-dropout" in printed["qwen-surgery patch demo"]
    assert "self.drop(" not in (copy / "demo" / "modeling_qwen.py").read_text(encoding="utf-8")
    assert "(drop-embedding-dropout.md)" in (copy / "docs/codemods/README.md").read_text(encoding="utf-8")


def test_the_page_s_graph_pass_can_be_added(copy: Path) -> None:
    printed = follow("Add a graph pass", copy)
    run("python -m ruff check graph_passes", copy)
    run("python -m ruff format --check graph_passes", copy)
    assert printed["python try_pass.py"].strip() == "('double-negation',) ['Relu']"
    assert "double-negation: leaves out two negations in a row" in printed["qwen-surgery clean --explain"]
