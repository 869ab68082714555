"""The ways to give nets their weights: hard links of the shards, one shared copy, or inside each file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from qwen_surgery.errors import Refused
from qwen_surgery.exporting.template import Location
from qwen_surgery.weights import TensorRef

WEIGHTS_FOLDER = "weights"
CONSTANTS_FILE = "constants.bin"
_ALIGNMENT = 4096
_CHUNK = 8 << 20


class WeightMode(str, Enum):
    """How an exported folder holds the weights."""

    LINK = "link"
    COPY = "copy"
    INLINE = "inline"


class SharedPlacement:
    """Weights stay in files ``weights/<shard>`` of the exported folder (linked or copied, same offsets)."""

    inline = False

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self._names = _distinct_names(files)
        self._constants = _ConstantPool(folder / CONSTANTS_FILE)

    def weight(self, ref: TensorRef) -> Location:
        return Location(f"{WEIGHTS_FOLDER}/{self._names[ref.file]}", ref.offset, ref.nbytes)

    def file(self, ref: TensorRef) -> Path:
        return Path(WEIGHTS_FOLDER, self._names[ref.file])

    def constant(self, data: bytes) -> Location:
        return self._constants.place(data)

    def close(self) -> None:
        self._constants.close()


class InlinePlacement:
    """Every net holds its own bytes."""

    inline = True

    def weight(self, ref: TensorRef) -> bytes:
        return ref.read_raw().tobytes()

    def file(self, ref: TensorRef) -> Path:
        return ref.file

    def constant(self, data: bytes) -> bytes:
        return data

    def close(self) -> None:
        """Nothing to close."""


class _ConstantPool:
    """One file that holds every distinct table once, each at a page boundary."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: BinaryIO | None = None
        self._placed: dict[str, Location] = {}
        self._end = 0

    def place(self, data: bytes) -> Location:
        key = hashlib.sha256(data).hexdigest()
        if key not in self._placed:
            if self._stream is None:
                self._stream = self._path.open("wb")
            self._stream.write(b"\0" * (-self._end % _ALIGNMENT))
            self._end += -self._end % _ALIGNMENT
            self._placed[key] = Location(self._path.name, self._end, len(data))
            self._stream.write(data)
            self._end += len(data)
        return self._placed[key]

    def close(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None


def _distinct_names(files: Iterable[Path]) -> dict[Path, str]:
    names = {file: file.name for file in files}
    if len(set(names.values())) != len(names):
        raise Refused("two weight files share one name")
    return names


def try_link(source: Path, folder: Path) -> str:
    """Empty when a hard link of *source* can be made in *folder*, else the reason why not."""
    probe = folder / f".link-probe-{os.getpid()}"
    try:
        os.link(source.resolve(), probe)
    except OSError as error:
        return error.strerror or str(error)
    probe.unlink()
    return ""


def link_files(files: Iterable[Path], folder: Path) -> None:
    """Hard-link *files* into *folder*/weights. Symlinks (as in the Hugging Face cache) are followed first."""
    target = folder / WEIGHTS_FOLDER
    target.mkdir()
    for file, name in _distinct_names(files).items():
        os.link(file.resolve(), target / name)


def copy_files(files: Iterable[Path], folder: Path, progress: Callable[[int], None]) -> None:
    """Copy *files* into *folder*/weights, calling *progress* with each number of bytes written."""
    target = folder / WEIGHTS_FOLDER
    target.mkdir()
    for file, name in _distinct_names(files).items():
        with file.open("rb") as source, (target / name).open("wb") as sink:
            while chunk := source.read(_CHUNK):
                sink.write(chunk)
                progress(len(chunk))
            sink.flush()
            os.fsync(sink.fileno())
