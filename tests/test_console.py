"""What comes from files reaches a terminal only in printable form, through whichever command."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden.eras import make_checkout, modeling_source
from qwen_surgery import console

#: Set the title, clear the screen, a C1 control, text turned round, a forged line.
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eabc\rok   all good\x08"
#: What rich itself writes on a terminal: colours, and hiding or moving the cursor.
OURS = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[[0-9]*[AKG]|\r|\n|\t")


def shown(*arguments: object, cwd: Path | None = None, **variables: str) -> str:
    """What a command writes on a terminal, both streams."""
    main, worker = pty.openpty()
    command = [sys.executable, "-m", "qwen_surgery", *(str(a) for a in arguments)]
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", **variables}
    with subprocess.Popen(command, stdin=worker, stdout=worker, stderr=worker, env=env, cwd=cwd) as running:
        os.close(worker)
        data = b"".join(_chunks(main))
        running.wait(60)
    os.close(main)
    return data.decode("utf-8", "surrogateescape")


def _chunks(descriptor: int) -> Iterator[bytes]:
    while True:
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # the other end is closed
            return
        if not chunk:
            return
        yield chunk


def assert_clean(text: str) -> None:
    rest = OURS.sub("", text)
    assert console.printable(rest) == rest, repr(rest)
    assert "\x1b]0" not in text and "\x1b[2J" not in text


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    path = make_checkout(tmp_path / "checkout", layers=1, hidden=16, heads=2, vocab=512)
    for shard in path.glob("*.safetensors"):
        shard.unlink()
    return path


@given(st.text())
def test_printable_leaves_nothing_that_does_not_show(text: str) -> None:
    for character in console.printable(text):
        assert character in "\n\t" or character.isprintable() or not character.isascii()
        assert not 0x7F <= ord(character) <= 0x9F and not 0xD800 <= ord(character) <= 0xDFFF
    assert console.printable("naïve 中文 🙂\n\t") == "naïve 中文 🙂\n\t"


def test_rich_consoles_print_nothing_else() -> None:
    from rich.table import Table

    stream = io.StringIO()
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    printer = console.on(stream)
    printer.print(EVIL)
    printer.print(table)
    printer.print("[bold]kept as it is[/bold]")
    assert console.printable(stream.getvalue()) == stream.getvalue()
    assert "[bold]kept as it is[/bold]" in stream.getvalue(), "a name may look like markup"


def test_a_model_type_with_escapes(checkout: Path) -> None:
    config = json.loads((checkout / "config.json").read_text())
    (checkout / "config.json").write_text(json.dumps(config | {"model_type": EVIL}))
    for arguments in (("patch",), ("build", "--out", checkout / "o", "--trust-remote-code")):
        text = shown(arguments[0], checkout, *arguments[1:])
        assert "\\x1b" in text
        assert_clean(text)


def test_a_diff_and_outcomes_with_escapes(checkout: Path) -> None:
    """The patched file's comments stand in the diff's context."""
    file = checkout / "modeling_qwen.py"
    text = file.read_text().replace("\n", f"\n# {EVIL.replace(chr(13), '')}\n", 3)
    file.write_text(re.sub(r"(\n *)(if layer_past is not None)", _with_escape, text))
    assert_clean(shown("patch", checkout, "--diff"))
    assert_clean(shown("patch", checkout))


def _with_escape(found: re.Match[str]) -> str:
    return f"{found[1]}# \x1b[1m{found[1]}{found[2]}"


def test_a_piped_diff_stays_data(checkout: Path) -> None:
    """A diff in a file must apply: its bytes are those of the source."""
    file = checkout / "modeling_qwen.py"
    file.write_text(re.sub(r"(\n *)(if layer_past is not None)", _with_escape, file.read_text()))
    command = [sys.executable, "-m", "qwen_surgery", "patch", str(checkout), "--diff", "--quiet"]
    diff = subprocess.run(command, capture_output=True, check=True, cwd=checkout).stdout
    assert b"\x1b[1m" in diff
    applied = subprocess.run(
        ["git", "apply", "-"], input=diff, cwd=checkout, capture_output=True, check=False
    )
    assert applied.returncode == 0, applied.stderr


def test_folders_and_files_with_escapes(tmp_path: Path) -> None:
    folder = tmp_path / f"evil{EVIL}"
    folder.mkdir()
    (folder / f"modeling{EVIL}.py").write_text(modeling_source("sdpa"))
    (folder / os.fsdecode(b"half\xff.py")).write_text(modeling_source("late"))
    for arguments in (
        ("survey", folder),
        ("survey", folder, "--markdown"),
        ("patch", folder),
        ("inspect", folder),
    ):
        assert_clean(shown(*arguments))
    assert_clean(shown("patch", folder, f"--{EVIL}"))
    assert_clean(shown(EVIL))


def test_json_keeps_what_was_there(tmp_path: Path) -> None:
    """JSON has escapes of its own: the content is whole and nothing reaches the terminal."""
    (tmp_path / f"m{EVIL}.py").write_text(modeling_source("sdpa"))
    text = shown("survey", tmp_path, "--json")
    assert_clean(text)
    assert EVIL in json.loads(text[text.index("{") :])["revisions"][0]["path"]


def test_a_note_has_one_line(checkout: Path) -> None:
    """A line end in a name would let a file speak as this program."""
    config = json.loads((checkout / "config.json").read_text())
    (checkout / "config.json").write_text(json.dumps(config | {"model_type": "x\nall is well"}))
    command = [sys.executable, "-m", "qwen_surgery", "patch", str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.count("\n") == 1
