"""Content digests of a checkpoint's tensors, remembered by the shard's size, time and inode.

A build must notice when one layer's weights change and nothing else. Every tensor is hashed whole, once; a
shard whose size, modification time and inode are as remembered is not read again.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from qwen_surgery.building.resources import cores
from qwen_surgery.building.step import decode, encode
from qwen_surgery.files import write_whole
from qwen_surgery.parsing import DATA_ERRORS
from qwen_surgery.weights import QuantisedRef

if TYPE_CHECKING:
    from qwen_surgery.weights import TensorRef

_CHUNK = 1 << 22


def _stamp(file: Path) -> tuple[int, ...]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns


#: What a tensor's bytes are known by while a build runs, whichever link of the shard it is read through.
Identity = tuple[object, ...]


def identity(ref: TensorRef) -> Identity:
    """Equal for two places of one tensor in one file that has not been written in between."""
    stat = ref.file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, ref.offset, ref.dtype, ref.shape


@contextmanager
def reading_early(refs: Iterable[TensorRef]) -> Iterator[Callable[[], dict[Identity, str]]]:
    """Read *refs* on one thread beside the block's own work.

    When that is done, call what this gives: it stops the reading and has the digests so far, by identity.
    """
    stop = threading.Event()

    with ThreadPoolExecutor(1) as pool:
        more = takewhile(lambda _: not stop.is_set(), refs)
        reading = pool.submit(lambda: {identity(ref): _digest(ref) for ref in more})

        def found() -> dict[Identity, str]:
            stop.set()
            return reading.result()

        try:
            yield found
        finally:
            stop.set()


def digest_of(ref: TensorRef, digests: Mapping[TensorRef, str]) -> str:
    """Of the content of *ref*, whose parts have *digests*."""
    if not isinstance(ref, QuantisedRef):
        return digests[ref]
    return " ".join([str(ref.release), str(ref.release.less_one), *(digests[part] for part in ref.parts)])


def _digest(ref: TensorRef) -> str:
    # sha256 releases the interpreter's lock and uses the processor's own instructions
    digest = hashlib.sha256(repr((ref.dtype, tuple(ref.shape))).encode())
    with ref.file.open("rb", buffering=0) as stream:
        stream.seek(ref.offset)
        left = ref.nbytes
        while left and (chunk := stream.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class _Shard:
    """What is remembered of a file: how it was when it was read, and the digest of each tensor."""

    stamp: tuple[int, ...]
    tensors: dict[str, str]


def tensor_digests(
    refs: Iterable[TensorRef],
    cache: Path,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    early: Mapping[Identity, str] = MappingProxyType({}),
) -> dict[TensorRef, str]:
    """Digest of every tensor's dtype, shape and bytes; *cache* is a JSON file, read and rewritten, *early*
    are digests that this build has already."""
    refs = list(dict.fromkeys(refs))
    stamps = {str(file): _stamp(file) for file in {ref.file for ref in refs}}
    known = {file: shard for file, shard in _load(cache).items() if shard.stamp == stamps.get(file)}
    found: dict[TensorRef, str] = {}
    for ref in refs:
        shard = known.get(str(ref.file))
        digest = (shard and shard.tensors.get(_label(ref))) or early.get(identity(ref))
        if digest:
            found[ref] = digest
    missing = [ref for ref in refs if ref not in found]
    if missing:
        total, done = sum(ref.nbytes for ref in missing), 0
        with ThreadPoolExecutor(cores()) as pool:
            for ref, digest in zip(missing, pool.map(_digest, missing), strict=True):
                found[ref] = digest
                done += ref.nbytes
                progress("read weights", done, total)
    if missing or early:
        shards = {file: _Shard(stamp, {}) for file, stamp in stamps.items()}
        for ref, digest in found.items():
            shards[str(ref.file)].tensors[_label(ref)] = digest
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cache, json.dumps(encode(shards)).encode())
    return found


def _label(ref: TensorRef) -> str:
    return f"{ref.name}@{ref.offset}"


def _load(cache: Path) -> dict[str, _Shard]:
    try:
        shards: dict[str, _Shard] = decode(dict[str, _Shard], json.loads(cache.read_text()))
    except (OSError, *DATA_ERRORS):
        return {}
    return shards
