"""Writes are all or nothing, whatever fails and whenever the process is killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codemods.framework.recipes import STATIC
from qwen_surgery.errors import Refused, ToolFailed
from qwen_surgery.files import digest, locked
from qwen_surgery.patching import edits, journal, write
from tests.patching.conftest import Result, snapshot

#: Names that a journal may hold.
ONE, TWO, NEW = "config.json", "modeling_qwen.py", "new.py"


def _made(folder: Path) -> Path:
    """A checkout with a state folder and two files."""
    journal.make_state(folder)
    (folder / ONE).write_bytes(b"1")
    (folder / TWO).write_bytes(b"2")
    return folder


def _leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.name.endswith("-tmp") or p.name == journal.JOURNAL]


def test_commit_writes_removes_and_keeps_modes(tmp_path: Path) -> None:
    root = _made(tmp_path)
    old, gone, new = root / ONE, root / TWO, root / NEW
    old.chmod(0o640)
    journal.commit(
        root, [journal.WriteFile(old, b"11"), journal.RemoveFile(gone), journal.WriteFile(new, b"3", 0o755)]
    )
    assert (old.read_bytes(), old.stat().st_mode & 0o7777) == (b"11", 0o640)
    assert (new.read_bytes(), new.stat().st_mode & 0o7777) == (b"3", 0o755)
    assert not gone.exists()
    assert _leftovers(root) == []


def test_commit_refuses_a_file_that_changed_since_the_plan(tmp_path: Path) -> None:
    root = _made(tmp_path)
    with pytest.raises(Refused, match="changed by someone else"):
        journal.commit(root, [journal.WriteFile(root / ONE, b"ours", expect=digest(b"planned on"))])
    assert (root / ONE).read_bytes() == b"1"


# Every call that can fail while files are being written; each is made to fail at its 1st, 2nd, ... use.
CALLS = ("write", "fsync", "open", "fchmod", "replace")


def _fail_at(monkeypatch: pytest.MonkeyPatch, call: str, use: int, error: int) -> list[int]:
    left = [use]
    where: Any = Path if call == "replace" else os
    real = getattr(where, call)

    def failing(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(error, os.strerror(error), str(arguments[0]))
        return real(*arguments, **options)

    monkeypatch.setattr(where, call, failing)
    return left


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("use", range(1, 12))
def test_one_failing_call_anywhere_leaves_every_file_old(
    call: str, use: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _made(tmp_path)
    one, two, new = root / ONE, root / TWO, root / NEW
    actions = [
        journal.WriteFile(one, b"new 1", 0o600),
        journal.WriteFile(two, b"new 2"),
        journal.WriteFile(new, b"3"),
    ]
    with monkeypatch.context() as patched:
        left = _fail_at(patched, call, use, errno.EIO)
        try:
            journal.commit(root, actions)
            raised = False
        except ToolFailed as error:
            raised = True
            assert "\n" not in str(error)
    found = (one.read_bytes(), two.read_bytes(), new.exists())
    if left[0] > 0:
        assert not raised
        assert found == (b"new 1", b"new 2", True)
    else:
        assert raised
        assert found in ((b"1", b"2", False), (b"new 1", b"new 2", True))
        journal.recover(root)
    assert _leftovers(root) == []


def test_when_undoing_fails_too_the_next_run_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _made(tmp_path)
    one, two = root / ONE, root / TWO
    real = Path.replace

    def broken(self: Path, target: Path) -> Path:
        if target.name == TWO or (target.name == ONE and one.read_bytes() == b"new 1"):
            raise OSError(errno.EIO, "Input/output error", str(target))
        return real(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", broken)
        with pytest.raises(ToolFailed, match="next run"):
            journal.commit(root, [journal.WriteFile(one, b"new 1"), journal.WriteFile(two, b"new 2")])
    assert one.read_bytes() in (b"1", b"new 1")
    assert two.read_bytes() == b"2"
    assert "finished" in journal.recover(root)
    assert (one.read_bytes(), two.read_bytes()) == (b"new 1", b"new 2")
    assert _leftovers(tmp_path) == []


def test_recover_leaves_alone_what_somebody_changed_after_the_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _made(tmp_path)
    one = root / ONE
    with monkeypatch.context() as patched:
        patched.setattr(journal._Step, "commit", lambda self: os._exit(9))
        child = os.fork()
        if child == 0:
            journal.commit(root, [journal.WriteFile(one, b"new")])
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    one.write_bytes(b"somebody's")
    journal.recover(root)
    assert one.read_bytes() == b"somebody's"
    assert _leftovers(tmp_path) == []


def test_a_damaged_journal_is_refused_not_guessed_at(tmp_path: Path) -> None:
    root = _made(tmp_path)
    (root / journal.STATE / journal.JOURNAL).write_text("{}")
    with pytest.raises(Refused, match=r"journal\.json"):
        journal.recover(root)


def _deadly(call: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)

    return wrapped


def _killed_at(step: int, action: Callable[[], object]) -> int:
    """Run *action* in a child that gets a SIGKILL before its step-th write, flush, rename or removal."""
    child = os.fork()
    if child == 0:
        try:
            left = [step]
            for where, names in (
                (os, ("open", "write", "fsync", "link")),
                (Path, ("replace", "unlink", "mkdir")),
            ):
                for name in names:
                    setattr(where, name, _deadly(getattr(where, name), left))
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _whole(checkout: Path, *allowed: dict[str, tuple[bytes, int]]) -> None:
    """Each user file is, byte for byte, one of the allowed states (modes too)."""
    for name in ("modeling_qwen.py", "config.json"):
        now = ((checkout / name).read_bytes(), (checkout / name).stat().st_mode & 0o7777)
        assert now in [state[name] for state in allowed], name


def _user_files(checkout: Path) -> dict[str, tuple[bytes, int]]:
    return {k: v for k, v in snapshot(checkout).items() if not k.startswith(".qwen-surgery")}


@pytest.fixture
def quick_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work out each edit once: these tests run a patch a hundred times, and the writing is what they test."""
    made: dict[Any, Any] = {}
    real, real_era = edits.apply, edits.era

    def apply(modeling: str, files: dict[str, bytes], *options: Any) -> Any:
        key = (modeling, files[modeling], files["config.json"], *options)
        if key not in made:
            made[key] = real(modeling, files, *options)
        return made[key]

    def era(data: bytes) -> str:
        if data not in made:
            made[data] = real_era(data)
        return str(made[data])

    monkeypatch.setattr(edits, "apply", apply)
    monkeypatch.setattr(edits, "era", era)


