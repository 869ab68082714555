"""The nets of a twin, in torch: one module for each kind, which is given each net's weights in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qwen_surgery import nets
from qwen_surgery.exporting.model_code import ModelCode
from qwen_surgery.exporting.modules import ModuleFactory, NetModule
from qwen_surgery.exporting.template import make_binding, resolve
from qwen_surgery.nets import Geometry, NetKind

if TYPE_CHECKING:
    import torch

    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.weights import TensorRef


class TwinNets:
    """Runs the patched code's nets by name, as :class:`TorchEngine` does.

    A layer is built once, not once for each net: building one takes some revisions longer than running it.
    """

    def __init__(
        self, sources: Sources, index: Mapping[str, TensorRef], geometry: Geometry, *, installed: bool
    ) -> None:
        patched = ModelCode.load(sources.patched, sources.modeling, installed=installed)
        reference = ModelCode.load(sources.reference, sources.modeling, installed=installed)
        self._factory = ModuleFactory(patched, reference, geometry)
        self._anatomy = patched.family.anatomy
        self._index = index
        self._contract = {net.name: net for net in nets.nets(geometry.layers)}
        self._built: dict[NetKind, NetModule] = {}
        self._values: dict[str, dict[str, torch.Tensor]] = {}
        self.nets = tuple(self._contract)

    def _module(self, name: str) -> torch.nn.Module:
        import torch

        net = self._contract[name]
        if net.kind not in self._built:
            self._built[net.kind] = self._factory.build(net.kind)
        built = self._built[net.kind]
        if name not in self._values:
            tied = self._anatomy.head_tensor not in self._index
            binding = make_binding(net, built.slots, self._anatomy, tied=tied)
            refs = resolve(binding, built.shapes(), self._index)
            self._values[name] = {slot: torch.from_numpy(ref.read()) for slot, ref in refs.items()}
        return built.load(self._values[name])

    def run(self, net: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs of *net*, float32 and int32, in the contract's order."""
        import torch

        module = self._module(net)
        with torch.no_grad():
            outputs = module(*(torch.from_numpy(np.ascontiguousarray(array)) for array in inputs))
        return [t.numpy() for t in (outputs if isinstance(outputs, tuple) else (outputs,))]
