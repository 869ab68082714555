"""Files written whole or not at all, read without surprises, and held against other runs.

Every writer of this program goes through here: one suffix for temporaries, one message for a full disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from qwen_surgery.errors import Refused, ToolFailed

SUFFIX = ".qwen-surgery-tmp"
_OLD = ".old"


def digest(data: bytes) -> str:
    """The sha256 of *data* in hex: how receipts, the journal and the catalogue name a content."""
    return hashlib.sha256(data).hexdigest()


def temporary_of(path: Path) -> Path:
    """The name beside *path* that its next content is written under."""
    return path.with_name(f".{path.name}{SUFFIX}")


def explain(error: OSError) -> str:
    """Why the system refused, in words a user can act on."""
    return {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file size limit (ulimit -f) forbids it",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission denied",
        errno.EPERM: "the operation is not permitted",
    }.get(error.errno or 0, error.strerror or str(error))


def cannot_write(error: OSError, what: str, path: Path | None = None) -> ToolFailed:
    """The one-line error for a failed write; *what* says how things stand now."""
    where = path or error.filename2 or error.filename
    return ToolFailed(f"cannot write{f' {where}' if where else ''}: {explain(error)}; {what}")


def free_disk(folder: Path) -> int:
    """Bytes free on the disk of *folder*, made or not yet."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def require_disk(
    folder: Path, needed: int, what: str = "this", hint: str = "free some space or choose another folder"
) -> None:
    """Raise ToolFailed when the disk of *folder*, made or not yet, has fewer than *needed* bytes free."""
    free = free_disk(folder)
    if free < needed:
        raise ToolFailed(
            f"{what} needs {needed / 1e6:,.0f} MB of disk, {folder} has {free / 1e6:,.0f} MB free", hint=hint
        )


def read_regular(path: Path, limit: int, *, follow: bool = False) -> bytes | None:
    """The bytes of a regular file, None when there is nothing at *path*.

    Symbolic links are only followed with *follow*. Raises Refused for a pipe, a device or a folder, and for
    more than *limit* bytes; ToolFailed when the system does not let it be read.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        kind = stat.S_IFMT(path.stat(follow_symlinks=follow).st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFLNK):  # opening alone rewinds a tape or starts a watchdog
            raise Refused(f"{path} is not read: it is no regular file")
        descriptor = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Refused(f"{path} is not read: it is a link") from None
        raise ToolFailed(f"cannot read {path}: {explain(error)}") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Refused(f"{path} is not read: it is no regular file")
        if status.st_size > limit:
            raise Refused(f"{path} is not read: {status.st_size:,} bytes are more than {limit:,}")
        return file.read(limit)


def flush_directory(path: Path) -> None:
    """Make renames in *path* last through a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_temporary(temp: Path, data: bytes, like: os.stat_result | None, mode: int | None) -> None:
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
        wanted = mode if mode is not None else like.st_mode if like is not None else None
        if wanted is not None:
            os.fchmod(descriptor, wanted & 0o777)  # nobody wants set-uid model code
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Replace one file, atomically, with default permission bits."""
    temp = temporary_of(path)
    try:
        write_temporary(temp, data, None, None)
        temp.replace(path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


@contextlib.contextmanager
def replacing(path: Path, needed: int, before: Callable[[Path], None] | None = None) -> Iterator[BinaryIO]:
    """A new file that takes the place of *path* when the block ends well, and is removed when it does not.

    For files too big for memory. *before* is called with the finished new file just before it takes the
    place. Raises ToolFailed when the disk cannot take *needed* more bytes, or fails while writing.
    """
    require_disk(path.parent, needed, path.name)
    temporary = temporary_of(path)
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("x+b", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        if before is not None:
            before(temporary)
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(error, "nothing was changed", path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside *folder*; on success it takes that name, on any error it is removed.

    What was there under that name is replaced: callers have asked whether it may be. What a killed run left
    beside it is removed first; a kill between the two renames leaves the old folder aside, and the next run
    brings it back. Raises ToolFailed when the disk is full.
    """
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}{SUFFIX}-", dir=folder.parent))
        try:
            with locked(work):
                work.chmod(0o777 & ~_umask())
                yield work
                _swap(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise cannot_write(error, "nothing was changed", folder) from error


def _sweep(folder: Path) -> None:
    """Remove the temporary folders of killed runs; those of runs that still work are locked and stay."""
    prefix = f".{folder.name}{SUFFIX}-"
    for stale in [p for p in folder.parent.iterdir() if p.name.startswith(prefix)]:
        if stale.is_symlink() or not stale.is_dir():
            continue
        with contextlib.suppress(ToolFailed, FileNotFoundError), locked(stale):
            if stale.name.endswith(_OLD) and not folder.exists():
                stale.rename(folder)
            else:
                shutil.rmtree(stale, ignore_errors=True)


def _swap(work: Path, folder: Path) -> None:
    if not folder.exists():
        work.rename(folder)
        return
    old = work.with_name(work.name + _OLD)
    with locked(folder):  # not swept as a killed run's while it stands aside
        folder.rename(old)
        try:
            work.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def put(source: Path, target: Path) -> None:
    """Make *target* the same file as *source* by a hard link, a copy where there are none; in one step."""
    temp = temporary_of(target)
    temp.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), temp)
    except OSError:
        shutil.copyfile(source, temp)
    try:
        temp.replace(target)
    finally:
        temp.unlink(missing_ok=True)  # a rename of a link onto itself does nothing and leaves both names


@contextlib.contextmanager
def locked(path: Path, busy: str = "", *, wait: bool = False) -> Iterator[None]:
    """Hold *path*, a folder or a file, against other runs (an flock: it leaves nothing behind).

    When another run holds it, *wait* waits for that to end; else ToolFailed says so, in the words of *busy*.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise ToolFailed(
                busy or f"another qwen-surgery is writing to {path}",
                hint="wait for it to end, then try again",
            ) from error
        except OSError:
            pass  # a file system without locks (some network mounts): two runs at once stay the user's care
        yield
    finally:
        os.close(descriptor)
