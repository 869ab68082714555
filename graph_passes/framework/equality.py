"""Whether two graphs compute the same, found out with onnxruntime on as little of them as proves it.

A pass touches a few nodes of a graph whose products hold hundreds of megabytes of weights. So two graphs are
first compared as structures: from the inputs on, tensors computed by equal operations from equal inputs are
equal; from the outputs back, equal operations give equal results when their inputs are equal. What remains
between is the *region* the pass rewrote: pairs of tensors that must be equal, as functions of tensors both
graphs share. Only regions are run, on random data of the real shapes and dtypes; where that would be billions
of multiply-adds, with a length or width made short (:mod:`graph_passes.framework.shorten`), and what differs
then is run again as it is. Equal regions make equal graphs.

Data is cut off at shared results of matrix products; cheaper shared operations (a norm, a table look-up) are
computed, because rewrites may rely on what they produce.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.framework.feeds import random_feed
from graph_passes.framework.shorten import shorten

#: float32 results may differ by this much, relative to the largest absolute value in the tensor.
RELATIVE_TOLERANCE = 2e-5
_COMMUTATIVE = {"Add", "Mul"}
_CUT_BEHIND = {"MatMul", "Gemm", "Softmax"}


@dataclass(frozen=True)
class Difference:
    """Where two graphs differ: tensor names and by how much (relative; inf for NaN, shape or dtype)."""

    before: str
    after: str
    relative: float
    reason: str = "values"

    def __str__(self) -> str:
        if self.reason != "values":
            return f"{self.before} against {self.after}: {self.reason}"
        return f"{self.before} against {self.after}: differs by {self.relative:.2e} of the largest value"


def compare_regions(before: onnx.ModelProto, after: onnx.ModelProto, seed: int = 0) -> Difference | None:
    """The first difference in what was rewritten between the two models, or None when they are equal.

    Inputs and outputs must agree in name, shape, dtype and order.
    """
    a, b = _folded(before), _folded(after)
    if (odd := _interface_difference(a, b)) is not None:
        return odd
    hashes_a, hashes_b = _hashes(a), _hashes(b)
    pairs = _frontier(a, b, hashes_a, hashes_b)
    if not pairs:
        return None
    odd = _compare_pairs(a, b, hashes_a, hashes_b, pairs, seed)
    outputs = list(zip(a.outputs, b.outputs, strict=True))
    if odd is None or pairs == outputs:
        return odd
    # Equal parts make equal outputs, but the outputs may be equal without: the outputs decide.
    a, b = _folded(before), _folded(after)
    hashes_a, hashes_b = _hashes(a), _hashes(b)
    outputs = list(zip(a.outputs, b.outputs, strict=True))
    return odd if _compare_pairs(a, b, hashes_a, hashes_b, outputs, seed) is not None else None


def _compare_pairs(
    a: Any,
    b: Any,
    hashes_a: dict[int, str],
    hashes_b: dict[int, str],
    pairs: list[tuple[Any, Any]],
    seed: int,
) -> Difference | None:
    """Run both graphs up to *pairs*; uses the graphs up."""
    shared = set(hashes_a.values()) & set(hashes_b.values())
    left = _region(a, [p[0] for p in pairs], hashes_a, shared)
    right = _region(b, [p[1] for p in pairs], hashes_b, shared)
    names = [(x.name, y.name) for x, y in pairs]
    short = shorten((left.model, right.model))
    if short[0] is not left.model:
        small = replace(left, model=short[0]), replace(right, model=short[1])
        if _compare_regions(*small, names, seed) is None:
            return None
    return _compare_regions(left, right, names, seed)


def _compare_regions(
    left: _Region, right: _Region, names: list[tuple[str, str]], seed: int
) -> Difference | None:
    feeds: dict[str, np.ndarray] = {}
    results = [_run_region(one, feeds, seed) for one in (left, right)]
    for (x, y), values_a, values_b in zip(names, *results, strict=True):
        if (odd := _difference(x, y, values_a, values_b)) is not None:
            return odd
    return None


def compare_whole(before: onnx.ModelProto, after: onnx.ModelProto, seed: int = 0) -> Difference | None:
    """Run both models whole on the same random inputs and weights; the first output that differs, or None."""
    a, b = gs.import_onnx(before), gs.import_onnx(after)
    if (odd := _interface_difference(a, b)) is not None:
        return odd
    rng = np.random.default_rng(seed)
    feeds = {t.name: random_feed(t, rng, t.name) for t in a.inputs}
    for t, x, y in zip(a.outputs, run(before, feeds), run(after, feeds), strict=True):
        if (odd := _difference(t.name, t.name, x, y)) is not None:
            return odd
    return None


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The model's outputs in onnxruntime, as the graph is written (its own optimizer off)."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})


def _interface_difference(a: Any, b: Any) -> Difference | None:
    for side in ("inputs", "outputs"):
        left = [(t.name, tuple(t.shape), np.dtype(t.dtype).name) for t in getattr(a, side)]
        right = [(t.name, tuple(t.shape), np.dtype(t.dtype).name) for t in getattr(b, side)]
        if left != right:
            odd = next((x for x in left if x not in right), left[0])
            return Difference(str(odd[0]), side, float("inf"), f"the {side} changed from {left} to {right}")
    return None


def _difference(left: str, right: str, a: np.ndarray, b: np.ndarray) -> Difference | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        reason = f"{a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}"
        return Difference(left, right, float("inf"), reason)
    if a.dtype.kind != "f":
        wrong = float(np.mean(a != b)) if a.size else 0.0
        return Difference(left, right, wrong) if wrong else None
    if not np.isfinite(a).all() or not np.isfinite(b).all():
        return Difference(left, right, float("inf"), "values that are not finite")
    scale = max(float(np.abs(a).max(initial=0.0)), 1e-30)
    relative = float(np.abs(a.astype(np.float64) - b).max(initial=0.0)) / scale
    return Difference(left, right, relative) if relative > RELATIVE_TOLERANCE else None


def _attributes(node: Any) -> str:
    parts = []
    for key in sorted(node.attrs):
        value = node.attrs[key]
        if isinstance(value, gs.Constant):
            value = (value.values.dtype.str, value.values.shape, value.values.tobytes())
        parts.append(f"{key}={value!r}")
    return ";".join(parts)


def _hashes(graph: Any) -> dict[int, str]:
    """id(tensor) -> hash of the computation that makes it; of the values, where they depend on nothing."""
    result: dict[int, str] = {}

    def digest(*parts: str) -> str:
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def constant(values: np.ndarray) -> str:
        content = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
        return digest("constant", values.dtype.str, str(values.shape), content)

    for tensor in graph.inputs:
        result[id(tensor)] = digest("input", tensor.name)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            result[id(tensor)] = constant(tensor.values)
    for node in graph.nodes:  # sorted topologically by the importer's source model
        inputs = [result.get(id(t), "none") for t in node.inputs]
        for slot, tensor in enumerate(node.outputs):
            if _passes_on(node):
                result[id(tensor)] = inputs[0]
            else:
                result[id(tensor)] = digest(node.op, _attributes(node), str(slot), *inputs)
    return result


def _passes_on(node: Any) -> bool:
    """Whether the node's result is its input by definition."""
    if node.op == "Identity":
        return True
    kept = node.inputs[0].dtype if node.op == "Cast" else None
    return kept is not None and kept == node.outputs[0].dtype


