"""What a flow overwrites before it is read: found from a bmodel's addresses alone, no chip and no numbers.

The flow runs twice on memory that holds, for every byte, who put it there: once with the bmodel's own
addresses, once with every tensor in a place of its own. Whatever a net or the host then reads must be the
same in both; where it is not, a result was overwritten, a copy went over its own source, or a net counts on
sharing memory with a net that it does not share with.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise

import numpy as np

from qwen_surgery.runtime.flows import Argument, DataFlow
from qwen_surgery.runtime.host import Sampling
from qwen_surgery.runtime.memory import Memory, NetMemory, Place

#: What a demo hands to a net, and the net's own place for it.
_Handed = tuple[Argument, Place]
#: Where memory of the demo's own starts: beyond every net's.
_OWN = 1 << 60
#: Decode steps that show everything a conversation does.
_STEPS = 2


@dataclass(frozen=True)
class Segment:
    """Memory that holds a run of one result, from its byte *offset* on. *number* tells results apart: the
    same call of the same flow has the same number on any memory.
    """

    memory: Memory
    number: int
    offset: int

    def cut(self, memory: Memory) -> Segment | None:
        """What of it lies in *memory*."""
        start, end = max(self.memory.address, memory.address), min(self.memory.end, memory.end)
        if start >= end:
            return None
        return Segment(Memory(start, end - start), self.number, self.offset + start - self.memory.address)


def _start(segment: Segment) -> int:
    return segment.memory.address


class Contents:
    """Device memory by who wrote what. Segments are disjoint and in the order of their addresses."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []

    def read(self, memory: Memory) -> list[Segment]:
        """The segments in *memory*, cut to it; gaps are bytes that nobody wrote."""
        return [part for segment in self._segments[self._touched(memory)] if (part := segment.cut(memory))]

    def put(self, segments: Iterable[Segment], memory: Memory) -> None:
        """Fill *memory* with *segments*, all of which lie in it."""
        touched = self._touched(memory)
        rest = []
        for segment in self._segments[touched]:
            before = Memory(segment.memory.address, max(0, memory.address - segment.memory.address))
            after = Memory(memory.end, max(0, segment.memory.end - memory.end))
            rest += [part for side in (before, after) if (part := segment.cut(side))]
        self._segments[touched] = sorted([*rest, *segments], key=_start)

    def _touched(self, memory: Memory) -> slice:
        """Where the segments stand that may have bytes in *memory*: a 72B model's flow has thousands."""
        first = max(0, bisect_right(self._segments, memory.address, key=_start) - 1)
        return slice(first, bisect_left(self._segments, memory.end, lo=first, key=_start))

    def fill(self, memory: Memory, number: int) -> None:
        if memory.size:
            self.put([Segment(memory, number, 0)], memory)


class Tracker:
    """A machine whose memory is :class:`Contents`. ``reads``: what was read, by whom, in order; ``results``:
    what each numbered result is, in words that are right where every tensor has a place of its own.
    """

    def __init__(self, nets: Iterable[NetMemory]) -> None:
        self.nets: Mapping[str, NetMemory] = {net.name: net for net in nets}
        self.reads: list[tuple[str, Memory, list[Segment]]] = []
        self.results: list[str] = []
        self._contents = Contents()
        self._names = {
            place.memory.address: f"{net.name}.{place.name}"
            for net in self.nets.values()
            for place in (*net.inputs, *net.outputs)
        }
        self._free = _OWN

    def allocate(self, size: int, what: str) -> Memory:
        memory = Memory(self._free, size)
        self._names[memory.address] = what
        self._free += 2 * size + 1
        return memory

    def write(self, to: Memory, data: np.ndarray) -> None:
        self._contents.fill(Memory(to.address, data.nbytes), self._result(self._name(to)))

    def copy(self, to: Memory, source: Memory) -> None:
        target = Memory(to.address, source.size)
        overwritten = self._result(f"what the copy to {self._name(to)} overwrote in its own source")
        if target == source:
            return
        moved = [
            replace(s, memory=Memory(s.memory.address - source.address + target.address, s.memory.size))
            for s in self._contents.read(source)
        ]
        self._contents.put(moved, target)
        shared = target.overlap(source)
        if shared:
            # Backwards or forwards, in pieces of a size nobody promises: what the target gets from there.
            start = target.address + max(source.address, target.address) - source.address
            self._contents.fill(Memory(start, min(shared, target.end - start)), overwritten)

    def read(self, source: Memory) -> np.ndarray:
        self._seen("the host", source)
        return np.zeros(source.size, np.uint8)

    def launch(self, net: str, inputs: Sequence[Argument], outputs: Sequence[Argument]) -> None:
        """A static net works in its own places: bmruntime copies inputs there, and results from there."""
        known = self.nets[net]
        taken = list(zip(inputs, known.inputs, strict=True))
        made = list(zip(outputs, known.outputs, strict=True))
        for step in sorted({place.step for place in (*known.inputs, *known.outputs)}):
            self._step(
                known,
                [(given, place) for given, place in taken if place.step == step],
                [(given, place) for given, place in made if place.step == step],
            )

    def _step(self, net: NetMemory, taken: Sequence[_Handed], made: Sequence[_Handed]) -> None:
        """One step of *net*: what it takes and makes, each with its place."""
        used = []
        for given, place in taken:
            memory = given.memory.part(0, _bytes(given, place.memory, place.shape))
            if not net.dynamic:
                self.copy(place.memory, memory)
                memory = place.memory.part(0, memory.size)
            used.append(memory)
        # A dynamic net reads where it is told to, also after it has begun to work.
        self._work(net, [place for _, place in taken])
        for memory, (_, place) in zip(used, taken, strict=True):
            self._seen(f"{net.name} as its {place.name}", memory)
        for given, place in made:
            size = _bytes(given, place.memory, place.shape)
            memory = given.memory if net.dynamic else place.memory
            self._contents.fill(memory.part(0, size), self._result(f"{net.name}.{place.name}"))
        if not net.dynamic:
            for given, place in made:
                self.copy(given.memory, place.memory.part(0, min(place.memory.size, given.memory.size)))

    def _work(self, net: NetMemory, taken: Sequence[Place]) -> None:
        """Intermediate results go over all of the net's memory but its own inputs, which are kept."""
        number = self._result(f"an intermediate result of {net.name}")
        if net.work is None:
            return
        kept = [part for place in taken for part in self._contents.read(place.memory)]
        inside = [part for part in kept if part.memory.overlap(net.work)]
        self._contents.fill(net.work, number)
        for part in inside:
            self._contents.put([part], part.memory)

    def _result(self, what: str) -> int:
        self.results.append(what)
        return len(self.results) - 1

    def _name(self, memory: Memory) -> str:
        return self._names.get(memory.address, "a part of a cache")

    def _seen(self, reader: str, memory: Memory) -> None:
        self.reads.append((reader, memory, self._contents.read(memory)))


