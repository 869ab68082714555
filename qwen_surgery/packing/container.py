"""The bmodel file: a 64-byte header, the flatbuffer, and a section of binary regions.

Layout (little endian; source of facts: ``lib/Builder/bmodel.cpp`` of TPU-MLIR and files it made)::

    uint32 magic 0xFF55AAEE | uint32 header size 64 | uint32 flatbuffer size | uint32 binary size
    48 zero bytes

Regions are (start, size) relative to the binary section. TPU-MLIR 1.30 pads the flatbuffer and every region
so that each region starts on a 4096-byte page of the file; older versions pack them tightly. The binary size
is kept modulo 2**32: models over 4 GiB have a wrapped number there, and readers go by the file's length.
Two regions with equal bytes are stored once: so ``block_i`` and ``block_cache_i`` share their weights.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qwen_surgery.errors import Refused
from qwen_surgery.packing import flat
from qwen_surgery.packing.check_code import CheckCode

MAGIC = 0xFF55AAEE
HEADER = struct.Struct("<4I48x")
PAGE = 4096
#: Bytes of a flatbuffer that is read at most; one of 80 layers has some MB.
LARGEST_FLAT = 64 << 20
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Region:
    """A run of bytes: ``start`` counts from the beginning of the binary section."""

    start: int
    size: int

    @classmethod
    def of(cls, binary: dict[str, int]) -> Region:
        return cls(binary["start"], binary["size"])


def regions(table: Any, type_: str = "Model") -> Iterator[dict[str, int]]:
    """Every ``Binary`` in *table* as ``model_tool`` walks a model: by field id, depth first."""
    from qwen_surgery.packing.schema import TABLES

    if type_ == "Binary":
        yield table
        return
    for field in TABLES.get(type_, ()):
        if field.name not in table:
            continue
        value, inner = table[field.name], field.type.strip("[]")
        if inner == "Binary" or inner in TABLES:
            for item in value if field.type.startswith("[") else [value]:
                yield from regions(item, inner)


class Bmodel:
    """A bmodel opened for reading. Raises :class:`Refused` when the file is not a whole bmodel."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._file: BinaryIO = self.path.open("rb")
        except OSError as error:
            raise Refused(f"{self.path}: {error.strerror}") from error
        try:
            self._read_head()
        except (flat.Damaged, struct.error) as error:
            self.close()
            raise Refused(f"{self.path} is not a whole bmodel: {error}") from error
        except Refused:
            self.close()
            raise

    def _read_head(self) -> None:
        head = self._file.read(HEADER.size)
        if len(head) < HEADER.size:
            raise flat.Damaged("it is shorter than a bmodel's header")
        magic, header_size, flat_size, binary_size = HEADER.unpack(head)
        if magic != MAGIC:
            raise flat.Damaged("it does not start with a bmodel's magic number")
        self.length = self.path.stat().st_size
        #: where the binary section starts in the file, in bytes
        self.base: int = header_size + flat_size
        if header_size != HEADER.size or self.base > self.length:
            raise flat.Damaged(
                f"the header asks for {self.base} bytes of description, the file has {self.length}"
            )
        if flat_size > LARGEST_FLAT:
            raise flat.Damaged(f"its description of {flat_size:,} bytes is over {LARGEST_FLAT:,}")
        self._file.seek(header_size)
        #: the root table, as :func:`flat.read` gives it
        self.model: dict[str, Any] = flat.read(self._file.read(flat_size))
        self.size: int = self.length - self.base
        if self.size % (1 << 32) != binary_size:
            raise flat.Damaged(
                f"the header promises a binary section of {binary_size} bytes, the file holds {self.size}"
            )
        for binary in regions(self.model):
            if binary["start"] + binary["size"] > self.size:
                raise flat.Damaged("a region runs past the end of the file")

    @property
    def nets(self) -> list[dict[str, Any]]:
        return list(self.model["net"])

    @property
    def paged(self) -> bool:
        """Whether regions are padded to pages, as TPU-MLIR 1.30 does (True) or packed tightly (False)."""
        return self.base % PAGE == 0 and all(b["start"] % PAGE == 0 for b in regions(self.model))

    def net(self, name: str) -> dict[str, Any]:
        """The only parameter set (stage) of the net called *name*, or of the only net if *name* is empty."""
        found = [net for net in self.model["net"] if not name or net["name"] == name]
        if len(found) != 1 or len(found[0].get("parameter", [])) != 1:
            raise Refused(f"{self.path}: expected one net {name!r} with one stage, found {len(found)}")
        return dict(found[0])

    def read(self, region: Region) -> bytes:
        """The bytes of *region*."""
        self._file.seek(self.base + region.start)
        data = self._file.read(region.size)
        if len(data) != region.size:
            raise Refused(f"{self.path}: a region of {region.size} bytes is cut short")
        return data

    def chunks(self, region: Region, size: int = _CHUNK) -> Iterator[bytes]:
        """The bytes of *region* in pieces of at most *size* bytes."""
        for offset in range(0, region.size, size):
            yield self.read(Region(region.start + offset, min(size, region.size - offset)))

    def sha256(self, region: Region) -> bytes:
        """The SHA-256 of *region* as TPU-MLIR computes it (32 bytes): a ``check_code`` of coefficients."""
        digest = CheckCode(region.size)
        for chunk in self.chunks(region):
            digest.update(chunk)
        return digest.digest()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Bmodel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RegionWriter:
    """Writes the binary section of a new bmodel, storing equal regions once, as TPU-MLIR's ModelGen does.

    *base* is where the section starts in the file. ``end`` is the section's size so far.
    """

    def __init__(self, file: BinaryIO, base: int, *, paged: bool) -> None:
        self._file = file
        self._base = base
        self._paged = paged
        self._known: dict[tuple[int, bytes], Region] = {}
        self.end = 0

    def next_region(self, size: int) -> Region:
        """Where a new region of *size* bytes would go; they may be written there before :meth:`settle`."""
        return Region(self.end, size)

    def offset(self, region: Region) -> int:
        """The position of *region* in the file, in bytes."""
        return self._base + region.start

    def settle(self, region: Region, digest: bytes) -> Region:
        """Keep *region* (of :meth:`next_region`, already written), or give the earlier one of equal bytes.

        *digest* is the SHA-256 of its bytes.
        """
        earlier = self._known.setdefault((region.size, digest), region)
        if earlier is region:
            self.keep(region)
        return earlier

    def keep(self, region: Region) -> None:
        """Keep *region* (from :meth:`next_region`, already written) whatever its bytes are."""
        self.end = region.start + region.size
        if self._paged:
            self.end += -self.end % PAGE

    def repeats(self, kept: Iterable[tuple[int, bytes]]) -> bool:
        """Whether any of the regions *kept* without a look (their sizes and digests) should not be there."""
        seen = set(self._known)
        return any(one in seen or seen.add(one) for one in kept)  # type: ignore[func-returns-value]

    def add(self, source: Bmodel, region: Region) -> Region:
        """Copy *region* of *source*; the region it has here."""
        digest = source.sha256(region)
        earlier = self._known.get((region.size, digest))
        if earlier is not None:
            return earlier
        new = self.next_region(region.size)
        position = self.offset(new)
        for chunk in source.chunks(region):
            write_at(self._file, chunk, position)
            position += len(chunk)
        return self.settle(new, digest)

    def finish(self) -> None:
        """Give the file its full length (the padding after the last region reads as zeros)."""
        os.ftruncate(self._file.fileno(), self._base + self.end)


