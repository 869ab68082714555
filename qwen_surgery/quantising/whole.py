"""A whole model quantised by ``gptq`` in one go, as ``refit`` does; ``build`` has a task for each net."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_surgery.families.family import TABLE
from qwen_surgery.nets import NetKind
from qwen_surgery.quantising import WINDOW, calibration, chosen, layerwise
from qwen_surgery.quantising.calibration import Layers

if TYPE_CHECKING:
    from qwen_surgery.checkout import Checkout
    from qwen_surgery.packing.plans import Given
    from qwen_surgery.packing.sidefile import SideFile
    from qwen_surgery.quantising.layerwise import Weights

#: Calls back with (net, nets done, nets in all).
Progress = Callable[[str, int, int], None]


def quantise(
    checkout: Checkout,
    text: str,
    most: int,
    side: SideFile,
    tensors: Mapping[str, Weights],
    folder: Path,
    progress: Progress = lambda *_: None,
) -> dict[str, Given]:
    """The integers of every net of the bmodel of *side* that keeps some, by net and slot, for the weights
    *tensors* (by net and slot) of *checkout*. They go by the first *most* tokens of *text* and lie in
    *folder*. Runs the checkout's code: callers have asked for trust."""
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.tokenizer import Tokenizer

    geometry = side.geometry
    sources = Sources.of(checkout, seq_length=min(WINDOW, geometry.seq_length))
    tokens = calibration.windows(Tokenizer.open(checkout.path), text, geometry, most)
    layers = Layers(sources, geometry, tokens.shape[1])
    states = calibration.embedded(tensors[NetKind.EMBEDDING.value][TABLE], tokens)
    head = NetKind.LM_HEAD.value
    forms = {name: chosen.forms(side.plans[net.plan]) for name, net in side.nets.items()}
    names = [f"{NetKind.BLOCK.value}_{layer}" for layer in range(geometry.layers)]
    given: dict[str, Given] = {}
    for done, name in enumerate(names):
        progress(name, done, len(names) + 1)
        weights, file = tensors[name], folder / f"{name}.npz"
        chosen.save(file, layerwise.layer_integers(layers, weights, forms[name], states))
        integers = chosen.refs(file, weights)
        given[name] = given[name.replace(NetKind.BLOCK.value, NetKind.BLOCK_CACHE.value)] = integers
        if done + 1 < len(names) or forms[head]:
            states = layerwise.states_behind(layers, weights, integers, states)
    progress(head, len(names), len(names) + 1)
    if forms[head]:
        file = folder / f"{head}.npz"
        chosen.save(file, layerwise.head_integers(layers, tensors[head], forms[head], states))
        given[head] = chosen.refs(file, tensors[head])
    return given
