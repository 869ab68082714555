"""What tasks do. Each function gets its parameters, the folders of the tasks it needs, and an empty folder
to fill.

Everything it leaves in that folder is its result; what it returns (plain JSON) goes into the task's record.
Heavy libraries are imported inside: every action runs in a process of its own.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_surgery.compiling.one import NetJob, combine, deploy, transform
from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.compiling.profile import PROFILE, profile_of
from qwen_surgery.nets import Net, NetKind
from qwen_surgery.toolchain import Toolchain

Params = dict[str, Any]
Needs = dict[str, Path]

#: Where exporting and cleaning leave the nets, inside their task's folder.
ONNX = "onnx"
#: Bmodels state when they were made; a fixed time makes equal builds give equal bytes.
CREATED = "Thu Jan  1 00:00:00 1970\n"


def toolchain_of(params: Params) -> Toolchain:
    """The toolchain that the build chose, wherever the task runs."""
    place = params["toolchain"]
    return Toolchain(
        Path(place["python"]),
        Path(place["root"]),
        place["version"],
        place["origin"],
        tuple((name, value) for name, value in place["extra"]),
    )


def toolchain_place(chain: Toolchain) -> dict[str, Any]:
    """What :func:`toolchain_of` reads."""
    return {
        "python": str(chain.python),
        "root": str(chain.root),
        "version": chain.version,
        "origin": chain.origin,
        "extra": [list(pair) for pair in chain.extra],
    }


def export(params: Params, needs: Needs, work: Path) -> Params:
    """Export a checkout (patched in memory, never written) into ``onnx/``."""
    from qwen_surgery.checkout import Checkout
    from qwen_surgery.exporting.export import export as run
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.weights import WeightIndex

    path = Path(params["checkout"])
    checkout = Checkout.open(path)
    sources = Sources.of(checkout, recipe=params["recipe"], seq_length=params["seq_length"])
    manifest = run(
        sources,
        WeightIndex.open(path),
        checkout.geometry(params["seq_length"]),
        work / ONNX,
        trust_remote_code=params["trust_remote_code"],
        multi_device=params["fused_head"],
    )
    return {"nets": len(manifest.nets), "weights": manifest.weights["mode"]}


def clean(params: Params, needs: Needs, work: Path) -> Params:
    """Run the graph passes over the exported templates and bind every net again."""
    from qwen_surgery.exporting.cleaning import clean_export

    cleaning = clean_export(needs["export"] / ONNX, work / ONNX, passes=params["passes"], check="each")
    nodes = {
        report.kind.value: [sum(report.before.values()), sum(report.after.values())]
        for report in cleaning.kinds
    }
    return {"passes": list(cleaning.manifest.passes), "nodes": nodes}


def _job(params: Params) -> NetJob:
    net = Net(params["net"], NetKind(params["kind"]), params["layer"])
    return NetJob(net, Path(params["onnx"]), bool(params["passes"]))


def transform_net(params: Params, needs: Needs, work: Path) -> Params:
    """ONNX to Top dialect, then the passes on the Top dialect's text. The preflight lint comes before either:
    an export that was not cleaned has not been through it.
    """
    import onnx

    from qwen_surgery.exporting.cleaning import refuse_unfit

    job = _job(params)
    refuse_unfit(onnx.load(str(job.onnx), load_external_data=False), job.net.name)
    result = transform(job, toolchain_of(params), work, Path(params["logs"]))
    # Heads end in TopK, whose two results the passes' reader does not take; no pass has anything to do there.
    passes = params["passes"] if job.net.kind.per_layer else []
    sites = apply_mlir_passes(work / job.mlir, passes)
    return {"command": list(result.command), "mlir_passes": sites}


def apply_mlir_passes(mlir: Path, passes: list[str]) -> dict[str, int]:
    """Run those of *passes* that work on the Top dialect over the file *mlir*; pass -> number of rewritten
    sites.
    """
    if not passes:
        return {}
    from graph_passes.mlir import apply

    text, reports = apply(mlir.read_text(), passes)
    mlir.write_text(text)
    return {report.name: len(report.sites) for report in reports if report.sites}


def deploy_net(params: Params, needs: Needs, work: Path) -> Params:
    """Top dialect to bmodel. Of what the compiler leaves, the bmodel, the final text and the cycle
    prediction stay.
    """
    job, cores = _job(params), params["cores"]
    (source,) = needs.values()
    linked = [entry for entry in source.iterdir() if entry.name != "done.json"]
    for entry in linked:
        (work / entry.name).symlink_to(entry)
    options = CompileOptions(**params["options"])
    with _place(job.net.kind, work) as place:
        bmodel, result = deploy(job, options, cores, toolchain_of(params), place, Path(params["logs"]))
    final = max(work.glob("*_final.mlir"), key=lambda path: path.stat().st_mtime)
    kept = {bmodel.name: work / bmodel.name, "final.mlir": final, PROFILE: profile_of(work / bmodel.name)}
    for name, path in kept.items():
        if path.exists() and path.name != name:
            path.rename(work / name)
    for entry in list(work.iterdir()):
        if entry.name in kept:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return {"command": list(result.command), "bmodel": bmodel.name}


@contextmanager
def _place(kind: NetKind, work: Path) -> Iterator[Path]:
    """Where to run model_deploy; what it leaves there is in *work* in the end.

    TPU-MLIR leaves a byte of padding unset in what it writes of a head, and which value it has depends on how
    long the path of its folder is (12 of 12 equal with one length, 8 of 10 with ten). So heads, which are
    small, are compiled where the path always has the same length.
    """
    if not kind.chooses:
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="qwen-surgery-") as folder:
        for entry in work.iterdir():
            (Path(folder) / entry.name).symlink_to(entry.resolve())
        yield Path(folder)
        for entry in Path(folder).iterdir():
            if not entry.is_symlink():
                # Not through a link to what the task before left.
                (work / entry.name).unlink(missing_ok=True)
                shutil.move(entry, work / entry.name)


def combine_nets(params: Params, needs: Needs, work: Path) -> Params:
    """Join the nets, in the order given, with TPU-MLIR's own tool."""
    parts = [needs[task] / file for task, file in params["parts"]]
    combine(parts, work / params["file"], toolchain_of(params), Path(params["logs"]))
    return {"file": params["file"]}


