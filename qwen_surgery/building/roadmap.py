"""The tasks of a build: which there are, what each needs and what decides its result.

In two parts, as the second is only known when the first is done: *front* exports and cleans; *back*
compiles, packs and assembles what came out of it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_surgery import __version__
from qwen_surgery.building import actions, costs, vocabulary
from qwen_surgery.building.graph import Task
from qwen_surgery.compiling.one import NetJob, deploy_args, transform_args
from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.nets import Net, NetKind
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.toolchain.preload import SPARSE_COPIES

if TYPE_CHECKING:
    from qwen_surgery.exporting.manifest import Manifest
    from qwen_surgery.nets import Geometry

_ACTIONS = "qwen_surgery.building.actions"
_MB = 1_000_000


def front(
    checkout: Path,
    source_digests: Mapping[str, str],
    geometry: Geometry,
    recipe: str,
    options: CompileOptions,
    passes: Sequence[str],
    *,
    trust_remote_code: bool,
) -> list[Task]:
    """Export and clean. *source_digests*: of the patched and unpatched files and of the weights' places and
    stamps.
    """
    common = {
        "recipe": recipe,
        "seq_length": geometry.seq_length,
        "fused_head": options.fused_head,
        "version": __version__,
        "code": code_digest("qwen_surgery.exporting", *_pass_modules(passes)),
    }
    tables = 8 * geometry.seq_length * geometry.head_dim * (2 * geometry.layers + 4)
    graphs = (2 * geometry.layers + 10) * 100_000 + tables
    tasks = [
        Task(
            "export", f"{_ACTIONS}:export", common, dict(source_digests),
            places={"checkout": str(checkout.absolute()), "trust_remote_code": trust_remote_code},
            memory=1500 * _MB, disk=graphs, seconds=8.0, keep=True,
            command=f"qwen-surgery export {checkout} --seq-length {geometry.seq_length}",
        )
    ]  # fmt: skip
    if passes:
        tasks.append(
            Task(
                "clean", f"{_ACTIONS}:clean", {**common, "passes": list(passes)}, needs=("export",),
                memory=1000 * _MB, disk=graphs, seconds=6.0, keep=True,
                command="qwen-surgery clean (passes: " + ", ".join(passes) + ")",
            )
        )  # fmt: skip
    return tasks


def _pass_modules(passes: Sequence[str]) -> tuple[str, ...]:
    """Where the code of *passes* is: this project's, and other packages' modules."""
    from graph_passes.framework import registry

    chosen = registry.select(registry.all_passes(), passes)
    return ("graph_passes", *sorted({type(one).__module__ for one in chosen}))


@dataclass(frozen=True)
class Compiling:
    """What the back part works on. ``digests``: net name -> digest of the content of all its weights.

    ``folder`` is the exported (and cleaned) folder, ``logs`` where the tools' logs go. ``jobs``: threads
    that pack, one of them hashing. ``whole``: kinds of the vocabulary that are compiled at their full size.
    """

    folder: Path
    manifest: Manifest
    options: CompileOptions
    toolchain: Toolchain
    digests: Mapping[str, str]
    logs: Path
    jobs: int = 1
    whole: frozenset[NetKind] = field(default=frozenset(vocabulary.KINDS))

    @property
    def nets(self) -> tuple[Net, ...]:
        return self.options.nets(self.manifest.geometry.layers)

    @property
    def cleaned(self) -> bool:
        return bool(self.manifest.passes)

    def narrow(self, net: Net) -> bool:
        """Whether *net* is compiled with a short vocabulary and widened."""
        return net.kind in vocabulary.KINDS and net.kind not in self.whole


def small_kinds(geometry: Geometry) -> frozenset[NetKind]:
    """The kinds of the vocabulary that are too small to be worth narrowing."""
    return frozenset(
        kind for kind in vocabulary.KINDS if costs.weights_of(kind, geometry) < vocabulary.WORTHWHILE
    )


def first_nets(compiling: Compiling) -> tuple[Net, ...]:
    """One net of every kind that holds weights: what is compiled when packing."""
    return tuple(net for net in compiling.nets if not net.kind.chooses and net.layer in (None, 0))


def packable(compiling: Compiling) -> tuple[Net, ...]:
    """Those that are compiled at their full size and proven after that."""
    return tuple(net for net in first_nets(compiling) if not compiling.narrow(net))


def narrowed(compiling: Compiling) -> tuple[Net, ...]:
    """Those that are compiled narrow and widened."""
    return tuple(net for net in first_nets(compiling) if compiling.narrow(net))


def to_compile(
    compiling: Compiling, unpacked: frozenset[NetKind], prove_layers: Sequence[int]
) -> tuple[Net, ...]:
    """The nets that TPU-MLIR compiles: one of each kind, all of the *unpacked* kinds, and those compiled as
    a check.
    """
    return tuple(
        net
        for net in compiling.nets
        if not compiling.narrow(net)
        and (net.layer in (None, 0) or net.kind in unpacked or net.layer in prove_layers)
    )


def compile_tasks(compiling: Compiling, nets: Sequence[Net], *, keep: bool) -> list[Task]:
    """Transform and deploy of *nets*. *keep*: the bmodels outlive the build (packing starts from them next
    time).
    """
    tasks = []
    for net in nets:
        tasks.append(_transform(compiling, net))
        tasks += [_deploy(compiling, net, cores, keep) for cores in compiling.options.cores]
    return tasks


def _net_params(compiling: Compiling, net: Net) -> dict[str, Any]:
    return {
        "net": net.name,
        "kind": net.kind.value,
        "layer": net.layer,
        "passes": _fit_passes(compiling),
        "code": code_digest("qwen_surgery.compiling", *_pass_modules(compiling.manifest.passes)),
    }


def _fit_passes(compiling: Compiling) -> list[str]:
    """The passes that cleaned the nets, less those whose Top-dialect text this toolchain cannot take."""
    from graph_passes.framework.registry import unfit

    off = unfit(compiling.toolchain.version)
    return [name for name in compiling.manifest.passes if name not in off]


def _places(compiling: Compiling, net: Net) -> dict[str, Any]:
    return {
        "onnx": str((compiling.folder / compiling.manifest.net(net.name).file).absolute()),
        "toolchain": actions.toolchain_place(compiling.toolchain),
        "logs": str(compiling.logs.absolute()),
    }


def _template_digest(compiling: Compiling, kind: NetKind) -> str:
    """Of the weight-free graph and its tables."""
    manifest = compiling.manifest
    parts = [manifest.templates[kind.value]["sha256"], *sorted(manifest.constants.values())]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _transform(compiling: Compiling, net: Net) -> Task:
    cost = costs.transform(net.kind, compiling.manifest.geometry, compiling.cleaned)
    job = _job(compiling, net)
    chain = compiling.toolchain
    return Task(
        f"transform:{net.name}", f"{_ACTIONS}:transform_net", _net_params(compiling, net),
        {
            "template": _template_digest(compiling, net.kind),
            "weights": compiling.digests[net.name],
            "toolchain": chain.identity,
        },
        places=_places(compiling, net),
        memory=cost.memory, disk=cost.disk, seconds=cost.seconds,
        command="model_transform " + " ".join(transform_args(job, chain)),
    )  # fmt: skip


def _job(compiling: Compiling, net: Net) -> NetJob:
    return NetJob(net, Path(compiling.manifest.net(net.name).file), compiling.cleaned)


def deploy_name(net: Net, cores: int) -> str:
    """Name of the task that deploys *net* for *cores*."""
    return f"deploy:{net.name}" if cores == 1 else f"deploy:{net.name}:{cores}core"


def _deploy(compiling: Compiling, net: Net, cores: int, keep: bool) -> Task:
    options = compiling.options
    cost = costs.deploy(net.kind, compiling.manifest.geometry, options)
    args = deploy_args(_job(compiling, net), options, cores, compiling.toolchain)
    return Task(
        deploy_name(net, cores), f"{_ACTIONS}:deploy_net",
        {**_net_params(compiling, net), "cores": cores, "flags": args},
        {"toolchain": compiling.toolchain.identity},
        places={**_places(compiling, net), "options": asdict(options)},
        needs=(f"transform:{net.name}",),
        memory=cost.memory, disk=cost.disk, seconds=cost.seconds, keep=keep,
        command="model_deploy " + " ".join(args),
    )  # fmt: skip


def prove_tasks(compiling: Compiling) -> list[Task]:
    """One proof per kind of net and core count: how it stores its weights, byte for byte."""
    tasks = []
    for cores in compiling.options.cores:
        for net in packable(compiling):
            cost = costs.prove(net.kind, compiling.manifest.geometry)
            job = _job(compiling, net)
            deployed = deploy_name(net, cores)
            tasks.append(
                Task(
                    deployed.replace("deploy:", "prove:"), f"{_ACTIONS}:prove_kind",
                    {"net": net.name, "bmodel": job.bmodel(cores), "packer": packer_digest()},
                    {"template": _template_digest(compiling, net.kind)},
                    places={"export": str(compiling.folder.absolute())},
                    needs=(deployed,),
                    memory=cost.memory, disk=cost.disk, seconds=cost.seconds, keep=True,
                    command=f"pack {net.name} and compare every byte with TPU-MLIR's",
                )
            )  # fmt: skip
    return tasks


def narrow_name(net: Net, cores: int) -> str:
    """Name of the task that compiles *net* narrow for *cores* and widens it."""
    return deploy_name(net, cores).replace("deploy:", "narrow:")


def narrow_tasks(compiling: Compiling) -> list[Task]:
    """The nets of the vocabulary, one task each and per core count."""
    tasks = []
    for cores in compiling.options.cores:
        for net in narrowed(compiling):
            sibling = vocabulary.SIBLINGS.get(net.kind) if cores == 1 else None
            needs = tuple(narrow_name(other, cores) for other in narrowed(compiling) if other.kind is sibling)
            cost = costs.narrow(net.kind, compiling.manifest.geometry, compiling.options, derived=bool(needs))
            args = deploy_args(_job(compiling, net), compiling.options, cores, compiling.toolchain)
            tasks.append(
                Task(
                    narrow_name(net, cores), "qwen_surgery.building.vocabulary:compile_narrow",
                    {
                        "net": net.name, "cleaned": compiling.cleaned, "cores": cores, "flags": args,
                        "packer": packer_digest(),
                        "code": code_digest(
                            "qwen_surgery.compiling",
                            "qwen_surgery.vocabulary",
                            "qwen_surgery.building.vocabulary",
                        ),
                        "copies": hashlib.sha256(SPARSE_COPIES.read_bytes()).hexdigest(),
                    },
                    {
                        "template": _template_digest(compiling, net.kind),
                        "weights": compiling.digests[net.name],
                        "toolchain": compiling.toolchain.identity,
                    },
                    places={
                        **_places(compiling, net), "export": str(compiling.folder.absolute()),
                        "options": asdict(compiling.options),
                    },
                    needs=needs,
                    memory=cost.memory, disk=cost.disk, seconds=cost.seconds, keep=True,
                    command="model_deploy " + " ".join(args) + " (with a short vocabulary, then widened)",
                )
            )  # fmt: skip
    return tasks


@cache
def code_digest(*names: str) -> str:
    """Of the code of packages and modules (and data beside it): what it made is made anew when it changes."""
    digest = hashlib.sha256()
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        roots = spec.submodule_search_locations
        files = [file for root in roots for file in Path(root).rglob("*")] if roots else [Path(spec.origin)]
        for file in sorted(files):
            if file.suffix in (".py", ".json", ".c"):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def packer_digest() -> str:
    """A changed packer proves itself again and packs again."""
    return code_digest("qwen_surgery.packing")


def combine_tasks(compiling: Compiling) -> list[Task]:
    """Everything compiled, joined by TPU-MLIR's own tool: one bmodel per core count."""
    tasks = []
    for cores in compiling.options.cores:
        file = compiling.options.file_name(compiling.manifest.seq_length, cores).name
        parts = [[deploy_name(net, cores), _job(compiling, net).bmodel(cores)] for net in compiling.nets]
        total = _total(compiling)
        tasks.append(
            Task(
                f"combine:{file}", f"{_ACTIONS}:combine_nets", {"file": file, "parts": parts},
                {"toolchain": compiling.toolchain.identity},
                places={
                    "toolchain": actions.toolchain_place(compiling.toolchain),
                    "logs": str(compiling.logs.absolute()),
                },
                needs=tuple(task for task, _ in parts),
                memory=300 * _MB + total, disk=total, seconds=1.0 + total / 5e8, keep=True,
                command=f"model_tool --combine (of {len(parts)} nets) -o {file}",
            )
        )  # fmt: skip
    return tasks


