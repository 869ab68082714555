"""Export a checkout: plan the bindings, trace each kind of net once, write the folder.

The order of work is the order of cost: everything that can be refused is refused before torch is imported or
a byte is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_surgery import __version__, nets
from qwen_surgery.errors import Refused, Usage
from qwen_surgery.exporting import placement as placing
from qwen_surgery.exporting.folder import atomic_folder, refuse_foreign
from qwen_surgery.exporting.manifest import Manifest, NetEntry, fingerprint, sha256_file
from qwen_surgery.exporting.model_code import ModelCode, read_config
from qwen_surgery.exporting.placement import WeightMode
from qwen_surgery.exporting.remote_code import require_trust
from qwen_surgery.exporting.template import (
    PROTOBUF_LIMIT,
    Binding,
    Placement,
    Template,
    bind,
    make_binding,
    refuse_extra,
    resolve,
)
from qwen_surgery.nets import Geometry, Net, NetKind
from qwen_surgery.weights import TensorRef, WeightIndex

if TYPE_CHECKING:
    from qwen_surgery.checkout import Sources
    from qwen_surgery.exporting.modules import ModuleFactory, TorchNets

TEMPLATES_FOLDER = "templates"
#: What graphs, tables and the manifest take besides weights, at most (bytes per net, and per table element).
_NET_OVERHEAD = 64 << 10


@dataclass(frozen=True)
class Plan:
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


def weight_shapes(kind: NetKind, geometry: Geometry, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Slot -> shape of every weight of *kind*, as Qwen v1's layers have them.

    Known without running the checkout's code, so that weights are validated first; the code must agree.
    """
    hidden, vocab, half = geometry.hidden, geometry.vocab, geometry.intermediate // 2
    projection = geometry.heads * geometry.head_dim
    if kind in (NetKind.EMBEDDING, NetKind.EMBEDDING_CACHE):
        return {"wte.weight": (vocab, hidden)}
    if kind in (NetKind.LM_HEAD, NetKind.LM_HEAD_TOPK):
        return {"ln_f.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    if not kind.per_layer:
        return {}
    shapes = {
        "ln_1.weight": (hidden,),
        "attn.c_attn.weight": (3 * projection, hidden),
        "attn.c_attn.bias": (3 * projection,),
        "attn.c_proj.weight": (hidden, projection),
        "ln_2.weight": (hidden,),
        "mlp.w1.weight": (half, hidden),
        "mlp.w2.weight": (half, hidden),
        "mlp.c_proj.weight": (hidden, half),
    }
    if not config.get("no_bias", True):
        shapes |= {
            "attn.c_proj.bias": (hidden,),
            "mlp.w1.bias": (half,),
            "mlp.w2.bias": (half,),
            "mlp.c_proj.bias": (hidden,),
        }
    return shapes


def refuse_beyond_trained(config: Mapping[str, Any], seq_length: int) -> None:
    """Raise Refused for an export length at which static nets cannot be exact.

    Above the trained length (config.json's ``seq_length``) dynamic NTK picks the rotary base from each
    prompt's length and LogN scales queries by their position. One static net has one table, so it could be
    exact for some prompts only.
    """
    trained = int(config.get("seq_length", config.get("max_position_embeddings", 0)))
    if not trained or seq_length <= trained:
        return
    for key, what in (("use_dynamic_ntk", "dynamic NTK"), ("use_logn_attn", "LogN attention")):
        if config.get(key, False):
            raise Refused(
                f"export length {seq_length} is above the trained length {trained} and {what} ({key}) is on: "
                "the model's numbers then depend on each prompt's length, which a static net cannot follow",
                hint=f"use --seq-length {trained} or less",
            )


def plan(
    sources: Sources,
    index: WeightIndex,
    geometry: Geometry,
    *,
    onnx_path: Path,
    mode: WeightMode | None = None,
    multi_device: bool = False,
    wanted: Iterable[str] = (),
) -> Plan:
    """Bind every net to its tensors and decide how weights are kept. Reads headers; writes nothing lasting.

    *mode* None means hard links, or one copy where the disk does not allow links. Raises Refused for weights
    that do not fit the config, for a length that cannot be exact and for links that are asked for and
    impossible; Usage for an unknown net.
    """
    config = read_config(sources.reference)
    refuse_beyond_trained(config, geometry.seq_length)
    every_net = nets.nets(geometry.layers, multi_device=multi_device)
    tied = is_tied(config, index)
    bindings, refs = [], {}
    for net in every_net:
        shapes = weight_shapes(net.kind, geometry, config)
        binding = make_binding(net, shapes, tied=tied)
        refs[net.name] = resolve(binding, shapes, index)
        bindings.append(binding)
    refuse_extra(bindings, index)
    chosen = {net.name for net in select(every_net, wanted)}
    kept = tuple(binding for binding in bindings if binding.net in chosen)
    files = tuple(dict.fromkeys(ref.file for b in kept for ref in refs[b.net].values()))
    refuse_foreign(onnx_path)
    mode, reason = _choose_mode(mode, files, onnx_path)
    weight_bytes = {
        WeightMode.LINK: 0,
        WeightMode.COPY: sum(file.stat().st_size for file in files),
        WeightMode.INLINE: sum(ref.nbytes for b in kept for ref in refs[b.net].values()),
    }[mode]
    if mode is WeightMode.INLINE:
        _refuse_too_large_inline(kept, refs, geometry)
    kinds = {binding.kind for binding in kept}
    table_bytes = 2 * 4 * geometry.seq_length * geometry.head_dim
    blocks = sum(1 for b in kept if b.kind.per_layer) if mode is WeightMode.INLINE else 1
    graph_bytes = _NET_OVERHEAD * len(kept) + table_bytes * (sum(k.per_layer for k in kinds) + blocks)
    return Plan(
        geometry, kept, {b.net: refs[b.net] for b in kept}, mode, reason, files, weight_bytes, graph_bytes
    )


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
        size = sum(ref.nbytes for ref in refs[binding.net].values()) + _NET_OVERHEAD
        size += tables if binding.kind.per_layer else 0
        if size > PROTOBUF_LIMIT:
            raise Refused(
                f"net {binding.net} would be a file of {size / 1e9:.1f} GB; protobuf ends at 2 GB",
                hint="use --weights link or --weights copy",
            )


def module_factory(sources: Sources, geometry: Geometry) -> ModuleFactory:
    """The torch nets of *sources*. Imports torch and runs the checkout's code (callers asked for trust)."""
    from qwen_surgery.exporting.modules import ModuleFactory

    patched = ModelCode.load(sources.patched, sources.modeling)
    reference = ModelCode.load(sources.reference, sources.modeling)
    return ModuleFactory(patched, reference, geometry)


def torch_nets(sources: Sources, index: WeightIndex, geometry: Geometry) -> TorchNets:
    """Every net with its weights, runnable in torch. Runs the checkout's code (callers asked for trust)."""
    from qwen_surgery.exporting.modules import TorchNets

    config = read_config(sources.reference)
    tied = is_tied(config, index)
    every_kind = [*nets.nets(geometry.layers), nets.Net("lm_head_topk", NetKind.LM_HEAD_TOPK)]
    bindings = {
        net.name: make_binding(net, weight_shapes(net.kind, geometry, config), tied=tied)
        for net in every_kind
    }
    return TorchNets(module_factory(sources, geometry), bindings, index)


def is_tied(config: Mapping[str, Any], index: Mapping[str, TensorRef]) -> bool:
    """Whether the lm_head uses the embedding's tensor."""
    return bool(config.get("tie_word_embeddings", False)) and "lm_head.weight" not in index


def trace_templates(
    sources: Sources, geometry: Geometry, kinds: Iterable[NetKind]
) -> dict[NetKind, Template]:
    """One weight-free template per kind. Runs the checkout's code (callers asked for trust)."""
    from qwen_surgery.exporting.tracing import trace

    factory = module_factory(sources, geometry)
    return {kind: Template(kind, trace(factory.build(kind), geometry)) for kind in kinds}


def export(
    sources: Sources,
    index: WeightIndex,
    geometry: Geometry,
    onnx_path: str | Path,
    *,
    trust_remote_code: bool,
    mode: WeightMode | None = None,
    multi_device: bool = False,
    wanted: Iterable[str] = (),
    announce: Callable[[str], None] = lambda text: None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Manifest:
    """Write every net of the contract into *onnx_path* (see :class:`Plan` for what it takes).

    The folder appears whole or not at all. *announce* gets the cost before work starts, *progress* what is
    being done with how much of how much. Raises Usage without trust, Refused for input that does not fit,
    ToolFailed when the disk or torch fails.
    """
    require_trust(trust_remote_code, "export")
    onnx_path = Path(onnx_path)
    todo = plan(
        sources,
        index,
        geometry,
        onnx_path=onnx_path,
        mode=mode,
        multi_device=multi_device,
        wanted=wanted,
    )
    announce(todo.cost)
    _require_space(todo, onnx_path)
    kinds = tuple(dict.fromkeys(binding.kind for binding in todo.bindings))
    progress("trace", 0, len(kinds))
    templates = trace_templates(sources, geometry, kinds)
    progress("trace", len(kinds), len(kinds))
    _check_against_code(todo, templates)
    config = read_config(sources.reference)
    return write_folder(
        onnx_path,
        templates,
        todo,
        checkout=str(index.path),
        recipe=str(sources.recipe),
        trained_length=int(config.get("seq_length", 0)),
        sources={"reference": _hashes(sources.reference), "patched": _hashes(sources.patched)},
        progress=progress,
    )


def write_folder(
    onnx_path: Path,
    templates: Mapping[NetKind, Template],
    todo: Plan,
    *,
    checkout: str,
    recipe: str,
    trained_length: int,
    sources: dict[str, dict[str, str]],
    passes: tuple[str, ...] = (),
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Manifest:
    """Bind *templates* as *todo* says and write the folder, whole or not at all; gives its manifest."""
    with atomic_folder(onnx_path) as folder:
        _put_weights(todo, folder, progress)
        template_entries = _write_templates(templates, folder)
        placement: Any = (
            placing.InlinePlacement()
            if todo.mode is WeightMode.INLINE
            else placing.SharedPlacement(folder, todo.files)
        )
        entries = []
        for done, binding in enumerate(todo.bindings):
            progress("write nets", done, len(todo.bindings))
            entries.append(
                _write_net(folder, templates[binding.kind], binding, todo.refs[binding.net], placement)
            )
        progress("write nets", len(todo.bindings), len(todo.bindings))
        placement.close()
        constants = folder / placing.CONSTANTS_FILE
        manifest = Manifest(
            checkout=checkout,
            recipe=recipe,
            trained_length=trained_length,
            geometry=todo.geometry,
            sources=sources,
            weights={"mode": todo.mode.value, "files": _shards(todo)},
            templates=template_entries,
            nets=tuple(entries),
            tools=_tools(),
            constants={constants.name: sha256_file(constants)} if constants.exists() else {},
            passes=passes,
        )
        manifest.write(folder)
    return manifest


def _require_space(todo: Plan, onnx_path: Path) -> None:
    folder = onnx_path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    placing.require_space(folder, todo.weight_bytes + todo.graph_bytes)


def _check_against_code(todo: Plan, templates: Mapping[NetKind, Template]) -> None:
    """The traced code must want exactly the weights that were bound."""
    for binding in todo.bindings:
        bound = {slot: ref.shape for slot, ref in todo.refs[binding.net].items()}
        wanted = templates[binding.kind].slots
        if bound != wanted:
            odd = ", ".join(sorted(s for s in {*bound, *wanted} if bound.get(s) != wanted.get(s)))
            raise Refused(
                f"net {binding.net}: modeling code and config.json disagree about the weights {odd}",
                hint="this is not the Qwen v1 layer this program knows",
            )


def _put_weights(todo: Plan, folder: Path, progress: Callable[[str, int, int], None]) -> None:
    if not todo.files or todo.mode is WeightMode.INLINE:
        return
    if todo.mode is WeightMode.LINK:
        placing.link_files(todo.files, folder)
        return
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("copy weights", done, todo.weight_bytes)

    placing.copy_files(todo.files, folder, advance)


def _write_templates(templates: Mapping[NetKind, Template], folder: Path) -> dict[str, dict[str, str]]:
    (folder / TEMPLATES_FOLDER).mkdir()
    entries = {}
    for kind, template in templates.items():
        name = f"{TEMPLATES_FOLDER}/{kind.value}.onnx"
        data = template.model.SerializeToString()
        (folder / name).write_bytes(data)
        entries[kind.value] = {"file": name, "sha256": hashlib.sha256(data).hexdigest()}
    return entries


def _write_net(
    folder: Path, template: Template, binding: Binding, refs: Mapping[str, TensorRef], placement: Placement
) -> NetEntry:
    data = bind(template, refs, placement).SerializeToString()
    file = f"{binding.net}.onnx"
    (folder / file).write_bytes(data)
    return NetEntry(
        binding.net, binding.kind, binding.layer, file, hashlib.sha256(data).hexdigest(), dict(refs)
    )


def _shards(todo: Plan) -> dict[str, dict[str, Any]]:
    by_file: dict[Path, list[TensorRef]] = {file: [] for file in todo.files}
    for refs in todo.refs.values():
        for ref in refs.values():
            by_file[ref.file].append(ref)
    return {
        file.name: {"size": file.stat().st_size, "fingerprint": fingerprint(file, refs)}
        for file, refs in by_file.items()
    }


def _hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}


def _tools() -> dict[str, str]:
    from importlib.metadata import version

    return {
        "qwen-surgery": __version__,
        **{name: version(name) for name in ("torch", "transformers", "onnx")},
    }