def _folded(model: onnx.ModelProto) -> Any:
    """The model's graph, in which what depends on constants alone is read as its value: two ways to work out
    one size are one, and a region is made shorter only where its sizes are written down.
    """
    graph = gs.import_onnx(model)
    fixed = {key: gs.Constant(f"fixed_{n}", v) for n, (key, v) in enumerate(_fixed_values(graph).items())}
    for node in graph.nodes:
        node.inputs = [fixed.get(id(tensor), tensor) for tensor in node.inputs]
    return graph


def _fixed_values(graph: Any) -> dict[int, np.ndarray]:
    """id(tensor) -> values of everything that is computed from constants alone, by onnxruntime."""
    values: dict[int, np.ndarray] = {}
    body: list[Any] = []
    for node in graph.nodes:
        if node.op == "Constant":
            if isinstance(node.attrs.get("value"), gs.Constant):
                values[id(node.outputs[0])] = node.attrs["value"].values
                body.append(node)
        elif (
            node.inputs and not node.op.startswith("Random") and all(_is_fixed(t, body) for t in node.inputs)
        ):
            body.append(node)
    wanted = [t for node in body if node.op != "Constant" for t in node.outputs if not t.is_empty()]
    if wanted:
        model = gs.export_onnx(
            gs.Graph(nodes=body, inputs=[], outputs=wanted, opset=graph.opset), do_type_check=False
        )
        model.ir_version = min(model.ir_version, 10)
        values |= {id(t): v for t, v in zip(wanted, run(model, {}), strict=True)}
    return values


def _is_fixed(tensor: Any, fixed: list[Any]) -> bool:
    if isinstance(tensor, gs.Constant) or tensor.is_empty():
        return True
    return bool(tensor.inputs) and any(tensor.inputs[0] is node for node in fixed)


