"""Choose a net's integers by what a text does inside the model, a layer at a time.

``quantise:block_I`` takes the hidden states before layer I, which ``calibrate:block_I`` left, and leaves the
layer's integers; ``calibrate:block_J`` takes both and leaves the states behind it. So a build that stops goes
on with the layer it was at. States are dropped once they are used, integers stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_surgery.building.graph import Cost, Task
from qwen_surgery.building.inputs import Inputs, code_digest, task_name
from qwen_surgery.building.sizes import MB, packed_bytes, weights_of
from qwen_surgery.building.step import PLACE, Info, Needs, Step
from qwen_surgery.nets import Geometry, Net, NetKind
from qwen_surgery.packing.formats import Quantisation
from qwen_surgery.quantising import WINDOW

if TYPE_CHECKING:
    import numpy as np

    from qwen_surgery.exporting.manifest import Manifest
    from qwen_surgery.quantising.calibration import Layers

#: Hidden states before a layer, float32 [windows, L, H], in a folder of their own.
_STATES = "states.npy"
Forms = Mapping[str, Quantisation]


@dataclass(frozen=True)
class Calibration:
    """What the integers of a build are chosen by: a *text*, so many *tokens* of it at most, read by the code
    of *checkout* as *recipe* patches it, whose files have the digests *sources*."""

    checkout: Path
    recipe: str
    trust_remote_code: bool
    text: str
    tokens: int
    sources: Mapping[str, str]


@dataclass(frozen=True)
class ReadStep(Step):
    """A step that looks into the model; ``code`` is a digest of the code that does."""

    code: str
    checkout: Path = field(metadata=PLACE)
    export: Path = field(metadata=PLACE)
    trust_remote_code: bool = field(metadata=PLACE)

    def manifest(self) -> Manifest:
        from qwen_surgery.exporting.manifest import Manifest

        return Manifest.load(self.export)


@dataclass(frozen=True)
class Embed(ReadStep):
    """The hidden states before the first layer, of the first so many *tokens* of *text*."""

    text: str
    tokens: int
    window: int

    def run(self, needs: Needs, work: Path) -> Info:
        import numpy as np

        from qwen_surgery.families.family import TABLE
        from qwen_surgery.quantising import calibration
        from qwen_surgery.tokenizer import Tokenizer

        manifest = self.manifest()
        tokens = calibration.windows(Tokenizer.open(self.checkout), self.text, manifest.geometry, self.tokens)
        table = manifest.net(NetKind.EMBEDDING.value).weights[TABLE]
        np.save(work / _STATES, calibration.embedded(table, tokens))
        return {"tokens": tokens.size}


@dataclass(frozen=True)
class CalibrationStep(ReadStep):
    """A step that runs the layer of *net* on the states that the task *before* left."""

    net: str
    before: str
    recipe: str

    def states(self, needs: Needs) -> np.ndarray:
        import numpy as np

        found: np.ndarray = np.load(needs[self.before] / _STATES)
        return found

    def layers(self, manifest: Manifest, tokens: int) -> Layers:
        from qwen_surgery.checkout import Checkout
        from qwen_surgery.exporting.remote_code import require_trust
        from qwen_surgery.patching.sources import Sources
        from qwen_surgery.quantising.calibration import Layers

        checkout = Checkout.open(self.checkout)
        require_trust(self.trust_remote_code, "build", lent=checkout.lent)
        window = min(WINDOW, manifest.geometry.seq_length)
        sources = Sources.of(checkout, recipe=self.recipe, seq_length=window)
        return Layers(sources, manifest.geometry, tokens)


@dataclass(frozen=True)
class Calibrate(CalibrationStep):
    """The hidden states behind the layer of *net*, whose integers the task *chosen* left."""

    chosen: str

    def run(self, needs: Needs, work: Path) -> Info:
        import numpy as np

        from qwen_surgery.quantising import chosen
        from qwen_surgery.quantising.layerwise import states_behind

        manifest, states = self.manifest(), self.states(needs)
        weights = manifest.net(self.net).weights
        integers = chosen.refs(needs[self.chosen] / chosen.FILE, weights)
        layers = self.layers(manifest, states.shape[1])
        np.save(work / _STATES, states_behind(layers, weights, integers, states))
        return {"layer": self.net}


@dataclass(frozen=True)
class Quantise(CalibrationStep):
    """The integers of *net* in *forms*, by what it gets of the text."""

    forms: dict[str, Quantisation]

    def run(self, needs: Needs, work: Path) -> Info:
        from qwen_surgery.quantising import chosen
        from qwen_surgery.quantising.layerwise import head_integers, layer_integers

        manifest, states = self.manifest(), self.states(needs)
        entry, layers = manifest.net(self.net), self.layers(manifest, states.shape[1])
        integers = layer_integers if entry.kind.per_layer else head_integers
        found = integers(layers, entry.weights, self.forms, states)
        chosen.save(work / chosen.FILE, found)
        return {"weights": sum(one.codes.size for one in found.values())}


def chosen_task(net: Net) -> str:
    """The task that chooses the integers of *net*; a layer's two nets have one."""
    return task_name("quantise", net.name if net.layer is None else f"{NetKind.BLOCK.value}_{net.layer}")