def coefficients(opened: Bmodel) -> Region:
    """Where the weights of a bmodel of one net lie."""
    return Region.of(opened.nets[0]["parameter"][0]["coeff_mem"]["binary_coeff"])


def check_code(opened: Bmodel) -> bytes:
    """The digest that a bmodel of one net carries of its weights; empty where it carries none."""
    return bytes(opened.nets[0]["parameter"][0]["coeff_mem"].get("check_code", []))


def write_at(file: BinaryIO, data: bytes | memoryview, position: int) -> None:
    """Write all of *data* at *position* of the unbuffered *file*, without moving its cursor."""
    view = memoryview(data).cast("B")
    while len(view):
        done = os.pwrite(file.fileno(), view, position)
        view, position = view[done:], position + done


def head_size(model: dict[str, Any], *, paged: bool) -> int:
    """Bytes of header and flatbuffer of *model*, padded; starts and check codes make no difference."""
    size = HEADER.size + len(flat.write(model))
    return size + (-size % PAGE if paged else 0)


def write_head(file: BinaryIO, model: dict[str, Any], base: int, binary_size: int) -> None:
    """Write header and flatbuffer; *base* is what :func:`head_size` gave for the same model."""
    description = flat.write(model)
    description += bytes(base - HEADER.size - len(description))
    write_at(
        file, HEADER.pack(MAGIC, HEADER.size, len(description), binary_size % (1 << 32)) + description, 0
    )
