"""A family is added by one file: the one that the documentation shows, in a copy of the program."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.families.test_decoders import ROOT
from tests.families.tiny import make

pytestmark = pytest.mark.repository

PACKAGES = ("qwen_surgery", "codemods", "graph_passes", "golden")
SCALING = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_the_documented_file_is_all_that_llama_takes(tmp_path: Path) -> None:
    page = (ROOT / "docs/decoders.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "qwen_surgery/families/llama.py").write_text(code, encoding="utf-8")
    model = make(tmp_path / "model", "llama", rope_parameters=SCALING)
    command = [sys.executable, "-m", "qwen_surgery", "verify", str(model), "--seq-length", "24"]
    command += ["--level", "source", "--json"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    report = json.loads(done.stdout)
    worst = [check["values"]["max_abs"] for level in report["levels"] for check in level["checks"]
             if "max_abs" in check["values"]]  # fmt: skip
    assert report["passed"] and worst and max(worst) < 1e-5
