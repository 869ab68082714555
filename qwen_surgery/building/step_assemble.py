"""Write the bmodel from compiled nets and packed ones; compare packed nets with compiled ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_surgery.building import resources
from qwen_surgery.building.graph import Cost, Task
from qwen_surgery.building.inputs import Inputs, code_digest, task_name
from qwen_surgery.building.sizes import MB, bmodel_bytes, weights_of
from qwen_surgery.building.step import PLACE, Info, Needs, Step
from qwen_surgery.building.step_prove import load_plan
from qwen_surgery.building.step_quantise import chosen_task
from qwen_surgery.compiling.options import GPTQ
from qwen_surgery.compiling.profile import PROFILE, read_profile
from qwen_surgery.errors import ToolFailed
from qwen_surgery.nets import Net, NetKind
from qwen_surgery.packing.sidefile import RELEASE

if TYPE_CHECKING:
    from qwen_surgery.exporting.manifest import Manifest
    from qwen_surgery.packing.container import Bmodel, Region
    from qwen_surgery.packing.expand import Piece
    from qwen_surgery.packing.plans import HasIntegers, PackPlan
    from qwen_surgery.packing.sidefile import Prediction

#: Bmodels state when they were made; a fixed time makes equal builds give equal bytes.
CREATED = "Thu Jan  1 00:00:00 1970\n"


@dataclass(frozen=True)
class Row:
    """A net of the bmodel: the task and file it comes from, its name there, whether its weights are still to
    be packed, a digest of them, the task that has the plan of them, and the one that chose their integers
    ('' for none)."""

    net: str
    task: str
    file: str
    source: str
    pack: bool
    weights: str
    plan: str
    chosen: str = ""


@dataclass(frozen=True)
class Previous:
    """The bmodel of an earlier build: nets (name -> signature) that are unchanged are taken from it."""

    file: Path
    nets: dict[str, str]


@dataclass(frozen=True)
class Assemble(Step):
    """Write the bmodel and its side file: compiled nets as they are, all others packed from their weights."""

    file: str
    nets: tuple[Row, ...]
    config: dict[str, Any]
    notes: dict[str, str]
    packer: str
    quantizer: str
    export: Path = field(metadata=PLACE)
    previous: Previous | None = field(metadata=PLACE)

    def run(self, needs: Needs, work: Path) -> Info:
        from qwen_surgery.exporting.manifest import Manifest
        from qwen_surgery.packing import expand, sidefile

        manifest = Manifest.load(self.export)
        plans = {task: load_plan(needs[task]) for task in {row.plan for row in self.nets} if task}
        signed = {row.net: _signature(row, self.quantizer, needs) for row in self.nets}
        pieces = [self._piece(row, signed[row.net], manifest, plans, needs) for row in self.nets]
        target, threads = work / self.file, resources.cores() + 1  # one of them hashes
        written = expand.write(target, pieces, created=CREATED, workers=threads, progress=_say_net)
        found = self._predictions(manifest, needs)
        sidefile.describe(
            target, pieces, manifest.geometry, self.config, predictions=found, notes=self.notes
        ).save(target)
        packed = [piece.name for piece in pieces if piece.pack]
        return {"file": target.name, "size": written.size, "packed": packed, "nets": signed}

    def _piece(
        self,
        row: Row,
        signature: str,
        manifest: Manifest,
        plans: Mapping[str, PackPlan | None],
        needs: Needs,
    ) -> Piece:
        from qwen_surgery.packing.expand import Piece
        from qwen_surgery.quantising import by_name, chosen
        from qwen_surgery.weights.quantised import own_integers

        entry, old = manifest.net(row.net), self.previous
        plan = plans.get(row.plan)
        tensors = entry.weights if plan is not None else None
        if row.pack and old is not None and old.nets.get(row.net) == signature and old.file.is_file():
            return Piece(row.net, old.file, row.net, plan, tensors)
        if row.pack and plan is None:
            raise RuntimeError(f"{row.net} has no pack plan and was not compiled")
        given: dict[str, HasIntegers] = dict(own_integers(entry.weights))
        if row.chosen:
            given |= chosen.refs(needs[row.chosen] / chosen.FILE, entry.weights)
        return Piece(
            row.net,
            needs[row.task] / row.file,
            row.source,
            plan,
            tensors,
            row.pack,
            given,
            by_name(self.quantizer),
        )

    def _predictions(self, manifest: Manifest, needs: Needs) -> dict[str, Prediction]:
        from qwen_surgery.packing.sidefile import Prediction

        found: dict[str, Prediction] = {}
        for row in self.nets:
            kind = manifest.net(row.net).kind.value
            if row.source == row.net and kind not in found:
                profile = read_profile(needs[row.task] / PROFILE)
                if profile is not None:
                    found[kind] = Prediction(profile.cycles, profile.milliseconds)
        return found


def _signature(row: Row, quantizer: str, needs: Needs) -> str:
    """Of what decides the net's bytes: its tasks (a folder's name is its task's key), its weights, and who
    chooses their integers."""
    keys = [quantizer, *(needs[task].name for task in (row.task, row.plan, row.chosen) if task)]
    return hashlib.sha256(json.dumps([*keys, row.weights]).encode()).hexdigest()[:32]


def signatures(info: Info) -> dict[str, str]:
    """Net -> signature of a bmodel, from the record of the task that made it; none of a combined one."""
    return dict(info.get("nets", {}))


def _say_net(name: str, done: int, total: int) -> None:
    print(f"packed {name}: {done} of {total} weights", flush=True)


@dataclass(frozen=True)
class Compare(Step):
    """Compare a packed net with the same net compiled by TPU-MLIR: every byte of every region, and the
    description. Raises ToolFailed naming the first difference."""

    net: str
    assembled: str
    file: str
    compiled: str
    bmodel: str

    def run(self, needs: Needs, work: Path) -> Info:
        packed, compiled = needs[self.assembled] / self.file, needs[self.compiled] / self.bmodel
        found = differences(packed, self.net, compiled, "")
        if found:
            raise ToolFailed(
                f"{self.net}: the packed net is not what TPU-MLIR compiles: {found[0]}",
                hint="please report it; `--no-pack` compiles every layer",
            )
        return {"net": self.net, "equal": True}


def differences(left: Path, left_net: str, right: Path, right_net: str) -> list[str]:
    """What differs between net *left_net* of *left* and *right_net* of *right* ('' for the only one).

    Compared are every region's bytes (coefficients, instructions, dynamic IR) and every field of the
    description, but for where regions start and for the net's name. The dynamic IR of ``--dynamic`` nets may
    differ in a few bytes: model_deploy writes uninitialised memory there, other bytes in each run on one net.
    """
    from qwen_surgery.packing.container import Bmodel, Region, regions

    with Bmodel(left) as a, Bmodel(right) as b:
        one, other = a.net(left_net), b.net(right_net)
        mine, theirs = list(regions(one, "Net")), list(regions(other, "Net"))
        if len(mine) != len(theirs):
            return ["the numbers of regions differ"]
        dynamic_ir = one["parameter"][0].get("binary_ir")
        found = []
        for index, (x, y) in enumerate(zip(mine, theirs, strict=True)):
            if x["size"] != y["size"]:
                found.append(f"region {index} has {x['size']} and {y['size']} bytes")
            elif not _equal(a, Region.of(x), b, Region.of(y), stray=x is dynamic_ir):
                found.append(f"the {x['size']} bytes of region {index} differ")
        if _plain(one) != _plain(other):
            found.append("the descriptions of the net differ")
        return found


def _equal(a: Bmodel, one: Region, b: Bmodel, other: Region, *, stray: bool) -> bool:
    """Whether two regions of one size hold the same bytes; with *stray* one byte in fifty may differ."""
    if a.sha256(one) == b.sha256(other):
        return True
    if not stray:
        return False
    return sum(p != q for p, q in zip(a.read(one), b.read(other), strict=True)) <= one.size // 50


def _plain(value: Any) -> Any:
    """*value* without the places of regions, the net's own name, and empty lists (combining drops those)."""
    if isinstance(value, dict):
        if set(value) == {"start", "size"}:
            return value["size"]
        kept = {k: v for k, v in value.items() if v != [] and not (k == "name" and "parameter" in value)}
        return {k: _plain(v) for k, v in kept.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def assemble_task(
    inputs: Inputs,
    cores: int,
    config: Mapping[str, Any],
    narrow: Collection[NetKind],
    unproven: Mapping[NetKind, str],
    previous: Previous | None,
) -> Task:
    """Write the bmodel for *cores*. *config* is the unpatched config.json, *narrow* are the kinds that were
    extended, *unproven* those of which every net is compiled, *previous* is an earlier build's bmodel."""
    options, file = inputs.options, inputs.bmodel(cores).name
    notes = {
        "mode": options.mode,
        "target": options.target,
        "tpu_mlir": inputs.toolchain.version,
        "runtime": options.runtime or "",
        "passes": ", ".join(inputs.passes),
        **({"quantizer": options.quantizer} if options.integers else {}),
        **({RELEASE: str(inputs.release)} if inputs.release else {}),
        **{f"unpacked {kind.value}": why for kind, why in unproven.items()},
    }
    rows = _rows(inputs, cores, narrow, unproven)
    packer = code_digest("qwen_surgery.packing", "qwen_surgery.quantising")
    packed = sum(row.pack for row in rows) // 2
    weights = packed * weights_of(NetKind.BLOCK, inputs.geometry)
    total = bmodel_bytes(inputs.geometry, options)
    # One weight's integers are read as a whole, a byte each and as they are stored.
    largest = weights_of(NetKind.LM_HEAD, inputs.geometry) if any(row.chosen for row in rows) else 0
    return Task(
        task_name("assemble", file),
        Assemble(file, rows, dict(config), notes, packer, options.quantizer, inputs.folder, previous),
        needs=tuple(sorted({task for row in rows for task in (row.task, row.plan, row.chosen) if task})),
        cost=Cost(600 * MB + 2 * largest, total, 0.5 + weights * 1.5e-8 + total / 1e9),
        keep=True,
        command=f"pack {packed} layers and write {file}",
    )


def _rows(
    inputs: Inputs, cores: int, narrow: Collection[NetKind], unproven: Collection[NetKind]
) -> tuple[Row, ...]:
    first = {net.kind: net for net in inputs.first_nets}
    rows = []
    for net in inputs.nets:
        extended = net.kind in narrow
        compiled = net.layer in (None, 0) or net.kind in unproven
        packed = extended or not compiled or (net.kind not in unproven and inputs.chosen(net.kind))
        source = net if compiled else first[net.kind]
        task = task_name("narrow" if extended else "deploy", source.name, cores)
        file, digest = inputs.job(source).bmodel(cores), inputs.weights.get(net.name, "")
        proof = "" if net.kind.chooses else first[net.kind].name
        plan = proof and task_name("narrow" if extended else "prove", proof, cores)
        by_text = inputs.options.quantizer == GPTQ and inputs.options.integer(net.kind)
        chosen = chosen_task(net) if by_text else ""
        rows.append(Row(net.name, task, file, source.name, packed, digest, plan, chosen))
    return tuple(rows)


def compare_task(inputs: Inputs, net: Net, cores: int) -> Task:
    """Compare *net*, which was packed and compiled as well."""
    file = inputs.bmodel(cores).name
    assembled, compiled = task_name("assemble", file), task_name("deploy", net.name, cores)
    return Task(
        task_name("compare", net.name, cores),
        Compare(net.name, assembled, file, compiled, inputs.job(net).bmodel(cores)),
        needs=(assembled, compiled),
        cost=Cost(memory=200 * MB),
        keep=True,
        command=f"compare {net.name}, packed and compiled",
    )
