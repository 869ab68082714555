"""One level of verification: an engine against the unpatched model, net by net and end to end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from golden.tolerances import Limit
from qwen_surgery import nets
from qwen_surgery.errors import Refused, SurgeryError, Usage
from qwen_surgery.nets import Geometry, NetKind
from qwen_surgery.runtime import host
from qwen_surgery.verification import runtime
from qwen_surgery.verification.cases import NetCase, as_distribution
from qwen_surgery.verification.engines import has_fused_head
from qwen_surgery.verification.metrics import (
    agreement,
    distance,
    kl_divergence,
    softmax,
    total_variation,
    worst,
)
from qwen_surgery.verification.results import Check, LevelResult, judge, net_check

if TYPE_CHECKING:
    from qwen_surgery.verification.engines import Engine
    from qwen_surgery.verification.reference import ReferenceModel

END_TO_END = "end-to-end"
#: Sampling follows at most this many steps: it judges head and draws; the cache is judged greedily.
SAMPLED_STEPS = 8


def _limits_of(kind: NetKind) -> str:
    if kind in (NetKind.GREEDY_HEAD, NetKind.LM_HEAD_TOPK):
        return "exact"
    return "probabilities" if kind.samples else "net"


def check_nets(
    engine: Engine,
    cases: Iterable[NetCase],
    geometry: Geometry,
    limits: dict[str, Limit],
    wanted: Sequence[str],
    *,
    expected_by: Engine | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Check]:
    """Run every case on *engine*. Nets of *wanted* that are missing or that no case touched are misses.

    With *expected_by* the outputs are compared with that engine's on the same inputs, all rows, instead of
    with the case's own expectation.
    """
    checks: list[Check] = []
    have, touched = set(engine.nets), set()
    fused = has_fused_head(engine)
    for name in wanted:
        if name not in have:
            checks.append(Check(name, None, "net", "-", {}, ("the net is missing",)))
    for case in cases:
        if case.net not in have or case.net not in wanted:
            continue
        touched.add(case.net)
        progress(f"{case.net} {case.label}")
        if fused and case.net == "lm_head":
            case = _fused(case)
        judged = case if expected_by is None else _re_expected(case, expected_by)
        checks += _check_case(engine, judged, geometry, limits)
    for name in wanted:
        if name in have and name not in touched:
            checks.append(Check(name, None, "net", "-", {}, ("nothing was compared",)))
    return checks


def _fused(case: NetCase) -> NetCase:
    """The lm_head's case for a head with the top-1 inside."""
    token = np.argmax(case.expected[0]).astype(np.int32).reshape(1, 1, 1)
    states = case.inputs[0].reshape(1, 1, -1)
    return NetCase(case.net, NetKind.LM_HEAD_TOPK, None, case.label, (states,), (token,))


def _re_expected(case: NetCase, engine: Engine) -> NetCase:
    outputs = tuple(np.asarray(array) for array in engine.run(case.net, case.inputs))
    return NetCase(case.net, case.kind, case.layer, case.label, case.inputs, outputs)


def _check_case(engine: Engine, case: NetCase, geometry: Geometry, limits: dict[str, Limit]) -> list[Check]:
    try:
        outputs = engine.run(case.net, case.inputs)
    except SurgeryError as error:
        return [Check(case.net, case.layer, case.label, "-", {}, (f"does not run: {error}",))]
    except Exception as error:
        # Engines wrap libraries that raise their own types; whichever it is, the net did not run.
        reason = f"does not run: {type(error).__name__}: {str(error).splitlines()[0]}"
        return [Check(case.net, case.layer, case.label, "-", {}, (reason,))]
    what = _limits_of(case.kind)
    return [
        net_check(limits, case.net, case.layer, case.label, output, found, what)
        for output, found in case.compare(outputs, geometry)
    ]


def check_contract(engine: Engine, geometry: Geometry) -> list[Check]:
    """A bmodel's nets must be the contract's, in its order: consumers count nets and go by index."""
    found = engine.nets
    variants = [
        nets.nets(geometry.layers, sampler=nets.sampler_of(found)),
        nets.nets(geometry.layers, heads=False),
        nets.nets(geometry.layers, multi_device=True),
    ]
    if any(found == tuple(net.name for net in variant) for variant in variants):
        return [Check("all nets", None, "contract", "order", {"nets": float(len(found))}, ())]
    wanted = [net.name for net in variants[0]]
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    reason = "nets are not the contract's"
    if missing or extra:
        reason += f": missing {', '.join(missing) or 'none'}; unexpected {', '.join(extra) or 'none'}"
    else:
        reason += " order"
    return [Check("all nets", None, "contract", "order", {"nets": float(len(found))}, (reason,))]


