"""A build that is killed at any moment resumes, and ends with what an uninterrupted one makes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_surgery.building.graph import DONE, Store
from tests.building import run_graph

ROOT = Path(__file__).parents[2]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_interrupts,
    )


def _heed_interrupts() -> None:
    """Jobs that a shell started in the background are born deaf to Ctrl-C, and so would their children be."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def check_store(root: Path) -> None:
    """Every task folder in the store is whole: it has its marker and files of the sizes that it states."""
    store = Store(root)
    for folder in root.glob("*"):
        if folder.name == ".work":
            continue
        assert (folder / DONE).exists(), "a folder without its marker would be half a result"
        if any(path.name != DONE for path in folder.iterdir()):
            assert store.has_outputs(folder.name)


def descendants(session: int) -> list[str]:
    """Command lines that still run with *session*'s store in them."""
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if f"kill-test-{session}" in line and "ps -eo" not in line]


def test_twenty_kills_of_a_small_graph(tmp_path: Path) -> None:
    expected = run_graph.run(tmp_path / "whole")
    folder = tmp_path / f"kill-test-{os.getpid()}"
    draw = random.Random(7)
    command = [sys.executable, "-m", "tests.building.run_graph", str(folder)]
    finished = 0
    for _ in range(20):
        process = start(command)
        try:
            process.wait(draw.uniform(0.2, 1.6))
            finished += 1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if (folder / "store").exists():
            check_store(folder / "store")
    assert finished < 20, "no run was killed: the test tested nothing"
    assert run_graph.run(folder) == expected


def test_nothing_of_a_killed_build_goes_on_running(tmp_path: Path) -> None:
    folder = tmp_path / f"kill-test-{os.getpid()}"
    process = start([sys.executable, "-m", "tests.building.run_graph", str(folder)])
    deadline = time.monotonic() + 20
    while not list((folder / "store/.work").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while descendants(os.getpid()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert descendants(os.getpid()) == []


def test_ctrl_c_leaves_a_state_that_resumes(tmp_path: Path) -> None:
    folder = tmp_path / f"kill-test-{os.getpid()}"
    process = start([sys.executable, "-m", "tests.building.run_graph", str(folder)])
    deadline = time.monotonic() + 20
    while not list((folder / "store/.work").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    assert time.monotonic() - started < 10, "Ctrl-C waits for what runs"
    check_store(folder / "store")
    assert descendants(os.getpid()) == []
    assert run_graph.run(folder) == run_graph.run(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_twenty_kills_of_a_real_build(tmp_path: Path, quantizer: str) -> None:
    """The same with TPU-MLIR: the bmodel equals an uninterrupted build's, byte for byte."""
    checkout = tmp_path / "ck"
    tool = [sys.executable, "-m", "qwen_surgery"]
    subprocess.run([*tool, "demo-checkout", str(checkout)], cwd=ROOT, check=True)

    def command(out: Path) -> list[str]:
        flags = ["--seq-length", "32", "--mode", "int4", "--quantizer", quantizer, "--verify", "none"]
        flags += ["--trust-remote-code", "--jobs", "2"]
        return [*tool, "build", str(checkout), "--out", str(out), *flags]

    subprocess.run(command(tmp_path / "whole"), cwd=ROOT, check=True)
    draw, kills, wait = random.Random(3), 0, 3.0
    while kills < 20:
        process = start(command(tmp_path / "killed"))
        try:
            process.wait(draw.uniform(0.5, wait))
            # Done before twenty kills: start over, the kills go on.
            (tmp_path / "killed").rename(tmp_path / f"done{kills}")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            wait += 0.5
            store = tmp_path / "killed/.build/store"
            if store.exists():
                check_store(store)
    subprocess.run(command(tmp_path / "killed"), cwd=ROOT, check=True)

    def digest(out: Path) -> str:
        (bmodel,) = out.glob("BM1684X/*.bmodel")
        return hashlib.sha256(bmodel.read_bytes()).hexdigest()

    finished = [*tmp_path.glob("done*"), tmp_path / "killed"]
    assert {digest(out) for out in finished} == {digest(tmp_path / "whole")}