def _frontier(a: Any, b: Any, hashes_a: dict[int, str], hashes_b: dict[int, str]) -> list[tuple[Any, Any]]:
    """Pairs of tensors whose equality makes all outputs equal."""
    pairs: dict[tuple[int, int], tuple[Any, Any]] = {}
    memo: dict[tuple[int, int], bool] = {}

    def need(x: Any, y: Any) -> bool:
        """Collect what makes x and y equal; False when they cannot be compared (their types differ)."""
        if hashes_a.get(id(x)) == hashes_b.get(id(y)):
            return True
        if isinstance(x, gs.Constant) or isinstance(y, gs.Constant) or not x.inputs or not y.inputs:
            return False
        if x.shape is None or y.shape is None or list(x.shape) != list(y.shape) or x.dtype != y.dtype:
            return False
        key = (id(x), id(y))
        if key not in memo:
            memo[key] = True
            if not descend(x, y):
                pairs[key] = (x, y)
        return True

    def descend(x: Any, y: Any) -> bool:
        """Whether x and y come from equal operations on tensors that can be compared in their turn."""
        m, n = x.inputs[0], y.inputs[0]
        same = m.op == n.op and _attributes(m) == _attributes(n) and len(m.inputs) == len(n.inputs)
        if not same or _slot(m, x) != _slot(n, y):
            return False
        pairs_before, memo_before = dict(pairs), dict(memo)
        theirs = list(n.inputs)
        if m.op in _COMMUTATIVE and hashes_a.get(id(m.inputs[0])) != hashes_b.get(id(theirs[0])):
            ops = [[t.inputs[0].op if t.inputs else "" for t in side] for side in (m.inputs, theirs)]
            crossed = hashes_a.get(id(m.inputs[0])) == hashes_b.get(id(theirs[1]))
            if crossed or (ops[0] != ops[1] and ops[0] == ops[1][::-1]):
                theirs.reverse()
        if all(need(u, v) for u, v in zip(m.inputs, theirs, strict=True)):
            return True
        pairs.clear()
        pairs.update(pairs_before)
        memo.clear()
        memo.update(memo_before)
        return False

    for x, y in zip(a.outputs, b.outputs, strict=True):
        if not need(x, y):
            pairs[(id(x), id(y))] = (x, y)
    return list(pairs.values())


def _slot(node: Any, tensor: Any) -> int:
    return next(i for i, t in enumerate(node.outputs) if t is tensor)


@dataclass(frozen=True)
class _Region:
    """Part of a graph as a model. Its inputs are called after the computation they stand for, so that the
    regions of two graphs agree on them; ``sources`` gives their names in the graph, ``wanted`` the results.
    """

    model: onnx.ModelProto
    wanted: tuple[str, ...]
    sources: dict[str, str]


def _region(graph: Any, wanted: list[Any], hashes: dict[int, str], shared: set[str]) -> _Region:
    """The part of *graph* that makes *wanted*; uses the graph up."""
    inputs: dict[str, Any] = {}
    body: list[Any] = []
    done: set[int] = set()

    def visit(tensor: Any) -> None:
        if id(tensor) in done or isinstance(tensor, gs.Constant) or tensor.is_empty():
            return
        done.add(id(tensor))
        node = tensor.inputs[0] if tensor.inputs else None
        key = hashes[id(tensor)]
        if node is None or (node.op in _CUT_BEHIND and key in shared):
            inputs[key] = tensor
            return
        for source in node.inputs:
            visit(source)
        if all(node is not n for n in body):
            body.append(node)

    for tensor in wanted:
        visit(tensor)
    renamed = {tensor.name: f"fed_{key[:16]}" for key, tensor in inputs.items()}
    fed = {id(t) for t in inputs.values()}
    # A wanted tensor that both graphs share is its own data; only the others are computed.
    computed = _unique([t for t in wanted if id(t) not in fed])
    sub = gs.Graph(
        nodes=body, inputs=list(inputs.values()), outputs=computed, opset=graph.opset, name="region"
    )
    for tensor in inputs.values():
        tensor.inputs = []
    model = gs.export_onnx(sub, do_type_check=False)
    _rename(model, renamed)
    model.ir_version = min(model.ir_version, 10)
    return _Region(
        model,
        tuple(renamed.get(t.name, t.name) for t in wanted),
        {new: old for old, new in renamed.items()},
    )


def _run_region(region: _Region, feeds: dict[str, np.ndarray], seed: int) -> list[np.ndarray]:
    """The wanted results; *feeds* grows by what is fed, so that both graphs' regions get the same."""
    for tensor in gs.import_onnx(region.model).inputs:
        if tensor.name not in feeds:
            rng = np.random.default_rng([seed, int(tensor.name.removeprefix("fed_")[:12], 16)])
            feeds[tensor.name] = random_feed(tensor, rng, region.sources[tensor.name])
    computed = [o.name for o in region.model.graph.output]
    values = dict(zip(computed, run(region.model, feeds), strict=True)) if computed else {}
    return [values[name] if name in values else feeds[name] for name in region.wanted]


def _unique(tensors: list[Any]) -> list[Any]:
    return list({id(t): t for t in tensors}.values())


def _rename(model: onnx.ModelProto, names: dict[str, str]) -> None:
    for node in model.graph.node:
        node.input[:] = [names.get(n, n) for n in node.input]
    for value in [*model.graph.input, *model.graph.output]:
        value.name = names.get(value.name, value.name)
