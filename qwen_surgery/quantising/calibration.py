"""What a text does inside a model: the inputs of every matrix, a layer at a time.

The layers are the patched ones that are exported, in fp32 and with the weights that they are given: those of
the checkpoint while a layer is looked at, its integers' once they are chosen, so that the layers behind see
what the chip will give them. No more than one layer's weights and the text's hidden states are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from qwen_surgery.errors import Refused
from qwen_surgery.exporting.export import with_or_without_transformers
from qwen_surgery.exporting.model_code import ModelCode
from qwen_surgery.exporting.modules import ModuleFactory, NetModule
from qwen_surgery.families.family import HEAD
from qwen_surgery.nets import Geometry, NetKind
from qwen_surgery.quantising import WINDOW
from qwen_surgery.quantising.gptq import Hessian

if TYPE_CHECKING:
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.tokenizer import Tokenizer
    from qwen_surgery.weights import TensorRef

#: A text of fewer tokens says too little of a model.
_LEAST_TOKENS = 64
#: What a position that must not be seen adds to a score.
_CLOSED = -10000.0

#: Calls back with (windows read, windows in all).
Progress = Callable[[int, int], None]


def windows(tokenizer: Tokenizer, text: str, geometry: Geometry, most: int) -> np.ndarray:
    """The tokens of *text*, *most* of them at most, as whole windows: int64 [windows, tokens of a window].

    Raises Refused for a text that is too short, or for a tokenizer that is not this model's.
    """
    if tokenizer.size > geometry.vocab:
        raise Refused(f"the tokenizer has {tokenizer.size} tokens, the model's table {geometry.vocab} rows")
    tokens = tokenizer.encode(text)[:most]
    if len(tokens) < min(_LEAST_TOKENS, geometry.seq_length):
        raise Refused(
            f"the calibration text has {len(tokens)} tokens, at least {_LEAST_TOKENS} are needed",
            hint="give a longer text, or use --quantizer search",
        )
    size = min(WINDOW, geometry.seq_length, len(tokens))
    count = len(tokens) // size
    return np.array(tokens[: count * size], np.int64).reshape(count, size)


def embedded(table: TensorRef, tokens: np.ndarray) -> np.ndarray:
    """The hidden states before the first layer, float32 [windows, L, H]. Reads no rows but those needed."""
    words, places = np.unique(tokens, return_inverse=True)
    return table.read_rows(words)[places.reshape(tokens.shape)]


@dataclass
class _Watch:
    """What the matrices of a net take in; *inputs* are those of the window that is being read."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def on(self, net: NetModule, slots: Sequence[str]) -> None:
        for slot in slots:
            owner, _ = net.slots[slot]
            if not isinstance(owner, nn.Linear):
                raise Refused(
                    f"{slot} belongs to {type(owner).__name__}, whose inputs are not known",
                    hint="use --quantizer search",
                )
            owner.register_forward_pre_hook(self._before(slot))

    def _before(self, slot: str) -> Any:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.inputs[slot] = args[0]

        return hook

    def shared(self, slots: Sequence[str]) -> list[tuple[str, ...]]:
        """*slots* by the input that they have in common. Raises Refused for one that had none."""
        if silent := sorted(set(slots) - set(self.inputs)):
            raise Refused(
                f"{silent[0]} is used in a way that hides its inputs", hint="use --quantizer search"
            )
        found: dict[int, list[str]] = {}
        for slot in slots:
            found.setdefault(id(self.inputs[slot]), []).append(slot)
        return [tuple(each) for each in found.values()]


class Layers:
    """The layers and the final norm of one checkout, for windows of so many tokens (``L``).

    Runs the checkout's code: callers have asked for trust.
    """

    def __init__(self, sources: Sources, geometry: Geometry, tokens: int) -> None:
        self._sources, self._geometry = sources, replace(geometry, seq_length=tokens)
        self._mask = torch.triu(torch.full((1, 1, tokens, tokens), _CLOSED), diagonal=1)
        self._places = torch.arange(tokens, dtype=torch.int32)[None]

    def _net(self, kind: NetKind, installed: bool) -> NetModule:
        patched, reference = (
            ModelCode.load(files, self._sources.modeling, installed=installed)
            for files in (self._sources.patched, self._sources.reference)
        )
        return ModuleFactory(patched, reference, self._geometry).build(kind)

    def outputs(
        self, weights: Mapping[str, torch.Tensor], states: np.ndarray, progress: Progress = lambda *_: None
    ) -> np.ndarray:
        """The states [windows, L, H] behind a layer that gets *states*; *weights* are by slot."""

        def work(installed: bool) -> np.ndarray:
            run = self._net(NetKind.BLOCK, installed).load(weights)
            result = np.empty_like(states)
            for number, window in enumerate(states):
                result[number] = self._run(run, window).numpy()
                progress(number + 1, len(states))
            return result

        return with_or_without_transformers(self._sources, work)

    def hessians(
        self,
        weights: Mapping[str, torch.Tensor],
        states: np.ndarray,
        slots: Sequence[str],
        progress: Progress = lambda *_: None,
    ) -> dict[tuple[str, ...], Hessian]:
        """What the matrices *slots* of a layer take in when that gets *states*: those that have one input in
        common share what is known of it. Raises Refused where inputs cannot be seen."""

        def work(installed: bool) -> dict[tuple[str, ...], Hessian]:
            net, watch = self._net(NetKind.BLOCK, installed), _Watch()
            watch.on(net, slots)
            run = net.load(weights)
            found: dict[tuple[str, ...], Hessian] = {}
            for number, window in enumerate(states):
                self._run(run, window)
                for shared in watch.shared(slots):
                    inputs = watch.inputs[shared[0]].flatten(0, -2)
                    found.setdefault(shared, Hessian(inputs.shape[1])).add(inputs)
                watch.inputs.clear()
                progress(number + 1, len(states))
            return found

        return with_or_without_transformers(self._sources, work)

    def _run(self, block: nn.Module, window: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            states: torch.Tensor = block(torch.from_numpy(window)[None], self._places, self._mask)[0][0]
        return states

    def head_hessian(self, weights: Mapping[str, torch.Tensor], states: np.ndarray) -> Hessian:
        """What the output layer takes in behind the last layer's *states*; *weights* are the final norm's."""

        def work(installed: bool) -> Hessian:
            net = self._net(NetKind.LM_HEAD, installed)
            norm = NetModule(
                net.kind,
                net.module.get_submodule("ln_f"),
                {slot: place for slot, place in net.slots.items() if slot != HEAD},
            ).load(weights)
            found = Hessian(states.shape[-1])
            with torch.no_grad():
                for window in states:
                    found.add(norm(torch.from_numpy(window)))
            return found

        return with_or_without_transformers(self._sources, work)
