"""Every parser on mutated inputs, in a process of its own that may grow by 1 GB.

If these fail, a damaged or hostile file ends in "a bug", a hang, or a machine out of memory, instead of one
line that names it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
#: An input of the modeling file takes a hundred times as long as a header's; a build flushes what it keeps.
FEW = {"modeling": 60, "builder-state": 100}


def _run(name: str, inputs: int, first: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.fuzz.run", name, "--inputs", str(inputs), "--first", str(first)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_ends_in_a_value_or_in_one_line(name: str) -> None:
    found = _run(name, FEW.get(name, 300), 0)
    assert found["failures"] == {}
    assert found["read"] > 0, "no mutated input is valid any more: the mutations reach nothing deep"


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_every_one_of_a_hundred_thousand_does(name: str) -> None:
    assert _run(name, 100_000, 1000)["failures"] == {}
