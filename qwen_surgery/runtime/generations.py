"""The generations of the vendor's demos for Qwen v1, and which of them can run a bmodel.

``docs/runtimes.md`` has the same table with what was run and where.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_surgery.nets import NetKind
from qwen_surgery.runtime import flows
from qwen_surgery.runtime.hazards import hazards
from qwen_surgery.runtime.memory import NetMemory, layout

#: What a file's lm_head and heads are: two heads that choose, as Qwen v1's demos or as the generic ones want
#: them, a lm_head that gives a token, or logits alone.
HEADS, GENERIC, FUSED, LOGITS = "heads", "generic heads", "fused", "logits"
#: The head that a kind of file has to sample by.
SAMPLERS = {HEADS: NetKind.PENALTY_SAMPLE_HEAD.value, GENERIC: NetKind.SAMPLE_HEAD.value}


@dataclass(frozen=True)
class DemoGeneration:
    """One generation of demos: ``profiles`` are the values of --runtime whose files it takes, ``several``
    those whose files for several devices it takes.

    ``heads``: the kinds of file it counts the layers of rightly. ``shared``: how its runtime may place nets.
    Demos that never ask for shared memory need a runtime old enough to share without being asked, where they
    count on it.
    """

    name: str
    demo: str
    profiles: tuple[str, ...]
    flow: type[flows.DataFlow]
    heads: tuple[str, ...]
    shared: tuple[bool, ...]
    several: tuple[str, ...] = ()

    def refuses(self, nets: Iterable[NetMemory]) -> str:
        """Why it cannot read a file of *nets* at all; empty when it can."""
        found = {net.name: net for net in nets}
        if devices_of(found.values()) > 1 and not self.several:
            return "it opens one device, and the file is for several"
        kind = kind_of(found)
        if kind not in self.heads:
            return _WHY_NOT[self.heads[0], kind]
        mask = found["block_0"].inputs[2].dtype
        if mask == "f16" and self.flow.mask_bits == flows.MASK_BITS["bf16"]:
            return "its masks are always bf16 bits, and float16 takes its -10000 for -6.1: nothing is masked"
        return ""


_TOO_MANY = (
    "it counts every net but two or three as a layer's: with two heads it looks for a layer that is not "
    "there, and ends in a segmentation fault"
)
_BITS = "it takes lm_head's output for a token, and gets the first logit's bits"
#: (what the demo takes, what the file is) -> why it cannot run
_WHY_NOT = {
    (HEADS, GENERIC): "it samples by penalty_sample_head, which this file does not have",
    (HEADS, FUSED): "it takes the layers for one fewer than there are, and looks for greedy_head in vain",
    (HEADS, LOGITS): "it takes the layers for one fewer than there are, and looks for greedy_head in vain",
    (FUSED, HEADS): _TOO_MANY,
    (FUSED, GENERIC): _TOO_MANY,
    (GENERIC, LOGITS): _BITS,
    (FUSED, LOGITS): _BITS,
}

GENERATIONS = (
    DemoGeneration(
        "chat-2024", "LLM-TPU models/Qwen/python_demo/chat.cpp, 2024-03-28 to 2025-06",
        ("llm-tpu",), flows.Copying, (HEADS,), (True,),
    ),
    DemoGeneration(
        "chat-2025", "LLM-TPU models/Qwen/python_demo/chat.cpp, from 2025-06",
        ("llm-tpu",), flows.CopyingAlone, (HEADS,), (True,),
    ),
    DemoGeneration(
        "generic", "LLM-TPU models/Qwen2_5/python_demo/chat.cpp and its likes",
        ("llm-tpu", "llm-tpu-generic"), flows.OwnLength, (GENERIC, HEADS, FUSED), (True,),
    ),
    DemoGeneration(
        "qwen.py-2024-08", "sophon-demo sample/Qwen/python/qwen.py, from 2024-08",
        ("sophon-demo",), flows.InPlace, (HEADS, GENERIC, LOGITS, FUSED), (True, False), ("sophon-demo",),
    ),
    DemoGeneration(
        "demo.cpp-2024-02", "LLM-TPU models/Qwen/demo/demo.cpp, 2024-02-19 to 2024-03-19",
        ("sophon-demo-2024.1",), flows.CopyingToken, (FUSED,), (True,),
    ),
    DemoGeneration(
        "qwen.py-2024-03", "sophon-demo sample/Qwen/python/qwen.py, 2024-03 to 2024-07",
        ("sophon-demo-2024.1",), flows.InPlaceFloat16, (FUSED,), (True, False),
    ),
    DemoGeneration(
        "demo_parallel", "LLM-TPU models/Qwen/demo_parallel, from 2024-04",
        ("sophon-demo-2024.1",), flows.Parallel, (FUSED,), (True, False), ("llm-tpu",),
    ),
)  # fmt: skip


def kind_of(nets: Mapping[str, NetMemory]) -> str:
    """Which kind of file *nets* make."""
    if "greedy_head" in nets:
        return GENERIC if SAMPLERS[GENERIC] in nets else HEADS
    return FUSED if nets["lm_head"].outputs[0].dtype == "i32" else LOGITS


def conversations(profile: str, kind: str) -> int:
    """How many conversations of one prompt the level ``runtime`` has with a file of *kind* of *profile*."""
    return sum(
        len(one.shared) * (2 if one.flow.sampler and one.flow.sampler == SAMPLERS.get(kind) else 1)
        for one in of_profile(profile)
        if kind in one.heads
    )


def devices_of(nets: Iterable[NetMemory]) -> int:
    """How many devices a file of *nets* is for."""
    return max(net.devices for net in nets)


def of_profile(profile: str | None, devices: int = 1) -> tuple[DemoGeneration, ...]:
    """The generations of one --runtime for a file for so many *devices*, or all. Where none is for several,
    those for one: they say why not.
    """
    if profile is None:
        return GENERATIONS
    several = tuple(one for one in GENERATIONS if profile in one.several) if devices > 1 else ()
    return several or tuple(one for one in GENERATIONS if profile in one.profiles)


@dataclass(frozen=True)
class Suitability:
    """Whether a generation can run a file. ``refusal``: it cannot read it; ``hazards``: it reads it, and what
    it overwrites before it is used.
    """

    generation: str
    demo: str
    refusal: str
    hazards: tuple[str, ...]


def suitability(
    bmodel: Path, profile: str | None = None, passes: Collection[str] | None = None
) -> tuple[Suitability, ...]:
    """What each generation (of *profile*) makes of *bmodel*, by its addresses and by the graph *passes* that
    its nets are recorded to have been through (None: nothing is recorded). Refuses what is no bmodel.
    """
    layouts = {shared: layout(bmodel, shared=shared) for shared in (True, False)}
    chosen = of_profile(profile, devices_of(layouts[True]))
    return tuple(suits(one, layouts, passes) for one in chosen)


def suits(
    generation: DemoGeneration,
    layouts: Mapping[bool, Sequence[NetMemory]],
    passes: Collection[str] | None,
) -> Suitability:
    """The same for one generation; *layouts*: the nets with shared memory (True) and without."""
    nets = {net.name: net for net in layouts[True]}
    refusal = generation.refuses(layouts[True]) or _unbounded(generation.flow, nets, passes)
    found = [] if refusal else [
        *_short_launches(generation.flow, nets, passes),
        *(
            f"{'with' if shared else 'without'} shared memory, {sentence}"
            for shared in generation.shared
            for sentence in hazards(layouts[shared], generation.flow)
        ),
    ]  # fmt: skip
    return Suitability(generation.name, generation.demo, refusal, tuple(found))


def _unbounded(
    flow: type[flows.DataFlow], nets: Mapping[str, NetMemory], passes: Collection[str] | None
) -> str:
    """What masks of float16's -10000 do to bf16 nets without a floor; empty where they do nothing."""
    float16 = flow.mask_bits == flows.MASK_BITS["f16"] and nets["block_0"].inputs[2].dtype == "bf16"
    if not float16 or passes is None or "bounded-mask" in passes:
        return ""
    return (
        "its masks are always float16 bits, which are -5.6e29 in bf16: these nets were not cleaned with the "
        "pass bounded-mask, and give no numbers for a prompt that is shorter than the export length"
    )


def _short_launches(
    flow: type[flows.DataFlow], nets: Mapping[str, NetMemory], passes: Collection[str] | None
) -> Iterator[str]:
    """What a launch at the prompt's own length does to dynamic nets that are not made for it: seen with
    files of this project's first commits.
    """
    if not flow.own_length or not nets["block_0"].dynamic:
        return
    if passes is not None and "free-length" not in passes:
        yield (
            "the prefill nets reshape to the whole length (they were not cleaned with the pass free-length): "
            "a launch at a prompt's own length ends the process"
        )
    if issubclass(flow, flows.OwnLength) and nets["block_cache_0"].dynamic:
        yield "the decode nets are dynamic: tokens after the first are wrong"