def _total(compiling: Compiling) -> int:
    """Bytes of the whole bmodel; a layer's two nets share their weights."""
    geometry, options = compiling.manifest.geometry, compiling.options
    sizes = [
        costs.packed_bytes(net.kind, geometry, options)
        for net in compiling.nets
        if net.kind not in (NetKind.BLOCK_CACHE, NetKind.EMBEDDING_CACHE)
    ]
    return sum(sizes) + 4 * _MB * geometry.layers


@dataclass(frozen=True)
class Previous:
    """The bmodel of an earlier build: nets (name -> signature) that are unchanged are taken from it."""

    file: Path
    nets: Mapping[str, str]


def assemble_tasks(
    compiling: Compiling,
    config: Mapping[str, Any],
    keys: Mapping[str, str],
    unpacked: frozenset[NetKind],
    notes: Mapping[str, str],
    previous: Mapping[str, Previous],
) -> list[Task]:
    """Write each bmodel: what was compiled as it is, the other layers packed.

    *keys* are those of the compile and prove tasks; *config* is the unpatched config.json; *previous* is by
    file name.
    """
    tasks = []
    for cores in compiling.options.cores:
        file = compiling.options.file_name(compiling.manifest.seq_length, cores).name
        rows, plans = _rows(compiling, cores, keys, unpacked)
        needs = sorted({row["task"] for row in rows} | set(plans.values()))
        total = _total(compiling)
        packed = sum(row["pack"] for row in rows) // 2
        cost = costs.assemble(compiling.manifest.geometry, compiling.options, packed, total)
        old = previous.get(file)
        tasks.append(
            Task(
                f"assemble:{file}", f"{_ACTIONS}:assemble",
                {
                    "file": file, "nets": rows, "plans": plans, "config": dict(config), "notes": dict(notes),
                    "packer": packer_digest(),
                },
                places={
                    "export": str(compiling.folder.absolute()),
                    "jobs": compiling.jobs,
                    "previous": str(old.file) if old else "",
                    "previous_nets": dict(old.nets) if old else {},
                },
                needs=tuple(needs), memory=cost.memory, disk=cost.disk, seconds=cost.seconds, keep=True,
                command=f"pack {packed} layers and write {file}",
            )
        )  # fmt: skip
    return tasks


