"""Trace a net into an ONNX model without its weights, and without computing anything of size.

Weights and tables enter the trace as further inputs, so that the graph shows them exactly as the checkpoint
stores them. While tracing, every operator on a floating-point tensor of size only works out its output's
shape: a 72B block costs as much as a tiny one, in time and memory, at any sequence length.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from qwen_surgery import nets
from qwen_surgery.errors import ToolFailed
from qwen_surgery.exporting.template import WEIGHT_PREFIX

if TYPE_CHECKING:
    import onnx

    from qwen_surgery.exporting.modules import NetModule

OPSET = 15
#: Floating-point tensors above this many elements are not computed while tracing.
_COMPUTED_UP_TO = 1 << 20
CONSTANT_PREFIX = "constant/"


class _ShapesOnly(TorchDispatchMode):
    """Answers operators on large floating-point tensors with a zero expanded to the right shape."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keeps torch from importing its compiler (a second and 60 MB), which no trace needs."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view or not any(_is_large(leaf) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        known = _known_result(func, args, kwargs)
        if known is not None:
            return known
        meta_args, meta_kwargs = tree_map(_to_meta, (args, kwargs))
        return tree_map(_from_meta, func(*meta_args, **meta_kwargs))


def _known_result(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """The result of the operators that layers are made of; None for any other.

    torch could tell all of them through its meta device, but imports its compiler and sympy for that (two
    seconds): more than the rest of an export.
    """
    aten = torch.ops.aten
    if torch.Tag.pointwise in func.tags:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        one_args, one_kwargs = tree_map(_to_one_element, (args, kwargs))
        one = func(*one_args, **one_kwargs)
        return one.reshape(()).expand(np.broadcast_shapes(*(tuple(t.shape) for t in tensors)))
    shapes: dict[Any, Callable[..., tuple[int, ...]]] = {
        aten.mm.default: lambda a, b: (a.shape[0], b.shape[1]),
        aten.addmm.default: lambda bias, a, b, **_: (a.shape[0], b.shape[1]),
        aten.bmm.default: lambda a, b: (a.shape[0], a.shape[1], b.shape[2]),
        aten._softmax.default: lambda x, *_: tuple(x.shape),
        aten.clone.default: lambda x, **_: tuple(x.shape),
        aten._unsafe_view.default: lambda x, size: tuple(x.view(size).shape),
        aten.embedding.default: lambda weight, ids, *_: (*ids.shape, weight.shape[1]),
        aten.mean.dim: _mean_shape,
        aten.cat.default: _cat_shape,
    }
    if func not in shapes:
        return None
    dtype = next(leaf.dtype for leaf in tree_leaves(args) if _is_float(leaf))
    return torch.zeros((), dtype=dtype).expand(shapes[func](*args, **kwargs))


def _mean_shape(x: torch.Tensor, dims: list[int], keepdim: bool = False, **_: Any) -> tuple[int, ...]:
    reduced = {dim % x.dim() for dim in dims}
    kept = [(1 if i in reduced else size) for i, size in enumerate(x.shape) if keepdim or i not in reduced]
    return tuple(kept)


def _cat_shape(tensors: list[torch.Tensor], dim: int = 0) -> tuple[int, ...]:
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return tuple(shape)


def _to_one_element(leaf: Any) -> Any:
    return leaf.new_zeros([1] * leaf.dim()) if isinstance(leaf, torch.Tensor) else leaf


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _is_large(leaf: Any) -> bool:
    return _is_float(leaf) and leaf.numel() > _COMPUTED_UP_TO


def _to_meta(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


def _from_meta(leaf: Any) -> Any:
    return torch.zeros((), dtype=leaf.dtype).expand(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf


class _Functional(nn.Module):
    """The net as a function of its inputs, then its weights, then its tables."""

    def __init__(self, net: NetModule, input_count: int) -> None:
        super().__init__()
        self.net = net.module
        self._places = [*net.slots.values(), *net.constants.values()]
        self._input_count = input_count
        for owner, name in self._places:
            owner._parameters.pop(name, None)

    def forward(self, *arguments: torch.Tensor) -> Any:
        for (owner, name), value in zip(self._places, arguments[self._input_count :], strict=True):
            object.__setattr__(owner, name, value)
        with _ShapesOnly():  # not around the exporter itself: its own passes compute with constants
            return self.net(*arguments[: self._input_count])


def trace(net: NetModule, geometry: nets.Geometry) -> onnx.ModelProto:
    """The net's graph: contract inputs, then ``weight/<slot>``; tables are ``constant/<name>`` initializers.

    The module is used up: its weights are gone afterwards. Raises ToolFailed when torch cannot trace it.
    """
    inputs, outputs = nets.inputs(net.kind, geometry), nets.outputs(net.kind, geometry)
    weights = {slot: getattr(owner, name) for slot, (owner, name) in net.slots.items()}
    constants = {key: getattr(owner, name) for key, (owner, name) in net.constants.items()}
    arguments = [
        torch.zeros((), dtype=torch.int32 if tensor.dtype == "int" else torch.float32).expand(tensor.shape)
        for tensor in inputs
    ]
    names = [
        *(tensor.name for tensor in inputs),
        *(WEIGHT_PREFIX + slot for slot in weights),
        *(CONSTANT_PREFIX + key for key in constants),
    ]
    proto = _export(
        _Functional(net, len(inputs)),
        [*arguments, *(w.detach() for w in weights.values()), *constants.values()],
        names,
        [tensor.name for tensor in outputs],
        str(net.kind.value),
    )
    _tables_to_initializers(proto, {CONSTANT_PREFIX + key: value for key, value in constants.items()})
    proto.graph.name = net.kind.value
    return proto


def _export(
    module: nn.Module, arguments: list[Any], inputs: list[str], outputs: list[str], kind: str
) -> onnx.ModelProto:
    import onnx

    buffer: Any = io.BytesIO()  # accepted, though torch's annotation says a path
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                tuple(arguments),
                buffer,
                input_names=inputs,
                output_names=outputs,
                opset_version=OPSET,
                do_constant_folding=True,
                **_exporter_switch(),
            )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        raise ToolFailed(f"torch.onnx.export failed on {kind}: {str(error).splitlines()[0]}") from error
    finally:
        logger.setLevel(level)
    proto = onnx.load_from_string(buffer.getvalue())
    _drop_scope(proto.graph, "/net/")
    missing = [name for name in inputs if name not in {i.name for i in proto.graph.input}]
    if missing:
        raise ToolFailed(f"{kind}: the trace does not use {', '.join(missing)}")
    return proto


def _drop_scope(graph: onnx.GraphProto, scope: str) -> None:
    """Take this module's own scope off names: ``/net/layer/attn/MatMul`` becomes ``/layer/attn/MatMul``."""

    def short(name: str) -> str:
        return "/" + name[len(scope) :] if name.startswith(scope) else name

    for node in graph.node:
        node.name = short(node.name)
        for names in (node.input, node.output):
            names[:] = [short(name) for name in names]


def _exporter_switch() -> dict[str, Any]:
    """``dynamo=False``, where torch has that switch: TPU-MLIR takes the TorchScript exporter's form."""
    import inspect

    return {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}


def _tables_to_initializers(proto: onnx.ModelProto, tables: dict[str, torch.Tensor]) -> None:
    from onnx import numpy_helper

    graph = proto.graph
    kept = [i for i in graph.input if i.name not in tables]
    del graph.input[:]
    graph.input.extend(kept)
    for name, table in tables.items():
        graph.initializer.append(numpy_helper.from_array(table.contiguous().numpy(), name))
