"""Write several files so that a kill at any moment leaves each one whole, old or new, never in between.

How: every new content is first written to a temporary in its target's own directory and flushed to the disk,
then a journal says "commit", then each temporary is renamed over its target. A run that is killed before the
journal says "commit" is undone by the next one, a run killed after it is finished by the next one
(:func:`recover`). Temporaries carry fixed names that the journal lists, so none is ever orphaned for good.

Links: a symbolic link is followed and stays a link; its target is replaced. A hard link is not followed: the
written name gets a new file, every other name of the old file keeps the old bytes (two checkouts that share
files by hard link must not change together, and a rename is the only write that cannot be caught half done).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_surgery.errors import Refused, ToolFailed

JOURNAL = "journal.json"
_SUFFIX = ".qwen-surgery-tmp"


def digest(data: bytes) -> str:
    """The sha256 of *data* in hex: how receipts, the journal and the catalogue name a content."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Write:
    """Put *data* at *path* (created when missing) with the permission bits *mode* (None keeps what is there).

    ``expect`` is the digest of the bytes the plan was made on; other bytes found there end the commit.
    ``link`` is a file that holds *data* already and whose hard link is put at *path* where that can be done.
    """

    path: Path
    data: bytes
    mode: int | None = None
    expect: str | None = None
    link: Path | None = None


@dataclass(frozen=True)
class Remove:
    """Remove the file at *path*, if it is there."""

    path: Path


@dataclass(frozen=True)
class _Step:
    """One journal line. ``target`` is the file behind any symbolic link; ``after`` is None for a removal."""

    target: Path
    temp: Path
    before: str | None
    after: str | None

    @classmethod
    def of(cls, action: Write | Remove) -> _Step:
        target = resolve(action.path)
        after = digest(action.data) if isinstance(action, Write) else None
        return cls(target, target.with_name(f".{target.name}{_SUFFIX}"), _digest_of(target), after)

    def to_json(self) -> dict[str, str | None]:
        return {
            "target": str(self.target),
            "temp": str(self.temp),
            "before": self.before,
            "after": self.after,
        }

    @classmethod
    def from_json(cls, data: dict[str, str | None]) -> _Step:
        return cls(Path(str(data["target"])), Path(str(data["temp"])), data["before"], data["after"])

    def commit(self) -> None:
        """Do the step; twice does no harm. A target that somebody changed meanwhile is left alone."""
        found = _digest_of(self.target)
        if self.after is None:
            if found == self.before:
                self.target.unlink(missing_ok=True)
        elif found == self.before and self.temp.exists():
            self.temp.replace(self.target)
        self.temp.unlink(missing_ok=True)


def resolve(path: Path) -> Path:
    """The file behind *path*: symbolic links followed, the last part allowed to be missing."""
    return path.resolve() if path.is_symlink() else path.parent.resolve() / path.name


def _digest_of(path: Path) -> str | None:
    try:
        return digest(path.read_bytes())
    except FileNotFoundError:
        return None


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_temporary(temp: Path, data: bytes, like: os.stat_result | None, mode: int | None) -> None:
    """Write and flush *temp*, with *mode* or else *like*'s permission bits, and its owner where allowed."""
    temp.unlink(missing_ok=True)
    descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        if like is not None and (like.st_uid, like.st_gid) != (os.geteuid(), os.getegid()):
            with contextlib.suppress(PermissionError):
                os.fchown(descriptor, like.st_uid, like.st_gid)
        wanted = mode if mode is not None else stat.S_IMODE(like.st_mode) if like is not None else None
        if wanted is not None:
            os.fchmod(descriptor, wanted)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_temporary(temp: Path, action: Write, like: os.stat_result | None) -> None:
    if action.link is not None and _digest_of(action.link) == digest(action.data):
        temp.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another file system, or one without hard links: write a copy
            os.link(action.link, temp)
            if action.mode is not None:
                temp.chmod(action.mode)
            return
    _write_temporary(temp, action.data, like, action.mode)


