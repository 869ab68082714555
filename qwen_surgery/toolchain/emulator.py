"""Run a bmodel on TPU-MLIR's chip emulator, from any Python.

The emulator's library is built for Python 3.10 and numpy 1.24, so it runs in a worker process of the
toolchain; arrays go over a pipe. Its numbers are the chip's, its speed is not: a small block takes a
second, a real one minutes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qwen_surgery.errors import ToolFailed, Usage
from qwen_surgery.toolchain.environment import LOG_TAIL_LINES, Toolchain

if TYPE_CHECKING:
    import numpy as np

# chip name as the bmodel has it -> emulator library, by TPU-MLIR's naming (newer, 1.6)
_EMULATORS = {
    "BM1684X": ("libcmodel_bm1684x.so", "libcmodel_1684x.so"),
    "BM1688": ("libcmodel_bm1688.so", "libcmodel_1688.so"),
    "CV186X": ("libcmodel_bm1688.so", "libcmodel_1688.so"),
}


@dataclass(frozen=True)
class ChipTensor:
    """An input or output of a compiled net; ``dtype`` is ``bf16``, ``f16``, ``f32`` or ``i32``."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def chip_of(bmodel: Path, toolchain: Toolchain) -> str:
    """The chip a bmodel is for, such as ``BM1684X``. Raises :class:`ToolFailed` when it is no bmodel."""
    command = toolchain.command("model_tool", ["--chip", str(bmodel)])
    done = subprocess.run(command, env=toolchain.environ(), capture_output=True, text=True, check=False)
    chip = re.search(r"\b(BM\d+\w*|CV\d+\w*|SG\d+\w*)\b", done.stdout)
    if done.returncode or chip is None:
        raise ToolFailed(
            f"{bmodel} is not a bmodel that model_tool can read", log_tail=(done.stderr or done.stdout)[-500:]
        )
    return chip.group(1)


class ChipEngine:
    """A bmodel open on the emulator. Use it in a ``with`` block: leaving it ends the worker.

    Arrays in are float32 (or anything float) and int32, arrays out float32 and int32; bf16 bits are handled
    inside. Raises :class:`ToolFailed` with the worker's last words when it dies, :class:`Usage` for an
    unknown net or wrong inputs.
    """

    def __init__(self, bmodel: Path | str, toolchain: Toolchain | None = None) -> None:
        self.bmodel = Path(bmodel).absolute()
        if not self.bmodel.is_file():
            raise ToolFailed(f"{self.bmodel} does not exist")
        self.toolchain = toolchain or Toolchain.find()
        self.chip = chip_of(self.bmodel, self.toolchain)
        self._scratch = tempfile.TemporaryDirectory(prefix="qwen-surgery-chip-")
        self._errors = (Path(self._scratch.name) / "stderr").open("wb+")
        self._liveness: int | None = None
        self._process = self._start()
        try:
            self._read()
            self.nets: tuple[str, ...] = tuple(self._ask({"op": "nets"})[0]["nets"])
        except BaseException:
            self.close()
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the worker with this chip's emulator, without touching the toolchain's own links."""
        libraries = self.toolchain.root / "lib"
        names = _EMULATORS.get(self.chip)
        if names is None:
            raise ToolFailed(f"no emulator is known for {self.chip}", hint="known: " + ", ".join(_EMULATORS))
        library = next((libraries / name for name in names if (libraries / name).exists()), None)
        if library is None:
            raise ToolFailed(f"TPU-MLIR {self.toolchain.version} has no emulator for {self.chip}")
        (Path(self._scratch.name) / "libcmodel.so").symlink_to(library)
        env = self.toolchain.environ()
        env["LD_LIBRARY_PATH"] = f"{self._scratch.name}:{env['LD_LIBRARY_PATH']}"
        worker = Path(__file__).with_name("emulator_worker.py")
        # Nothing is ever written here; that it closes when this process ends, however it ends, ends the
        # worker.
        their_end, self._liveness = os.pipe()
        try:
            return subprocess.Popen(
                [str(self.toolchain.python), str(worker), str(self.bmodel), str(their_end)],
                cwd=self._scratch.name, env=env, pass_fds=(their_end,),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            )  # fmt: skip
        finally:
            os.close(their_end)

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
        import numpy as np

        frames = [json.dumps({**request, "arrays": len(arrays)}).encode()]
        for array in arrays:
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
            frames.append(buffer.getvalue())
        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            raise ToolFailed("the chip emulator is closed")
        try:
            for frame in frames:
                stdin.write(struct.pack("<Q", len(frame)))
                stdin.write(frame)
            stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        reply, outputs = self._read()
        if "error" in reply:
            raise Usage(f"{request.get('net', self.bmodel.name)} on the emulator: {reply['error']}")
        return reply, outputs

    def _read(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        import numpy as np

        reply = json.loads(self._frame())
        arrays = [np.load(io.BytesIO(self._frame()), allow_pickle=False) for _ in range(reply["arrays"])]
        return reply, arrays

    def _frame(self) -> bytes:
        stdout = self._process.stdout
        assert stdout is not None
        head = stdout.read(8)
        data = stdout.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else b""
        if len(head) < 8 or len(data) < struct.unpack("<Q", head)[0]:
            raise self._died()
        return data

    def _died(self) -> ToolFailed:
        status = self._process.wait()
        self._errors.seek(0)
        tail = "\n".join(self._errors.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return ToolFailed(f"the chip emulator {how} on {self.bmodel}", log_tail=tail)

    def close(self) -> None:
        """End the worker; safe to call twice."""
        process = self._process
        if self._liveness is None:
            return
        os.close(self._liveness)
        self._liveness = None
        if process.stdin:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
        self._errors.close()
        self._scratch.cleanup()

    def __enter__(self) -> ChipEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
