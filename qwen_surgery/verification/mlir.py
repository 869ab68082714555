"""TPU-MLIR's Top dialect as an engine: each net goes through model_transform and runs in its interpreter."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from qwen_surgery import nets
from qwen_surgery.compiling.one import NetJob, transform
from qwen_surgery.errors import ToolFailed
from qwen_surgery.exporting.plain import plain_net
from qwen_surgery.nets import Geometry, Net
from qwen_surgery.toolchain.worker import Worker

if TYPE_CHECKING:
    from qwen_surgery.exporting.manifest import Manifest
    from qwen_surgery.toolchain import Toolchain
    from qwen_surgery.verification.engines import OrtEngine

_INTERPRETER = "TPU-MLIR's Top-level interpreter"


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
        try:
            self._worker = Worker(toolchain, ("top-dialect",), _INTERPRETER, str(folder.folder))
        except BaseException:
            self._scratch.cleanup()
            raise

    @property
    def nets(self) -> tuple[str, ...]:
        return self._folder.nets

    @property
    def manifest(self) -> Manifest:
        """Of the exported folder."""
        return self._folder.manifest

    def _mlir(self, name: str) -> Path:
        if name not in self._made:
            entry = self._folder.manifest.net(name)
            work = self._work / name
            work.mkdir()
            onnx = plain_net(self._folder.folder.absolute() / entry.file, work)
            job = NetJob(Net(name, entry.kind, entry.layer), onnx, bool(self._folder.manifest.passes))
            transform(job, self._toolchain, work, self._work)
            self._made[name] = work / job.mlir
        return self._made[name]

    def run(self, net: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs of *net* in the contract's order, float32 and int32."""
        reply, arrays = self._worker.ask({"mlir": str(self._mlir(net))}, inputs)
        if "error" in reply:
            raise ToolFailed(f"{net} in {_INTERPRETER}: {reply['error']}")
        specs = nets.outputs(self._folder.manifest.net(net).kind, self._geometry)
        if len(arrays) != len(specs):
            return arrays
        return [
            np.rint(array).astype(np.int32) if spec.dtype == "int" else array.astype(np.float32)
            for spec, array in zip(specs, arrays, strict=True)
        ]

    def close(self) -> None:
        """End the worker and delete the transforms."""
        self._worker.close()
        self._scratch.cleanup()

    def __enter__(self) -> MlirEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
