"""What files of an older commit do in the vendor's runtimes, beside what they do now.

The older program is taken from this repository's own history and builds with the same TPU-MLIR. A test that
passes says both: the old file fails where ``docs/runtimes.md`` says it does, the new one does not.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from golden.eras import make_checkout
from tests.building.test_build import ROOT, cli
from tests.runtime.test_runtimes import build, in_runtime, inspected, missed

pytestmark = [pytest.mark.tpu, pytest.mark.slow]
#: The commit before any of it was known.
OLDER = "3ba640c"


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program as it was; needs the repository's history."""
    folder = tmp_path_factory.mktemp("older")
    archive = subprocess.run(["git", "-C", ROOT, "archive", OLDER], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        opened.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("findings") / "Qwen-tiny"
    return make_checkout(folder, layers=2, hidden=128, heads=2, vocab=4096)


def run_older(older: Path, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen_surgery", *map(str, args)]
    return subprocess.run(command, cwd=older, capture_output=True, text=True, check=True)


def build_older(older: Path, checkout: Path, out: Path, *flags: object) -> tuple[Path, str]:
    """The bmodel, and what was said beside it."""
    base = ("--out", out, "--seq-length", 64, "--verify", "none", "--name", "tiny", "--trust-remote-code")
    done = run_older(older, "build", checkout, *base, "--json", *flags)
    return Path(json.loads(done.stdout)["bmodels"][0]), done.stderr


@pytest.mark.parametrize(
    ("flags", "demo", "by_its_addresses"),
    [
        pytest.param(("--mode", "bf16", "--dynamic"), ("generic", "greedy"), True, id="1-dynamic"),
        pytest.param(("--mode", "int4"), ("chat-2025", "sampling"), True, id="2-sampling"),
        pytest.param(("--mode", "bf16"), ("chat-2025", "greedy"), True, id="3-copy-onto-itself"),
        pytest.param(
            ("--mode", "bf16", "--runtime", "sophon-demo-2024.1"),
            ("qwen.py-2024-03", "greedy"),
            False,
            id="4-mask",
        ),
    ],
)
def test_an_older_file_fails_where_todays_does_not(
    older: Path,
    checkout: Path,
    tmp_path: Path,
    flags: tuple[str, ...],
    demo: tuple[str, str],
    by_its_addresses: bool,
) -> None:
    old, _ = build_older(older, checkout, tmp_path / "old", *flags)
    assert demo in missed(in_runtime(checkout, old))
    condemned = {one["generation"] for one in inspected(old)["runtimes"] if one["hazards"]}
    assert (demo[0] in condemned) is by_its_addresses
    new = build(checkout, tmp_path / "new", *flags)
    assert missed(in_runtime(checkout, new)) == set()
    assert inspected(new)["contract"] == []


def test_5_what_suits_no_demo_was_not_said(older: Path, checkout: Path, tmp_path: Path) -> None:
    flags = ("--mode", "int4", "--addr-mode", "basic")
    old, said = build_older(older, checkout, tmp_path / "old", *flags)
    assert "chat.cpp" not in said
    told = cli("inspect", old, check=False).stdout
    assert "demo.cpp, 2024-02-19 to 2024-03-19): cannot run it" in told and "segmentation fault" in told
    assert "chat-2025" not in run_older(older, "inspect", old).stdout
    base = ("--out", tmp_path / "new", "--seq-length", 64, "--verify", "none", "--trust-remote-code")
    assert "does not suit LLM-TPU's chat.cpp" in cli("build", checkout, *base, *flags).stderr
