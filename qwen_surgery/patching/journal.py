"""Change several files of a checkout so that a kill at any moment leaves each one whole, old or new.

How: every new content is first written to a temporary in its target's own directory and flushed to the disk,
then a journal says "commit", then each temporary is renamed over its target. A run that is killed before the
journal says "commit" is undone by the next one, a run killed after it is finished by the next one
(:func:`recover`).

Nothing is ever written through a link: the name in the checkout gets a file of its own. Behind a symbolic
link lies a store that other checkouts share (a hub cache names its blobs by their hash), behind a hard link
the other names of the file; all of these keep the old bytes.

The state folder may have come with the checkout, from anybody. A journal or receipt in it is therefore only
believed as far as it can do no harm: it names files of this checkout by plain names that this program
patches, temporaries are computed from these names and never read, and everything that is read must be a
regular file, not a link, of modest size. What a forged one can still do is what the checkout's own files can
do anyway: say what stands in config.json and in the modeling file. There is no key to forge around, so that a
patched checkout can be moved to another machine and restored there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_surgery.errors import Refused
from qwen_surgery.files import (
    SUFFIX,
    cannot_write,
    digest,
    flush_directory,
    read_regular,
    temporary_of,
    write_temporary,
    write_whole,
)

STATE = ".qwen-surgery"
JOURNAL = "journal.json"
RECEIPT = "receipt.json"
ORIGINALS = "originals"
#: No receipt, journal or source file comes near this many bytes.
LARGEST = 64 << 20
_HASH = re.compile(r"[0-9a-f]{64}")
_PATCHED = re.compile(r"config\.json|[^/\0]+\.py")
_KEPT = re.compile(r"originals/[0-9a-f]{16}-([^/\0]+?)(\.link)?")


def is_patched_name(name: object) -> bool:
    """Whether *name* is a plain name of a file that this program patches: config.json or a Python file."""
    return isinstance(name, str) and _PATCHED.fullmatch(name) is not None


def is_hash(text: object) -> bool:
    """Whether *text* is a sha256 in hex."""
    return isinstance(text, str) and _HASH.fullmatch(text) is not None


def _is_ours(name: object) -> bool:
    """Whether *name*, relative to the checkout, is one that a journal of ours can hold."""
    if not isinstance(name, str) or is_patched_name(name):
        return is_patched_name(name)
    folder, _, rest = name.partition("/")
    kept = _KEPT.fullmatch(rest)
    return folder == STATE and (rest == RECEIPT or (kept is not None and is_patched_name(kept[1])))


@dataclass(frozen=True)
class WriteFile:
    """Put *data* at *path* (created when missing) with the permission bits *mode* (None keeps what is there).

    ``expect`` is the digest of the bytes the plan was made on; other bytes found there end the commit.
    ``link`` is a file that holds *data* already and whose hard link is put at *path* where that can be done.
    ``symlink`` is the text of a symbolic link that leads to *data*; it is put at *path* where it still does.
    """

    path: Path
    data: bytes
    mode: int | None = None
    expect: str | None = None
    link: Path | None = None
    symlink: str = ""


@dataclass(frozen=True)
class RemoveFile:
    """RemoveFile the file at *path*, if it is there."""

    path: Path


@dataclass(frozen=True)
class _Step:
    """One journal line, its target named relative to the checkout; ``after`` is None for a removal."""

    target: Path
    before: str | None
    after: str | None

    @classmethod
    def of(cls, action: WriteFile | RemoveFile) -> _Step:
        after = digest(action.data) if isinstance(action, WriteFile) else None
        return cls(action.path, _digest_of(action.path), after)

    @property
    def temp(self) -> Path:
        return temporary_of(self.target)

    def to_json(self, root: Path) -> dict[str, str | None]:
        return {
            "target": self.target.relative_to(root).as_posix(),
            "before": self.before,
            "after": self.after,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], root: Path) -> _Step:
        name, before, after = data["target"], data["before"], data["after"]
        if not _is_ours(name):
            raise ValueError(f"{name!r} is no file that this program writes")
        if not all(value is None or is_hash(value) for value in (before, after)):
            raise ValueError("a digest is none")
        return cls(root / name, before, after)

    def commit(self) -> None:
        """Do the step; twice does no harm. A target that somebody changed meanwhile is left alone."""
        found = _digest_of(self.target)
        if self.after is None:
            if found == self.before:
                self.target.unlink(missing_ok=True)
        elif found == self.before and _digest_of(self.temp) == self.after:
            self.temp.replace(self.target)
        self.temp.unlink(missing_ok=True)


def _digest_of(path: Path) -> str | None:
    data = read_regular(path, LARGEST, follow=True)
    return None if data is None else digest(data)


def _make_temporary(temp: Path, action: WriteFile, like: os.stat_result | None) -> None:
    if not (_as_symlink(temp, action) or _as_link(temp, action)):
        write_temporary(temp, action.data, like, action.mode)


def _as_symlink(temp: Path, action: WriteFile) -> bool:
    """Make *temp* the symbolic link that *action* names, if it still leads to the wanted bytes."""
    if not action.symlink:
        return False
    temp.unlink(missing_ok=True)
    with contextlib.suppress(OSError, ValueError, Refused):
        temp.symlink_to(action.symlink)
        if _digest_of(temp) == digest(action.data):
            return True
    temp.unlink(missing_ok=True)
    return False


def _as_link(temp: Path, action: WriteFile) -> bool:
    """Make *temp* another name of the file that *action* names, if that holds the wanted bytes and mode."""
    if action.link is None:
        return False
    with contextlib.suppress(OSError, Refused):
        status = action.link.lstat()
        same = digest(read_regular(action.link, LARGEST) or b"") == digest(action.data)
        if not same or action.mode not in (None, status.st_mode & 0o7777):
            return False
        temp.unlink(missing_ok=True)
        os.link(action.link, temp, follow_symlinks=False)
        return True
    return False  # another file system, or one without hard links: write a copy


def _write_journal(root: Path, phase: str, steps: list[_Step]) -> None:
    data = {"phase": phase, "steps": [step.to_json(root) for step in steps]}
    write_whole(root / STATE / JOURNAL, json.dumps(data, indent=1).encode())


def _drop_journal(root: Path) -> None:
    (root / STATE / JOURNAL).unlink(missing_ok=True)
    flush_directory(root / STATE)


def _undo(root: Path, steps: Iterable[_Step]) -> None:
    for step in steps:
        step.temp.unlink(missing_ok=True)
    _drop_journal(root)


@dataclass(frozen=True)
class _Old:
    """What stood at a target before: bytes, status, and the link's text where it was a symbolic link."""

    data: bytes | None
    status: os.stat_result | None
    symlink: str

    @classmethod
    def of(cls, step: _Step) -> _Old:
        if step.before is None:
            return cls(None, None, "")
        symlink = str(step.target.readlink()) if step.target.is_symlink() else ""
        return cls(read_regular(step.target, LARGEST, follow=True), step.target.stat(), symlink)


