"""Content digests of a checkpoint's tensors, remembered by the shard's size, time and inode.

A build must notice when one layer's weights change and nothing else. Every tensor is hashed whole, once; a
shard whose size, modification time and inode are as remembered is not read again.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from qwen_surgery.building.resources import cores
from qwen_surgery.parsing import DATA_ERRORS

if TYPE_CHECKING:
    from qwen_surgery.weights import TensorRef

_CHUNK = 1 << 22


def _stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]


#: What a tensor's bytes are known by while a build runs, whichever link of the shard it is read through.
Identity = tuple[object, ...]


def identity(ref: TensorRef) -> Identity:
    """Equal for two places of one tensor in one file that has not been written in between."""
    stat = ref.file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, ref.offset, ref.dtype, ref.shape


def read_early(refs: Iterable[TensorRef], stop: threading.Event) -> dict[Identity, str]:
    """Digests of *refs* by identity, read on one thread beside other work; as many as there are when *stop*
    is set.
    """
    found = {}
    for ref in refs:
        if stop.is_set():
            break
        found[identity(ref)] = _digest(ref)
    return found


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


def tensor_digests(
    refs: Iterable[TensorRef],
    cache: Path,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    early: Mapping[Identity, str] = MappingProxyType({}),
) -> dict[TensorRef, str]:
    """Digest of every tensor's dtype, shape and bytes; *cache* is a JSON file, read and rewritten. *early*
    are digests that this build has read already.
    """
    refs = list(dict.fromkeys(refs))
    known = _load(cache)
    stamps = {str(file): _stamp(file) for file in {ref.file for ref in refs}}
    fresh = {file: entry["tensors"] for file, entry in known.items() if stamps.get(file) == entry["stamp"]}
    found: dict[TensorRef, str] = {}
    missing = []
    for ref in refs:
        digest = fresh.get(str(ref.file), {}).get(_label(ref)) or early.get(identity(ref))
        if digest is None:
            missing.append(ref)
        else:
            found[ref] = digest
    if missing:
        total, done = sum(ref.nbytes for ref in missing), 0
        with ThreadPoolExecutor(cores()) as pool:
            for ref, digest in zip(missing, pool.map(_digest, missing), strict=True):
                found[ref] = digest
                done += ref.nbytes
                progress("read weights", done, total)
    if missing or early:
        _save(cache, stamps, found)
    return found


def _label(ref: TensorRef) -> str:
    return f"{ref.name}@{ref.offset}"


def _load(cache: Path) -> dict[str, dict]:
    try:
        data = json.loads(cache.read_text())
        return {
            str(file): {
                "stamp": entry["stamp"],
                "tensors": {name: said for name, said in entry["tensors"].items() if isinstance(said, str)},
            }
            for file, entry in data.items()
        }
    except (OSError, *DATA_ERRORS):
        return {}


def _save(cache: Path, stamps: dict[str, list[int]], found: dict[TensorRef, str]) -> None:
    entries: dict[str, dict] = {file: {"stamp": stamp, "tensors": {}} for file, stamp in stamps.items()}
    for ref, digest in found.items():
        entries[str(ref.file)]["tensors"][_label(ref)] = digest
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(cache.name + ".part")
    temporary.write_text(json.dumps(entries))
    temporary.replace(cache)
