"""The vendor's bmruntime on the emulated chip, in a process of the toolchain.

Each call of a flow is one request; a crash of the runtime ends that process and is a ToolFailed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_surgery.errors import Refused, ToolFailed
from qwen_surgery.runtime.flows import Argument
from qwen_surgery.runtime.memory import Memory, NetMemory, Place
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.toolchain.emulator import chip_of, emulator_library
from qwen_surgery.toolchain.preload import EMULATOR_YIELD
from qwen_surgery.toolchain.worker import Worker

#: BM_RUNTIME_SHARE_MEM
_SHARE = 1


class Device:
    """A bmodel in bmruntime, with shared memory or without; a machine for flows. Use it in a ``with`` block.

    Raises Refused for what is no bmodel, ToolFailed when the runtime refuses a call or dies.
    """

    def __init__(self, bmodel: Path, toolchain: Toolchain, *, shared: bool) -> None:
        if not bmodel.is_file():
            raise Refused(f"{bmodel} does not exist")
        library = emulator_library(chip_of(bmodel, toolchain), toolchain)
        self._worker = Worker(
            toolchain,
            ("device", str(bmodel.absolute()), str(_SHARE if shared else 0)),
            "the vendor's runtime",
            str(bmodel),
            {"libcmodel.so": library},
            preload=EMULATOR_YIELD,
        )
        try:
            found = self._ask({"op": "nets"})[0]["nets"]
        except BaseException:
            self.close()
            raise
        self._nets = {net["name"]: _net(net) for net in found}

    @property
    def nets(self) -> Mapping[str, NetMemory]:
        return self._nets

    def allocate(self, size: int, what: str) -> Memory:
        return Memory(self._ask({"op": "allocate", "size": size})[0]["address"], size)

    def write(self, to: Memory, data: np.ndarray) -> None:
        self._ask({"op": "write", "to": to.address}, [data])

    def copy(self, to: Memory, source: Memory) -> None:
        self._ask({"op": "copy", "to": to.address, "at": source.address, "size": source.size})

    def read(self, source: Memory) -> np.ndarray:
        return self._ask({"op": "read", "at": source.address, "size": source.size})[1][0]

    def launch(self, net: str, inputs: Sequence[Argument], outputs: Sequence[Argument]) -> None:
        self._ask({"op": "launch", "net": net, "inputs": _json(inputs), "outputs": _json(outputs)})

    def _ask(
        self, request: dict[str, Any], arrays: Sequence[np.ndarray] = ()
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        reply, outputs = self._worker.ask(request, arrays)
        if "error" in reply:
            raise ToolFailed(
                f"the vendor's runtime: {request['op']} {request.get('net', '')}: {reply['error']}"
            )
        return reply, outputs

    def close(self) -> None:
        """End the process; safe to call twice."""
        self._worker.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _json(arguments: Sequence[Argument]) -> list[dict[str, Any]]:
    return [
        {"address": one.memory.address, "size": one.memory.size, "shape": list(one.shape)}
        for one in arguments
    ]


def _net(net: dict[str, Any]) -> NetMemory:
    def places(key: str) -> tuple[Place, ...]:
        return tuple(
            Place(t["name"], t["dtype"], tuple(t["shape"]), Memory(t["address"], t["size"])) for t in net[key]
        )

    return NetMemory(net["name"], net["io_alone"], net["dynamic"], places("inputs"), places("outputs"))