def _take_back(step: _Step, old: _Old) -> None:
    """Put back what stood there, after a later step of the same commit could not be done."""
    if _digest_of(step.target) != step.after:
        return
    if old.data is None:
        step.target.unlink(missing_ok=True)
        return
    _make_temporary(step.temp, WriteFile(step.target, old.data, symlink=old.symlink), old.status)
    step.temp.replace(step.target)


def commit(root: Path, actions: Iterable[WriteFile | RemoveFile]) -> None:
    """Do all *actions* on the checkout *root* or none, keeping the journal in its existing state folder.

    On an error every target holds its old bytes again and ToolFailed says why; only when even that fails is
    the journal left for the next run's :func:`recover`.
    """
    todo = list(actions)
    steps = [_Step.of(action) for action in todo]
    for action, step in zip(todo, steps, strict=True):
        if isinstance(action, WriteFile) and action.expect is not None and action.expect != step.before:
            raise Refused(f"{action.path} was changed by someone else meanwhile; nothing was changed")
    for path in (root / STATE / JOURNAL, *(action.path for action in todo)):
        _refuse_folder(temporary_of(path))
    old = [_Old.of(step) for step in steps]
    done: list[int] = []
    try:
        _write_journal(root, "prepare", steps)
        for action, step, was in zip(todo, steps, old, strict=True):
            if isinstance(action, WriteFile):
                _make_temporary(step.temp, action, was.status)
        _write_journal(root, "commit", steps)
        for index, step in enumerate(steps):
            done.append(index)
            step.commit()
        for directory in sorted({step.target.parent for step in steps}):
            flush_directory(directory)
        _drop_journal(root)
    except BaseException as error:
        try:
            for index in reversed(done):
                _take_back(steps[index], old[index])
            _undo(root, steps)
        except OSError as second:
            raise cannot_write(second, "the next run will finish or undo what was begun") from error
        if isinstance(error, OSError):
            raise cannot_write(error, "nothing was changed") from error
        raise


