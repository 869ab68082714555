"""What a build is made from, and the digests that tell when it changed: sources, weights, templates, code."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwen_surgery.building.digests import digest_of
from qwen_surgery.compiling.one import NetJob
from qwen_surgery.compiling.options import QUANTIZERS, CompileOptions
from qwen_surgery.nets import Geometry, Net, NetKind
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.weights.quantised import Release, release_of

if TYPE_CHECKING:
    from qwen_surgery.exporting.manifest import Manifest
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.weights import TensorRef

Verb = Literal[
    "transform", "deploy", "combine", "narrow", "prove", "calibrate", "quantise", "assemble", "compare",
    "sample", "verify",
]  # fmt: skip


def task_name(verb: Verb, subject: str, cores: int = 1) -> str:
    """What the task is called that does *verb* to a net or to a bmodel file."""
    return f"{verb}:{subject}" if cores == 1 else f"{verb}:{subject}:{cores}core"


@dataclass(frozen=True)
class Inputs:
    """An exported (and cleaned) folder and how to compile it.

    ``weights`` holds per net a digest of the content of all its weights, ``templates`` per kind one of the
    graph and its tables. In a plan made before the export both are empty. ``logs`` is where tools log to.
    ``release`` says how the checkpoint is quantised, where it is.
    """

    folder: Path
    geometry: Geometry
    passes: tuple[str, ...]
    options: CompileOptions
    toolchain: Toolchain
    logs: Path
    weights: Mapping[str, str] = field(default_factory=dict)
    templates: Mapping[NetKind, str] = field(default_factory=dict)
    release: Release | None = None

    def chosen(self, kind: NetKind) -> bool:
        """Whether the integers of nets of *kind* are others than the compiler's."""
        own = self.release is not None and kind.per_layer
        return own or (self.options.quantizer != QUANTIZERS[0] and self.options.integer(kind))

    @property
    def nets(self) -> tuple[Net, ...]:
        """The nets of the bmodel, in order."""
        return self.options.nets(self.geometry.layers)

    @property
    def first_nets(self) -> tuple[Net, ...]:
        """One net of every kind that holds weights."""
        return tuple(net for net in self.nets if not net.kind.chooses and net.layer in (None, 0))

    def job(self, net: Net) -> NetJob:
        """*net* as TPU-MLIR's commands name it."""
        return NetJob(net, Path(f"{net.name}.onnx"), bool(self.passes))

    def digests(self, net: Net) -> dict[str, str]:
        """Of all that decides what *net* compiles to, but for flags."""
        return {
            "template": self.templates.get(net.kind, ""),
            "weights": self.weights.get(net.name, ""),
            "toolchain": self.toolchain.identity,
        }

    def bmodel(self, cores: int) -> Path:
        """Where the finished bmodel goes, relative to the output folder."""
        return self.options.file_name(self.geometry.seq_length, cores)

    def exported(self, manifest: Manifest, digests: Mapping[TensorRef, str]) -> Inputs:
        """The same with what was exported; *digests* are those of the weights' tensors."""
        tables = "".join(sorted(manifest.constants.values()))
        slots = {
            net.name: {slot: digest_of(ref, digests) for slot, ref in net.weights.items()}
            for net in manifest.nets
        }
        return replace(
            self,
            weights={name: _digest(json.dumps(held, sort_keys=True))[:32] for name, held in slots.items()},
            templates={
                NetKind(kind): _digest(entry["sha256"] + tables) for kind, entry in manifest.templates.items()
            },
        )

    def fit_passes(self) -> tuple[str, ...]:
        """The passes that cleaned the nets, less those whose Top-dialect text this toolchain cannot take."""
        from graph_passes.framework.registry import unfit

        off = unfit(self.toolchain.version)
        return tuple(name for name in self.passes if name not in off)

    def drawn_layers(self, count: int) -> tuple[int, ...]:
        """*count* of the packed layers, drawn at random, the same ones whenever the build is the same."""
        packed = range(1, self.geometry.layers)
        digests = self.weights or {net.name: "" for net in self.nets}
        seed = json.dumps(sorted(digests.items()))
        return tuple(sorted(random.Random(seed).sample(packed, min(count, len(packed)))))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_digests(sources: Sources) -> dict[str, str]:
    """Of the checkout's Python files, unpatched and patched."""
    return {
        f"{which}/{name}": hashlib.sha256(content).hexdigest()
        for which, files in (("reference", sources.reference), ("patched", sources.patched))
        for name, content in files.items()
    }


def source_digests(sources: Sources, index: Mapping[str, TensorRef]) -> dict[str, str]:
    """Of all files that decide the export, of where the weights are (their content is read later) and how
    they are to be read."""
    digests = file_digests(sources)
    places = [
        [name, str(ref.file), ref.offset, ref.dtype, list(ref.shape), stat.st_ino, stat.st_mtime_ns]
        for name, whole in sorted(index.items())
        for ref in whole.parts
        for stat in [ref.file.stat()]
    ]
    if release := release_of(index.values()):
        places.append([str(release), release.less_one])
    digests["weights"] = _digest(json.dumps(places))
    if home := sources.family.home:
        digests["home"] = f"{home} {version(home.partition('.')[0])}"
    return digests


@cache
def code_digest(*names: str) -> str:
    """Of the code of packages and modules, and data beside it: what changed code made is made anew."""
    digest = hashlib.sha256()
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        file = Path(spec.origin)
        files = file.parent.rglob("*") if spec.submodule_search_locations else [file]
        for file in sorted(files):
            if file.suffix in (".py", ".json", ".c"):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def pass_modules(passes: Sequence[str]) -> tuple[str, ...]:
    """Where the code of *passes* is: this project's, and other packages' modules."""
    from graph_passes.framework import registry

    chosen = registry.select(registry.all_passes(), passes)
    return ("graph_passes", *sorted({type(one).__module__ for one in chosen}))
