"""A bmodel in the vendor's own runtime, followed call by call, against the same nets run one by one.

The chip level judges what each net computes; here nothing new is computed. A demo that hands the right bytes
from net to net gets exactly the same logits, so everything is compared for equality.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_surgery.errors import ToolFailed
from qwen_surgery.nets import Geometry, sampler_of
from qwen_surgery.runtime.device import Device
from qwen_surgery.runtime.flows import DataFlow
from qwen_surgery.runtime.generations import DemoGeneration, of_profile
from qwen_surgery.runtime.host import Sampling
from qwen_surgery.runtime.memory import layout
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.toolchain.emulator import ChipEngine
from qwen_surgery.verification.engines import Engine
from qwen_surgery.verification.results import Check
from qwen_surgery.verification.runtime import Runtime

Candidates = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Conversation:
    """What one conversation gives, step by step: tokens chosen; logits or candidates where there are any."""

    prompt: list[int]
    tokens: list[int]
    logits: list[np.ndarray]
    candidates: list[Candidates]


def check_runtimes(
    bmodel: Path,
    toolchain: Toolchain,
    geometry: Geometry,
    prompts: Sequence[Sequence[int]],
    steps: int,
    sampling: Sampling,
    *,
    profile: str | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Check]:
    """Every generation that can read *bmodel* with shared memory and without, as its runtime may, over every
    prompt and *steps* more tokens. Of a *profile*, also one that cannot read it, which is a miss.
    """
    meant = []
    with ChipEngine(bmodel, toolchain) as chip:
        for prompt in prompts:
            progress(f"net by net {len(prompt)}+{steps}")
            meant.append(net_by_net(chip, geometry, prompt, steps, sampling))
    checks = []
    nets = layout(bmodel, shared=True)
    for generation in of_profile(profile):
        refusal = generation.refuses(nets)
        if refusal and profile is not None:
            checks.append(Check(generation.name, None, "-", "-", {}, (refusal,)))
        for shared in () if refusal else generation.shared:
            progress(f"{generation.name}, {'with' if shared else 'without'} shared memory")
            checks += _generation(bmodel, toolchain, generation, shared, meant, sampling)
    return checks or [Check("-", None, "-", "-", {}, ("no generation of demos can read this file",))]


def net_by_net(
    chip: Engine, geometry: Geometry, prompt: Sequence[int], steps: int, sampling: Sampling
) -> Conversation:
    """The same conversation on the emulator without a runtime's memory."""
    run = Runtime(chip, geometry)
    sampled = sampler_of(chip.nets).value in chip.nets
    found = Conversation(list(prompt), [], [], [])
    logits = run.prefill(prompt)
    for step in range(steps + 1):
        if step:
            logits = run.decode(found.tokens[-1])
        found.logits.append(np.ravel(logits))
        if sampled:
            found.candidates.append(run.candidates(logits, sampling))
        found.tokens.append(run.greedy(logits))
    return found


def follow(flow: DataFlow, meant: Conversation, sampling: Sampling | None) -> Conversation:
    """*flow* in the conversation *meant*; it chooses greedily, or gives candidates where *sampling*."""
    found = Conversation(meant.prompt, [], [], [])
    for step in range(len(meant.tokens)):
        if step:
            flow.decode(meant.tokens[step - 1])
        else:
            flow.prefill(meant.prompt)
        if not flow.fused:
            found.logits.append(flow.logits())
        if sampling is not None:
            found.candidates.append(flow.candidates(sampling))
        else:
            found.tokens.append(flow.greedy())
    return found


def _generation(
    bmodel: Path,
    toolchain: Toolchain,
    generation: DemoGeneration,
    shared: bool,
    meant: Sequence[Conversation],
    sampling: Sampling,
) -> list[Check]:
    """One generation through all conversations."""
    checks: list[Check] = []
    label = "greedy"
    try:
        with Device(bmodel, toolchain, shared=shared) as device:
            flow = generation.flow(device)
            for one in meant:
                for sampled in (False, True) if flow.samples and one.candidates else (False,):
                    label = _label(one, sampled, shared)
                    found = follow(flow, one, sampling if sampled else None)
                    checks.append(Check(generation.name, None, label, "tokens", *_differences(one, found)))
    except ToolFailed as error:
        checks.append(Check(generation.name, None, label, "-", {}, (f"does not run: {error}",)))
    return checks


def _label(one: Conversation, sampled: bool, shared: bool) -> str:
    how, memory = "sampling" if sampled else "greedy", "shared" if shared else "apart"
    return f"{how} {memory} {len(one.prompt)}+{len(one.tokens) - 1}"


def _differences(meant: Conversation, found: Conversation) -> tuple[dict[str, float], tuple[str, ...]]:
    """Metrics, and a sentence for the first step in which anything differs."""
    gaps = [
        float(np.abs(a.astype(np.float64) - b).max())
        for a, b in zip(meant.logits, found.logits, strict=False)
    ]
    missed = []
    for step, gap in enumerate(gaps):
        if gap != 0:  # also what is no number
            missed.append(f"step {step}: logits differ from the nets' own by {gap:.6g}")
            break
    for step, (mine, theirs) in enumerate(zip(meant.candidates, found.candidates, strict=False)):
        if not all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)):
            missed.append(
                f"step {step}: {int((mine[1] != theirs[1]).sum())} of {mine[1].size} candidates differ"
            )
            break
    if found.tokens and found.tokens != meant.tokens:
        missed.append(f"tokens are {found.tokens}, the nets' own {meant.tokens}")
    pairs = [a == b for a, b in zip(meant.tokens, found.tokens, strict=False)]
    values = {"max_abs": max(gaps, default=0.0)}
    if pairs:
        values["agreement"] = sum(pairs) / len(pairs)
    return values, tuple(missed)
