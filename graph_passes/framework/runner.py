"""Runs passes over one model to a fixpoint, and checks what they did."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import onnx
import onnx_graphsurgeon as gs

from graph_passes.framework import equality, registry
from graph_passes.framework.base import GraphPass, PassError, PassReport

#: A pass set that still changes the graph after this many rounds goes in circles.
MAX_ROUNDS = 8


class When(str, Enum):
    """When outputs are compared with the input graph's: after each pass, once at the end, or never."""

    EACH = "each"
    END = "end"
    OFF = "off"


@dataclass(frozen=True)
class CleanResult:
    """The cleaned model and, in running order, what every pass did (also those that found nothing)."""

    model: onnx.ModelProto
    reports: tuple[PassReport, ...]

    @property
    def applied(self) -> tuple[str, ...]:
        """Names of the passes that changed something."""
        return tuple(r.name for r in self.reports if r.changed)


@dataclass
class _Tally:
    sites: list[str] = field(default_factory=list)
    before: Counter[str] | None = None
    after: Counter[str] | None = None
    rounds: int = 0
    seconds: float = 0.0


def apply(one: GraphPass, model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """One pass on one model, as a pure function: *model* itself is not touched.

    Gives the rewritten model, shapes inferred and accepted by the ONNX checker, and the sites; when the pass
    finds nothing, *model* itself. Raises :class:`PassError`.
    """
    graph = gs.import_onnx(model)
    try:
        sites = one.rewrite(graph)
    except Exception as error:
        raise PassError(one.name, f"failed: {type(error).__name__}: {error}") from error
    if not sites:
        return model, []
    rewritten = gs.export_onnx(graph, do_type_check=False)
    rewritten.ir_version = model.ir_version
    del rewritten.opset_import[:]
    rewritten.opset_import.extend(model.opset_import)
    rewritten.graph.name = model.graph.name
    try:
        onnx.checker.check_model(rewritten, full_check=False)
        return infer_shapes(rewritten), sites
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise PassError(one.name, f"left an invalid graph: {str(error).strip().splitlines()[0]}") from error


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shape of every tensor on record; raises InferenceError where shapes contradict."""
    del model.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def clean(
    model: onnx.ModelProto,
    passes: Sequence[GraphPass] | Iterable[str] | None = None,
    *,
    check: When | str = When.EACH,
    seed: int = 0,
) -> CleanResult:
    """Run *passes* over *model*, in their declared order, again and again until none changes anything.

    *model* is a template: static shapes, weights as inputs named ``weight/<slot>``. *passes* are pass
    objects, names, or None for every known pass. With ``check`` "each" the outputs are compared after every
    pass that changed something (only the rewritten region is run); with "end" once, whole, and the first pass
    that broke them is found by bisection. Raises :class:`PassError` naming the pass, UnknownPass for an
    unknown name.
    """
    check = When(check)
    chosen = _resolve(passes)
    current = infer_shapes(_copy(model))
    steps: list[tuple[str, onnx.ModelProto]] = []
    tallies = {one.name: _Tally() for one in chosen}
    for _ in range(MAX_ROUNDS):
        changed = False
        for one in chosen:
            result = _step(one, current, tallies[one.name], check, seed)
            if result is not current:
                changed = True
                current = result
                if check is When.END:
                    steps.append((one.name, result))
        if not changed:
            break
    else:
        busy = ", ".join(n for n, t in tallies.items() if t.rounds == MAX_ROUNDS)
        raise PassError(busy, f"still changing the graph after {MAX_ROUNDS} rounds")
    if check is When.END and steps and (odd := equality.compare_whole(model, current, seed)) is not None:
        raise PassError(_first_breaking(model, steps, seed), f"changed what the net computes: {odd}")
    return CleanResult(current, tuple(_report(n, t, current) for n, t in tallies.items()))


def find_breaking_pass(
    model: onnx.ModelProto, passes: Sequence[GraphPass] | Iterable[str] | None = None, seed: int = 0
) -> PassError | None:
    """Debug mode: the first pass after which the whole net computes something else, or None.

    Runs the whole net log2(number of steps) times instead of once a pass: for nets whose regions cannot be
    trusted (a third-party pass that changes inputs of random operators, say) or to double-check the region
    comparison.
    """
    try:
        clean(model, passes, check=When.END, seed=seed)
    except PassError as error:
        return error
    return None


def _step(one: GraphPass, current: onnx.ModelProto, tally: _Tally, check: When, seed: int) -> onnx.ModelProto:
    started = time.perf_counter()
    result, sites = apply(one, current)
    if sites and check is When.EACH and (odd := equality.compare_regions(current, result, seed)) is not None:
        raise PassError(one.name, f"changed what the net computes: {odd}")
    if tally.before is None:
        tally.before = tally.after = count_ops(current)
    if sites:
        tally.before = tally.before if tally.sites else count_ops(current)
        tally.after = count_ops(result)
        tally.sites += sites
        tally.rounds += 1
    tally.seconds += time.perf_counter() - started
    return result


def _first_breaking(model: onnx.ModelProto, steps: list[tuple[str, onnx.ModelProto]], seed: int) -> str:
    """Bisect: the last step is known to be wrong, the input is right by definition."""
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        if equality.compare_whole(model, steps[middle][1], seed) is None:
            low = middle + 1
        else:
            high = middle
    return steps[low][0]


def count_ops(model: onnx.ModelProto) -> Counter[str]:
    """Op type -> how many nodes."""
    return Counter(node.op_type for node in model.graph.node)


def _report(name: str, tally: _Tally, model: onnx.ModelProto) -> PassReport:
    before = tally.before if tally.before is not None else count_ops(model)
    after = tally.after if tally.after is not None else before
    ops = {
        op: (before[op], after[op]) for op in sorted(before.keys() | after.keys()) if before[op] != after[op]
    }
    return PassReport(
        name, tuple(tally.sites), sum(before.values()), sum(after.values()), ops, tally.rounds, tally.seconds
    )


def _resolve(passes: Sequence[GraphPass] | Iterable[str] | None) -> tuple[GraphPass, ...]:
    if passes is None:
        return registry.onnx_passes()
    given = list(passes)
    names = [p for p in given if isinstance(p, str)]
    if not names:
        return tuple(p for p in given if isinstance(p, GraphPass))
    registry.require_known(names)
    return registry.select(registry.onnx_passes(), names)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
