"""Templates and bindings: one graph per kind of net, and where each net's weights lie.

A *template* is an ordinary ONNX model (opset 15, static shapes, fp32) whose weights are graph inputs named
``weight/<slot>`` behind the contract's inputs; tables are plain initializers. A *binding* says which
checkpoint tensor fills which slot for one net. :func:`bind` puts the two together: each weight input becomes
an initializer ``stored/<slot>`` in the checkpoint's own dtype, as external data at its place in the shard,
with a ``Cast`` to float32 that keeps the name ``weight/<slot>``; a float32 weight needs no Cast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qwen_surgery.errors import Refused
from qwen_surgery.families.family import Anatomy, Family
from qwen_surgery.nets import Net, NetKind
from qwen_surgery.weights import ITEM_SIZE, QuantisedRef, TensorRef
from qwen_surgery.weights.quantised import refuse_stray_bias

if TYPE_CHECKING:
    import onnx

WEIGHT_PREFIX = "weight/"
STORED_PREFIX = "stored/"
#: Initializers of at least this many bytes are kept once for all nets instead of in every file.
SHARED_FROM = 1024
#: protobuf's limit on one message.
PROTOBUF_LIMIT = 2**31 - 1

_ONNX_TYPES = {"F32": 1, "F16": 10, "BF16": 16}  # onnx.TensorProto's numbers
_ONNX_BYTES = 2  # uint8


@dataclass(frozen=True)
class Template:
    """The weight-free graph of one kind of net."""

    kind: NetKind
    model: onnx.ModelProto

    @property
    def slots(self) -> dict[str, tuple[int, ...]]:
        """Slot -> shape of every weight input."""
        return {
            value.name[len(WEIGHT_PREFIX) :]: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
            for value in self.model.graph.input
            if value.name.startswith(WEIGHT_PREFIX)
        }

    @classmethod
    def load(cls, kind: NetKind, path: Path) -> Template:
        """Read a template file."""
        import onnx

        return cls(kind, onnx.load(str(path)))


@dataclass(frozen=True)
class Binding:
    """One net: its name, its kind, its layer (None for nets that exist once), slot -> checkpoint tensor."""

    net: str
    kind: NetKind
    layer: int | None
    tensors: Mapping[str, str]


def make_binding(net: Net, slots: Iterable[str], anatomy: Anatomy, *, tied: bool) -> Binding:
    """Name the checkpoint tensors of *net*. With *tied* the lm_head uses the embedding's tensor."""
    tensors = {slot: anatomy.tensor(net, slot, tied=tied) for slot in slots}
    return Binding(net.name, net.kind, net.layer, tensors)


def resolve(
    binding: Binding, shapes: Mapping[str, tuple[int, ...]], index: Mapping[str, TensorRef]
) -> dict[str, TensorRef]:
    """slot -> place of its tensor; raises Refused for a missing, wrong-shaped or wrong-typed tensor."""
    result = {}
    for slot, name in binding.tensors.items():
        ref = index.get(name)
        if ref is None:
            raise Refused(
                f"tensor {name} is missing from the checkpoint (net {binding.net} needs it)",
                hint="a shard may be missing from the index, or config.json does not belong to these weights",
            )
        if tuple(ref.shape) != tuple(shapes[slot]):
            raise Refused(
                f"{ref.file}: tensor {name} has shape {list(ref.shape)}, config.json makes it "
                f"{list(shapes[slot])}",
                hint="config.json does not belong to these weights",
            )
        if ref.dtype not in ITEM_SIZE:
            raise Refused(f"{ref.file}: tensor {name} has dtype {ref.dtype}; BF16, F16 and F32 are supported")
        result[slot] = ref
    return result


def refuse_extra(bindings: Iterable[Binding], index: Mapping[str, TensorRef], family: Family) -> None:
    """Raise Refused when the checkpoint holds a tensor that no net uses."""
    used = {name for binding in bindings for name in binding.tensors.values()}
    used |= {family.anatomy.head_tensor}  # also stored by some checkpoints whose embeddings are tied
    used |= refuse_stray_bias(index, used)
    for name, ref in index.items():
        if name not in used and not family.ignored.search(name):
            raise Refused(
                f"{ref.file}: tensor {name} belongs to no net: it would be silently dropped",
                hint=f"config.json may state too few layers, or this is not a text-only {family.title} model",
            )


