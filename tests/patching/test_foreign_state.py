"""A state folder that came with the checkout can do no harm outside the checkout's own files."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_surgery.files import digest
from tests.patching.conftest import Result, process, snapshot

STATE = ".qwen-surgery"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file outside the checkout that nothing may touch."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / ".profile").write_bytes(b"mine\n")
    (folder / ".profile").chmod(0o640)
    return folder


@pytest.fixture
def patched(checkout: Path, cli: Callable[..., Result]) -> Path:
    assert cli("patch", checkout).code == 0
    return checkout


def _forge(checkout: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = checkout / STATE / "receipt.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _shipped(checkout: Path, name: str, content: bytes, **fields: Any) -> None:
    """A receipt that asks for *content* at *name*, with its original lying ready."""
    record = {"before": digest(content), "after": "0" * 64, "mode": "0644", **fields}
    kept = checkout / STATE / "originals" / f"{record['before'][:16]}-{name}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    _forge(checkout, lambda data: data["files"].update({name: record}))


NAMES = (
    "../victim/.profile",
    "../victim/evil.py",
    "/tmp/evil.py",
    "sub/evil.py",
    "..",
    "",
    "config.json\0.py",
    "model.safetensors",
    ".git/config",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", ["restore", "patch"])
def test_a_receipt_names_only_files_that_are_patched(
    name: str, command: str, patched: Path, victim: Path, cli: Callable[..., Result]
) -> None:
    """It once wrote outside the checkout, with the mode it liked."""
    _shipped(patched, name.replace("\0", "").rpartition("/")[2], b"evil\n")
    _forge(patched, lambda data: data["files"].update({name: next(iter(data["files"].values()))}))
    before, outside = snapshot(patched), snapshot(victim)
    result = cli(command, patched)
    assert result.code == 3 and "did not come from this program" in result.err
    assert result.err.count("\n") == 1 and "a bug" not in result.err
    assert (snapshot(patched), snapshot(victim)) == (before, outside)


FIELDS = (
    ("mode", "4755"),
    ("mode", "1777"),
    ("mode", "-1"),
    ("mode", "rwx"),
    ("mode", 493),
    ("before", "../../../victim/x"),
    ("before", None),
    ("after", "0" * 63 + "\0"),
    ("symlink", "a\0b"),
    ("symlink", 7),
)


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_a_record_holds_only_what_this_program_writes(
    field: str, value: object, patched: Path, cli: Callable[..., Result]
) -> None:
    """Set-uid model code, a path in place of a hash, a null byte."""
    _forge(patched, lambda data: data["files"]["config.json"].update({field: value}))
    before = snapshot(patched)
    for command in ("restore", "patch"):
        result = cli(command, patched)
        assert result.code == 3 and result.err.count("\n") == 1 and "a bug" not in result.err
    assert snapshot(patched) == before


def test_half_a_character_in_a_receipt_is_refused(patched: Path, cli: Callable[..., Result]) -> None:
    """It could be read and not written again: the next patch would end in an unexpected error."""
    _forge(patched, lambda data: data.update(time="\ud800"))
    for command in ("restore", "patch"):
        result = cli(command, patched)
        assert result.code == 3 and "a bug" not in result.err


STEPS = (
    {"target": "/etc/passwd", "before": None, "after": "0" * 64},
    {"target": "../victim/.profile", "before": None, "after": None},
    {"target": "../victim/new.py", "before": None, "after": "0" * 64},
    {"target": "sub/new.py", "before": None, "after": "0" * 64},
    {"target": ".qwen-surgery/../../victim/.profile", "before": None, "after": None},
    {"target": ".qwen-surgery/originals/../../../victim/x.py", "before": None, "after": None},
    {"target": "config.json", "before": "x", "after": None},
    {"target": "config.json\0", "before": None, "after": None},
    {"target": 3, "before": None, "after": None},
    {"target": "model.safetensors", "before": None, "after": None},
)


@pytest.mark.parametrize("phase", ["prepare", "commit"])
@pytest.mark.parametrize("step", STEPS)
def test_a_journal_touches_only_files_that_are_patched(
    phase: str, step: dict[str, Any], checkout: Path, victim: Path, cli: Callable[..., Result]
) -> None:
    """It once deleted any file ("prepare" removes temporaries) and made any new one ("commit" renames)."""
    state = checkout / STATE
    state.mkdir()
    for name in (".profile", "new.py"):  # what a commit would move into place
        (victim / f".{name}.qwen-surgery-tmp").write_bytes(b"evil\n")
    lies = {"temp": str(victim / ".profile")}  # the old journal's own word for its temporary
    (state / "journal.json").write_text(json.dumps({"phase": phase, "steps": [step | lies]}))
    before, outside = snapshot(checkout), snapshot(victim)
    for command in ("patch", "restore"):
        result = cli(command, checkout)
        assert result.code == 3 and "did not come from this program" in result.err
        assert result.err.count("\n") == 1
    assert (snapshot(checkout), snapshot(victim)) == (before, outside)


def test_an_absolute_temporary_in_a_journal_is_not_believed(
    checkout: Path, victim: Path, cli: Callable[..., Result]
) -> None:
    """A journal with a good target and a bad temporary: the temporary's name is computed, never read."""
    (checkout / STATE).mkdir()
    target = {"target": "config.json", "temp": str(victim / ".profile"), "before": None, "after": None}
    text = json.dumps({"phase": "prepare", "steps": [target]})
    (checkout / STATE / "journal.json").write_text(text)
    outside = snapshot(victim)
    cli("patch", checkout)
    assert snapshot(victim) == outside