def _rows(
    compiling: Compiling, cores: int, keys: Mapping[str, str], unpacked: frozenset[NetKind]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Per net: its name, ``task`` and ``file`` it comes from, its name there (``source``), whether its
    weights are still to be packed, a signature of what decides its bytes; and kind -> task with the plan.
    """
    first = {net.kind: net for net in first_nets(compiling)}
    plans = {
        kind.value: narrow_name(net, cores)
        if compiling.narrow(net)
        else deploy_name(net, cores).replace("deploy:", "prove:")
        for kind, net in first.items()
    }
    rows = []
    for net in compiling.nets:
        narrow = compiling.narrow(net)
        source = net if net.layer in (None, 0) or net.kind in unpacked else first[net.kind]
        task = narrow_name(net, cores) if narrow else deploy_name(source, cores)
        proof = keys.get(plans.get(net.kind.value, ""), "")
        decisive = json.dumps([keys[task], proof, compiling.digests[net.name]])
        rows.append(
            {
                "net": net.name,
                "task": task,
                "file": _job(compiling, source).bmodel(cores),
                "source": source.name,
                "pack": narrow or source is not net,
                "signature": hashlib.sha256(decisive.encode()).hexdigest()[:32],
            }
        )
    return rows, plans


def check_tasks(compiling: Compiling, layers: Sequence[int]) -> list[Task]:
    """Compare the packed nets of *layers* with compiled ones."""
    tasks = []
    for cores in compiling.options.cores:
        file = compiling.options.file_name(compiling.manifest.seq_length, cores).name
        for net in compiling.nets:
            if net.layer not in layers:
                continue
            deployed = deploy_name(net, cores)
            tasks.append(
                Task(
                    deployed.replace("deploy:", "compare:"), f"{_ACTIONS}:check_layer",
                    {
                        "net": net.name, "bmodel": _job(compiling, net).bmodel(cores), "file": file,
                        "assembled": f"assemble:{file}", "deployed": deployed,
                    },
                    needs=(f"assemble:{file}", deployed), memory=200 * _MB, seconds=1.0, keep=True,
                    command=f"compare {net.name}, packed and compiled",
                )
            )  # fmt: skip
    return tasks


def layers_to_prove(compiling: Compiling, count: int) -> tuple[int, ...]:
    """*count* layers that are packed, drawn at random, the same ones whenever the build is the same."""
    packed = range(1, compiling.manifest.geometry.layers)
    seed = json.dumps(sorted(compiling.digests.items()))
    return tuple(sorted(random.Random(seed).sample(packed, min(count, len(packed)))))


@dataclass(frozen=True)
class Verifying:
    """What a verification compares: parameters and inputs that decide its result, places that do not."""

    params: Mapping[str, Any]
    places: Mapping[str, Any]
    inputs: Mapping[str, str]


def verify_tasks(compiling: Compiling, verifying: Verifying, maker: str) -> list[Task]:
    """Verify each bmodel against the unpatched model; *maker* is ``assemble`` or ``combine``."""
    tasks = []
    for cores in compiling.options.cores:
        file = compiling.options.file_name(compiling.manifest.seq_length, cores).name
        made = f"{maker}:{file}"
        only = {"depth": "contract"} if cores > 1 else {}
        tasks.append(
            Task(
                f"verify:{file}", f"{_ACTIONS}:verify",
                {
                    **verifying.params, **only, "file": file, "assembled": made,
                    "code": code_digest("qwen_surgery.verification", "qwen_surgery.nets", "golden"),
                },
                verifying.inputs, {**verifying.places, "export": str(compiling.folder.absolute())}, (made,),
                memory=2000 * _MB, disk=_MB, seconds=30.0, keep=True,
                command=f"verify {file} against the unpatched model",
            )
        )  # fmt: skip
    return tasks


def planned_manifest(
    checkout: Path, geometry: Geometry, options: CompileOptions, recipe: str, passes: Sequence[str]
) -> Manifest:
    """A manifest that stands in for an export that has not been made: right nets and sizes, no hashes."""
    from qwen_surgery.exporting.manifest import Manifest, NetEntry

    nets = options.nets(geometry.layers)
    entries = tuple(NetEntry(net.name, net.kind, net.layer, f"{net.name}.onnx", "", {}) for net in nets)
    templates = {net.kind.value: {"file": "", "sha256": ""} for net in nets}
    return Manifest(str(checkout), recipe, 0, geometry, {}, {}, templates, entries, {}, {}, tuple(passes))