def _refuse_folder(temp: Path) -> None:
    if temp.is_dir() and not temp.is_symlink():
        raise Refused(f"{temp} is a folder, where this program writes a file", hint="move it away")


def refuse_foreign_state(root: Path) -> None:
    """Raise Refused when the state folder of *root* cannot be one that this program made."""
    for folder in (root / STATE, root / STATE / ORIGINALS):
        if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
            raise foreign(root, f"{folder.name} is a link or no folder")


def foreign(root: Path, why: object) -> Refused:
    """The error for a state folder that did not come from this program, or was changed since."""
    return Refused(
        f"{root / STATE} did not come from this program, or was changed since: {why}",
        hint=f"nothing was changed; move {STATE} out of the checkout to go on without undo",
    )


def recover(root: Path) -> str:
    """Finish or undo what a killed run began in *root*; says which in one line, '' for nothing to do."""
    refuse_foreign_state(root)
    journal = root / STATE / JOURNAL
    _refuse_folder(temporary_of(journal))
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        temporary_of(journal).unlink()
    text = read_regular(journal, LARGEST)
    if text is None:
        return ""
    try:
        data = json.loads(text)
        steps = [_Step.from_json(step, root) for step in data["steps"]]
        phase = data["phase"]
        if phase not in ("prepare", "commit"):
            raise ValueError(f"there is no phase {phase!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise foreign(root, f"{JOURNAL}: {error}") from error
    try:
        if phase == "prepare":
            _undo(root, steps)
            return "an earlier run was interrupted before it changed anything; its leftovers are cleared"
        for step in steps:
            step.commit()
        _drop_journal(root)
    except OSError as error:
        raise cannot_write(
            error, "an interrupted run could not be finished, the next run tries again"
        ) from error
    return "an earlier run was interrupted half way; its writes are finished"


def make_state(root: Path) -> None:
    """Create the state folder of *root*, hidden from git by a .gitignore of its own."""
    refuse_foreign_state(root)
    state = root / STATE
    try:
        (state / ORIGINALS).mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(state / ".gitignore"):
            write_whole(state / ".gitignore", b"*\n")
    except OSError as error:
        drop_state(root)
        raise cannot_write(error, "nothing was changed") from error


def drop_state(root: Path) -> None:
    """RemoveFile the state folder when it holds neither a receipt nor a journal (nothing anyone needs).

    Only what this program puts there is removed: a folder that holds anything else stays, with that.
    """
    state = root / STATE
    if state.is_symlink() or any(os.path.lexists(state / name) for name in (RECEIPT, JOURNAL)):
        return
    with contextlib.suppress(OSError):
        for kept in (state / ORIGINALS).iterdir():
            name = kept.name.removeprefix(".").removesuffix(SUFFIX)
            if _is_ours(f"{STATE}/{ORIGINALS}/{name}"):
                kept.unlink()
    with contextlib.suppress(OSError):
        (state / ORIGINALS).rmdir()
    with contextlib.suppress(OSError):
        ours = [state / ".gitignore", *(temporary_of(state / n) for n in (".gitignore", JOURNAL, RECEIPT))]
        if set(state.iterdir()) <= set(ours):
            for path in ours:
                path.unlink(missing_ok=True)
        state.rmdir()