@pytest.mark.parametrize("place", [STATE, f"{STATE}/originals"])
def test_a_state_folder_that_is_a_link_is_refused(
    place: str, checkout: Path, victim: Path, cli: Callable[..., Result]
) -> None:
    """Originals and receipts would be written, and later removed, in a folder outside."""
    if place != STATE:
        (checkout / STATE).mkdir()
    (checkout / place).symlink_to(victim)
    (victim / "originals").mkdir()
    before, outside = snapshot(checkout), snapshot(victim)
    for command in ("patch", "restore"):
        result = cli(command, checkout)
        assert result.code == 3 and "link" in result.err
    assert (snapshot(checkout), snapshot(victim)) == (before, outside)


@pytest.mark.parametrize("name", ["receipt.json", "journal.json"])
def test_links_pipes_and_giants_in_the_state_folder_are_not_read(
    name: str, checkout: Path, victim: Path
) -> None:
    """A link would leak another file's text into a message, a pipe would hang, a giant fill the memory."""
    (checkout / STATE).mkdir()
    file = checkout / STATE / name
    for make in (
        lambda: file.symlink_to(victim / ".profile"),
        lambda: os.mkfifo(file),
        lambda: file.mkdir(),
        lambda: os.truncate(_touched(file), 1 << 40),
    ):
        make()
        done = process("restore", checkout, timeout=20)
        assert done.returncode in (3, 4) and done.stderr.count("\n") == 1
        assert "mine" not in done.stderr and "a bug" not in done.stderr
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()


def _touched(file: Path) -> Path:
    file.touch()
    return file