@pytest.mark.usefixtures("quick_edits")
def test_a_kill_at_every_step_of_a_patch(checkout: Path) -> None:
    """SIGKILL before each single write, flush, rename and removal; then the next run heals."""
    old = snapshot(checkout)
    write.patch(checkout, "static", 512)
    new = _user_files(checkout)
    write.restore(checkout)
    for step in range(1, 200):
        assert snapshot(checkout) == old
        code = _killed_at(step, lambda: write.patch(checkout, "static", 512))
        _whole(checkout, old, new)
        if step % 2:  # heal by patching again, or by restoring: both must do
            write.patch(checkout, "static", 512)
            assert _user_files(checkout) == new
            assert _leftovers(checkout) == []
        write.restore(checkout)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert snapshot(checkout) == old
    assert code == 0
    assert step > 30


@pytest.mark.usefixtures("quick_edits")
def test_a_kill_at_every_step_of_a_restore(checkout: Path) -> None:
    old = snapshot(checkout)
    for step in range(1, 200):
        write.patch(checkout, "static", 512)
        new = _user_files(checkout)
        code = _killed_at(step, lambda: write.restore(checkout))
        _whole(checkout, old, new)
        if step % 2:
            write.restore(checkout)
            assert snapshot(checkout) == old
        else:
            write.patch(checkout, "static", 512)
            assert _user_files(checkout) == new
            assert _leftovers(checkout) == []
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0
    assert step > 15


def test_kills_at_random_moments_of_a_real_process(checkout: Path) -> None:
    old = snapshot(checkout)
    write.patch(checkout, "static", 512)
    new = _user_files(checkout)
    write.restore(checkout)
    for delay in (0.2, 0.35, 0.45, 0.5, 0.55, 0.6):
        running = subprocess.Popen([sys.executable, "-m", "qwen_surgery", "patch", str(checkout), "-q"])
        time.sleep(delay)
        running.kill()
        running.wait()
        _whole(checkout, old, new)
        write.restore(checkout)
        assert snapshot(checkout) == old, "restore finishes or undoes, and nothing of ours is left"


def test_file_size_limit_zero(checkout: Path) -> None:
    """Under `ulimit -f 0` other tools leave the user's file at 0 bytes."""
    before = snapshot(checkout)
    command = f"ulimit -f 0; exec {sys.executable} -m qwen_surgery patch {checkout}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "file size limit" in done.stderr
    assert done.stderr.count("\n") == 1
    assert snapshot(checkout) == before


