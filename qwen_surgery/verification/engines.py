"""Things that run nets by name: patched torch, onnxruntime, and (from the toolchain) the emulated chip.

All take the contract's inputs in order as numpy arrays (float32 and int32) and give its outputs in order.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from qwen_surgery import nets
from qwen_surgery.errors import Refused
from qwen_surgery.exporting.manifest import Manifest
from qwen_surgery.exporting.model_code import ModelCode
from qwen_surgery.exporting.template import make_binding, resolve
from qwen_surgery.nets import Geometry, NetKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.weights import TensorRef

#: Opened nets are kept up to this many bytes of weights.
KEEP_BYTES = 2 << 30


class Engine(Protocol):
    """Runs nets by name."""

    @property
    def nets(self) -> tuple[str, ...]:
        """Names of the nets it has, in order."""
        ...

    def run(self, net: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs of *net*, float32 and int32, in the contract's order."""
        ...


def has_fused_head(engine: Engine) -> bool:
    """Whether lm_head gives a token instead of logits (multi-device models and the oldest runtime's)."""
    if "lm_head" not in engine.nets:
        return False
    manifest: Manifest | None = getattr(engine, "manifest", None)  # an exported folder's
    if manifest is not None:
        return manifest.net("lm_head").kind is NetKind.LM_HEAD_TOPK
    describe = getattr(engine, "describe", None)  # a bmodel knows its own shapes
    return describe is not None and math.prod(describe("lm_head")[1][0].shape) == 1


_T = TypeVar("_T")


class _Kept(OrderedDict[str, tuple[_T, int]]):
    """The latest opened things, as many as fit in *limit* bytes (always the latest one)."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def get_or(self, key: str, make: Callable[[], tuple[_T, int]]) -> _T:
        if key in self:
            self.move_to_end(key)
            return self[key][0]
        if not self._limit:
            self.clear()  # before the next one is there too
        self[key] = make()
        while len(self) > 1 and sum(size for _, size in self.values()) > self._limit:
            self.popitem(last=False)
        return self[key][0]


class TorchEngine:
    """The patched code's nets in torch, fp32, one module per net, weights from the checkpoint."""

    def __init__(
        self,
        sources: Sources,
        index: Mapping[str, TensorRef],
        geometry: Geometry,
        *,
        sampler: NetKind = NetKind.PENALTY_SAMPLE_HEAD,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        from qwen_surgery.exporting.modules import ModuleFactory

        patched = ModelCode.load(sources.patched, sources.modeling)
        reference = ModelCode.load(sources.reference, sources.modeling)
        self._factory = ModuleFactory(patched, reference, geometry)
        self._anatomy = patched.family.anatomy
        self._index = index
        self._contract = {net.name: net for net in nets.nets(geometry.layers, sampler=sampler)}
        self._open: _Kept[Any] = _Kept(keep_bytes)

    @property
    def nets(self) -> tuple[str, ...]:
        return tuple(self._contract)

    def _make(self, name: str) -> tuple[Any, int]:
        import torch

        net = self._contract[name]
        built = self._factory.build(net.kind)
        tied = self._anatomy.head_tensor not in self._index
        binding = make_binding(net, built.slots, self._anatomy, tied=tied)
        refs = resolve(binding, built.shapes(), self._index)
        values = {slot: torch.from_numpy(np.ascontiguousarray(ref.read())) for slot, ref in refs.items()}
        return built.load(values), sum(4 * ref.numel for ref in refs.values())

    def run(self, net: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        import torch

        module = self._open.get_or(net, lambda: self._make(net))
        with torch.no_grad():
            outputs = module(*(torch.from_numpy(np.ascontiguousarray(array)) for array in inputs))
        return [t.numpy() for t in (outputs if isinstance(outputs, tuple) else (outputs,))]


class OrtEngine:
    """The nets of an exported folder in onnxruntime on the CPU.

    Raises Refused when the folder's parts do not match its manifest.
    """

    def __init__(self, folder: Path | str, *, keep_bytes: int = KEEP_BYTES, threads: int = 0) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        self.manifest.check(self.folder)
        self._threads, self._keep_bytes = threads, keep_bytes
        self._open: _Kept[Any] = _Kept(keep_bytes)

    @property
    def nets(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.manifest.nets)

    def _make(self, name: str) -> tuple[Any, int]:
        import onnxruntime

        entry = self.manifest.net(name)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        if not self._keep_bytes:
            # A net that runs once or twice: folding its weights' casts takes longer, and holds them twice.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.enable_cpu_mem_arena = False
        session = onnxruntime.InferenceSession(
            str(self.folder / entry.file), options, providers=["CPUExecutionProvider"]
        )
        return session, sum(4 * ref.numel for ref in entry.weights.values())

    def run(self, net: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        session = self._open.get_or(net, lambda: self._make(net))
        wanted = session.get_inputs()
        if len(wanted) != len(inputs):
            raise Refused(f"net {net} takes {len(wanted)} inputs, {len(inputs)} were given")
        feed = {
            spec.name: np.ascontiguousarray(array, dtype=np.int32 if "int" in spec.type else np.float32)
            for spec, array in zip(wanted, inputs, strict=True)
        }
        return session.run(None, feed)
