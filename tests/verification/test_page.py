"""The HTML page: one file, offline, with the numbers of the run in its plots."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qwen_surgery.verification.page import PassCounts, Predicted, errors_by_layer, render, write_page
from qwen_surgery.verification.results import LevelResult, Report
from qwen_surgery.verification.session import Request, verify
from tests.verification.conftest import SEQ_LENGTH, Bench


@pytest.fixture(scope="module")
def page(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Request]:
    path = tmp_path_factory.mktemp("page") / "report.html"
    request = Request(
        bench.path, onnx=(bench.folder,), seq_length=SEQ_LENGTH, steps=2, trust_remote_code=True
    )
    report = verify(request)
    assert report.passed
    write_page(report, path, request)
    return path, request


def test_the_page_is_one_file_that_needs_no_network(page: tuple[Path, Request]) -> None:
    text = page[0].read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert not re.search(r"@import|url\(\s*['\"]?http", text)
    assert len(text) < 500_000
    for piece in ("-    if self.", "Error by layer", "Every check passed", "greedy"):
        assert piece.lower() in text.lower() or piece == "-    if self."
    assert "Everything that was compared agrees within its tolerance." in text
    assert text.count('<div class="figure">') == 3
    assert 'class="plus"' in text and 'class="minus"' in text, "the diff of the patch is shown"


def test_ids_are_unique(page: tuple[Path, Request]) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page[0].read_text())
    points = [i for i in ids if "-point-" in i or "-line-" in i]
    assert points and len(points) == len(set(points))


def test_chromium_renders_it(page: tuple[Path, Request], bench: Bench, tmp_path: Path) -> None:
    """In headless Chromium the plots hold one mark per layer and phase, and the console is silent."""
    chromium = next(
        (
            found
            for name in ("chromium", "chromium-browser", "google-chrome")
            if (found := shutil.which(name))
        ),
        None,
    )
    if chromium is None:
        pytest.skip("no chromium on PATH: install it (apt-get install chromium) to run this test")
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            "--dump-dom", page[0].as_uri(),
        ],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    assert re.search(r'<h1 id="verdict" class="ok">Every check passed', done.stdout)
    for level in (0, 1):
        marks = re.findall(rf'id="level{level}-point-\d+-\d+"', done.stdout)
        assert len(marks) == 2 * bench.geometry.layers, "prefill and decode, every layer"
    assert "overview-point-0-0" in done.stdout
    together = re.findall(r'id="together-point-\d+-\d+"', done.stdout)
    assert len(together) == 2 * 2 * bench.geometry.layers, "both levels, prefill and decode, every layer"


def test_plots_are_readable_on_a_dark_page(page: tuple[Path, Request]) -> None:
    """Text and axes take the page's colour; nothing is drawn in black or on white."""
    text = page[0].read_text()
    assert "currentColor" in text and "#010203" not in text
    for style in re.findall(r'<(?:text|path|use)[^>]*style="([^"]*)"', text):
        assert "#ffffff" not in style and "#000000" not in style, style


def test_latency_and_passes_are_tables() -> None:
    report = Report("checkout", 64, "static", [LevelResult("chip", "int4", "BM1684X")])
    text = render(
        report,
        "-before\n+after",
        [
            PassCounts("block", "views", 76, 68, "Slice 6 to 0"),
            PassCounts("block", "all passes", 129, 69, ""),
        ],
        [Predicted("int4", "block", 43418, 0.043), Predicted("bf16", "block", 16845, 0.017)],
    )
    assert "43,418" in text and "16,845" in text and "Slice 6 to 0" in text
    assert text.count('class="sum"') == 1
    assert '<span class="plus">+after</span>' in text


def test_plots_hold_the_reports_numbers(bench: Bench) -> None:
    request = Request(bench.path, seq_length=SEQ_LENGTH, steps=0, trust_remote_code=True, layers=(1,))
    level = verify(request).levels[0]
    series = {one.name: one.points for one in errors_by_layer(level)}
    assert set(series) == {"prefill", "decode"}
    worst = max(
        c.values["max_abs"] for c in level.checks if c.output == "hidden_states" and c.phase == "prefill"
    )
    assert series["prefill"] == ((1.0, max(worst, 1e-17)),)
