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
from typing import Any

from qwen_surgery.errors import Refused
from qwen_surgery.packing.container import Bmodel
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


@dataclass(frozen=True)
class NetMemory:
    """One net's tensors. ``work`` is where its intermediate results go, None where that is not known."""

    name: str
    io_alone: bool
    dynamic: bool
    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    work: Memory | None = None


_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int32": "i32", "uint32": "i32"}


def layout(bmodel: Path, *, shared: bool) -> tuple[NetMemory, ...]:
    """The nets of *bmodel* with their places, under shared memory or without.

    Addresses are this model's own: only which places overlap, and where, is the device's. Raises Refused
    for a file that is no bmodel, or one whose tensors lie outside their net's memory.
    """
    with Bmodel(bmodel) as opened:
        nets = [net for net in opened.nets if net.get("parameter")]
        return tuple(_net(net, index, shared, bmodel) for index, net in enumerate(nets))


def _net(net: dict[str, Any], index: int, shared: bool, bmodel: Path) -> NetMemory:
    parameter = net["parameter"][0]
    alone = net["addr_mode"] == IO_ALONE
    work = Memory(0 if shared else (2 * index + 1) * _APART, parameter["ctx_size"])
    own = Memory((2 * index + 2) * _APART, parameter["io_size"])
    region, start = (own, parameter["io_addr"]) if alone else (work, parameter["ctx_addr"])

    def places(key: str) -> tuple[Place, ...]:
        return tuple(_place(tensor, region, start, net["name"], bmodel) for tensor in parameter[key])

    dynamic = bool(parameter["is_dynamic"])
    return NetMemory(net["name"], alone, dynamic, places("input_tensor"), places("output_tensor"), work)


def _place(tensor: dict[str, Any], region: Memory, start: int, net: str, bmodel: Path) -> Place:
    kind, width = DATA_TYPES.get(tensor["data_type"], ("", 0))
    shape = tuple(tensor["shape"][0].get("dim", ()))
    size = int(_count(shape) * width)
    memory = region.part(tensor["device_addr"] - start, size)
    if memory.address < region.address or memory.end > region.end:
        raise Refused(f"{bmodel}: {tensor['name']} of {net} lies outside the memory of its net")
    return Place(tensor["name"], _NAMES.get(kind, kind), shape, memory)


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
