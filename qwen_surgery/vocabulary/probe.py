"""Probes: pseudo-random bytes that stand for weights while a net is compiled, and are found again in it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_surgery.vocabulary.narrow import CannotExtend, Vocabulary

#: A probe of at least so many bytes has a page of content in every piece, and zeros.
_SPARSE_FROM = 1 << 24
_PIECE, _PAGE = 1 << 18, 1 << 12
_ZEROS = bytes(_PIECE)


def probe(index: int, size: int) -> Iterator[bytes]:
    """*size* bytes, the same for the same *index*, in pieces: pseudo-random, or from :data:`_SPARSE_FROM`
    bytes on zeros with a pseudo-random page at a pseudo-random place of every piece.
    """
    random = np.random.Generator(np.random.SFC64(index))
    for start in range(0, size, _PIECE):
        length = min(_PIECE, size - start)
        if size < _SPARSE_FROM:
            yield random.bytes(length)
            continue
        piece = bytearray(_ZEROS[:length])
        page = int(random.integers(_PIECE // _PAGE)) * _PAGE
        content = random.bytes(_PAGE)
        if page < length:
            piece[page : page + _PAGE] = content[: length - page]
        yield bytes(piece)


class _SparseFile(io.FileIO):
    """A new file in which pages of zeros take no room and no writing."""

    def write(self, data: Any) -> int:
        content = bytes(data)
        whole = np.frombuffer(content, np.uint64, len(content) // _PAGE * (_PAGE // 8))
        written = 0
        for page in np.flatnonzero(whole.reshape(-1, _PAGE // 8).any(axis=1)):
            self.seek(page * _PAGE - written, io.SEEK_CUR)
            super().write(content[page * _PAGE : (page + 1) * _PAGE])
            written = (page + 1) * _PAGE
        self.seek(whole.nbytes - written, io.SEEK_CUR)
        super().write(content[whole.nbytes :])
        return len(content)


@dataclass(frozen=True)
class ProbeArray:
    """One array of an extended net whose content is ``probe(index, nbytes)``."""

    name: str
    index: int
    shape: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.itemsize


def extend_weights(
    source: Path, target: Path, shapes: Mapping[str, tuple[int, ...]], vocabulary: Vocabulary
) -> list[ProbeArray]:
    """Write the weight file (npz) of an extended net: the narrow file *source*'s arrays, those with the
    vocabulary in their shape (*shapes*: name -> narrow shape) at their real size and with a probe in each.
    """
    arrays = []
    with np.load(source) as stored, _SparseFile(target, "w") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as out:
            for index, (name, array) in enumerate(sorted(stored.items())):
                narrow = shapes.get(name, array.shape)
                one = ProbeArray(name, index, vocabulary.extended(narrow), array.dtype.itemsize)
                with out.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    _write_header(stream, array.dtype, one.shape)
                    if one.shape == narrow:
                        stream.write(np.ascontiguousarray(array).tobytes())
                        continue
                    if not array.any():  # a bias that the graph adds; no weight of a checkpoint is all zeros
                        stream.write(bytes(one.nbytes))
                        continue
                    arrays.append(one)
                    for piece in probe(index, one.nbytes):
                        stream.write(piece)
        file.truncate()
    if not arrays:
        raise CannotExtend("no array of the lowered net depends on the vocabulary")
    return arrays


def _write_header(stream: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