def check_end_to_end(
    engine: Engine,
    reference: ReferenceModel,
    geometry: Geometry,
    limits: dict[str, Limit],
    prompt: Sequence[int],
    steps: int,
    sampling: host.Sampling,
    *,
    progress: Callable[[str], None] = lambda what: None,
) -> tuple[list[Check], dict[str, list[int]]]:
    """Prefill and *steps* decode steps through the KV cache, greedily and with penalty sampling.

    The engine reads the reference's tokens, so that the numbers of every step are comparable; as long as its
    own choice equals the reference's at each step, its own text is the same text. Returns the checks and the
    greedy tokens of both.
    """
    if len(prompt) + steps > geometry.seq_length:
        raise Usage(
            f"{len(prompt)} tokens and {steps} steps do not fit in an export length of {geometry.seq_length}",
            hint="use a shorter --prompt-lengths or fewer --steps",
        )
    try:
        run = runtime.Runtime(engine, geometry)
    except Refused as error:
        return [Check(END_TO_END, None, "greedy", "-", {}, (str(error),))], {}
    label = f"greedy {len(prompt)}+{steps}"
    rest: list[Check] = []
    try:
        logits = run.prefill(prompt)
        after_prompt = run.saved()
        greedy, texts = _greedy(run, logits, reference, limits, prompt, steps, label, progress)
        if not run.fused_head:
            draws = min(steps, SAMPLED_STEPS)
            label = f"sampling {len(prompt)}+{draws}"
            run.restore(after_prompt)
            one = _sampled(run, logits, reference, geometry, limits, prompt, draws, sampling, label, progress)
            rest.append(one)
    except SurgeryError as error:
        return [Check(END_TO_END, None, label, "-", {}, (f"does not run: {error}",))], {}
    except Exception as error:
        # As for one net: whatever a library raised, the engine did not get through.
        reason = f"does not run: {type(error).__name__}: {str(error).splitlines()[0]}"
        return [Check(END_TO_END, None, label, "-", {}, (reason,))], {}
    return [*greedy, *rest], texts


def _greedy(
    run: runtime.Runtime,
    logits: np.ndarray,
    reference: ReferenceModel,
    limits: dict[str, Limit],
    prompt: Sequence[int],
    steps: int,
    label: str,
    progress: Callable[[str], None],
) -> tuple[list[Check], dict[str, list[int]]]:
    record = reference.prefill(prompt)
    distances, divergences, leads = [], [], []
    wanted: list[int] = []
    found: list[int] = []
    for step in range(steps + 1):
        assert record.logits is not None
        progress(f"{END_TO_END} greedy {step}/{steps}")
        if not run.fused_head:
            distances.append(distance(record.logits, logits.ravel()))
            divergences.append(kl_divergence(record.logits, logits))
        wanted.append(int(np.argmax(record.logits)))
        found.append(run.greedy(logits))
        leads.append(_lead(record.logits, found[-1]))
        if step < steps:
            record, logits = reference.decode(wanted[-1]), run.decode(wanted[-1])
    tokens = {"agreement": agreement(wanted, found)}
    token_misses = judge(limits, "greedy", tokens)
    if tokens["agreement"] < 1:
        first = next(i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b)
        near = f"first at step {first}, where the reference prefers its own by {leads[first]:.3g}"
        token_misses = tuple(f"{miss} ({near})" for miss in token_misses)
    checks = [Check(END_TO_END, None, label, "tokens", tokens, token_misses)]
    if not run.fused_head:
        whole = worst(distances)
        values = {"max_abs": whole.max_abs, "relative": whole.relative, "cosine": whole.cosine}
        values["kl"] = max(divergences)
        missed = (*whole.faults, *judge(limits, "logits", values, whole.scale))
        checks.insert(0, Check(END_TO_END, None, label, "logits", values, missed))
    return checks, {"reference": wanted, "candidate": found}


def _lead(logits: np.ndarray, token: int) -> float:
    """By how much the best logit is above that of *token*: little where the two are nearly tied."""
    inside = 0 <= token < logits.size
    return float(logits.max() - logits[token]) if inside else float("inf")


def _sampled(
    run: runtime.Runtime,
    logits: np.ndarray,
    reference: ReferenceModel,
    geometry: Geometry,
    limits: dict[str, Limit],
    prompt: Sequence[int],
    steps: int,
    sampling: host.Sampling,
    label: str,
    progress: Callable[[str], None],
) -> Check:
    """Three things, the worst of all steps: ``total_variation`` between the two models' distributions (with
    penalty and temperature, before top-p, whose edge makes it jump), ``head_variation`` between what the
    engine's sampling head gives and what the contract gives for the same logits, and how many draws agree."""
    uniforms = np.random.default_rng(sampling.seed).random(steps + 1)
    record = reference.prefill(prompt)
    gaps: list[float] = []
    head_gaps: list[float] = []
    wanted: list[int] = []
    found: list[int] = []
    for step in range(steps + 1):
        assert record.logits is not None
        progress(f"{END_TO_END} sampling {step}/{steps}")
        ids = host.sampling_ids(run.tokens, geometry.seq_length, sampling.last_n)
        expected = runtime.penalty_sample(record.logits, ids, sampling)
        got = run.candidates(logits, sampling)
        gaps.append(_shift(record.logits, logits, ids, sampling))
        own = runtime.penalty_sample(logits, ids, sampling)
        head_gaps.append(total_variation(as_distribution(own), as_distribution(got)))
        wanted.append(runtime.draw(*expected, float(uniforms[step])))
        found.append(runtime.draw(*got, float(uniforms[step])))
        if step < steps:
            record, logits = reference.decode(wanted[-1]), run.decode(wanted[-1])
    values = {
        "agreement": agreement(wanted, found),
        "total_variation": float(np.max(gaps)),  # NaN in one step is NaN in all, and a miss
        "head_variation": float(np.max(head_gaps)),
    }
    return Check(END_TO_END, None, label, "tokens", values, judge(limits, "sampling", values))


def _shift(reference: np.ndarray, candidate: np.ndarray, ids: np.ndarray, sampling: host.Sampling) -> float:
    """Total variation between the distributions that two models would sample from, without top-p."""
    expected, found = (
        softmax(runtime.penalised(logits, ids, sampling) / np.float32(sampling.temperature))
        for logits in (reference, candidate)
    )
    return float(np.abs(expected - found).sum()) / 2


def timed(result: LevelResult, work: Callable[[], None]) -> LevelResult:
    """Run *work*, which fills *result*, and note how long it took."""
    started = time.monotonic()
    work()
    result.seconds = time.monotonic() - started
    return result