def test_file_size_limit_that_lets_some_files_through(checkout: Path) -> None:
    before = snapshot(checkout)
    for blocks in (1, 4, 8):
        command = f"ulimit -f {blocks}; exec {sys.executable} -m qwen_surgery patch {checkout}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 4
        assert snapshot(checkout) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system with 64 KiB to spare; where mounting is not allowed, an ENOSPC is made instead."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(where)], capture_output=True, check=False
    )
    yield where, mounted.returncode == 0
    if mounted.returncode == 0:
        subprocess.run(["umount", str(where)], check=True)


def test_full_disk(
    small_disk: tuple[Path, bool], make: Callable[..., Path], cli: Callable[..., Result], monkeypatch: Any
) -> None:
    where, real = small_disk
    checkout = make("sdpa", "disk/checkout")
    if real:
        filler = os.statvfs(where).f_bavail * os.statvfs(where).f_frsize - 8192
        (where / "filler").write_bytes(b"x" * filler)
    else:
        _fail_at(monkeypatch, "write", 3, errno.ENOSPC)
    before = snapshot(checkout)
    result = cli("patch", checkout)
    assert result.code == 4
    assert "disk is full" in result.err
    assert result.err.count("\n") == 1
    assert snapshot(checkout) == before


def test_read_only_directory(checkout: Path, cli: Callable[..., Result], monkeypatch: Any) -> None:
    """As root permission bits do not stop anyone, so the refusal comes from a read-only mount or is made."""
    mounted = [
        subprocess.run(["mount", *options, str(checkout)], capture_output=True, check=False).returncode
        for options in (["--bind", str(checkout)], ["-o", "remount,ro,bind"])
    ]
    before = snapshot(checkout)
    try:
        if mounted != [0, 0]:
            checkout.chmod(0o555)
            if os.geteuid() == 0:
                monkeypatch.setattr(Path, "mkdir", _refuse)
        result = cli("patch", checkout)
    finally:
        if mounted[0] == 0:
            subprocess.run(["umount", str(checkout)], check=True)
        checkout.chmod(0o755)
    assert result.code == 4
    assert "cannot write" in result.err
    assert result.err.count("\n") == 1
    assert snapshot(checkout) == before


