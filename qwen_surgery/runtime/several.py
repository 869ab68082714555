"""A bmodel for several devices on one emulated chip.

The parts of a net run one after the other, and what they hand each other goes by its name, as bmruntime does
it (``cascade_prepare_input``): every device's own first, else from the device that has it. What devices do at
the same time, the order of their sums where bmruntime has a kernel of its own for those (four, six and eight
devices), and the transfers between them are not emulated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from types import TracebackType

import numpy as np

from qwen_surgery.errors import Refused, ToolFailed, Usage
from qwen_surgery.files import cannot_write, require_disk
from qwen_surgery.packing.cascade import (
    SHARED_AXIS,
    DevicePart,
    WholeNet,
    apart,
    devices_of,
    nets_of,
    shape_of,
    whole_nets,
)
from qwen_surgery.packing.container import Bmodel
from qwen_surgery.runtime.memory import chip_dtype
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.toolchain.emulator import ChipEngine, ChipTensor

#: What is known while a net runs, by a tensor's name in the file and the device that has it.
Held = dict[tuple[str, int], np.ndarray]


def open_chip(bmodel: Path | str, toolchain: Toolchain | None = None) -> ChipEngine | DevicesEngine:
    """*bmodel* open on the emulator, for one device or several. Raises as :class:`ChipEngine` does."""
    several = devices_of(nets_of(Path(bmodel))) > 1
    return DevicesEngine(bmodel, toolchain) if several else ChipEngine(bmodel, toolchain)


class DevicesEngine:
    """A bmodel for several devices, open on one emulated chip; takes and gives what :class:`ChipEngine` does:
    every input once, however many devices get it, and a KV cache with all its heads.

    Raises as :class:`ChipEngine` does, and :class:`ToolFailed` where devices give different numbers for what
    each of them should have.
    """

    def __init__(self, bmodel: Path | str, toolchain: Toolchain | None = None) -> None:
        self.bmodel = Path(bmodel).absolute()
        with Bmodel(self.bmodel) as opened, tempfile.TemporaryDirectory(prefix="qwen-surgery-") as folder:
            self._wholes = {whole.name: whole for whole in whole_nets(opened.nets)}
            require_disk(Path(folder), opened.length, f"a copy of {self.bmodel.name}", "set TMPDIR")
            parts = Path(folder) / self.bmodel.name
            try:
                apart(opened, parts)
            except OSError as error:
                raise cannot_write(error, "the bmodel is as it was", parts) from error
            # The emulator has the file open: it needs no name from here on, and is gone with the worker.
            self._chip = ChipEngine(parts, toolchain)
        self.chip, self.nets = self._chip.chip, tuple(self._wholes)

    def run(self, net: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One forward of *net* on *inputs*, in the net's order."""
        whole = self._known(net)
        held, by_step = _given(whole, inputs), attrgetter("step")
        for _, parts in groupby(sorted(whole.parts, key=by_step), key=by_step):
            made: Held = {}
            for part in parts:
                made |= self._step(part, held)
            held |= made
        return _gathered(whole, held)

    def _step(self, part: DevicePart, held: Held) -> Held:
        """What *part* gives."""
        names = [tensor["name"] for tensor in part.parameter["input_tensor"]]
        found = self._chip.run(part.table["name"], [_handed(name, part.device, held) for name in names])
        outputs = part.parameter["output_tensor"]
        return {(tensor["name"], part.device): array for tensor, array in zip(outputs, found, strict=True)}

    def describe(self, net: str) -> tuple[tuple[ChipTensor, ...], tuple[ChipTensor, ...]]:
        """Inputs and outputs of *net*."""
        whole = self._known(net)
        return _described(whole, "input_tensor"), _described(whole, "output_tensor")

    def _known(self, net: str) -> WholeNet:
        if net not in self._wholes:
            raise Usage(f"{self.bmodel.name} has no net {net}", hint="it has " + ", ".join(self.nets))
        return self._wholes[net]

    def close(self) -> None:
        """End the worker; safe to call twice."""
        self._chip.close()

    def __enter__(self) -> DevicesEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _given(whole: WholeNet, inputs: Sequence[np.ndarray]) -> Held:
    """*inputs* as the demo hands them over."""
    wanted = whole.whole_tensors("input_tensor")
    if len(inputs) != len(wanted):
        raise Usage(f"{whole.name} takes {len(wanted)} inputs, {len(inputs)} were given")
    held = {}
    for array, tensor in zip(inputs, wanted, strict=True):
        values = [array] * len(tensor.pieces)
        if tensor.split:
            if array.shape != tensor.shape:
                raise Usage(
                    f"{whole.name}: {tensor.name} of shape {list(array.shape)}, wanted {list(tensor.shape)}"
                )
            heads = [shape_of(piece)[SHARED_AXIS] for _, piece in tensor.pieces]
            values = np.split(array, np.cumsum(heads)[:-1], SHARED_AXIS)
        for (part, piece), value in zip(tensor.pieces, values, strict=True):
            held[piece["name"], part.device] = value
    return held


def _handed(name: str, device: int, held: Held) -> np.ndarray:
    """What a part on *device* finds under *name*: its own, else what another device has."""
    if (name, device) in held:
        return held[name, device]
    for (other, _), array in held.items():
        if other == name:
            return array
    raise Refused(f"no part gives {name}, which device {device} needs")


def _gathered(whole: WholeNet, held: Held) -> list[np.ndarray]:
    """The outputs of *whole*: shares beside each other, anything else as the first device has it."""
    outputs = []
    for tensor in whole.whole_tensors("output_tensor"):
        arrays = [held[piece["name"], part.device] for part, piece in tensor.pieces]
        if tensor.split:
            outputs.append(np.concatenate(arrays, SHARED_AXIS))
            continue
        if any(not np.array_equal(array, arrays[0], equal_nan=True) for array in arrays):
            raise ToolFailed(f"{whole.name}: the devices differ in {tensor.name}")
        outputs.append(arrays[0])
    return outputs


def _described(whole: WholeNet, key: str) -> tuple[ChipTensor, ...]:
    return tuple(
        ChipTensor(tensor.name, tensor.shape, chip_dtype(tensor.pieces[0][1]))
        for tensor in whole.whole_tensors(key)
    )
