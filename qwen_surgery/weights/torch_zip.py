"""Find the tensors inside a ``pytorch_model*.bin`` without running anything that is in it.

``torch.save`` writes an uncompressed zip: ``<archive>/data.pkl`` describes the tensors,
``<archive>/data/<key>`` holds each storage's bytes. The pickle is read with an unpickler that knows exactly
the few names a state dict needs and refuses every other one, and that builds descriptions instead of
tensors; so a tensor can be bound to its place in the file, as with safetensors, and torch is not needed.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_surgery.errors import Refused
from qwen_surgery.parsing import DATA_ERRORS, parsing, reason, sizes, whole
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
#: Bytes of the archive's directory and of data.pkl; a model of 72B in one file has 200 KB of each.
_LARGEST = 16 << 20
#: Pickle instructions that say a value, and those that say nothing.
_CONSTANTS = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_IGNORED = {"PROTO", "FRAME"}
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
    entries = _directory(file)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refused(f"{file}: not a PyTorch checkpoint (it has {len(pickles)} data.pkl)")
    prefix = pickles[0][: -len("data.pkl")]
    order = entries.get(prefix + "byteorder")
    if order is not None and _small(file, order) != b"little":
        raise Refused(f"{file}: written on a big-endian machine, which is not supported")
    state = _unpickle(file, _small(file, entries[pickles[0]]))
    refs = [
        _ref(file, name, tensor, entries.get(f"{prefix}data/{tensor.storage.key}"))
        for name, tensor in state.items()
    ]
    check_ranges(refs, file, file.stat().st_size, shared=True)
    return {ref.name: ref for ref in refs}


class _Limited(io.BufferedReader):
    """A file of which no more than :data:`_LARGEST` bytes are read at once, whatever it says of itself."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGEST:
            raise ValueError(f"it asks for {size:,} bytes at once, the most is {_LARGEST:,}")
        return super().read(size)


def _directory(file: Path) -> dict[str, zipfile.ZipInfo]:
    """The entries of a zip archive by name; reads its directory only."""
    try:
        with _Limited(io.FileIO(file)) as stream, zipfile.ZipFile(stream) as archive:
            return {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, OSError, NotImplementedError, *DATA_ERRORS) as error:
        raise Refused(
            f"{file}: not a zip archive: truncated, or written by a PyTorch older than 1.6 ({reason(error)})",
            hint="download it again, or save it again with a current torch",
        ) from None


