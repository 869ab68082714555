"""Write a whole folder or nothing: all goes to a hidden neighbour first, then the names are swapped."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_surgery.errors import Refused, ToolFailed
from qwen_surgery.exporting.manifest import FILE_NAME


def refuse_foreign(folder: Path) -> None:
    """Raise Refused when *folder* exists and is neither empty nor an earlier export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise Refused(f"{folder} is a file")
    if any(folder.iterdir()) and not (folder / FILE_NAME).is_file():
        raise Refused(
            f"{folder} holds other files and no export",
            hint="choose an empty or a new folder: it would be replaced",
        )


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside *folder*; on success it takes that name, on any error it is removed.

    An earlier export under that name is replaced as one step. Raises ToolFailed when the disk is full.
    """
    folder = folder.absolute()
    refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        work.chmod(0o777 & ~_umask())
        yield work
        _swap(work, folder)
    except OSError as error:
        raise ToolFailed(
            f"{folder}: cannot be written: {error.strerror or error}", hint="nothing was changed"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(work: Path, folder: Path) -> None:
    if not folder.exists():
        work.rename(folder)
        return
    old = work.with_name(work.name + ".old")
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
