"""Walk the road: the front part of the graph, then the back part that its result decides.

What is on disk under ``OUT/.build``: ``store`` (task results), ``logs`` (one per task and per tool run),
``digests.json`` (what the checkpoint's tensors hold), ``finals.json`` (which build made each bmodel).
Deleting it only costs time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_surgery.building import resources, roadmap, vocabulary
from qwen_surgery.building.digests import Identity, read_early, tensor_digests
from qwen_surgery.building.graph import Done, Graph, Store, Task, peak_disk, require_disk, stale
from qwen_surgery.building.run import MEMORY_SHARE, Runner, Watcher, silent
from qwen_surgery.compiling.one import refuse_unsupported
from qwen_surgery.compiling.options import CompileOptions, refuse_uncleaned
from qwen_surgery.errors import Refused
from qwen_surgery.nets import NetKind
from qwen_surgery.parsing import DATA_ERRORS, build
from qwen_surgery.toolchain import Toolchain

if TYPE_CHECKING:
    from qwen_surgery.checkout import Checkout
    from qwen_surgery.exporting.manifest import Manifest
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.weights import TensorRef, WeightIndex

STATE = ".build"
FINALS = "finals.json"
UNFINISHED = "unfinished.json"
SIDE = ".side.json"


@dataclass(frozen=True)
class _Final:
    """What is known of a finished bmodel: its path below the output folder, the result that made it, net ->
    signature, and every result of its build.
    """

    path: str
    key: str
    nets: dict[str, str]
    keys: list[str]


@dataclass(frozen=True)
class Running:
    """How to run: side by side (*jobs*, None: by cores and memory), on *executor* (None: this machine),
    *watch* ing.

    ``say`` gets one-line notes. ``pack`` off compiles every layer; ``prove`` layers are compiled as well
    and compared.
    """

    jobs: int | None = None
    executor: Executor | None = None
    workers: int | None = None  # of an executor that is elsewhere
    memory: int | None = None  # bytes that tasks may take together; None: most of what is free
    watch: Watcher = silent
    say: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    pack: bool = True
    prove: int = 0


@dataclass
class Built:
    """What came out: the bmodels in the order of core counts, the exported folder used, and the record per
    task.
    """

    bmodels: list[Path]
    folder: Path
    manifest: Manifest
    done: dict[str, Done] = field(default_factory=dict)
    unpacked: dict[str, str] = field(default_factory=dict)  # kind -> why it was compiled layer by layer
    ran: list[str] = field(default_factory=list)
    report: dict[str, Any] | None = None  # of the verification


class Builder:
    """One build into *out*. Raises before anything runs for what cannot work."""

    def __init__(self, out: Path, options: CompileOptions, toolchain: Toolchain, running: Running) -> None:
        self.out = out.absolute()
        self.state = self.out / STATE
        self.store = Store(self.state / "store")
        self.logs = self.state / "logs"
        if options.num_device > 1 and running.pack:
            running.say("several chips share every net: layers are compiled one by one, not packed")
            running = replace(running, pack=False)
        self.options, self.toolchain, self.running = options, toolchain, running
        self.ran: list[str] = []
        self.early: dict[Identity, str] = {}
        refuse_unsupported(options, toolchain)

    # ---- the parts ----

    def front(
        self, checkout: Checkout, sources: Sources, index: WeightIndex, passes: Sequence[str], *, trust: bool
    ) -> list[Task]:
        """The tasks that export and clean."""
        geometry = checkout.geometry(sources.seq_length)
        return roadmap.front(
            checkout.path,
            _source_digests(sources, index),
            geometry,
            sources.recipe,
            self.options,
            passes,
            trust_remote_code=trust,
        )

    def exported(self, tasks: list[Task], index: WeightIndex) -> tuple[Path, Manifest, dict[str, Done]]:
        """Run the front part; the folder of nets to compile. Where the export is new, the weights' digests
        are read beside it, which takes one core only.
        """
        from qwen_surgery.exporting.manifest import Manifest

        graph = Graph(tasks)
        targets = ["export", tasks[-1].name]
        refs = [ref for _, ref in index.items()] if stale(graph, self.store, targets) else []
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read_early, refs, stop)
            try:
                done = self._run(graph, targets)
            finally:
                stop.set()
            self.early = reading.result()
        folder = self.store.folder(graph.keys[tasks[-1].name]) / "onnx"
        return folder, Manifest.load(folder), done

    def compiling(self, folder: Path, manifest: Manifest) -> roadmap.Compiling:
        """The exported *folder* as the back part's input; reads the weights once to know what they hold."""
        refs = {ref for net in manifest.nets for ref in net.weights.values()}
        digests = tensor_digests(refs, self.state / "digests.json", self.running.progress, self.early)
        per_net = {net.name: _net_digest(net.weights, digests) for net in manifest.nets}
        return self._compiling(folder, manifest, per_net)

    def _compiling(self, folder: Path, manifest: Manifest, digests: dict[str, str]) -> roadmap.Compiling:
        whole = roadmap.small_kinds(manifest.geometry) if self.running.pack else frozenset(vocabulary.KINDS)
        threads = resources.cores() + 1
        return roadmap.Compiling(
            folder, manifest, self.options, self.toolchain, digests, self.logs, threads, whole
        )

    def back(
        self,
        compiling: roadmap.Compiling,
        config: dict[str, Any],
        front: list[Task],
        verifying: roadmap.Verifying | None = None,
    ) -> Built:
        """Compile, prove, pack, assemble; put the bmodels in place; verify them."""
        unpacked: dict[str, str] = {}
        if self.running.pack:
            layers = roadmap.layers_to_prove(compiling, self.running.prove)
            first = self._proving(compiling, layers)
            done = self._run(first, proof_targets(first))
            # More than once: without embedding widened, embedding_cache is a new task.
            while not_widened := self._not_widened(compiling, done):
                compiling = replace(compiling, whole=compiling.whole | not_widened)
                first = self._proving(compiling, layers)
                done = self._run(first, proof_targets(first))
            unpacked = self._unproven(compiling, done)
            graph = self.packing_graph(compiling, config, unpacked)
        else:
            graph = Graph(self._unpacked(compiling))
        done = self._run(graph, proof_targets(graph))
        bmodels = [self._place(graph, cores, compiling, front) for cores in self.options.cores]
        built = Built(bmodels, compiling.folder, compiling.manifest, done, unpacked, self.ran)
        if verifying is not None:
            self._verify(built, graph, compiling, verifying, front)
        self._retire()  # last: what the verification left is part of the build
        return built

    def _verify(
        self,
        built: Built,
        graph: Graph,
        compiling: roadmap.Compiling,
        verifying: roadmap.Verifying,
        front: list[Task],
    ) -> None:
        """Verify each bmodel; a result is remembered like any other."""
        tasks = [
            *graph.tasks.values(),
            *roadmap.verify_tasks(compiling, verifying, self._maker),
        ]
        whole = Graph(tasks)
        names = [name for name in whole.order if name.startswith("verify:")]
        built.done |= self._run(whole, names)
        reports = [
            json.loads((self.store.folder(whole.keys[name]) / "report.json").read_text()) for name in names
        ]
        built.report = next((report for report in reports if not report["passed"]), reports[0])
        self._remember({whole.keys[name] for name in names})

    def _unpacked(self, compiling: roadmap.Compiling) -> list[Task]:
        nets = compiling.nets
        return [*roadmap.compile_tasks(compiling, nets, keep=False), *roadmap.combine_tasks(compiling)]

    def _proving(
        self, compiling: roadmap.Compiling, layers: Sequence[int], unpacked: frozenset[NetKind] = frozenset()
    ) -> Graph:
        nets = roadmap.to_compile(compiling, unpacked, layers)
        return Graph(
            [
                *roadmap.narrow_tasks(compiling),
                *roadmap.compile_tasks(compiling, nets, keep=True),
                *roadmap.prove_tasks(compiling),
            ]
        )

    def packing_graph(
        self, compiling: roadmap.Compiling, config: dict[str, Any], unpacked: dict[str, str]
    ) -> Graph:
        """Everything the packing road does, once it is known which kinds cannot be packed."""
        kinds = frozenset(NetKind(kind) for kind in unpacked)
        layers = roadmap.layers_to_prove(compiling, self.running.prove)
        base = self._proving(compiling, layers, kinds)
        notes = {
            "mode": self.options.mode,
            "target": self.options.target,
            "tpu_mlir": self.toolchain.version,
            "runtime": self.options.runtime or "",
            **{f"unpacked {kind}": why for kind, why in unpacked.items()},
        }
        previous = self._previous()
        tasks = [*base.tasks.values()]
        tasks += roadmap.assemble_tasks(compiling, config, base.keys, kinds, notes, previous)
        tasks += roadmap.check_tasks(compiling, layers)
        return Graph(tasks)

    def planned(
        self,
        front: list[Task],
        config: dict[str, Any],
        manifest: Manifest,
        verifying: roadmap.Verifying | None = None,
    ) -> Graph:
        """Every task of a build, for a plan. *manifest* stands for the export's own while there is none."""
        from qwen_surgery.exporting.manifest import Manifest as Loaded

        folder = self.store.folder(Graph(front).keys[front[-1].name]) / "onnx"
        if (folder / "manifest.json").is_file():
            compiling = self.compiling(folder, Loaded.load(folder))
        else:
            compiling = self._compiling(folder, manifest, {net.name: "" for net in manifest.nets})
        tasks = [*front, *self.whole_graph(compiling, config).tasks.values()]
        if verifying is not None:
            tasks += roadmap.verify_tasks(compiling, verifying, self._maker)
        return Graph(tasks)

    def require_room(self, front: list[Task], config: dict[str, Any], manifest: Manifest) -> None:
        """Raise ToolFailed before the first task of a new build when its disk cannot hold the whole."""
        if stale(Graph(front), self.store, [task.name for task in front]):
            graph = self.planned(front, config, manifest)
            require_disk(self.state, peak_disk(graph, graph.order))

    @property
    def _maker(self) -> str:
        """What the tasks that make bmodels are called."""
        return "assemble" if self.running.pack else "combine"

    def whole_graph(self, compiling: roadmap.Compiling, config: dict[str, Any]) -> Graph:
        """Every task behind the export, for a plan: all kinds taken to be packable."""
        if self.running.pack:
            return self.packing_graph(compiling, config, {})
        return Graph(self._unpacked(compiling))

    def _not_widened(self, compiling: roadmap.Compiling, done: dict[str, Done]) -> frozenset[NetKind]:
        """The kinds that cannot be compiled with a short vocabulary; says so."""
        found: dict[NetKind, str] = {}
        for cores in self.options.cores:
            for net in roadmap.narrowed(compiling):
                record = done.get(roadmap.narrow_name(net, cores))
                if record is not None and not record.info["widened"]:
                    found[net.kind] = record.info["reason"]
        for kind, why in found.items():
            self.running.say(f"{kind.value}: compiled at its full size, which takes longer ({why})")
        return frozenset(found)

    def _unproven(self, compiling: roadmap.Compiling, done: dict[str, Done]) -> dict[str, str]:
        found: dict[str, str] = {}
        for cores in self.options.cores:
            for net in roadmap.packable(compiling):
                record = done.get(roadmap.deploy_name(net, cores).replace("deploy:", "prove:"))
                if record is not None and not record.info["proven"]:
                    found[net.kind.value] = record.info["reason"]
        for kind, why in found.items():
            if NetKind(kind).per_layer:
                self.running.say(
                    f"{kind}: packing is not proven ({why}); every layer of it is compiled instead"
                )
            else:
                self.running.say(f"{kind}: packing is not proven ({why}); refit will not be possible")
        return found

    # ---- running ----

    @property
    def jobs(self) -> int:
        """How many tasks run side by side."""
        if self.running.jobs is not None:
            return self.running.jobs
        if self.running.workers is not None:
            return self.running.workers
        return resources.cores()  # whether two fit in memory is looked at as they start

    def _run(self, graph: Graph, targets: Sequence[str]) -> dict[str, Done]:
        self.ran += stale(graph, self.store, targets)
        unfinished = self._unfinished()
        unfinished[self._name] = sorted({*unfinished.get(self._name, ()), *graph.keys.values()})
        self.state.mkdir(parents=True, exist_ok=True)
        self._write(UNFINISHED, unfinished)
        runner = Runner(
            graph,
            self.store,
            self.logs,
            jobs=self.jobs,
            memory=self._memory(),
            executor=self.running.executor,
            watch=self.running.watch,
        )
        return runner.run(targets)

    def _memory(self) -> int:
        """Bytes that tasks may take together. Elsewhere only the user knows."""
        if self.running.memory is not None:
            return self.running.memory
        return 1 << 62 if self.running.workers else int(resources.free_memory() * MEMORY_SHARE)

    # ---- results ----

    def _finals(self) -> dict[str, Any]:
        """File name -> what is known of the build that made it; empty when that record is damaged."""
        try:
            data = json.loads((self.state / FINALS).read_text())
            return {name: asdict(build(_Final, entry)) for name, entry in data.items()}
        except (OSError, *DATA_ERRORS):
            return {}

    def _previous(self) -> dict[str, roadmap.Previous]:
        return {
            name: roadmap.Previous(self.store.folder(entry["key"]) / name, entry["nets"])
            for name, entry in self._finals().items()
            if self.store.has_outputs(entry["key"])
        }

    def _place(self, graph: Graph, cores: int, compiling: roadmap.Compiling, front: list[Task]) -> Path:
        """Give the bmodel its place under *out*: another name for the store's file, or a copy where links
        are impossible.
        """
        relative = self.options.file_name(compiling.manifest.seq_length, cores)
        task = graph.tasks[f"{self._maker}:{relative.name}"]
        folder = self.store.folder(graph.keys[task.name])
        target = self.out / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        for name in (relative.name, relative.name + SIDE):
            if (folder / name).exists():
                put(folder / name, target.with_name(name))
        keys = {*graph.keys.values(), *(Graph(front).keys.values() if front else ())}
        entry = {
            "path": str(relative),
            "key": graph.keys[task.name],
            "nets": {row["net"]: row["signature"] for row in task.params.get("nets", ())},
            "keys": sorted(keys),
        }
        self._write_finals({**self._finals(), relative.name: entry})
        return target

    def _write_finals(self, finals: dict[str, Any]) -> None:
        self._write(FINALS, finals)

    def _write(self, name: str, data: dict[str, Any]) -> None:
        temporary = self.state / (name + ".part")
        temporary.write_text(json.dumps(data))
        temporary.replace(self.state / name)

    def _remember(self, keys: set[str]) -> None:
        """Keep the results *keys* as long as this build's bmodels are there."""
        finals = self._finals()
        for entry in finals.values():
            if keys - set(entry["keys"]):
                entry["keys"] = sorted({*entry["keys"], *keys})
        self._write_finals(finals)

    def _retire(self) -> None:
        """Forget the results behind bmodels that are gone or were made anew."""
        finals = {
            name: entry for name, entry in self._finals().items() if (self.out / entry["path"]).exists()
        }
        self._write_finals(finals)
        unfinished = self._unfinished()
        unfinished.pop(self._name, None)
        self._write(UNFINISHED, unfinished)
        kept = [key for entry in finals.values() for key in entry["keys"]]
        self.store.retire([*kept, *(key for keys in unfinished.values() for key in keys)])

    # ---- other builds into the same folder ----

    @property
    def _name(self) -> str:
        """What this build is known by among others into the same folder."""
        return json.dumps([asdict(self.options), self.toolchain.identity], sort_keys=True)

    def _unfinished(self) -> dict[str, list[str]]:
        """Build -> the results it has asked for so far; they stay when another build is done."""
        try:
            data = json.loads((self.state / UNFINISHED).read_text())
            return {str(name): [str(key) for key in keys] for name, keys in data.items()}
        except (OSError, *DATA_ERRORS):
            return {}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the output folder. Raises Refused when another build works in it."""
        self.state.mkdir(parents=True, exist_ok=True)
        with (self.state / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(
                    f"another build is running into {self.out}", hint="wait for it or choose another --out"
                ) from None
            yield


def proof_targets(graph: Graph) -> list[str]:
    """What is compiled and proven before anything is packed: the ends of *graph*."""
    return [name for name in graph.order if not graph.users(name)]


def put(source: Path, target: Path) -> None:
    """Make *target* the file *source*, in one step; nothing happens when it is already."""
    if target.exists() and target.samefile(source):
        return
    temporary = target.with_name(f".{target.name}.part")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    temporary.replace(target)


def _source_digests(sources: Sources, index: WeightIndex) -> dict[str, str]:
    """Digests of all files that decide the export, and of the places of the weights (their content is
    looked at later).
    """
    digests = {
        f"{which}/{name}": hashlib.sha256(content).hexdigest()
        for which, files in (("reference", sources.reference), ("patched", sources.patched))
        for name, content in files.items()
    }
    places = []
    for name, ref in sorted(index.items()):
        stat = ref.file.stat()
        places.append(
            [name, str(ref.file), ref.offset, ref.dtype, list(ref.shape), stat.st_ino, stat.st_mtime_ns]
        )
    digests["weights"] = hashlib.sha256(json.dumps(places).encode()).hexdigest()
    return digests


def _net_digest(weights: dict[str, TensorRef], digests: dict[TensorRef, str]) -> str:
    text = json.dumps({slot: digests[ref] for slot, ref in weights.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def upstream_config(sources: Sources) -> dict[str, Any]:
    """config.json as upstream wrote it, with its silent keys written out."""
    return sources.facts.written_out()


def compile_exported(
    onnx_dir: Path, out_dir: Path, options: CompileOptions, toolchain: Toolchain, running: Running
) -> Built:
    """Compile an exported (and cleaned) folder to bmodels under *out_dir*.

    *options* must be resolved. Every net goes through TPU-MLIR and its own tool joins them, unless
    ``running.pack``: then one net of each kind does, and the other layers are packed. Raises Refused when
    the folder's parts do not match its manifest or its nets are not those that *options* want; ToolFailed
    when a tool fails.
    """
    builder = Builder(out_dir, options, toolchain, running)
    compiling = open_export(builder, onnx_dir)
    with builder.alone():
        return builder.back(compiling, compiling.manifest.config, [])


def open_export(builder: Builder, onnx_dir: Path) -> roadmap.Compiling:
    """The exported folder *onnx_dir*, checked: its parts are those of its manifest and its nets those that
    are wanted.
    """
    from qwen_surgery.exporting.manifest import Manifest

    folder = onnx_dir.absolute()
    manifest = Manifest.load(folder)
    manifest.check(folder)
    options = builder.options
    refuse_uncleaned(options, manifest.passes)
    have = {net.name: net.kind for net in manifest.nets}
    for net in options.nets(manifest.geometry.layers):
        if have.get(net.name) is not net.kind:
            raise Refused(
                f"{folder} lacks net {net.name} ({net.kind.value}), which --runtime {options.runtime} needs",
                hint="export " + ("with" if options.fused_head else "without") + " --multi-device",
            )
    return builder.compiling(folder, manifest)
