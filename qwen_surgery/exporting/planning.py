"""Decide what an export will write, and refuse what cannot be right, before anything runs or is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_surgery import nets
from qwen_surgery.errors import Refused, Usage
from qwen_surgery.exporting import placement as placing
from qwen_surgery.exporting.folder import refuse_foreign
from qwen_surgery.exporting.placement import WeightMode
from qwen_surgery.exporting.template import PROTOBUF_LIMIT, Binding, make_binding, refuse_extra, resolve
from qwen_surgery.files import require_disk
from qwen_surgery.nets import Geometry, Net, NetKind
from qwen_surgery.weights import ITEM_SIZE, TensorRef, WeightIndex
from qwen_surgery.weights.quantised import refuse_half_quantised

if TYPE_CHECKING:
    from qwen_surgery.patching.sources import Sources

#: What one net's graph takes besides weights and tables, at most (bytes).
_GRAPH_BYTES = 64 << 10


@dataclass(frozen=True)
class ExportPlan:
    """Everything an export will write, known before it starts."""

    geometry: Geometry
    bindings: tuple[Binding, ...]
    refs: Mapping[str, Mapping[str, TensorRef]]  # net name -> slot -> tensor
    mode: WeightMode
    reason: str  # why links are not possible, where they were wished for
    files: tuple[Path, ...]
    weight_bytes: int  # new bytes for weights
    graph_bytes: int  # new bytes for everything else, an upper estimate

    @property
    def cost(self) -> str:
        """What the export takes, in one line."""
        size = f"{self.weight_bytes / 1e6:,.0f} MB"
        weights = {
            WeightMode.LINK: "weights are hard links of the shards, which take no space "
            "(onnxruntime and TPU-MLIR read them, recent onnx refuses to)",
            WeightMode.COPY: f"weights are copied once, {size}, and open in any onnx",
            WeightMode.INLINE: f"every net holds its weights, {size}",
        }[self.mode]
        reason = f"; hard links are not possible: {self.reason}" if self.reason else ""
        return (
            f"{len(self.bindings)} nets, up to {self.graph_bytes / 1e6:,.0f} MB of graphs; {weights}{reason}"
        )


def select(all_nets: Iterable[Net], wanted: Iterable[str]) -> tuple[Net, ...]:
    """The nets whose name or kind is in *wanted* (all when empty); raises Usage for an unknown name."""
    all_nets, wanted = tuple(all_nets), tuple(wanted)
    if not wanted:
        return all_nets
    known = {net.name for net in all_nets} | {net.kind.value for net in all_nets}
    for name in wanted:
        if name not in known:
            raise Usage(
                f"there is no net {name}",
                hint=f"nets are {', '.join(sorted({n.kind.value for n in all_nets}))}",
            )
    return tuple(net for net in all_nets if net.name in wanted or net.kind.value in wanted)


def bind(
    sources: Sources, index: WeightIndex, geometry: Geometry, every_net: Iterable[Net]
) -> tuple[list[Binding], dict[str, dict[str, TensorRef]]]:
    """Bind *every_net* to its tensors, by net and slot. Raises Refused for weights that do not fit the config
    and for a length that cannot be exact."""
    facts, family = sources.facts, sources.family
    family.refuse(facts, geometry)
    tied = facts.tied and family.anatomy.head_tensor not in index
    bindings, refs = [], {}
    for net in every_net:
        shapes = family.weight_shapes(net.kind, geometry, facts)
        binding = make_binding(net, shapes, family.anatomy, tied=tied)
        refs[net.name] = resolve(binding, shapes, index)
        bindings.append(binding)
    refuse_extra(bindings, index, family)
    every_ref = (ref for named in refs.values() for ref in named.values())
    refuse_half_quantised(every_ref, family.anatomy.every_layer)
    return bindings, refs


def plan(
    sources: Sources,
    index: WeightIndex,
    geometry: Geometry,
    *,
    onnx_path: Path,
    mode: WeightMode | None = None,
    multi_device: bool = False,
    sampler: NetKind = NetKind.PENALTY_SAMPLE_HEAD,
    wanted: Iterable[str] = (),
) -> ExportPlan:
    """Bind every net to its tensors and decide how weights are kept.

    *mode* None means hard links, or one copy where the disk does not allow links. Raises Refused for weights
    that do not fit the config, for a length that cannot be exact and for links that are asked for and
    impossible; Usage for an unknown net.
    """
    every_net = nets.nets(geometry.layers, multi_device=multi_device, sampler=sampler)
    bindings, refs = bind(sources, index, geometry, every_net)
    chosen = {net.name for net in select(every_net, wanted)}
    kept = tuple(binding for binding in bindings if binding.net in chosen)
    refuse_foreign(onnx_path)
    return plan_weights(geometry, kept, refs, mode=mode, onnx_path=onnx_path)


def plan_weights(
    geometry: Geometry,
    kept: tuple[Binding, ...],
    refs: Mapping[str, Mapping[str, TensorRef]],
    *,
    mode: WeightMode | None,
    onnx_path: Path,
) -> ExportPlan:
    """Decide how the weights of the nets *kept* reach *onnx_path*, and what that takes (see :func:`plan`)."""
    files = tuple(
        dict.fromkeys(part.file for b in kept for ref in refs[b.net].values() for part in ref.parts)
    )
    mode, reason = _choose_mode(mode, files, onnx_path)
    weight_bytes = {
        WeightMode.LINK: 0,
        WeightMode.COPY: sum(file.stat().st_size for file in files),
        WeightMode.INLINE: sum(_inline_bytes(refs[b.net]) for b in kept),
    }[mode]
    if mode is WeightMode.INLINE:
        _refuse_too_large_inline(kept, refs, geometry)
    kinds = {binding.kind for binding in kept}
    table_bytes = 2 * 4 * geometry.seq_length * geometry.head_dim
    blocks = sum(1 for b in kept if b.kind.per_layer) if mode is WeightMode.INLINE else 1
    graph_bytes = _GRAPH_BYTES * len(kept) + table_bytes * (sum(k.per_layer for k in kinds) + blocks)
    return ExportPlan(
        geometry, kept, {b.net: refs[b.net] for b in kept}, mode, reason, files, weight_bytes, graph_bytes
    )


def _inline_bytes(refs: Mapping[str, TensorRef]) -> int:
    """Bytes of a net's weights inside its file."""
    return sum(ref.numel * ITEM_SIZE[ref.dtype] for ref in refs.values())