def _refuse(self: Path, *arguments: Any, **options: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", str(self))


def test_modes_survive_patch_and_restore(checkout: Path, cli: Callable[..., Result]) -> None:
    (checkout / "modeling_qwen.py").chmod(0o755)
    (checkout / "config.json").chmod(0o440)
    before = snapshot(checkout)
    assert cli("patch", checkout).code == 0
    after = snapshot(checkout)
    assert (after["modeling_qwen.py"][1], after["config.json"][1]) == (0o755, 0o440)
    (checkout / "modeling_qwen.py").chmod(0o600)
    assert cli("restore", checkout).code == 0
    assert snapshot(checkout) == before


def _hub(checkout: Path) -> Path:
    """Turn *checkout* into a hub cache's snapshot: every file a link to a blob named by its hash."""
    blobs = checkout.parent / "blobs"
    blobs.mkdir()
    for name in ("modeling_qwen.py", "config.json"):
        blob = blobs / digest((checkout / name).read_bytes())
        (checkout / name).rename(blob)
        (checkout / name).symlink_to(f"../blobs/{blob.name}")
    return blobs


def _links(checkout: Path) -> dict[str, str]:
    return {p.name: str(p.readlink()) for p in checkout.iterdir() if p.is_symlink()}


def test_a_hub_cache_keeps_its_blobs_and_its_other_snapshots(
    checkout: Path, cli: Callable[..., Result]
) -> None:
    """Else a blob no longer holds its own hash, and every snapshot that shares it is patched unasked."""
    blobs = _hub(checkout)
    other = checkout.parent / "other"
    shutil.copytree(checkout, other, symlinks=True)
    before, links = snapshot(other), _links(checkout)
    result = cli("patch", checkout)
    assert result.code == 0 and "link" in result.err and "restore brings the link back" in result.err
    assert all(blob.name == digest(blob.read_bytes()) for blob in blobs.iterdir())
    assert len(list(blobs.iterdir())) == 2, "no temporary left beside a blob"
    assert snapshot(other) == before
    assert _links(checkout) == {} and snapshot(checkout)["config.json"] != before["config.json"]
    assert cli("patch", checkout).code == 0
    assert cli("restore", checkout).code == 0
    assert _links(checkout) == links and snapshot(checkout) == before
    assert json.loads(cli("patch", checkout, "--json").out)["notes"]


def test_options_that_leave_a_file_unpatched_bring_its_links_back(
    checkout: Path, cli: Callable[..., Result]
) -> None:
    """The receipt forgets the file then, so restore could not bring the link back any more."""
    blobs = _hub(checkout)
    kept, links, before = snapshot(blobs), _links(checkout), snapshot(checkout)
    assert cli("patch", checkout).code == 0 and not _links(checkout)
    every = [word for name in (*STATIC.codemods, *STATIC.config) for word in ("--skip", name)]
    assert cli("patch", checkout, *every).code == 0
    assert (snapshot(checkout), _links(checkout), snapshot(blobs)) == (before, links, kept)


def test_options_that_leave_a_file_unpatched_join_its_hard_links(
    checkout: Path, cli: Callable[..., Result]
) -> None:
    other = checkout.parent / "other.py"
    other.hardlink_to(checkout / "modeling_qwen.py")
    assert cli("patch", checkout).code == 0
    every = [word for name in (*STATIC.codemods, *STATIC.config) for word in ("--skip", name)]
    assert cli("patch", checkout, *every).code == 0
    assert other.samefile(checkout / "modeling_qwen.py")


def test_a_link_that_leads_elsewhere_since_is_restored_as_a_file(
    checkout: Path, cli: Callable[..., Result]
) -> None:
    blobs = _hub(checkout)
    before = snapshot(checkout)
    assert cli("patch", checkout).code == 0
    for blob in blobs.iterdir():
        blob.unlink()
    result = cli("restore", checkout)
    assert result.code == 0 and "restored as a file" in result.err
    assert snapshot(checkout) == before and not _links(checkout)


@pytest.mark.usefixtures("quick_edits")
def test_a_kill_at_every_step_where_files_are_links(checkout: Path) -> None:
    """Patch and restore in turn, each killed before each of its steps; blobs never change."""
    blobs = _hub(checkout)
    links, old = _links(checkout), snapshot(checkout)
    kept = snapshot(blobs)
    write.patch(checkout, "static", 512)
    new = _user_files(checkout)
    write.restore(checkout)
    finished = 0
    for step in range(1, 200):
        codes = []
        for action in (lambda: write.patch(checkout, "static", 512), lambda: write.restore(checkout)):
            codes.append(_killed_at(step, action))
            _whole(checkout, old, new)
            assert snapshot(blobs) == kept
        write.restore(checkout)
        assert (_links(checkout), snapshot(checkout)) == (links, old)
        if codes == [0, 0]:
            finished = step
            break
    assert finished > 30


def test_what_a_commit_cannot_finish_brings_links_back(
    checkout: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    _hub(checkout)
    links = _links(checkout)
    real = Path.replace

    def broken(self: Path, target: Path) -> Path:
        if target.name == journal.RECEIPT:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", broken)
    assert cli("patch", checkout).code == 4
    assert _links(checkout) == links


def test_hard_links_elsewhere_keep_the_old_bytes_and_restore_joins_them_again(
    checkout: Path, cli: Callable[..., Result]
) -> None:
    other = checkout.parent / "other.py"
    other.hardlink_to(checkout / "modeling_qwen.py")
    original = other.read_bytes()
    result = cli("patch", checkout)
    assert result.code == 0
    assert "hard links" in result.err
    assert other.read_bytes() == original, "a checkout that shares the file must not change with this one"
    assert (checkout / "modeling_qwen.py").read_bytes() != original
    assert cli("restore", checkout).code == 0
    assert other.samefile(checkout / "modeling_qwen.py")
    assert other.read_bytes() == original
    assert other.stat().st_nlink == 2


def test_restore_does_not_trust_a_hard_link_that_was_written_through(
    checkout: Path, cli: Callable[..., Result]
) -> None:
    other = checkout.parent / "other.py"
    other.hardlink_to(checkout / "modeling_qwen.py")
    original = other.read_bytes()
    assert cli("patch", checkout).code == 0
    other.write_bytes(b"# changed in place\n")
    assert cli("restore", checkout).code == 0
    assert (checkout / "modeling_qwen.py").read_bytes() == original
    assert other.read_bytes() == b"# changed in place\n"


def test_two_runs_at_once_do_not_mix(checkout: Path, cli: Callable[..., Result]) -> None:
    with locked(checkout):
        result = cli("patch", checkout)
    assert result.code == 4
    assert "another qwen-surgery" in result.err
