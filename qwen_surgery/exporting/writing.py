"""Write an exported folder: bound nets, templates, shared files, manifest; whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_surgery import __version__
from qwen_surgery.errors import Refused
from qwen_surgery.exporting import placement as placing
from qwen_surgery.exporting.folder import refuse_foreign
from qwen_surgery.exporting.manifest import Manifest, NetEntry, fingerprint, sha256_file
from qwen_surgery.exporting.placement import WeightMode
from qwen_surgery.exporting.planning import ExportPlan, plan_weights, require_space
from qwen_surgery.exporting.template import Binding, Placement, Template, bind
from qwen_surgery.files import atomic_folder
from qwen_surgery.nets import NetKind
from qwen_surgery.weights import TensorRef

TEMPLATES_FOLDER = "templates"
Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class Provenance:
    """Where an exported folder comes from: the fields of the manifest that its bytes do not tell."""

    checkout: str
    recipe: str
    trained_length: int
    sources: dict[str, dict[str, str]]
    config: dict[str, Any]
    passes: tuple[str, ...] = ()
    twin: dict[str, Any] = field(default_factory=dict)


def rebind(
    source: str | Path,
    templates: Mapping[NetKind, Template],
    target: str | Path,
    passes: tuple[str, ...],
    progress: Progress = no_progress,
) -> Manifest:
    """Write *target*: the nets of the export *source*, bound again to *templates* (the cleaned ones).

    Weights are kept as *source* keeps them: links are linked again, copies copied again, inline stays inline.
    *passes* are the graph passes that made the templates. Raises Refused when a template is missing, wants
    other weights than its net has, or when links cannot cross to *target*'s disk; ToolFailed on a full disk.
    """
    old = Manifest.load(source)
    target = Path(target)
    missing = {net.kind for net in old.nets} - set(templates)
    if missing:
        raise Refused(f"no template for {', '.join(sorted(kind.value for kind in missing))}")
    refuse_foreign(target)
    todo = plan_weights(
        old.geometry,
        tuple(
            Binding(net.name, net.kind, net.layer, {s: r.name for s, r in net.weights.items()})
            for net in old.nets
        ),
        {net.name: net.weights for net in old.nets},
        mode=WeightMode(old.weights["mode"]),
        onnx_path=target,
    )
    require_space(todo, target)
    origin = Provenance(
        old.checkout, old.recipe, old.trained_length, old.sources, old.config, passes, old.twin
    )
    return write_folder(target, templates, todo, origin, progress)


def write_folder(
    onnx_path: Path,
    templates: Mapping[NetKind, Template],
    todo: ExportPlan,
    origin: Provenance,
    progress: Progress = no_progress,
) -> Manifest:
    """Bind *templates* as *todo* says and write the folder, whole or not at all; gives its manifest."""
    _check_against_code(todo, templates)
    refuse_foreign(onnx_path)
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
            checkout=origin.checkout,
            recipe=origin.recipe,
            trained_length=origin.trained_length,
            geometry=todo.geometry,
            sources=origin.sources,
            weights={"mode": todo.mode.value, "files": _shards(todo)},
            templates=template_entries,
            nets=tuple(entries),
            tools=_tools(),
            constants={constants.name: sha256_file(constants)} if constants.exists() else {},
            passes=origin.passes,
            config=origin.config,
            twin=origin.twin,
        )
        manifest.write(folder)
    return Manifest.load(onnx_path)


def _check_against_code(todo: ExportPlan, templates: Mapping[NetKind, Template]) -> None:
    """The traced code must want exactly the weights that were bound."""
    for binding in todo.bindings:
        bound = {slot: ref.shape for slot, ref in todo.refs[binding.net].items()}
        wanted = templates[binding.kind].slots
        if bound != wanted:
            odd = ", ".join(sorted(s for s in {*bound, *wanted} if bound.get(s) != wanted.get(s)))
            raise Refused(
                f"net {binding.net}: modeling code and config.json disagree about the weights {odd}",
                hint="this is not the layer that this program knows of this family",
            )


def _put_weights(todo: ExportPlan, folder: Path, progress: Progress) -> None:
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
    kept = {slot: ref.moved(placement.file) for slot, ref in refs.items()}
    return NetEntry(binding.net, binding.kind, binding.layer, file, hashlib.sha256(data).hexdigest(), kept)


def _shards(todo: ExportPlan) -> dict[str, dict[str, Any]]:
    by_file: dict[Path, list[TensorRef]] = {file: [] for file in todo.files}
    for refs in todo.refs.values():
        for part in (part for ref in refs.values() for part in ref.parts):
            by_file[part.file].append(part)
    return {
        file.name: {"size": file.stat().st_size, "fingerprint": fingerprint(file, refs)}
        for file, refs in by_file.items()
    }


def _tools() -> dict[str, str]:
    from importlib.metadata import version

    return {
        "qwen-surgery": __version__,
        **{name: version(name) for name in ("torch", "transformers", "onnx")},
    }
