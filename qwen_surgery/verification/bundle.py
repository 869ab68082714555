"""A bundle for a board: inputs and expected outputs of every net, as the vendor's ``bmrt_test`` takes them.

``compilation.bmodel``, ``input_ref_data.dat`` and ``output_ref_data.dat``: the bytes of the tensors in the
chip's own types, one after the other, in the order of the nets and their tensors. ``NET.npz`` has the same
with names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qwen_surgery.errors import Refused
from qwen_surgery.nets import Geometry
from qwen_surgery.runtime.host import Sampling
from qwen_surgery.toolchain.emulator import ChipEngine, ChipTensor
from qwen_surgery.toolchain.worker_side import to_chip
from qwen_surgery.verification.on_runtime import net_by_net

_RUN = """#!/bin/sh
# On the board, with the vendor's libsophon: every net on its inputs, compared with what is expected.
cd "$(dirname "$0")" && bmrt_test --context_dir . 2>&1 | tee verdict.txt
"""


class _Recorder:
    """The emulator, with the first inputs and outputs of every net kept."""

    def __init__(self, chip: ChipEngine, progress: Callable[[str], None]) -> None:
        self._chip, self._progress = chip, progress
        self.nets = chip.nets
        self.first: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}

    def run(self, net: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        self._progress(net)
        outputs = self._chip.run(net, inputs)
        self.first.setdefault(net, ([np.array(one) for one in inputs], [np.array(one) for one in outputs]))
        return outputs


def write_bundle(
    bmodel: Path, chip: ChipEngine, geometry: Geometry, folder: Path, progress: Callable[[str], None]
) -> None:
    """Run one prompt and one step, and write what every net got and gave into the new *folder*.

    Raises Refused when *folder* is there and not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise Refused(f"{folder} is not empty", hint="give a new folder")
    prompt = np.random.default_rng(0).integers(0, geometry.vocab, max(1, geometry.seq_length // 3))
    recorder = _Recorder(chip, progress)
    net_by_net(recorder, geometry, prompt.tolist(), 1, Sampling())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compilation.bmodel").symlink_to(bmodel.absolute())
    script = folder / "run.sh"
    script.write_text(_RUN)
    script.chmod(0o755)
    with (
        (folder / "input_ref_data.dat").open("wb") as given,
        (folder / "output_ref_data.dat").open("wb") as expected,
    ):
        for net in chip.nets:
            declared = chip.describe(net)
            named: dict[str, np.ndarray] = {}
            for tensors, arrays, file in zip(declared, recorder.first[net], (given, expected), strict=True):
                for tensor, array in zip(tensors, arrays, strict=True):
                    named[tensor.name] = in_chip_type(tensor, array)
                    file.write(named[tensor.name].tobytes())
            np.savez(folder / f"{net}.npz", **named)  # type: ignore[arg-type]


def in_chip_type(tensor: ChipTensor, array: np.ndarray) -> np.ndarray:
    """*array* in *tensor*'s own type and shape; bf16 is its bits."""
    bits: np.ndarray = to_chip(array, tensor.dtype)
    return bits.reshape(tensor.shape)
