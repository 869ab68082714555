"""On any terminal: readable on dark and on light, whole at 80 columns, plain under NO_COLOR and in a pipe."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from golden.eras import make_checkout
from qwen_surgery import console
from tests.test_console import shown

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_COLOUR = re.compile(r"\x1b\[([0-9;]+)m([^\x1b]*)")
#: Attributes, and the colours that every terminal's theme keeps apart from its background.
_KEPT = {*map(str, range(10)), "22", "23", "24", *map(str, range(31, 37)), "39"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkout(tmp_path_factory.mktemp("terminal") / "checkout", hidden=16, heads=2, vocab=512)


@pytest.fixture(scope="module")
def screens(checkout: Path) -> dict[str, str]:
    """What four calls show on a terminal of 80 columns."""
    return {
        "survey": shown("survey", checkout, COLUMNS="80"),
        "outcomes": shown("patch", checkout, "--check", COLUMNS="80"),
        "diff": shown("patch", checkout, "--diff", COLUMNS="80"),
        "explain": shown("explain", "early-present", COLUMNS="80"),
    }


def test_colours_are_the_terminals_own(screens: dict[str, str]) -> None:
    """A colour of ours, or black or white by name, vanishes on somebody's background."""
    for name, text in screens.items():
        used = {part for codes, said in _COLOUR.findall(text) if said.strip() for part in codes.split(";")}
        assert used & set(map(str, range(31, 37))), f"{name} has colours"
        assert used <= _KEPT, name


def test_no_color_leaves_no_colour(checkout: Path) -> None:
    text = shown("survey", checkout, NO_COLOR="1") + shown("patch", checkout, "--diff", NO_COLOR="1")
    used = {part for codes, _ in _COLOUR.findall(text) for part in codes.split(";")}
    assert used <= set(map(str, range(10))), "bold and dim are no colours"


def test_eighty_columns_are_enough(screens: dict[str, str]) -> None:
    """Names folded in the middle cannot be searched for; lines that are too long break the table."""
    plain = {name: _ESCAPE.sub("", text) for name, text in screens.items()}
    for name in ("survey", "outcomes", "explain"):  # a diff shows source, as long as it is
        assert max(map(len, re.split(r"[\r\n]+", plain[name]))) <= 80, name
    assert re.search(r"revision +date +era +1  2  3", plain["survey"])
    assert "drop-upcast-causal-mask" in plain["survey"] and "+ applied" in plain["survey"]
    assert "number behind a mark" in plain["survey"]
    assert "config:use_cache_quantization" in plain["outcomes"]
    assert "  QWenAttention._upcast_and_reordered_attn" in plain["outcomes"]


def test_a_wide_terminal_has_words_in_its_matrix(checkout: Path) -> None:
    text = shown("survey", checkout, COLUMNS="200", NO_COLOR="1")
    assert re.search(r"applied +applied +already x2 +applied +applied +applied", _ESCAPE.sub("", text))
    assert "+ applied" not in text


def test_a_pipe_gets_no_bars_and_no_escapes(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A log full of half-drawn bars hides the one line that matters."""
    command = [sys.executable, "-m", "qwen_surgery", "survey", str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "" and "\x1b" not in done.stdout
    with console.progress_bars() as show:
        show("clean", 1, 2)
        show("clean", 2, 2)
    assert capfd.readouterr() == ("", "")