def _choose_mode(mode: WeightMode | None, files: tuple[Path, ...], onnx_path: Path) -> tuple[WeightMode, str]:
    if mode in (WeightMode.COPY, WeightMode.INLINE):
        return mode, ""
    folder = onnx_path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    reason = next((why for file in files[:1] if (why := placing.try_link(file, folder))), "")
    if not reason:
        return WeightMode.LINK, ""
    if mode is WeightMode.LINK:
        raise Refused(
            f"{files[0]} cannot be hard-linked into {folder}: {reason}",
            hint="put the export on the same disk as the checkout, or use --weights copy",
        )
    return WeightMode.COPY, reason


def _refuse_too_large_inline(
    bindings: Iterable[Binding], refs: Mapping[str, Mapping[str, TensorRef]], geometry: Geometry
) -> None:
    tables = 2 * 4 * geometry.seq_length * geometry.head_dim
    for binding in bindings:
        size = _inline_bytes(refs[binding.net]) + _GRAPH_BYTES
        size += tables if binding.kind.per_layer else 0
        if size > PROTOBUF_LIMIT:
            raise Refused(
                f"net {binding.net} would be a file of {size / 1e9:.1f} GB; protobuf ends at 2 GB",
                hint="use --weights link or --weights copy",
            )


def require_space(todo: ExportPlan, onnx_path: Path) -> None:
    """Raise ToolFailed when the disk of *onnx_path* is too full for *todo*."""
    require_disk(
        onnx_path.absolute().parent,
        todo.weight_bytes + todo.graph_bytes,
        "the export",
        "free some space, choose another disk, or use --weights link, which copies nothing",
    )
