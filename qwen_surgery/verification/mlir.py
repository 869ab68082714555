"""TPU-MLIR's Top dialect as an engine: each net goes through model_transform and runs in its interpreter."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from qwen_surgery import nets
from qwen_surgery.compiling.one import NetJob, transform
from qwen_surgery.errors import ToolFailed
from qwen_surgery.nets import Geometry, Net

if TYPE_CHECKING:
    from qwen_surgery.toolchain import Toolchain
    from qwen_surgery.verification.engines import OrtEngine


class MlirEngine:
    """The nets of an exported folder as TPU-MLIR's front end understood them, in float32.

    What the compiler reads the graph as, before any lowering: a wrong fusion shows here. Transforms are made
    on first use and deleted on leaving the ``with`` block. Raises ToolFailed with the log when one fails.
    """

    def __init__(self, folder: OrtEngine, toolchain: Toolchain, geometry: Geometry) -> None:
        self._folder = folder
        self._toolchain = toolchain
        self._geometry = geometry
        self._scratch = tempfile.TemporaryDirectory(prefix="qwen-surgery-mlir-")
        self._work = Path(self._scratch.name)
        self._made: dict[str, Path] = {}
        self._errors = (self._work / "worker.log").open("wb+")
        self._process = self._start()

    @property
    def nets(self) -> tuple[str, ...]:
        return self._folder.nets

    def _start(self) -> subprocess.Popen[str]:
        worker = Path(__file__).with_name("mlir_worker.py")
        return subprocess.Popen(
            [str(self._toolchain.python), str(worker)],
            cwd=self._work,
            env=self._toolchain.environ(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def _mlir(self, name: str) -> Path:
        if name not in self._made:
            entry = self._folder.manifest.net(name)
            onnx = self._folder.folder.absolute() / entry.file
            job = NetJob(Net(name, entry.kind, entry.layer), onnx, bool(self._folder.manifest.passes))
            work = self._work / name
            work.mkdir()
            transform(job, self._toolchain, work, self._work)
            self._made[name] = work / job.mlir
        return self._made[name]

    def run(self, net: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs of *net* in the contract's order, float32 and int32."""
        files = {"input": str(self._work / "input.npz"), "output": str(self._work / "output.npz")}
        request = {"mlir": str(self._mlir(net)), **files}
        np.savez(files["input"], *inputs)
        self._ask(request)
        specs = nets.outputs(self._folder.manifest.net(net).kind, self._geometry)
        with np.load(files["output"]) as found:
            arrays = [found[f"arr_{i}"] for i in range(len(found.files))]
        if len(arrays) != len(specs):
            return arrays
        return [
            np.rint(array).astype(np.int32) if spec.dtype == "int" else array.astype(np.float32)
            for spec, array in zip(specs, arrays, strict=True)
        ]

    def _ask(self, request: dict[str, str]) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            tail = "\n".join(self._errors.read().decode(errors="replace").splitlines()[-15:])
            raise ToolFailed("TPU-MLIR's Top-level interpreter died", log_tail=tail)
        reply = json.loads(line)
        if "error" in reply:
            raise ToolFailed(f"TPU-MLIR's Top-level interpreter: {reply['error']}")

    def close(self) -> None:
        """End the worker and delete the transforms."""
        process = self._process
        if process.stdin and not process.stdin.closed:
            process.stdin.close()
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
        self._errors.close()
        self._scratch.cleanup()

    def __enter__(self) -> MlirEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
