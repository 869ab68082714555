"""Nets that several devices share: their parts, put together as bmruntime does.

For ``--num-device`` TPU-MLIR writes every net as parts, one for each device and step, which say what net they
belong to (a ``cascade``). A demo knows whole nets alone: it hands over the inputs of the first device, then
those of the second, and gets outputs in the same order.

Source of facts: ``cascade_update_input``, ``cascade_update_output`` and ``cascade_prepare_input`` of
bmruntime; ``CreateTensorVector`` of TPU-MLIR's BM168xCodegen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen_surgery.errors import Refused
from qwen_surgery.packing.container import Bmodel, Region, head_size, write_at, write_head

Table = Mapping[str, Any]
#: Values of a tensor's ``hidden``: it comes from outside or goes there; the higher ones differ from device to
#: device in name, and in what they hold where that is a KV cache. 0 is what parts hand each other.
_OUTSIDE = {"input_tensor": (1, 3), "output_tensor": (2, 4)}
_OWN = (3, 4)
#: A device's share of a KV cache [1, S, heads, head_dim] are heads: this axis.
SHARED_AXIS = 2
#: More devices, or parts of one net, are in no file: TPU-MLIR splits over eight, in eight steps.
_MOST_DEVICES, _MOST_PARTS = 64, 1024


@dataclass(frozen=True)
class DevicePart:
    """What one device does of a net in one step; ``table`` is the file's net that holds it."""

    device: int
    step: int
    table: Table
    number: int

    @property
    def parameter(self) -> Table:
        parameter: Table = self.table["parameter"][0]
        return parameter


@dataclass(frozen=True)
class WholeTensor:
    """An input or output of a net as one device would have it. ``pieces`` are the parts that have it and what
    the file says of it there: all of it on each device, or (``split``) that device's heads.
    """

    pieces: tuple[tuple[DevicePart, Table], ...]
    split: bool

    @property
    def name(self) -> str:
        return name_of(*self.pieces[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, shares put together."""
        shape = list(shape_of(self.pieces[0][1]))
        if self.split:
            shape[SHARED_AXIS] = sum(shape_of(tensor)[SHARED_AXIS] for _, tensor in self.pieces)
        return tuple(shape)


@dataclass(frozen=True)
class WholeNet:
    """A net as a demo knows it; one that no devices share has one part. ``parts`` are in the file's order."""

    name: str
    parts: tuple[DevicePart, ...]

    @cached_property
    def devices(self) -> tuple[int, ...]:
        """The numbers of the devices that share it."""
        return tuple(sorted({part.device for part in self.parts}))

    def on(self, device: int) -> tuple[DevicePart, ...]:
        """The parts of one device."""
        return tuple(part for part in self.parts if part.device == device)

    def tensors(self, key: str) -> list[tuple[DevicePart, Table]]:
        """Its ``input_tensor`` or ``output_tensor``, each with its part: device by device, by index."""
        if not shared(self.parts[0].table):
            return [(part, tensor) for part in self.parts for tensor in part.parameter[key]]
        found: dict[tuple[int, str], tuple[DevicePart, Table]] = {}
        for part in self.parts:
            for tensor in part.parameter[key]:
                if tensor["hidden"] in _OUTSIDE[key]:
                    found.setdefault((part.device, tensor["name"]), (part, tensor))
        return sorted(found.values(), key=lambda one: (one[0].device, one[1]["index"]))

    def whole_tensors(self, key: str) -> tuple[WholeTensor, ...]:
        """The same, each once, by index."""
        if len(self.devices) == 1:
            return tuple(WholeTensor((piece,), split=False) for piece in self.tensors(key))
        found: dict[int, list[tuple[DevicePart, Table]]] = {}
        for part, tensor in self.tensors(key):
            found.setdefault(tensor["index"], []).append((part, tensor))
        return tuple(
            WholeTensor(tuple(pieces), all(is_share(self, tensor) for _, tensor in pieces))
            for _, pieces in sorted(found.items())
        )


def shared(net: Table) -> bool:
    """Whether *net* is a part of a net that devices share."""
    return bool(net.get("cascade", {}).get("main_name"))


def is_share(whole: WholeNet, tensor: Table) -> bool:
    """Whether *tensor* of *whole* holds one device's heads of a KV cache, and other devices have the rest."""
    own = len(whole.devices) > 1 and tensor["hidden"] in _OWN
    return own and len(shape_of(tensor)) == 4


def name_of(part: DevicePart, tensor: Table) -> str:
    """What the net calls *tensor*: on several devices, its own ones have the device's number behind it."""
    name: str = tensor["name"]
    own = shared(part.table) and tensor["hidden"] in _OWN
    return name.removesuffix(f"_{part.device}") if own else name


def shape_of(tensor: Table) -> tuple[int, ...]:
    """The shape of a bmodel's tensor; empty where it has none."""
    return tuple(tensor["shape"][0].get("dim", ())) if tensor.get("shape") else ()


def whole_nets(nets: Iterable[Table]) -> tuple[WholeNet, ...]:
    """The *nets* of a bmodel as a demo knows them, in the order of their first parts. Raises Refused for one
    in more parts than there can be.
    """
    found: dict[tuple[str, int], list[DevicePart]] = {}
    for number, net in enumerate(nets):
        if not net.get("parameter"):
            continue
        if shared(net):
            cascade = net["cascade"]
            part = DevicePart(cascade["device_id"], cascade["step"], net, number)
            found.setdefault((cascade["main_name"], 0), []).append(part)
        else:
            found[net["name"], 1 + number] = [DevicePart(0, 0, net, number)]
    wholes = tuple(WholeNet(name, tuple(parts)) for (name, _), parts in found.items())
    for whole in wholes:
        if len(whole.parts) > _MOST_PARTS or len(whole.devices) > _MOST_DEVICES:
            raise Refused(
                f"{whole.name} is in {len(whole.parts):,} parts: no net is shared by so many devices"
            )
    return wholes


def nets_of(bmodel: Path) -> tuple[WholeNet, ...]:
    """The nets of the file *bmodel*. Raises Refused for what is no bmodel, and as :func:`whole_nets` does."""
    with Bmodel(bmodel) as opened:
        return whole_nets(opened.nets)


def devices_of(wholes: Iterable[WholeNet]) -> int:
    """How many devices share the nets of a bmodel, where most do."""
    return max((len(whole.devices) for whole in wholes), default=1)


def apart(opened: Bmodel, out: Path) -> None:
    """Write *opened* to *out* with every part a net of its own, for one device, which can be run alone. Names
    of parts, weights and instructions are as they were.
    """
    nets = [{key: value for key, value in net.items() if key != "cascade"} for net in opened.nets]
    model = {**opened.model, "net": nets, "device_num": 1}
    base = head_size(model, paged=opened.paged)
    with out.open("wb", buffering=0) as file:
        write_head(file, model, base, opened.size)
        position = base
        for chunk in opened.chunks(Region(0, opened.size)):
            write_at(file, chunk, position)
            position += len(chunk)
