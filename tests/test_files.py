"""Files and folders are written whole or not at all, and what a killed run left is cleared by the next."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_surgery import files
from qwen_surgery.errors import Refused, ToolFailed


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _killed(script: str, folder: Path) -> None:
    """Run *script* in a process that kills itself; ``folder`` is its working directory."""
    head = (
        "import os, signal, shutil\nfrom pathlib import Path\nfrom qwen_surgery import files\n"
        "die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", head + script], cwd=folder, check=False)
    assert done.returncode == -signal.SIGKILL


def _write_folder(target: Path, text: str) -> None:
    with files.atomic_folder(target) as work:
        (work / "file").write_text(text)


def test_a_killed_run_leaves_the_old_folder_and_the_next_clears_what_it_left(tmp_path: Path) -> None:
    """Else gigabytes of a half export stay hidden beside the folder."""
    _write_folder(tmp_path / "out", "old")
    _killed("with files.atomic_folder(Path('out')) as work:\n    (work / 'big').touch()\n    die()", tmp_path)
    assert (tmp_path / "out/file").read_text() == "old" and len(_names(tmp_path)) == 2
    _write_folder(tmp_path / "out", "new")
    assert (tmp_path / "out/file").read_text() == "new" and _names(tmp_path) == ["out"]


def test_a_kill_between_the_two_renames_loses_no_folder(tmp_path: Path) -> None:
    _write_folder(tmp_path / "out", "old")
    _killed(
        "real = Path.rename\n"
        "Path.rename = lambda self, to: real(self, to) if to.name != 'out' else die()\n"
        "with files.atomic_folder(Path('out')) as work:\n    (work / 'file').write_text('new')",
        tmp_path,
    )
    assert "out" not in _names(tmp_path)
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "out"):
        raise RuntimeError("this run fails too")
    assert (tmp_path / "out/file").read_text() == "old" and _names(tmp_path) == ["out"]


def test_a_folder_that_another_run_is_writing_is_not_swept(tmp_path: Path) -> None:
    with files.atomic_folder(tmp_path / "out") as work:
        (work / "file").write_text("slow")
        _write_folder(tmp_path / "out", "quick")
        assert (work / "file").read_text() == "slow"
    assert (tmp_path / "out/file").read_text() == "slow" and _names(tmp_path) == ["out"]


def test_a_failing_swap_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_folder(tmp_path / "out", "old")
    real = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if target.name == "out" and not self.name.endswith(".old"):
            raise OSError(errno.EIO, "Input/output error", str(target))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(ToolFailed, match="nothing was changed"):
        _write_folder(tmp_path / "out", "new")
    assert (tmp_path / "out/file").read_text() == "old" and _names(tmp_path) == ["out"]


def _replace(target: Path) -> None:
    with files.replacing(target, 3) as file:
        file.write(b"new")


@pytest.mark.parametrize("write", [_replace, lambda path: files.write_whole(path, b"new")])
def test_no_writer_writes_through_a_temporary_that_is_a_link(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    """A link under the temporary's name, shipped in a folder, would send the bytes elsewhere."""
    (tmp_path / "victim").write_bytes(b"mine")
    files.temporary_of(tmp_path / "file").symlink_to("victim")
    write(tmp_path / "file")
    assert (tmp_path / "victim").read_bytes() == b"mine"
    assert (tmp_path / "file").read_bytes() == b"new" and not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("write", [_replace, lambda path: files.write_whole(path, b"new")])
def test_a_failing_write_leaves_the_old_file_and_no_temporary(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((ToolFailed, OSError)):
        write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old" and _names(tmp_path) == ["file"]


def test_holes_of_a_sparse_file_stay_holes(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "file", 3) as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"abc")
    status = (tmp_path / "file").stat()
    assert status.st_size == 64 << 20 and status.st_blocks * 512 < 1 << 20


def test_put_links_what_a_link_leads_to_and_copies_where_links_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blob").write_bytes(b"data")
    (tmp_path / "name").symlink_to("blob")
    for target in ("one", "one", "two"):  # the second time onto itself
        files.put(tmp_path / "name", tmp_path / target)
    assert (tmp_path / "one").samefile(tmp_path / "blob") and not (tmp_path / "one").is_symlink()

    def refused(*arguments: object, **options: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    files.put(tmp_path / "name", tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == b"data"
    assert not (tmp_path / "two").samefile(tmp_path / "blob")
    assert _names(tmp_path) == ["blob", "name", "one", "two"]


def test_a_lock_refuses_or_waits(tmp_path: Path) -> None:
    order = []
    inside, waiting = threading.Event(), threading.Event()

    def wait() -> None:
        inside.wait()
        waiting.set()
        with files.locked(tmp_path, wait=True):
            order.append("second")

    thread = threading.Thread(target=wait)
    thread.start()
    with files.locked(tmp_path):
        inside.set()
        waiting.wait()
        with pytest.raises(ToolFailed, match="in our words"), files.locked(tmp_path, "in our words"):
            pass
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_full_disk_says_how_much_is_needed(tmp_path: Path) -> None:
    """Also for a folder that is still to be made."""
    free = shutil.disk_usage(tmp_path).free
    files.require_disk(tmp_path / "not" / "there", 0)
    with pytest.raises(ToolFailed, match=r"the thing needs .* MB of disk") as failed:
        files.require_disk(tmp_path / "not" / "there", free * 2, "the thing", "make room")
    assert failed.value.hint == "make room"


def test_what_is_no_regular_file_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To open a device can act already: a tape rewinds, a watchdog starts."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    monkeypatch.setattr(os, "open", lambda *arguments: pytest.fail("opened"))
    for name in ("pipe", "link"):
        with pytest.raises(Refused, match="no regular file"):
            files.read_regular(tmp_path / name, 10, follow=True)