def prove_kind(params: Params, needs: Needs, work: Path) -> Params:
    """Find and prove how a kind of net stores its weights; the plan, or why there is none, as
    ``plan.json``.
    """
    import onnx

    from qwen_surgery.exporting.manifest import Manifest
    from qwen_surgery.packing.proof import Compiled, Unproven, prove

    (compiled,) = needs.values()
    folder = Path(params["export"])
    manifest = Manifest.load(folder)
    entry = manifest.net(params["net"])
    template = onnx.load(str(folder / manifest.template_file(entry.kind)))
    try:
        plan = prove(Compiled(compiled / params["bmodel"], compiled / "final.mlir"), template, entry.weights)
    except Unproven as error:
        (work / "plan.json").write_text(json.dumps({"unproven": str(error)}))
        return {"proven": False, "reason": str(error)}
    (work / "plan.json").write_text(json.dumps({"plan": plan.to_json()}))
    return {"proven": True, "weights": plan.weights}


def assemble(params: Params, needs: Needs, work: Path) -> Params:
    """Write the bmodel: compiled nets as they are, every other layer packed from its weights; and its side
    file.

    ``previous`` may name an earlier bmodel: nets whose weights and plan are as they were are taken from it.
    """
    from qwen_surgery.exporting.manifest import Manifest
    from qwen_surgery.packing import expand, sidefile
    from qwen_surgery.packing.plans import PackPlan

    manifest = Manifest.load(Path(params["export"]))
    plans = {}
    for kind, task in params["plans"].items():
        data = json.loads((needs[task] / "plan.json").read_text())
        plans[kind] = PackPlan.from_json(data["plan"]) if "plan" in data else None
    old = _previous_nets(params)
    pieces = []
    for row in params["nets"]:
        name, net, pack = row["net"], row["source"], row["pack"]
        entry = manifest.net(name)
        plan = plans.get(entry.kind.value)
        source = needs[row["task"]] / row["file"]
        if pack and old.get(name) == row["signature"]:
            source, net, pack = Path(params["previous"]), name, False
        elif pack and plan is None:
            raise RuntimeError(f"{name} has no pack plan and was not compiled")
        tensors = entry.weights if plan is not None else None
        pieces.append(expand.Piece(name, source, net, plan=plan, tensors=tensors, pack=pack))
    target = work / params["file"]
    written = expand.write(target, pieces, created=CREATED, workers=params["jobs"], progress=_say_net)
    side = sidefile.describe(
        target,
        pieces,
        manifest.geometry,
        params["config"],
        predictions=_predictions(params, needs, manifest),
        notes=params["notes"],
    )
    side.save(target)
    packed = [piece.name for piece in pieces if piece.pack]
    return {"file": target.name, "size": written.size, "packed": packed}


def _say_net(name: str, done: int, total: int) -> None:
    print(f"packed {name}: {done} of {total} weights", flush=True)


def _previous_nets(params: Params) -> dict[str, str]:
    """Net -> signature in the bmodel that ``previous`` names; empty when that file is not usable."""
    previous = params.get("previous")
    if not previous or not Path(previous).is_file():
        return {}
    return dict(params["previous_nets"])


def _predictions(params: Params, needs: Needs, manifest: Any) -> dict[str, Any]:
    from qwen_surgery.compiling.profile import read_profile
    from qwen_surgery.packing.sidefile import Prediction

    found: dict[str, Any] = {}
    for row in params["nets"]:
        if row["source"] == row["net"]:
            profile = read_profile(needs[row["task"]] / PROFILE)
            kind = manifest.net(row["net"]).kind.value
            if profile is not None and kind not in found:
                found[kind] = Prediction(profile.cycles, profile.milliseconds)
    return found


def check_layer(params: Params, needs: Needs, work: Path) -> Params:
    """Compare a packed net with the same net compiled by TPU-MLIR: every byte of every region, and the
    description.

    Raises ToolFailed naming the first difference.
    """
    from qwen_surgery.building.compare import differences
    from qwen_surgery.errors import ToolFailed

    packed = needs[params["assembled"]] / params["file"]
    compiled = needs[params["deployed"]] / params["bmodel"]
    found = differences(packed, params["net"], compiled, "")
    if found:
        raise ToolFailed(
            f"{params['net']}: the packed net is not what TPU-MLIR compiles: {found[0]}",
            hint="please report it; `--no-pack` compiles every layer",
        )
    return {"net": params["net"], "equal": True}


def verify(params: Params, needs: Needs, work: Path) -> Params:
    """Verify the whole chain against the unpatched model; the report as ``report.json``."""
    from qwen_surgery.building.verifying import run

    report = run(params, Path(needs[params["assembled"]]) / params["file"], Path(params["export"]))
    (work / "report.json").write_text(json.dumps(report))
    return {"passed": report["passed"]}