def _bytes(given: Argument, own: Memory, shape: tuple[int, ...]) -> int:
    """Bytes of *given* at the shape it is said to have; *own* is the place of the net, of *shape*."""
    whole = int(np.prod(shape)) or 1
    return min(given.memory.size, own.size * int(np.prod(given.shape)) // whole)


def apart(nets: Sequence[NetMemory]) -> tuple[NetMemory, ...]:
    """*nets* with every tensor in a place of its own; but position and mask of all prefill blocks are one,
    which is what demos that write them once count on.
    """
    addresses = count(0, 1 << 44)
    shared: dict[str, Memory] = {}

    def moved(net: NetMemory, place: Place) -> Place:
        new = Memory(next(addresses), place.memory.size)
        prefill = net.name.startswith("block_") and not net.name.startswith("block_cache_")
        if prefill and place.name in ("position_ids", "attention_mask"):
            new = shared.setdefault(place.name, new)
        return replace(place, memory=new)

    return tuple(
        replace(
            net,
            inputs=tuple(moved(net, place) for place in net.inputs),
            outputs=tuple(moved(net, place) for place in net.outputs),
            work=None,
        )
        for net in nets
    )


def hazards(nets: Sequence[NetMemory], flow: type[DataFlow]) -> tuple[str, ...]:
    """What *flow* reads otherwise than it means to, with *nets* where they are: a sentence for each first
    case. A prompt that nearly fills the export length, some decode steps, greedily and with sampling.
    """
    found: dict[str, None] = {}
    sampling = any(net.name == flow.sampler for net in nets)
    for sampled in (False, True) if sampling else (False,):
        meant, real = (_run(flow, Tracker(places), sampled) for places in (apart(nets), nets))
        for (reader, wanted, expected), (_, memory, seen) in zip(meant.reads, real.reads, strict=True):
            wrong = _differences(wanted, expected, memory, seen)
            if wrong:
                found.setdefault(_sentence(reader, memory, wrong, meant.results))
                break  # what follows from it is not another case
    return tuple(found)


def _run(flow: type[DataFlow], tracker: Tracker, sampled: bool) -> Tracker:
    run = flow(tracker)
    run.prefill([0] * max(1, run.seq_length - _STEPS - 1))
    for _ in range(_STEPS):
        run.candidates(Sampling()) if sampled else run.greedy()
        run.decode(0)
    return tracker


def _differences(
    wanted: Memory, expected: list[Segment], memory: Memory, seen: list[Segment]
) -> Counter[int | None]:
    """Bytes that are not what they should be, by the result that they are of (None: nobody's)."""
    edges = {0, memory.size}
    for base, segments in ((wanted, expected), (memory, seen)):
        for segment in segments:
            start = segment.memory.address - base.address
            edges |= {start, start + segment.memory.size}
    wrong: Counter[int | None] = Counter()
    ordered = sorted(edges)
    for start, end in pairwise(ordered):
        should, found = (_at(s, base, start) for s, base in ((expected, wanted), (seen, memory)))
        if should is not None and found != should:
            wrong[found[0] if found else None] += end - start
    return wrong


def _at(segments: list[Segment], base: Memory, place: int) -> tuple[int, int] | None:
    """The result that byte *place* of *base* is of, and which byte of it."""
    address = base.address + place
    for segment in segments:
        if segment.memory.address <= address < segment.memory.end:
            return segment.number, segment.offset + address - segment.memory.address
    return None


def _sentence(reader: str, memory: Memory, wrong: Counter[int | None], results: list[str]) -> str:
    parts = " and ".join(
        f"{size:,} are {'what nobody has put there' if number is None else results[number]}"
        for number, size in wrong.most_common()
    )
    return f"{reader} reads {memory.size:,} bytes, of which {parts}"
