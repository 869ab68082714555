"""``build`` as a function: from a checkout to verified bmodels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_surgery.building import roadmap, session, verifying
from qwen_surgery.building.drive import Builder, Built, Running, proof_targets, upstream_config
from qwen_surgery.building.graph import Graph, Task
from qwen_surgery.compiling.options import CompileOptions, refuse_uncleaned
from qwen_surgery.toolchain import Toolchain

if TYPE_CHECKING:
    from qwen_surgery.exporting.manifest import Manifest
    from qwen_surgery.weights import WeightIndex


@dataclass(frozen=True)
class Outcome:
    """A finished build. ``report`` is the verification's JSON, None when none was wanted."""

    built: Built
    depth: str
    report: dict[str, Any] | None

    @property
    def passed(self) -> bool:
        return self.report is None or bool(self.report["passed"])

    def to_json(self) -> dict[str, Any]:
        tasks = {
            name: {
                "seconds": round(done.seconds, 3),
                "peak_rss": done.peak_rss,
                "ran": name in self.built.ran,
            }
            for name, done in self.built.done.items()
        }
        return {
            "bmodels": [str(path) for path in self.built.bmodels],
            "passed": self.passed,
            "verified": self.depth,
            "unpacked": self.built.unpacked,
            "tasks": tasks,
            "report": self.report,
        }


@dataclass
class _Start:
    """Everything known before the first task."""

    builder: Builder
    front: list[Task]
    config: dict[str, Any]
    depth: str
    checkout: Path
    recipe: str
    index: WeightIndex
    planned: Manifest  # stands in for the export's until there is one


def _start(
    checkout: Path, out: Path, options: CompileOptions, given: Mapping[str, Any], running: Running
) -> _Start:
    """Open and check everything; raises for whatever cannot work before anything runs."""
    from qwen_surgery.checkout import Checkout
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.weights import WeightIndex

    opened = Checkout.open(checkout)
    geometry = opened.geometry(given["seq_length"])
    resolved = options.resolved(geometry)
    toolchain = Toolchain.find(given["toolchain"])
    sources = Sources.of(opened, recipe=given["recipe"], seq_length=given["seq_length"])
    config = upstream_config(sources)
    index = WeightIndex.open(checkout)
    builder = Builder(out, resolved, toolchain, running)
    passes = () if given["no_clean"] else _passes(given, toolchain)
    refuse_uncleaned(resolved, passes)
    front = builder.front(opened, sources, index, passes, trust=given["trust_remote_code"])
    depth = verifying.depth(given["depth"], geometry, resolved, given["steps"])
    planned = roadmap.planned_manifest(checkout, geometry, resolved, given["recipe"], passes)
    return _Start(builder, front, config, depth, checkout, given["recipe"], index, planned)


def _passes(given: Mapping[str, Any], toolchain: Toolchain) -> tuple[str, ...]:
    from qwen_surgery.exporting.cleaning import chosen_passes

    version = toolchain.version if toolchain.version != "unknown" else None
    return chosen_passes(skip=given["skip"], toolchain=version)


def walk(checkout: Path, out: Path, options: CompileOptions, given: Mapping[str, Any]) -> Outcome:
    """Build the bmodels of *checkout* into *out*. *given* are the command's other options.

    Raises Usage and Refused before anything runs, ToolFailed when a tool fails; what was done stays done.
    """
    with session.running(dict(given)) as (running, display):
        start = _start(checkout, out, options, given, running)
        builder = start.builder
        with builder.alone():
            builder.require_room(start.front, start.config, start.planned)
            folder, manifest, done = builder.exported(start.front, start.index)
            compiling = builder.compiling(folder, manifest)
            verify = _verify_tasks(start, given) if start.depth != "none" else None
            built = builder.back(compiling, start.config, start.front, verify)
        built.done = {**done, **built.done}
        if start.depth == "none" and given["depth"] != "none":
            display.say("not verified: the emulator is one chip, this bmodel needs several")
        elif 2 in builder.options.cores:
            display.say(
                "the two-core bmodel is checked for nets, shapes and types only: on two cores, TPU-MLIR's "
                "emulator gives other numbers from run to run"
            )
        if start.depth == "contract" and given["depth"] == "auto":
            display.say(
                "verified: nets, shapes and types. The emulator would need long for this size; "
                f"sample it with `qwen-surgery verify {checkout} --bmodel {built.bmodels[0]} "
                "--layers 0 --nets block_cache`"
            )
    return Outcome(built, start.depth, built.report)


def _verify_tasks(start: _Start, given: Mapping[str, Any]) -> roadmap.Verifying:
    builder, planned = start.builder, start.planned
    keys = Graph(start.front).keys
    folders = [str(builder.store.folder(keys[task.name]) / "onnx") for task in start.front]
    version = builder.toolchain.version
    return roadmap.Verifying(
        {
            "depth": start.depth,
            "steps": given["steps"],
            "recipe": start.recipe,
            "mode": builder.options.mode,
            "geometry": asdict(planned.geometry),
            "nets": [{"name": net.name, "kind": net.kind.value} for net in planned.nets],
        },
        {
            "folders": folders,
            "checkout": str(start.checkout.absolute()),
            "trust_remote_code": given["trust_remote_code"],
            "toolchain": None if version == "unknown" else version,
        },
        {"export": keys[start.front[-1].name]},
    )


def plan(checkout: Path, out: Path, options: CompileOptions, given: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`walk` would do, as :func:`.session.plan_of` gives it.

    Before the first export the compile steps are planned from the checkout alone.
    """
    running = session.planned(given)
    start = _start(checkout, out, options, given, running)
    builder = start.builder
    verify = _verify_tasks(start, given) if start.depth != "none" else None
    graph = builder.planned(start.front, start.config, start.planned, verify)
    return session.plan_of(graph, builder.store, proof_targets(graph), builder.jobs)