def _small(file: Path, entry: zipfile.ZipInfo) -> bytes:
    """The bytes of an entry of which each has a few hundred per tensor."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > _LARGEST:
        raise Refused(f"{file}: {entry.filename:.100}: its storage is compressed, or over {_LARGEST:,} bytes")
    with file.open("rb") as stream:
        stream.seek(_data_offset(file, entry))
        data = stream.read(entry.file_size)
    if zlib.crc32(data) != entry.CRC:
        raise Refused(f"{file}: {entry.filename:.100} is damaged", hint="download it again")
    return data


def _unpickle(file: Path, data: bytes) -> dict[str, _Tensor]:
    with parsing(f"{file}: data.pkl"):
        state = _StateDict(file).read(data)
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
    if not isinstance(state, dict):
        raise Refused(f"{file}: holds a {type(state).__name__}, not a state dict")
    return {name: value for name, value in state.items() if isinstance(value, _Tensor)}


_MARK = object()


class _StateDict:
    """Runs the few pickle instructions that a state dict takes; every other one, and every name outside the
    table below, is refused and never imported.

    Python's own unpickler would run more, and lets a file of a few bytes ask for any amount of memory.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def read(self, data: bytes) -> Any:
        for opcode, argument, _position in pickletools.genops(data):
            if opcode.name == "STOP":
                break
            if opcode.name in _CONSTANTS:
                self._stack.append(argument)
            elif opcode.name not in _IGNORED:
                step = getattr(self, f"_{opcode.name.lower()}", None)
                if step is None:
                    raise ValueError(f"the instruction {opcode.name} has no place in a state dict")
                step(argument)
        (state,) = self._stack
        return state

    def _pop(self, kind: type = object) -> Any:
        value = self._stack.pop()
        if value is _MARK or not isinstance(value, kind):
            raise TypeError(f"a {type(value).__name__} where there must be a {kind.__name__}")
        return value

    def _pop_to_mark(self) -> list[Any]:
        values = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _top(self, kind: type) -> Any:
        value = self._stack[-1]
        if not isinstance(value, kind):
            raise TypeError(f"a {type(value).__name__} where there must be a {kind.__name__}")
        return value

    # ---- values ----

    def _none(self, _: Any) -> None:
        self._stack.append(None)

    def _newtrue(self, _: Any) -> None:
        self._stack.append(True)

    def _newfalse(self, _: Any) -> None:
        self._stack.append(False)

    def _empty_dict(self, _: Any) -> None:
        self._stack.append({})

    def _empty_list(self, _: Any) -> None:
        self._stack.append([])

    def _empty_tuple(self, _: Any) -> None:
        self._stack.append(())

    def _mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _tuple1(self, _: Any) -> None:
        self._stack.append((self._pop(),))

    def _tuple2(self, _: Any) -> None:
        last = self._pop()
        self._stack.append((self._pop(), last))

    def _tuple3(self, _: Any) -> None:
        last, middle = self._pop(), self._pop()
        self._stack.append((self._pop(), middle, last))

    # ---- what was seen before ----

    def _binput(self, key: int) -> None:
        self._memo[key] = self._top(object)

    def _binget(self, key: int) -> None:
        self._stack.append(self._memo[key])

    def _memoize(self, _: Any) -> None:
        self._binput(len(self._memo))

    _long_binput = _put = _binput
    _long_binget = _get = _binget

    # ---- filling ----

    def _append(self, _: Any) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _appends(self, _: Any) -> None:
        values = self._pop_to_mark()
        self._top(list).extend(values)

    def _put_item(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        if not isinstance(key, (str, int)):  # to hash or to print a nested tuple may take for ever
            raise TypeError(f"a {type(key).__name__} as a name")
        target[str(key)] = value

    def _setitem(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._put_item(self._top(dict), key, value)

    def _setitems(self, _: Any) -> None:
        values = self._pop_to_mark()
        for key, value in zip(values[::2], values[1::2], strict=True):
            self._put_item(self._top(dict), key, value)

    def _build(self, _: Any) -> None:
        self._pop()  # attributes of the state dict, such as _metadata: nothing about its tensors
        self._top(dict)

    # ---- names ----

    def _global(self, names: str) -> None:
        self._stack.append(self._known(*names.split(" ", 1)))

    def _stack_global(self, _: Any) -> None:
        name = self._pop(str)
        self._stack.append(self._known(self._pop(str), name))

    def _known(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): _ordered_dict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if (module, name) in known:
            return known[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        raise Refused(
            f"{self._file}: the pickle asks for {module:.100}.{name:.100}, which a state dict does not need",
            hint="it may run code when loaded; convert the checkpoint to safetensors from a source you trust",
        )

    def _reduce(self, _: Any) -> None:
        arguments = self._pop(tuple)
        function = self._stack.pop()
        if function not in (_ordered_dict, _rebuild_tensor, _rebuild_parameter):
            raise TypeError(f"a {type(function).__name__} cannot be called")
        self._stack.append(function(*arguments))

    def _binpersid(self, _: Any) -> None:
        kind, storage_type, key, _location, _numel = self._pop(tuple)
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, (str, int)):
            raise ValueError("it refers to something that is no storage")
        self._stack.append(_Storage(str(key), storage_type.dtype))


def _ordered_dict(pairs: list[Any] | None = None) -> dict[str, Any]:
    if pairs:
        raise ValueError("a dict with unknown content")
    return {}


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_rest: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise TypeError("a tensor without a storage")
    return _Tensor(storage, whole(offset), sizes(shape), sizes(stride))


def _rebuild_parameter(data: Any, *_rest: Any) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise TypeError("a parameter without a tensor")
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
        stream.seek(max(0, entry.header_offset))
        local = stream.read(30)
    if entry.header_offset < 0 or len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise Refused(f"{file}: damaged zip entry {entry.filename}")
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    return entry.header_offset + 30 + name_length + extra_length