def quantise_tasks(inputs: Inputs, calibration: Calibration, forms: Mapping[NetKind, Forms]) -> list[Task]:
    """Choose the integers of every kind in *forms*, net by net and in order."""
    made = _Tasks(inputs, calibration)
    tasks, blocks = [made.embed()], [net for net in inputs.nets if net.kind is NetKind.BLOCK]
    heads = [net for net in inputs.nets if net.kind in forms and not net.kind.per_layer]
    following = [*blocks[1:], *heads]
    for place, net in enumerate(blocks):
        tasks.append(made.quantise(net, forms[NetKind.BLOCK]))
        if place < len(following):
            tasks.append(made.calibrate(net, following[place]))
    return [*tasks, *(made.quantise(net, forms[net.kind]) for net in heads)]


@dataclass(frozen=True)
class _Tasks:
    """Makes the tasks of one build."""

    inputs: Inputs
    calibration: Calibration

    @property
    def _common(self) -> tuple[str, Path, Path, bool]:
        """The fields of :class:`ReadStep`."""
        asked = self.calibration
        code = code_digest("qwen_surgery.quantising", "qwen_surgery.packing.formats", __name__)
        return code, asked.checkout.absolute(), self.inputs.folder, asked.trust_remote_code

    def _digests(self, net: Net) -> dict[str, str]:
        return {"weights": self.inputs.weights.get(net.name, ""), **self.calibration.sources}

    def embed(self) -> Task:
        asked, table = self.calibration, next(n for n in self.inputs.nets if n.kind is NetKind.EMBEDDING)
        window = min(WINDOW, self.inputs.geometry.seq_length)
        return Task(
            task_name("calibrate", f"{NetKind.BLOCK.value}_0"),
            Embed(*self._common, asked.text, asked.tokens, window),
            {**self._digests(table), "tokenizer": _vocabulary(asked.checkout)},
            cost=Cost(400 * MB, self._states, 3.0),
            command=f"read {asked.tokens} tokens of the calibration text",
        )

    def calibrate(self, net: Net, following: Net) -> Task:
        before, chosen = task_name("calibrate", net.name), chosen_task(net)
        weights = weights_of(net.kind, self.inputs.geometry)
        return Task(
            task_name("calibrate", following.name),
            Calibrate(*self._common, net.name, before, self.calibration.recipe, chosen),
            self._digests(net),
            needs=(before, chosen),
            cost=Cost(700 * MB + 6 * weights + 3 * self._states, self._states, 4.0 + self._pass(weights)),
            command=f"run the text through {net.name} as it is quantised",
        )

    def quantise(self, net: Net, forms: Forms) -> Task:
        before = task_name("calibrate", net.name)
        return Task(
            chosen_task(net),
            Quantise(*self._common, net.name, before, self.calibration.recipe, dict(forms)),
            self._digests(net),
            needs=(before,),
            cost=self._cost(net),
            keep=True,
            command=f"choose the integers of {net.name} by what it gets of the text",
        )

    @property
    def _states(self) -> int:
        return 4 * self.calibration.tokens * self.inputs.geometry.hidden

    def _pass(self, weights: int) -> float:
        """Seconds that the text takes through so many weights."""
        return weights * self.calibration.tokens * _SECONDS_MAC

    def _cost(self, net: Net) -> Cost:
        geometry, weights = self.inputs.geometry, weights_of(net.kind, self.inputs.geometry)
        widths = _widths(net.kind, geometry)
        known = sum(width**2 for width in widths)
        memory = 700 * MB + 4 * (known + 3 * max(widths) ** 2) + 2 * self._states
        memory += 5 * weights if net.kind.per_layer else 2 * weights
        read = self._pass(known + (weights if net.kind.per_layer else 0))
        solved = sum(width**3 for width in widths) * 1.4 * _SECONDS_MAC
        rounded = weights * max(geometry.hidden, _COLUMN) * _SECONDS_MAC
        disk = packed_bytes(net.kind, geometry, self.inputs.options)
        return Cost(memory, disk, 4.0 + read + solved + rounded)


#: Seconds of one multiply-add in fp32, and the columns below which a row's work no longer shrinks.
_SECONDS_MAC, _COLUMN = 1.5e-11, 1024


def _widths(kind: NetKind, geometry: Geometry) -> list[int]:
    """The inputs that a net's matrices have, each once."""
    hidden = geometry.hidden
    if not kind.per_layer:
        return [hidden]
    return [hidden, geometry.heads * geometry.head_dim, hidden, geometry.mlp_width]


def _vocabulary(checkout: Path) -> str:
    """A digest of the tokenizer's files."""
    from qwen_surgery.tokenizer import files_of

    digest = hashlib.sha256()
    for name in files_of(checkout):
        file = checkout / name
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()
