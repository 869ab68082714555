"""Where a bmodel's tensors lie in the device's memory, as bmruntime places them.

A net in address mode ``basic`` has its inputs, outputs and intermediate results in one region. With shared
memory (what runtimes older than the flag always do, and newer ones when asked) every net's region starts at
one and the same address. In mode ``io_alone`` inputs and outputs are in a region of the net's own, and only
intermediate results are in the shared one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_surgery.errors import Refused
from qwen_surgery.packing.cascade import DevicePart, Table, WholeNet, name_of, nets_of, shape_of
from qwen_surgery.packing.schema import DATA_TYPES

#: Modes of addresses, as a bmodel numbers them.
BASIC, IO_ALONE = 0, 1
#: Regions of different nets are kept this far apart in the model of memory; none is larger.
_APART = 1 << 40


@dataclass(frozen=True)
class Memory:
    """A run of device memory: address and size in bytes."""

    address: int
    size: int

    @property
    def end(self) -> int:
        return self.address + self.size

    @property
    def offset(self) -> int:
        """How far it is from the start of its region."""
        return self.address % _APART

    def part(self, offset: int, size: int) -> Memory:
        """*size* bytes from *offset* on."""
        return Memory(self.address + offset, size)

    def overlap(self, other: Memory) -> int:
        """Bytes that both have."""
        return max(0, min(self.end, other.end) - max(self.address, other.address))


@dataclass(frozen=True)
class Place:
    """A net's input or output: its name, type (``bf16``, ``f16``, ``f32``, ``i32``), shape and memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    memory: Memory
    step: int = 0


@dataclass(frozen=True)
class NetMemory:
    """One net's tensors. ``work`` is where its intermediate results go, None where that is not known. Of a
    net that ``devices`` share these are the first one's: the others do the same at the same time.
    """

    name: str
    io_alone: bool
    dynamic: bool
    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    work: Memory | None = None
    devices: int = 1


_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int32": "i32", "uint32": "i32"}


def layout(bmodel: Path, *, shared: bool) -> tuple[NetMemory, ...]:
    """The nets of *bmodel* with their places, under shared memory or without.

    Addresses are this model's own: only which places overlap, and where, is the device's. Raises Refused
    for a file that is no bmodel, or one whose tensors lie outside their net's memory.
    """
    return tuple(_net(whole, shared, bmodel) for whole in nets_of(bmodel))


def _work(part: DevicePart, shared: bool) -> Memory:
    """Where a part of a net has its intermediate results."""
    return Memory(0 if shared else (2 * part.number + 1) * _APART, part.parameter["ctx_size"])


def _outside(part: DevicePart, shared: bool) -> tuple[Memory, int]:
    """The region of a part's inputs and outputs, and the file's address for its start."""
    parameter = part.parameter
    if part.table["addr_mode"] == IO_ALONE:
        return Memory((2 * part.number + 2) * _APART, parameter["io_size"]), parameter["io_addr"]
    return _work(part, shared), parameter["ctx_addr"]


def _net(whole: WholeNet, shared: bool, bmodel: Path) -> NetMemory:
    parts = whole.on(whole.devices[0])

    def places(key: str) -> tuple[Place, ...]:
        return tuple(
            _place(part, tensor, shared, whole.name, bmodel)
            for part, tensor in whole.tensors(key)
            if part.device == whole.devices[0]
        )

    return NetMemory(
        whole.name,
        parts[0].table["addr_mode"] == IO_ALONE,
        bool(parts[0].parameter["is_dynamic"]),
        places("input_tensor"),
        places("output_tensor"),
        max((_work(part, shared) for part in parts), key=lambda work: work.size),
        len(whole.devices),
    )


def _place(part: DevicePart, tensor: Table, shared: bool, net: str, bmodel: Path) -> Place:
    region, start = _outside(part, shared)
    _, width = DATA_TYPES.get(tensor["data_type"], ("", 0))
    shape = shape_of(tensor)
    size = int(_count(shape) * width)
    memory = region.part(tensor["device_addr"] - start, size)
    if memory.address < region.address or memory.end > region.end:
        raise Refused(f"{bmodel}: {tensor['name']} of {net} lies outside the memory of its net")
    return Place(name_of(part, tensor), chip_dtype(tensor), shape, memory, part.step)


def chip_dtype(tensor: Table) -> str:
    """The type of a bmodel's tensor as the emulator calls it: ``bf16``, ``f16``, ``f32`` or ``i32``."""
    kind, _ = DATA_TYPES.get(tensor["data_type"], ("", 0))
    return _NAMES.get(kind, kind)


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
