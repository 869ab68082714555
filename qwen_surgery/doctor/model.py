"""What a build of a checkout will meet: the checks that ``build`` makes, all of them instead of the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_surgery import extras, nets
from qwen_surgery.building import resources
from qwen_surgery.building.display import clock, size
from qwen_surgery.building.request import BuildRequest
from qwen_surgery.checkout import Checkout
from qwen_surgery.doctor.machine import COMPILER
from qwen_surgery.doctor.remarks import Remark, fail, failed, note, ok
from qwen_surgery.errors import SurgeryError
from qwen_surgery.files import free_disk
from qwen_surgery.toolchain.preload import c_compiler
from qwen_surgery.weights import Release
from qwen_surgery.weights.index import WeightIndex
from qwen_surgery.weights.quantised import release_of

if TYPE_CHECKING:
    from qwen_surgery.patching.plan import Patch
    from qwen_surgery.patching.sources import Sources

Plan = dict[str, Any]


def remarks(request: BuildRequest) -> tuple[list[Remark], Plan | None]:
    """A remark on each thing that the build *request* needs, and its plan where one can be made."""
    try:
        checkout = Checkout.open(request.checkout)
        found = list(_model(checkout, request))
    except SurgeryError as error:
        return [failed("model", error)], None
    if extras.absent(*extras.OF_COMMAND["build"]):
        said = "memory, disk and time can be told once the packages of a build are installed"
        return [*found, note("plan", said)], None
    if any(remark.what in ("edits", "options") and remark.mend for remark in found):
        return found, None  # there is no such build
    from qwen_surgery.building import build

    try:
        plan = build.plan(request)
    except SurgeryError as error:
        known = any(remark.found == str(error) for remark in found)
        return found if known else [*found, failed("plan", error)], None
    return [*found, *_plan(plan, request.out)], plan


def why_not_build(made: Patch) -> SurgeryError | None:
    """The error that a build of the checkout that *made* patches would end with before it runs."""
    from qwen_surgery.patching.sources import Sources

    try:
        _check_weights(made.checkout, Sources.made(made))
    except SurgeryError as error:
        return error
    return None


def _model(checkout: Checkout, request: BuildRequest) -> Iterator[Remark]:
    from qwen_surgery.patching.sources import Sources

    geometry = checkout.geometry(request.seq_length)
    yield ok(
        "model",
        f"{checkout.family.title}, era {checkout.era}: {geometry.layers} layers, hidden {geometry.hidden}, "
        f"vocabulary {geometry.vocab:,}",
    )
    yield _window(checkout.family.window(checkout.facts, geometry), request.seq_length)
    try:
        sources = Sources.of(checkout, recipe=request.recipe, seq_length=request.seq_length)
    except SurgeryError as error:
        yield failed("edits", error)
        return
    yield ok("edits", f"recipe {request.recipe}: none declined")
    try:
        index = _check_weights(checkout, sources)
    except SurgeryError as error:
        yield failed("weights", error)
    else:
        types = ", ".join(sorted({ref.dtype for ref in index.values()}))
        how = str(release_of(index.values()) or "not quantised")
        yield ok("weights", f"{size(index.total_bytes)} in {len(index.files)} files, {types}, {how}")
    try:
        options = request.options.resolved(geometry, Release.of(request.checkout))
    except SurgeryError as error:
        yield failed("options", error)
    else:
        yield ok("options", f"mode {options.mode}, chip {options.target}, for {options.runtime}")


def _window(window: int | None, seq_length: int) -> Remark:
    if window is None:
        return ok("window", "none: every position sees all before it")
    if window <= seq_length:
        found = f"attention sees {window} tokens, no more than the export length {seq_length}"
        return fail("window", found, f"use --seq-length {window - 1}")
    return ok("window", f"{window} tokens, which an export length of {seq_length} never fills")


def _check_weights(checkout: Checkout, sources: Sources) -> WeightIndex:
    """The weights, when they are whole and fit the config; raises what ``build`` would raise."""
    from qwen_surgery.exporting import planning

    geometry = checkout.geometry(sources.seq_length)
    sources.family.refuse(sources.facts, geometry)  # the length first: fetching weights would not mend it
    index = WeightIndex.open(checkout.path)
    planning.bind(sources, index, geometry, nets.nets(geometry.layers))
    return index


def _plan(plan: Plan, out: Path) -> Iterator[Remark]:
    """What the plan takes against what there is."""
    for stage, tasks in _by_stage(plan["tasks"]).items():
        yield _stage(stage, tasks)
    disk, free = plan["disk"], free_disk(out)
    if disk > free:
        mend = f"free some space, or --out on a disk with {size(disk)}"
        yield fail("disk", f"a build needs {size(disk)}, {out} has {size(free)} free", mend)
    else:
        yield ok("disk", f"{size(disk)} at most, of {size(free)} free for {out}")
    yield ok("time", f"about {clock(plan['seconds'])} with {plan['jobs']} tasks side by side")


def _by_stage(tasks: list[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The tasks of each stage, in the order in which these begin."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for task in tasks:
        stages.setdefault(task["task"].partition(":")[0], []).append(task)
    return stages


def _stage(stage: str, tasks: list[Mapping[str, Any]]) -> Remark:
    most, free = max(tasks, key=lambda task: task["memory"]), resources.free_memory()
    seconds = sum(task["seconds"] for task in tasks)
    if most["memory"] > free:
        narrow = stage == "narrow" and c_compiler() is None
        mend = (
            COMPILER if narrow else f"free some memory, or add swap: {size(most['memory'] - free)} are short"
        )
        found = f"{most['task']} needs {size(most['memory'])} of memory, {size(free)} are free"
        return fail(stage, found, mend)
    count = f"{len(tasks)} task" + ("s" if len(tasks) > 1 else "")
    return ok(stage, f"{count}, {size(most['memory'])} of memory at most, {clock(seconds)}")