@dataclass(frozen=True)
class Location:
    """External data of an initializer: *file* relative to the model's own folder."""

    file: str
    offset: int
    nbytes: int


class Placement(Protocol):
    """Where bound nets find bytes: a location beside the net, or (*inline*) bytes to be put inside it."""

    inline: bool

    def weight(self, ref: TensorRef) -> Location | bytes:
        """The place of a checkpoint tensor."""
        ...

    def file(self, ref: TensorRef) -> Path:
        """The file the manifest names for a tensor: relative to the net's folder, or the checkpoint's."""
        ...

    def constant(self, data: bytes) -> Location | bytes:
        """The place of a table that many nets share."""
        ...


def bind(template: Template, refs: Mapping[str, TensorRef], placement: Placement) -> onnx.ModelProto:
    """The net: *template* with every weight input filled from *refs* (slot -> tensor).

    The template is not changed. Raises Refused when slots and refs differ.
    """
    import onnx

    if set(template.slots) != set(refs):
        odd = ", ".join(sorted(set(template.slots) ^ set(refs)))
        raise Refused(f"template {template.kind.value} and its binding differ in the weights {odd}")
    model = onnx.ModelProto()
    model.CopyFrom(template.model)
    graph = model.graph
    kept = [value for value in graph.input if not value.name.startswith(WEIGHT_PREFIX)]
    weights = [
        value.name[len(WEIGHT_PREFIX) :] for value in graph.input if value.name.startswith(WEIGHT_PREFIX)
    ]
    del graph.input[:]
    graph.input.extend(kept)
    for tensor in graph.initializer:
        if len(tensor.raw_data) >= SHARED_FROM:
            _put(tensor, placement.constant(tensor.raw_data))
    made = [_add_weight(graph, slot, refs[slot], placement) for slot in weights]
    body = list(graph.node)
    del graph.node[:]
    graph.node.extend([node for nodes in made for node in nodes] + body)
    return model


def _add_weight(
    graph: onnx.GraphProto, slot: str, ref: TensorRef, placement: Placement
) -> list[onnx.NodeProto]:
    """Put a weight into *graph*; the nodes that make its input of it."""
    import onnx

    if isinstance(ref, QuantisedRef) and not placement.inline:
        return _add_quantised(graph, slot, ref, placement)
    plain = ref.dtype == "F32"
    name = (WEIGHT_PREFIX if plain else STORED_PREFIX) + slot
    _add_tensor(graph, name, _ONNX_TYPES[ref.dtype], ref.shape, placement.weight(ref))
    if plain:
        return []
    cast = onnx.helper.make_node(
        "Cast", [name], [WEIGHT_PREFIX + slot], name=f"cast/{slot}", to=onnx.TensorProto.FLOAT
    )
    return [cast]


def _add_quantised(
    graph: onnx.GraphProto, slot: str, ref: QuantisedRef, placement: Placement
) -> list[onnx.NodeProto]:
    """The parts of a weight as the checkpoint stores them, and the nodes that make the weight of them."""
    from qwen_surgery.exporting.dequantise import bytes_shape, weight_nodes

    shapes = bytes_shape(ref)
    stored = {part: f"{STORED_PREFIX}{slot}/{part}" for part in (*shapes, "scales")}
    for part, shape in shapes.items():
        _add_tensor(graph, stored[part], _ONNX_BYTES, shape, placement.weight(getattr(ref, part)))
    where = placement.weight(ref.scales)
    _add_tensor(graph, stored["scales"], _ONNX_TYPES[ref.scales.dtype], ref.scales.shape, where)
    return weight_nodes(graph, ref, stored, WEIGHT_PREFIX + slot)


def _add_tensor(
    graph: onnx.GraphProto, name: str, type_: int, shape: tuple[int, ...], where: Location | bytes
) -> None:
    tensor = graph.initializer.add()
    tensor.name, tensor.data_type = name, type_
    tensor.dims.extend(shape)
    _put(tensor, where)


def _put(tensor: onnx.TensorProto, where: Location | bytes) -> None:
    import onnx

    if isinstance(where, bytes):
        tensor.raw_data = where
        return
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", where.file), ("offset", where.offset), ("length", where.nbytes)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
