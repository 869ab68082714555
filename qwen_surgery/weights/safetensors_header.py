"""Read a safetensors header: names, dtypes, shapes and byte ranges, never the data.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, that many bytes of
JSON ``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``, then the data. The safetensors package
gives tensors but not their offsets, and offsets are what a binding is made of.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from qwen_surgery.errors import Refused
from qwen_surgery.parsing import LARGEST_JSON, parsing, sizes, whole
from qwen_surgery.weights.refs import ITEM_SIZE, TensorRef, check_ranges

#: Bytes of a header that is read at most. The library allows six times as many, but a model of 72B has 200 KB
#: in all, and JSON takes up to thirty times its size in memory.
MAX_HEADER = LARGEST_JSON
LFS_MARK = b"version https://git-lfs"


def read_header(file: Path) -> dict[str, TensorRef]:
    """Every tensor of *file*; raises Refused for a git-lfs pointer, a damaged or a truncated file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        refuse_lfs_pointer(file, first + stream.read(len(LFS_MARK) - 8))
        if len(first) < 8:
            raise Refused(f"{file}: truncated: {size} bytes are no safetensors file")
        (length,) = struct.unpack("<Q", first)
        if length > MAX_HEADER:
            raise Refused(f"{file}: not a safetensors file (header of {length} bytes)")
        if 8 + length > size:
            raise Refused(
                f"{file}: truncated: the header needs {8 + length} bytes, the file has {size}",
                hint="download this shard again",
            )
        stream.seek(8)
        header = _parse(file, stream.read(length))
    data = 8 + length
    refs = [_ref(file, name, entry, data) for name, entry in header.items() if name != "__metadata__"]
    check_ranges(refs, file, size)
    return {ref.name: ref for ref in refs}


def refuse_lfs_pointer(file: Path, head: bytes) -> None:
    """Raise Refused when *head* (the first bytes of *file*) is that of a git-lfs pointer."""
    if head.startswith(LFS_MARK):
        raise Refused(f"{file}: this shard is a git-lfs pointer, not the weights", hint="run git lfs pull")


def _parse(file: Path, raw: bytes) -> dict[str, Any]:
    with parsing(file, "the safetensors header is not JSON"):
        header = json.loads(raw, object_pairs_hook=lambda pairs: _unique(file, pairs))
    if not isinstance(header, dict):
        raise Refused(f"{file}: the safetensors header is not a JSON object")
    return header


def _unique(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise Refused(f"{file}: the safetensors header names {key:.100} twice")
        result[key] = value
    return result


def _ref(file: Path, name: str, entry: Any, data: int) -> TensorRef:
    with parsing(f"{file}: tensor {name}", "damaged header entry"):
        shape, (begin, end) = sizes(entry["shape"]), map(whole, entry["data_offsets"])
        dtype = entry["dtype"]
        if not isinstance(dtype, str) or end < begin:
            raise ValueError(f"{dtype!r:.100} from byte {begin} to {end}")
    if dtype in ITEM_SIZE and end - begin != math.prod(shape) * ITEM_SIZE[dtype]:
        raise Refused(
            f"{file}: tensor {name}: {end - begin} bytes do not hold {dtype} of shape {list(shape)}",
            hint="the shard's header is damaged: download it again",
        )
    return TensorRef(name, file, data + begin, end - begin, dtype, shape)