def write_whole(path: Path, data: bytes) -> None:
    """Replace one file, atomically, with default permission bits."""
    temp = path.with_name(f".{path.name}{_SUFFIX}")
    try:
        _write_temporary(temp, data, None, None)
        temp.replace(path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    _flush_directory(path.parent)


def _write_journal(state: Path, phase: str, steps: list[_Step]) -> None:
    data = {"phase": phase, "steps": [step.to_json() for step in steps]}
    write_whole(state / JOURNAL, json.dumps(data, indent=1).encode())


def _drop_journal(state: Path) -> None:
    (state / JOURNAL).unlink(missing_ok=True)
    _flush_directory(state)


def _undo(state: Path, steps: Iterable[_Step]) -> None:
    for step in steps:
        step.temp.unlink(missing_ok=True)
    _drop_journal(state)


def _take_back(action: Write | Remove, step: _Step, old: bytes | None, like: os.stat_result | None) -> None:
    """Put the old bytes back after a later step of the same commit could not be done."""
    if _digest_of(step.target) != step.after:
        return
    if old is None:
        step.target.unlink(missing_ok=True)
        return
    _write_temporary(step.temp, old, like, None)
    step.temp.replace(step.target)


def _say(error: OSError, what: str) -> ToolFailed:
    reason = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file size limit (ulimit -f) forbids it",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission denied",
        errno.EPERM: "the operation is not permitted",
    }.get(error.errno or 0, error.strerror or str(error))
    where = f" {error.filename2 or error.filename}" if error.filename else ""
    return ToolFailed(f"cannot write{where}: {reason}; {what}")


def commit(state: Path, actions: Iterable[Write | Remove]) -> None:
    """Do all *actions* or none, keeping the journal in the existing directory *state*.

    On an error every target holds its old bytes again and ToolFailed says why; only when even that fails is
    the journal left for the next run's :func:`recover`.
    """
    todo = list(actions)
    steps = [_Step.of(action) for action in todo]
    for action, step in zip(todo, steps, strict=True):
        if isinstance(action, Write) and action.expect is not None and action.expect != step.before:
            raise Refused(f"{action.path} was changed by someone else meanwhile; nothing was changed")
    old = [step.target.read_bytes() if step.before is not None else None for step in steps]
    like = [step.target.stat() if step.before is not None else None for step in steps]
    done: list[int] = []
    try:
        _write_journal(state, "prepare", steps)
        for action, step, status in zip(todo, steps, like, strict=True):
            if isinstance(action, Write):
                _make_temporary(step.temp, action, status)
        _write_journal(state, "commit", steps)
        for index, step in enumerate(steps):
            done.append(index)
            step.commit()
        for directory in sorted({step.target.parent for step in steps}):
            _flush_directory(directory)
        _drop_journal(state)
    except BaseException as error:
        try:
            for index in reversed(done):
                _take_back(todo[index], steps[index], old[index], like[index])
            _undo(state, steps)
        except OSError as second:
            raise _say(second, "the next run will finish or undo what was begun") from error
        if isinstance(error, OSError):
            raise _say(error, "nothing was changed") from error
        raise


def recover(state: Path) -> str:
    """Finish or undo what a killed run began in *state*; says which in one line, '' for nothing to do."""
    journal = state / JOURNAL
    with contextlib.suppress(FileNotFoundError):
        (state / f".{JOURNAL}{_SUFFIX}").unlink()
    try:
        data = json.loads(journal.read_bytes())
        steps = [_Step.from_json(step) for step in data["steps"]]
        phase = data["phase"]
    except FileNotFoundError:
        return ""
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"{journal} is not a journal this program wrote ({error})",
            hint="move it away after checking the files of the checkout",
        ) from error
    try:
        if phase == "prepare":
            _undo(state, steps)
            return "an earlier run was interrupted before it changed anything; its leftovers are cleared"
        for step in steps:
            step.commit()
        _drop_journal(state)
    except OSError as error:
        raise _say(error, "an interrupted run could not be finished; the next run tries again") from error
    return "an earlier run was interrupted half way; its writes are finished"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold *directory* against other runs of this program (an flock on the directory: it leaves no file)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ToolFailed(
                f"another qwen-surgery is writing to {directory}", hint="wait for it to end, then try again"
            ) from error
        except OSError:
            pass  # a file system without locks (some network mounts): two runs at once stay the user's care
        yield
    finally:
        os.close(descriptor)


def make_state(state: Path) -> None:
    """Create the state directory *state*, hidden from git by a .gitignore of its own."""
    try:
        (state / "originals").mkdir(parents=True, exist_ok=True)
        if not (state / ".gitignore").exists():
            write_whole(state / ".gitignore", b"*\n")
    except OSError as error:
        drop_state(state)
        raise _say(error, "nothing was changed") from error


def drop_state(state: Path) -> None:
    """Remove the state directory when it holds neither a receipt nor a journal (nothing anyone needs)."""
    if state.is_dir() and not any((state / name).exists() for name in ("receipt.json", JOURNAL)):
        shutil.rmtree(state, ignore_errors=True)
