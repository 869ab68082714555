"""Run a bmodel on TPU-MLIR's chip emulator, from any Python.

The emulator runs in a worker process of the toolchain; arrays go over a pipe. Its numbers are the chip's,
its speed is not: a small block takes a tenth of a second, a real one minutes. Where there is a C compiler,
the emulator's idle threads are made to wait instead of spin (``emulator_yield.c``), without which small nets
take 40 times as long on two cores.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qwen_surgery.chips import CHIPS
from qwen_surgery.errors import Refused, ToolFailed, Usage
from qwen_surgery.toolchain.environment import Toolchain
from qwen_surgery.toolchain.preload import EMULATOR_YIELD
from qwen_surgery.toolchain.worker import Worker

if TYPE_CHECKING:
    import numpy as np

#: Chip name as the bmodel has it -> names of the emulator's library.
_EMULATORS = {chip.name.upper(): chip.emulators for chip in CHIPS.values()}


@dataclass(frozen=True)
class ChipTensor:
    """An input or output of a compiled net; ``dtype`` is ``bf16``, ``f16``, ``f32`` or ``i32``."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def chip_of(bmodel: Path, toolchain: Toolchain) -> str:
    """The chip a bmodel is for, such as ``BM1684X``. Raises :class:`Refused` when it is no bmodel."""
    command = toolchain.command("model_tool", ["--chip", str(bmodel)])
    done = subprocess.run(command, env=toolchain.environ(), capture_output=True, text=True, check=False)
    chip = re.search(r"\b(BM\d+\w*|CV\d+\w*|SG\d+\w*)\b", done.stdout)
    if done.returncode or chip is None:
        raise Refused(f"{bmodel} is not a whole bmodel: model_tool cannot read it")
    return chip.group(1)


def emulator_library(chip: str, toolchain: Toolchain) -> Path:
    """The emulator of *chip*; raises :class:`ToolFailed` where *toolchain* has none."""
    names = _EMULATORS.get(chip)
    if names is None:
        raise ToolFailed(f"no emulator is known for {chip}", hint="known: " + ", ".join(_EMULATORS))
    folder = toolchain.root / "lib"
    library = next((folder / name for name in names if (folder / name).exists()), None)
    if library is None:
        raise ToolFailed(f"TPU-MLIR {toolchain.version} has no emulator for {chip}")
    return library


class ChipEngine:
    """A bmodel open on the emulator. Use it in a ``with`` block: leaving it ends the worker.

    Arrays in are float32 (or anything float) and int32, arrays out float32 and int32; bf16 bits are handled
    inside. Raises :class:`Refused` for a file that is no bmodel, :class:`ToolFailed` with the worker's last
    words when it dies, :class:`Usage` for an unknown net or wrong inputs.
    """

    def __init__(self, bmodel: Path | str, toolchain: Toolchain | None = None) -> None:
        self.bmodel = Path(bmodel).absolute()
        if not self.bmodel.is_file():
            raise Refused(f"{self.bmodel} does not exist")
        self.toolchain = toolchain or Toolchain.find()
        self.chip = chip_of(self.bmodel, self.toolchain)
        arguments = ("emulator", str(self.bmodel))
        # The chip's emulator under the name the runtime loads, without touching the toolchain's own links.
        libraries = {"libcmodel.so": emulator_library(self.chip, self.toolchain)}
        self._worker = Worker(
            self.toolchain,
            arguments,
            "the chip emulator",
            str(self.bmodel),
            libraries,
            preload=EMULATOR_YIELD,
        )
        try:
            self.nets: tuple[str, ...] = tuple(self._ask({"op": "nets"})[0]["nets"])
        except BaseException:
            self.close()
            raise

    def run(self, net: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One forward of *net* on *inputs*, in the net's order."""
        self._known(net)
        return self._ask({"op": "run", "net": net}, inputs)[1]

    def describe(self, net: str) -> tuple[tuple[ChipTensor, ...], tuple[ChipTensor, ...]]:
        """Inputs and outputs of *net*."""
        self._known(net)
        reply, _ = self._ask({"op": "describe", "net": net})
        inputs, outputs = (
            tuple(ChipTensor(t["name"], tuple(t["shape"]), t["dtype"]) for t in reply[key])
            for key in ("inputs", "outputs")
        )
        return inputs, outputs

    def _known(self, net: str) -> None:
        if net not in self.nets:
            raise Usage(f"{self.bmodel.name} has no net {net}", hint="it has " + ", ".join(self.nets))

    def _ask(
        self, request: dict[str, Any], arrays: Sequence[np.ndarray] = ()
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        reply, outputs = self._worker.ask(request, arrays)
        if "error" in reply:
            raise Usage(f"{request.get('net', self.bmodel.name)} on the emulator: {reply['error']}")
        return reply, outputs

    def close(self) -> None:
        """End the worker; safe to call twice."""
        self._worker.close()

    def __enter__(self) -> ChipEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
