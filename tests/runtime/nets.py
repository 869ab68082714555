"""Layouts: small made-up ones, the nets of a two-layer model with each tensor where a test wants it; and
recorded ones, of files that commit 3ba640c made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_surgery.nets import Geometry, NetKind, inputs, nets, outputs
from qwen_surgery.runtime.memory import Memory, NetMemory, Place

GEOMETRY = Geometry(layers=2, hidden=8, heads=2, head_dim=4, vocab=64, intermediate=16, seq_length=16)
#: Bytes from one net's own memory to the next one's.
APART = 1 << 20
_HEADS = (NetKind.LM_HEAD, *(kind for kind in NetKind if kind.chooses))


def made(
    *,
    heads: bool = True,
    sampler: NetKind = NetKind.PENALTY_SAMPLE_HEAD,
    dynamic: bool = False,
    shared: bool = True,
    moved: Mapping[str, int] | None = None,
) -> tuple[NetMemory, ...]:
    """Every net's tensors one after the other in memory of its own; the prefill blocks' in one place when
    *shared*. *moved*: ``net.tensor`` -> another address.
    """
    result = []
    for index, net in enumerate(nets(GEOMETRY.layers, heads=heads, sampler=sampler)):
        prefill = net.kind is NetKind.BLOCK
        base = 1 << 30 if prefill and shared else APART * (index + 1)
        places, end = [], base
        for tensor in (*inputs(net.kind, GEOMETRY), *outputs(net.kind, GEOMETRY)):
            dtype = "i32" if tensor.dtype == "int" else "f32" if _is_f32(net.kind, tensor.name) else "bf16"
            size = _count(tensor.shape) * (2 if dtype == "bf16" else 4)
            address = (moved or {}).get(f"{net.name}.{tensor.name}", end)
            places.append(Place(tensor.name, dtype, tensor.shape, Memory(address, size)))
            end += size
        count = len(inputs(net.kind, GEOMETRY))
        work = Memory(base, end - base + 64) if prefill else Memory(1 << 30, 64)
        is_dynamic = dynamic and net.kind in (NetKind.BLOCK, NetKind.EMBEDDING)
        is_dynamic = is_dynamic or net.kind is NetKind.SAMPLE_HEAD
        result.append(
            NetMemory(net.name, not prefill, is_dynamic, tuple(places[:count]), tuple(places[count:]), work)
        )
    return tuple(result)


def first_layout(file: str) -> tuple[NetMemory, ...]:
    """How commit 3ba640c laid *file* out under shared memory, at S = 64 and hidden 128: ``int4`` and ``bf16``
    (2 layers, 4,096 tokens), ``bf16 dynamic``, ``bf16 token`` (for sophon-demo of 2024-03), ``int4 wide``
    (1 layer, 151,936 tokens).
    """

    def places(tensors: list[Any]) -> tuple[Place, ...]:
        return tuple(Place(n, dtype, tuple(shape), Memory(*where)) for n, dtype, shape, *where in tensors)

    recorded = json.loads(Path(__file__).with_name("first_layouts.json").read_text())[file]
    return tuple(
        NetMemory(
            net["name"], net["io_alone"], net["dynamic"],
            places(net["inputs"]), places(net["outputs"]), Memory(*net["work"]),
        )
        for net in recorded
    )  # fmt: skip


def place(net: str, tensor: str) -> Memory:
    """Where *tensor* of *net* is in :func:`made` unmoved."""
    (found,) = (one for one in made() if one.name == net)
    return next(p.memory for p in (*found.inputs, *found.outputs) if p.name == tensor)


def _is_f32(kind: NetKind, name: str) -> bool:
    return kind in _HEADS and name != "hidden_states"


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
