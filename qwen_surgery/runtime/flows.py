"""What each generation of the vendor's demos does with a model's memory, call by call.

Written from reading the demos; each class says which. A flow only moves bytes: it works on any machine that
has nets with places, and writes, copies, reads and launches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qwen_surgery.nets import MASK_VALUE, NetKind
from qwen_surgery.runtime.host import (
    Sampling,
    decode_mask,
    decode_position,
    padded,
    prefill_mask,
    prefill_positions,
    sampler_knobs,
    sampling_ids,
)
from qwen_surgery.runtime.memory import Memory, NetMemory, Place

#: -10000 in the format of the nets' states, as bits; and the float16 bits that one generation always writes.
MASK_BITS = {"bf16": 0xC61C, "f16": 0xF0E2}


@dataclass(frozen=True)
class Argument:
    """One tensor of a launch: where its data are, and which shape it is said to have."""

    memory: Memory
    shape: tuple[int, ...]


class Machine(Protocol):
    """What a flow runs on."""

    @property
    def nets(self) -> Mapping[str, NetMemory]: ...

    def allocate(self, size: int, what: str) -> Memory:
        """New memory of *size* bytes, named *what* in reports."""

    def write(self, to: Memory, data: np.ndarray) -> None:
        """Copy *data* from the host to *to*."""

    def copy(self, to: Memory, source: Memory) -> None:
        """Copy *source*, all of it, to where *to* starts."""

    def read(self, source: Memory) -> np.ndarray:
        """The bytes of *source*, uint8."""

    def launch(self, net: str, inputs: Sequence[Argument], outputs: Sequence[Argument]) -> None:
        """Run *net* once and wait for it."""


def own(place: Place) -> Argument:
    """*place* itself, at its full shape."""
    return Argument(place.memory, place.shape)


class DataFlow(ABC):
    """One conversation. ``tokens`` are those in the cache, and what the demo calls its visited tokens."""

    #: The head that it samples by; empty for those that are greedy only.
    sampler = ""
    #: The mask's closed value as the demo always writes it; None: it goes by the net's own type.
    mask_bits: int | None = None
    #: Whether it launches a dynamic prefill at the prompt's own length.
    own_length = False

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.nets = machine.nets
        self.tokens: list[int] = []
        #: Each layer's KV cache.
        self.keys: list[Memory] = []
        self.values: list[Memory] = []
        self.seq_length = self.nets["embedding"].inputs[0].shape[-1]
        self.layers = sum(name.startswith("block_cache_") for name in self.nets)
        self.unit = self.cache(0).outputs[1].memory.size
        self.dynamic = self.block(0).dynamic
        self.prepare()

    def block(self, layer: int) -> NetMemory:
        return self.nets[f"block_{layer}"]

    def cache(self, layer: int) -> NetMemory:
        return self.nets[f"block_cache_{layer}"]

    @abstractmethod
    def prepare(self) -> None:
        """What the demo does once, after it has loaded the model."""

    @abstractmethod
    def prefill(self, tokens: Sequence[int]) -> None:
        """Read a prompt; the logits (or the token) are in :attr:`result` then."""

    @abstractmethod
    def decode(self, token: int) -> None:
        """Read one more token."""

    @property
    def result(self) -> Memory:
        """Where lm_head's output is."""
        return self.nets["lm_head"].outputs[0].memory

    # ---- what all demos share

    def launch(self, name: str) -> None:
        """*name* with all its tensors in its own places."""
        net = self.nets[name]
        self.machine.launch(name, [own(p) for p in net.inputs], [own(p) for p in net.outputs])

    def masked(self, mask: np.ndarray, dtype: str) -> np.ndarray:
        """*mask* (0 or closed) as the bits that this generation writes."""
        bits = self.mask_bits if self.mask_bits is not None else MASK_BITS[dtype]
        return np.where(mask == MASK_VALUE, bits, 0).astype(np.uint16)

    def prefill_mask(self, length: int, rows: int) -> np.ndarray:
        return self.masked(prefill_mask(length, rows), self.block(0).inputs[2].dtype)

    def decode_mask(self) -> np.ndarray:
        mask = decode_mask(len(self.tokens), self.seq_length)
        return self.masked(mask, self.cache(0).inputs[2].dtype)

    def slot(self, memory: Memory) -> Memory:
        """The latest token's unit in a KV cache."""
        return memory.part((len(self.tokens) - 1) * self.unit, self.unit)

    # ---- choosing a token

    @property
    def fused(self) -> bool:
        """Whether lm_head gives a token."""
        return self.nets["lm_head"].outputs[0].dtype == "i32"

    def head(self, name: str) -> None:
        """A head on the logits where they are; its other inputs are in its own places."""
        net = self.nets[name]
        logits = Argument(self.result, net.inputs[0].shape)
        self.machine.launch(name, [logits, *map(own, net.inputs[1:])], [own(p) for p in net.outputs])

    def greedy(self) -> int:
        """The best token: by the head where the file has one, else by the host from lm_head's output."""
        if self.fused:
            return int(self.machine.read(self.result.part(0, 4)).view(np.int32)[0])
        if "greedy_head" not in self.nets:
            return int(np.argmax(self.logits()))
        self.head("greedy_head")
        return int(self.machine.read(self.nets["greedy_head"].outputs[0].memory).view(np.int32)[0])

    def logits(self) -> np.ndarray:
        """float32 [V], read back."""
        return self.machine.read(self.result).view(np.float32)

    @property
    def samples(self) -> bool:
        """Whether it can sample from this file."""
        return self.sampler in self.nets

    def candidates(self, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities and tokens [1, 50] of the head that it samples by."""
        net = self.nets[self.sampler]
        write = self.machine.write
        write(net.inputs[1].memory, sampling_ids(self.tokens, self.seq_length, sampling.last_n))
        for place, knob in zip(net.inputs[2:], sampler_knobs(NetKind(self.sampler), sampling), strict=True):
            write(place.memory, knob)
        self.head(net.name)
        return self.drawn_from(net)

    def drawn_from(self, net: NetMemory) -> tuple[np.ndarray, np.ndarray]:
        """What the sampling head *net* has just given."""
        probabilities, tokens = (self.machine.read(place.memory) for place in net.outputs)
        return probabilities.view(np.float32)[None], tokens.view(np.int32)[None]


class Copying(DataFlow):
    """LLM-TPU's chat.cpp for Qwen v1 (2024-03 to today), and demo.cpp before it.

    Every net works in its own places, and what one gives is copied to where the next expects it. Position
    and mask of the prompt are written for the first block alone; the others find them at the same address.
    In address mode ``basic`` (``--addr-mode basic``) the caches are memory of the demo's own, copied in
    before each step; the demos from 2025-06 on have no such case.
    """

    sampler = "penalty_sample_head"
    mask_bits: int | None = MASK_BITS["bf16"]
    #: Whether it can hold the caches itself.
    holds_cache = True

    def prepare(self) -> None:
        for layer in range(self.layers):
            key, value = (place.memory for place in self.cache(layer).inputs[3:5])
            if not self.cache(layer).io_alone and self.holds_cache:
                key = self.machine.allocate(key.size, f"keys of layer {layer}")
                value = self.machine.allocate(value.size, f"values of layer {layer}")
            self.keys.append(key)
            self.values.append(value)

    def prefill(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self.machine.write(self.nets["embedding"].inputs[0].memory, padded(tokens, self.seq_length))
        self.launch("embedding")
        states = self.blocks(self.nets["embedding"].outputs[0].memory)
        row = states.size // self.seq_length
        self.machine.copy(self.nets["lm_head"].inputs[0].memory, states.part((len(tokens) - 1) * row, row))
        self.launch("lm_head")

    def blocks(self, states: Memory) -> Memory:
        """Every layer over the prompt; where the last one's hidden states are."""
        length = len(self.tokens)
        for layer in range(self.layers):
            net = self.block(layer)
            self.machine.copy(net.inputs[0].memory, states)
            if layer == 0:
                self.machine.write(net.inputs[1].memory, prefill_positions(length, self.seq_length))
                self.machine.write(net.inputs[2].memory, self.prefill_mask(length, self.seq_length))
            self.launch(net.name)
            states = net.outputs[0].memory
            self.machine.copy(self.keys[layer], net.outputs[1].memory)
            self.machine.copy(self.values[layer], net.outputs[2].memory)
        return states

    def decode(self, token: int) -> None:
        self.tokens.append(token)
        self.feed(self.nets["embedding_cache"].inputs[0].memory, token)
        self.launch("embedding_cache")
        states = self.nets["embedding_cache"].outputs[0].memory
        for layer in range(self.layers):
            states = self.step(layer, states)
        self.machine.copy(self.nets["lm_head"].inputs[0].memory, states)
        self.launch("lm_head")

    def feed(self, to: Memory, token: int) -> None:
        """Bring *token* to embedding_cache."""
        self.machine.write(to, np.array([token], np.int32))

    def step(self, layer: int, states: Memory) -> Memory:
        """One layer over the latest token."""
        net, first = self.cache(layer), self.cache(0)
        self.machine.copy(net.inputs[0].memory, states)
        if layer == 0:
            self.machine.write(net.inputs[1].memory, decode_position(len(self.tokens)))
            self.machine.write(net.inputs[2].memory, self.decode_mask())
        elif net.io_alone or not self.holds_cache:
            self.machine.copy(net.inputs[1].memory, first.inputs[1].memory)
            self.machine.copy(net.inputs[2].memory, first.inputs[2].memory)
        if self.keys[layer] != net.inputs[3].memory:
            self.machine.copy(net.inputs[3].memory, self.keys[layer])
            self.machine.copy(net.inputs[4].memory, self.values[layer])
        self.launch(net.name)
        self.machine.copy(self.slot(self.keys[layer]), net.outputs[1].memory)
        self.machine.copy(self.slot(self.values[layer]), net.outputs[2].memory)
        return net.outputs[0].memory


class CopyingToken(Copying):
    """LLM-TPU's demo.cpp of 2024-02, whose lm_head gives the token: the device copies it from there."""

    sampler = ""

    def feed(self, to: Memory, token: int) -> None:
        self.machine.copy(to, self.result)


class CopyingAlone(Copying):
    """chat.cpp from 2025-06 on: the caches are block_cache's own inputs, in every address mode."""

    holds_cache = False


class OwnLength(Copying):
    """LLM-TPU's generic demos (Qwen2 to Qwen3), which read a file without heads, with a greedy head, and with
    one to sample by: a dynamic prefill is launched at the prompt's own length; a decode net reads where the
    one before it wrote, and writes straight into the cache. They know float16 from 2025-08 on.

    Sampling as from 2026-07 on: the sampling head is launched with the tokens that the penalty looks back
    on, however many they are. Before, it got all S places, zeros behind the text.
    """

    sampler = "sample_head"
    mask_bits = None
    own_length = True
    holds_cache = False

    def prepare(self) -> None:
        super().prepare()
        self.buffer = self.machine.allocate(
            self.nets["embedding"].outputs[0].memory.size, "the demo's buffer"
        )
        for memory in (*self.keys, *self.values):
            self.machine.write(memory, np.zeros(memory.size, np.uint8))

    def blocks(self, states: Memory) -> Memory:
        self.machine.copy(self.buffer, states)
        length, rows = len(self.tokens), len(self.tokens) if self.dynamic else self.seq_length
        row = states.size // self.seq_length
        for place in self.block(0).inputs:
            self.machine.write(place.memory, np.zeros(place.memory.size, np.uint8))
        states = self.buffer
        for layer in range(self.layers):
            net = self.block(layer)
            self.machine.copy(net.inputs[0].memory, states.part(0, length * row))
            if layer == 0:
                self.machine.write(net.inputs[1].memory, prefill_positions(length, self.seq_length))
                mask = np.full(self.seq_length**2, MASK_VALUE, np.float32)
                mask[: rows * rows] = prefill_mask(length, rows).ravel()
                self.machine.write(net.inputs[2].memory, self.masked(mask, net.inputs[2].dtype))
            shapes = (1, rows, *net.inputs[0].shape[2:]), (1, rows), (1, 1, rows, rows)
            inputs = [Argument(place.memory, shape) for place, shape in zip(net.inputs, shapes, strict=True)]
            self.machine.launch(net.name, inputs, [own(place) for place in net.outputs])
            states = net.outputs[0].memory
            for cache, output in ((self.keys, 1), (self.values, 2)):
                self.machine.copy(cache[layer], net.outputs[output].memory.part(0, length * self.unit))
        return states

    def step(self, layer: int, states: Memory) -> Memory:
        net, first = self.cache(layer), self.cache(0)
        if layer == 0:
            self.machine.write(net.inputs[1].memory, decode_position(len(self.tokens)))
            self.machine.write(net.inputs[2].memory, self.decode_mask())
        inputs = [Argument(states, net.inputs[0].shape), own(first.inputs[1]), own(first.inputs[2])]
        outputs = [own(net.outputs[0])]
        for cache, place in ((self.keys, net.outputs[1]), (self.values, net.outputs[2])):
            outputs.append(Argument(self.slot(cache[layer]), place.shape))
        self.machine.launch(net.name, [*inputs, *map(own, net.inputs[3:])], outputs)
        return net.outputs[0].memory

    def greedy(self) -> int:
        if self.fused or "greedy_head" not in self.nets:
            return super().greedy()
        net = self.nets["greedy_head"]
        self.machine.copy(net.inputs[0].memory, self.result)
        self.launch(net.name)
        return int(self.machine.read(net.outputs[0].memory).view(np.int32)[0])

    def candidates(self, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
        net = self.nets[self.sampler]
        latest = np.array([self.tokens[-sampling.last_n :]], np.int32)
        knobs = sampler_knobs(NetKind(self.sampler), sampling)
        for place, data in zip(net.inputs[1:], (latest, *knobs), strict=True):
            self.machine.write(place.memory, data)
        self.machine.copy(net.inputs[0].memory, self.result)
        inputs = [own(place) for place in net.inputs]
        inputs[1] = Argument(net.inputs[1].memory, latest.shape)
        self.machine.launch(net.name, inputs, [own(place) for place in net.outputs])
        return self.drawn_from(net)


class InPlace(DataFlow):
    """sophon-demo's qwen.py (2024-08) and LLM-TPU's demo_parallel.

    Hidden states stay in one buffer that is input and output of every layer, keys and values go straight
    into the caches. qwen.py launches a dynamic prefill at one more than the prompt's length.
    """

    own_length = True

    def prepare(self) -> None:
        allocate, nets = self.machine.allocate, self.nets
        self.places()
        self.logits_memory = allocate(nets["lm_head"].outputs[0].memory.size, "logits")
        self.position, self.mask = (allocate(p.memory.size, p.name) for p in self.block(0).inputs[1:])
        self.next_position, self.next_mask = (
            allocate(p.memory.size, f"next {p.name}") for p in self.cache(0).inputs[1:3]
        )
        for layer in range(self.layers):
            places = self.cache(layer).inputs[3:5]
            for kept, place, what in zip((self.keys, self.values), places, ("keys", "values"), strict=True):
                mine = not self.cache(layer).io_alone or self.dynamic
                memory = allocate(place.memory.size, f"{what} of layer {layer}") if mine else place.memory
                kept.append(memory)

    def places(self) -> None:
        """Where prompt, token and hidden states are."""
        allocate, nets = self.machine.allocate, self.nets
        self.ids = allocate(nets["embedding"].inputs[0].memory.size, "prompt")
        self.states = allocate(nets["embedding"].outputs[0].memory.size, "hidden states")
        self.token = allocate(nets["embedding_cache"].inputs[0].memory.size, "token")
        self.state = allocate(nets["embedding_cache"].outputs[0].memory.size, "hidden state")

    def rows(self, length: int) -> tuple[int, int]:
        """Rows of a dynamic embedding and of dynamic blocks for a prompt of *length*."""
        rows = min(length + 1, self.seq_length)
        return rows, rows

    @property
    def result(self) -> Memory:
        return self.logits_memory

    def prefill(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        length = len(tokens)
        read, rows = self.rows(length) if self.dynamic else (self.seq_length, self.seq_length)
        hidden = self.nets["embedding"].outputs[0].shape[2:]
        write, launch = self.machine.write, self.machine.launch
        write(self.ids, padded(tokens, read))
        launch("embedding", [Argument(self.ids, (1, read))], [Argument(self.states, (1, read, *hidden))])
        states = Argument(self.states, (1, rows, *hidden))
        write(self.position, prefill_positions(length, rows))
        write(self.mask, self.prefill_mask(length, rows))
        rest = [Argument(self.position, (1, rows)), Argument(self.mask, (1, 1, rows, rows))]
        for layer in range(self.layers):
            unit = self.cache(layer).outputs[1].shape[2:]
            kept = [Argument(cache[layer], (1, rows, *unit)) for cache in (self.keys, self.values)]
            launch(f"block_{layer}", [states, *rest], [states, *kept])
        row = self.states.size // self.seq_length
        self.logits_of(self.states.part((length - 1) * row, row))

    def logits_of(self, state: Memory) -> None:
        net = self.nets["lm_head"]
        output = Argument(self.logits_memory, net.outputs[0].shape)
        self.machine.launch("lm_head", [Argument(state, net.inputs[0].shape)], [output])

    def fed(self, token: int) -> Memory:
        """Where *token* is for embedding_cache: where a head left it, or written anew."""
        if self.fused:
            return self.result
        if "greedy_head" in self.nets:
            return self.nets["greedy_head"].outputs[0].memory
        self.machine.write(self.token, np.array([token], np.int32))
        return self.token

    def decode(self, token: int) -> None:
        self.tokens.append(token)
        write, launch = self.machine.write, self.machine.launch
        state = Argument(self.state, self.nets["embedding_cache"].outputs[0].shape)
        launch("embedding_cache", [Argument(self.fed(token), (1, 1))], [state])
        write(self.next_position, decode_position(len(self.tokens)))
        write(self.next_mask, self.decode_mask())
        for layer in range(self.layers):
            net = self.cache(layer)
            inputs = [
                state, Argument(self.next_position, (1, 1)), Argument(self.next_mask, net.inputs[2].shape),
                Argument(self.keys[layer], net.inputs[3].shape),
                Argument(self.values[layer], net.inputs[4].shape),
            ]  # fmt: skip
            outputs = [state] + [
                Argument(self.slot(cache[layer]), place.shape)
                for cache, place in zip((self.keys, self.values), net.outputs[1:], strict=True)
            ]
            launch(net.name, inputs, outputs)
        self.logits_of(self.state)


class Parallel(InPlace):
    """LLM-TPU's demo_parallel: the hidden states' buffer is the first block's own output, and a dynamic
    prefill is launched at exactly the prompt's length, after a whole embedding.
    """

    mask_bits = MASK_BITS["bf16"]

    def places(self) -> None:
        self.ids = self.nets["embedding"].inputs[0].memory
        self.states = self.block(0).outputs[0].memory
        self.token = self.nets["embedding_cache"].inputs[0].memory
        self.state = self.cache(0).outputs[0].memory

    def rows(self, length: int) -> tuple[int, int]:
        return self.seq_length, length

    def fed(self, token: int) -> Memory:
        self.machine.write(self.token, np.array([token], np.int32))
        return self.token


class InPlaceFloat16(InPlace):
    """sophon-demo's qwen.py of 2024-03 to 2024-07: buffers of its own, and float16's -10000 in every mask."""

    mask_bits = MASK_BITS["f16"]
