"""Find the tensors inside a ``pytorch_model*.bin`` without running anything that is in it.

``torch.save`` writes an uncompressed zip: ``<archive>/data.pkl`` describes the tensors,
``<archive>/data/<key>`` holds each storage's bytes. The pickle is read with an unpickler that knows exactly
the few names a state dict needs and refuses every other one, and that builds descriptions instead of
tensors; so a tensor can be bound to its place in the file, as with safetensors, and torch is not needed.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_surgery.errors import Refused
from qwen_surgery.weights.refs import ITEM_SIZE, TensorRef, check_ranges
from qwen_surgery.weights.safetensors_header import LFS_MARK, refuse_lfs_pointer

# torch's storage classes and the dtype names used here; other storages may be present but not be bound.
_STORAGES = {
    "BFloat16Storage": "BF16",
    "HalfStorage": "F16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_OTHER_ITEM_SIZE = {"F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str


@dataclass(frozen=True)
class _StorageType:
    dtype: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int  # in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch_zip(file: Path) -> dict[str, TensorRef]:
    """Every tensor of *file* that lies in one contiguous piece.

    Raises Refused for a git-lfs pointer, a pre-1.6 (non-zip) file, a truncated file, a compressed storage and
    for any pickled name a plain state dict does not need.
    """
    with file.open("rb") as stream:
        refuse_lfs_pointer(file, stream.read(len(LFS_MARK)))
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise Refused(
            f"{file}: not a zip archive: truncated, or written by a PyTorch older than 1.6",
            hint="download it again, or save it again with a current torch",
        ) from None
    with archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused(f"{file}: not a PyTorch checkpoint (it has {len(pickles)} data.pkl)")
        prefix = pickles[0][: -len("data.pkl")]
        if entries.get(prefix + "byteorder") and archive.read(prefix + "byteorder") != b"little":
            raise Refused(f"{file}: written on a big-endian machine, which is not supported")
        state = _unpickle(file, archive.read(pickles[0]))
    refs = [
        _ref(file, name, tensor, entries.get(f"{prefix}data/{tensor.storage.key}"))
        for name, tensor in state.items()
    ]
    check_ranges(refs, file, file.stat().st_size, shared=True)
    return {ref.name: ref for ref in refs}


def _unpickle(file: Path, data: bytes) -> dict[str, _Tensor]:
    try:
        state = _StateDictUnpickler(file, data).load()
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise Refused(f"{file}: data.pkl is damaged ({error})") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise Refused(f"{file}: holds a {type(state).__name__}, not a state dict")
    return {str(name): value for name, value in state.items() if isinstance(value, _Tensor)}


class _StateDictUnpickler(pickle.Unpickler):
    """Unpickles descriptions of tensors; every name outside the table below is refused, never imported."""

    def __init__(self, file: Path, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if (module, name) in known:
            return known[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        raise Refused(
            f"{self._file}: the pickle asks for {module}.{name}, which a state dict does not need",
            hint="it may run code when loaded; convert the checkpoint to safetensors from a source you trust",
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _location, _numel = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError(f"unknown persistent id {kind!r}")
        return _Storage(str(key), storage_type.dtype)


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_rest: Any
) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(data: _Tensor, *_rest: Any) -> _Tensor:
    return data


def _ref(file: Path, name: str, tensor: _Tensor, entry: zipfile.ZipInfo | None) -> TensorRef:
    if entry is None:
        raise Refused(f"{file}: tensor {name}: storage {tensor.storage.key} is missing from the archive")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise Refused(f"{file}: tensor {name}: its storage is compressed, so it cannot be bound in place")
    if tensor.stride != _row_major(tensor.shape) and math.prod(tensor.shape) > 1:
        raise Refused(f"{file}: tensor {name}: stored with strides {list(tensor.stride)}, not row-major")
    dtype = tensor.storage.dtype
    item = ITEM_SIZE.get(dtype) or _OTHER_ITEM_SIZE[dtype]
    nbytes = math.prod(tensor.shape) * item
    if tensor.offset * item + nbytes > entry.file_size:
        raise Refused(f"{file}: tensor {name} does not fit into its storage of {entry.file_size} bytes")
    return TensorRef(
        name, file, _data_offset(file, entry) + tensor.offset * item, nbytes, dtype, tensor.shape
    )


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _data_offset(file: Path, entry: zipfile.ZipInfo) -> int:
    """Byte offset of the entry's data. The local header's lengths decide; the directory's may differ."""
    with file.open("rb") as stream:
        stream.seek(entry.header_offset)
        local = stream.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise Refused(f"{file}: damaged zip entry {entry.filename}")
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    return entry.header_offset + 30 + name_length + extra_length