def test_a_socket_in_place_of_an_original_is_refused(
    patched: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = next((patched / STATE / "originals").iterdir())
    kept.unlink()
    monkeypatch.chdir(kept.parent)  # a socket's path may not be long
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(kept.name)
        result = cli("restore", patched)
    assert result.code in (3, 4) and result.err.count("\n") == 1


def test_a_kept_hard_link_that_is_a_link_is_not_followed(
    patched: Path, victim: Path, cli: Callable[..., Result]
) -> None:
    """Restore once gave the file behind it the original's mode."""
    kept = next(p for p in (patched / STATE / "originals").iterdir() if p.name.endswith("config.json"))
    (victim / "same").write_bytes(kept.read_bytes())
    (victim / "same").chmod(0o600)
    kept.with_name(kept.name + ".link").symlink_to(victim / "same")
    outside = snapshot(victim)
    assert cli("restore", patched).code == 0
    assert snapshot(victim) == outside
    assert not (patched / "config.json").is_symlink()
    assert not (patched / "config.json").samefile(victim / "same")


def test_a_foreign_file_in_the_state_folder_is_never_removed(
    patched: Path, cli: Callable[..., Result]
) -> None:
    (patched / STATE / "notes.txt").write_text("somebody's")
    assert cli("restore", patched).code == 0
    assert (patched / STATE / "notes.txt").read_text() == "somebody's"


def test_a_patched_checkout_can_be_moved_and_restored_there(
    checkout: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """On another machine, say: nothing in the state folder depends on where it was made."""
    before = snapshot(checkout)
    assert cli("patch", checkout).code == 0
    shutil.move(checkout, tmp_path / "elsewhere")
    assert cli("restore", tmp_path / "elsewhere").code == 0
    assert snapshot(tmp_path / "elsewhere") == before


def test_a_set_uid_file_does_not_stay_one(checkout: Path, cli: Callable[..., Result]) -> None:
    (checkout / "modeling_qwen.py").chmod(0o4755)
    assert cli("patch", checkout).code == 0
    assert (checkout / "modeling_qwen.py").stat().st_mode & 0o7777 == 0o755
    assert cli("restore", checkout).code == 0
    assert (checkout / "modeling_qwen.py").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize("name", ["config.json", "modeling_qwen.py", f"{STATE}/journal.json"])
def test_a_folder_in_place_of_a_temporary_is_refused_and_blocks_nothing_later(
    name: str, checkout: Path, cli: Callable[..., Result]
) -> None:
    """It once left a journal that neither patch nor restore could ever get rid of."""
    file = checkout / name
    shipped = file.with_name(f".{file.name}.qwen-surgery-tmp")
    shipped.mkdir(parents=True)
    before = snapshot(checkout)
    for _ in range(2):
        result = cli("patch", checkout)
        assert result.code in (3, 4) and result.err.count("\n") <= 12 and "Traceback" not in result.err
        assert snapshot(checkout).items() >= before.items()
    assert not (checkout / STATE / "journal.json").exists()
    shipped.rmdir()
    assert cli("patch", checkout).code == 0


def test_a_journal_moves_only_the_bytes_that_it_names_into_place(
    checkout: Path, cli: Callable[..., Result]
) -> None:
    """A temporary that came with the checkout, or was damaged, does not become the model's code."""
    file = checkout / "modeling_qwen.py"
    old = file.read_bytes()
    (checkout / STATE).mkdir()
    (checkout / ".modeling_qwen.py.qwen-surgery-tmp").write_bytes(b"import evil\n")
    step = {"target": file.name, "before": digest(old), "after": digest(b"something else\n")}
    (checkout / STATE / "journal.json").write_text(json.dumps({"phase": "commit", "steps": [step]}))
    cli("restore", checkout)
    assert file.read_bytes() == old


@pytest.mark.parametrize("kind", ["dangling", "folder", "pipe", "loop"])
def test_a_name_that_leads_to_no_file_is_refused_in_one_line(
    kind: str, checkout: Path, tmp_path: Path
) -> None:
    file = checkout / "config.json"
    file.unlink()
    if kind == "dangling":
        file.symlink_to("nowhere")
    elif kind == "folder":
        file.symlink_to(tmp_path)
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("config.json")
    for command in ("patch", "restore"):
        done = process(command, checkout, timeout=20)
        assert done.returncode in (0, 3, 4) and done.stderr.count("\n") == 1
        assert "a bug" not in done.stderr


def test_a_chain_of_links_comes_back_as_it_was(checkout: Path, cli: Callable[..., Result]) -> None:
    real = checkout.parent / "real.json"
    (checkout / "config.json").rename(real)
    (checkout.parent / "middle").symlink_to("real.json")
    (checkout / "config.json").symlink_to("../middle")
    content = real.read_bytes()
    assert cli("patch", checkout).code == 0 and real.read_bytes() == content
    assert cli("restore", checkout).code == 0
    assert str((checkout / "config.json").readlink()) == "../middle" and real.read_bytes() == content
