"""The side file of a bmodel: where every weight lies, how it is packed, and what was recorded at build time.

It stands beside the bmodel as ``<name>.bmodel.side.json`` and makes ``refit`` and the predictions of
``inspect`` possible without TPU-MLIR. It belongs to one bmodel: it holds the SHA-256 of that file's head,
which in turn holds the SHA-256 of every net's weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen_surgery import families
from qwen_surgery.errors import Refused
from qwen_surgery.files import replacing
from qwen_surgery.nets import Geometry
from qwen_surgery.packing.cascade import devices_of, nets_of
from qwen_surgery.packing.container import Bmodel
from qwen_surgery.packing.expand import Piece
from qwen_surgery.packing.plans import PackPlan
from qwen_surgery.parsing import build, parsing, read_json, whole

FORMAT = 1
#: Bytes. A plan takes some KB, but a constant inside an expression may have a million numbers.
_LARGEST = 64 << 20
_LONGEST = 1e12  # milliseconds that a net may be predicted to take
SUFFIX = ".side.json"
#: The note that says how the checkpoint was quantised, where the layers hold its own integers.
RELEASE = "release"
#: The note that says what a text has shown of the bmodel.
MEASURED = "measured"


@dataclass(frozen=True)
class NetWeights:
    """The weights of one net: the index of its *plan*; slot -> name and shape of the checkpoint tensor."""

    plan: int
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Prediction:
    """What TPU-MLIR predicts for one kind of net: *cycles* on the chip and *milliseconds*."""

    cycles: int
    milliseconds: float


@dataclass(frozen=True)
class SideFile:
    """The content of a side file; see the module's text.

    ``heads`` are the head digests of the bmodels it belongs to: one, but for the moment in which a refit
    replaces a file. ``config`` holds what its family compiles in (see :class:`Family`) and
    ``trained_length``. ``predictions`` are by kind of net (``block``, ``block_cache``, ...). ``notes`` is
    free text by name: mode, TPU-MLIR version, what could not be packed and why.
    """

    heads: tuple[str, ...]
    geometry: Geometry
    plans: tuple[PackPlan, ...]
    nets: Mapping[str, NetWeights]
    config: Mapping[str, Any]
    predictions: Mapping[str, Prediction] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def integers(self) -> dict[str, str]:
        """Kind of net -> bits and groups of the weights that it keeps as integers."""
        forms = {
            name.rstrip("0123456789").removesuffix("_"): said
            for name, net in self.nets.items()
            if (said := self.plans[net.plan].integers())
        }
        return {name: said for name, said in forms.items() if name not in ("block_cache", "embedding_cache")}

    def save(self, bmodel: Path) -> Path:
        """Write the side file of *bmodel*, whole or not at all; its path."""
        data = {"format": FORMAT, **asdict(self), "plans": [plan.to_json() for plan in self.plans]}
        text = json.dumps(data).encode()
        target = path_for(bmodel)
        with replacing(target, len(text)) as file:
            file.write(text)
        return target


def integers_line(integers: Mapping[str, str], notes: Mapping[str, str]) -> str:
    """What :meth:`SideFile.integers` and a side file's notes say, as one line; nothing without integers."""
    if not integers:
        return ""
    kinds = "; ".join(f"{kind} {said}" for kind, said in integers.items())
    own = f", the blocks' as the checkpoint has them ({notes[RELEASE]})" if RELEASE in notes else ""
    return f"integers: {kinds}; chosen by {notes.get('quantizer', 'rtn')}{own}"


def note(bmodel: Path, name: str, text: str) -> None:
    """Set the note *name* in the side file of *bmodel*. Raises as :func:`load` does."""
    side = load(bmodel)
    replace(side, notes={**side.notes, name: text}).save(bmodel)


def path_for(bmodel: Path) -> Path:
    """Where the side file of *bmodel* lies."""
    return bmodel.with_name(bmodel.name + SUFFIX)


def head_digest(bmodel: Path) -> str:
    """SHA-256 (hex) of everything before the binary section of *bmodel*."""
    with Bmodel(bmodel) as opened, bmodel.open("rb") as file:
        return hashlib.sha256(file.read(opened.base)).hexdigest()


def describe(
    bmodel: Path,
    pieces: Sequence[Piece],
    geometry: Geometry,
    config: Mapping[str, Any],
    *,
    predictions: Mapping[str, Prediction] | None = None,
    notes: Mapping[str, str] | None = None,
) -> SideFile:
    """The side file of *bmodel*, just written from *pieces*.

    *config* is the unpatched config.json with its silent keys written out. Pieces without plan or tensors
    are recorded as not refittable.
    """
    family = families.of(config)
    plans: list[PackPlan] = []
    nets = {}
    for piece in pieces:
        if piece.plan is None or piece.tensors is None:
            continue
        if piece.plan not in plans:
            plans.append(piece.plan)
        tensors = {slot: (ref.name, tuple(ref.shape)) for slot, ref in piece.tensors.items()}
        nets[piece.name] = NetWeights(plans.index(piece.plan), tensors)
    return SideFile(
        (head_digest(bmodel),),
        geometry,
        tuple(plans),
        nets,
        family.compiled_facts(family.facts_of(config)),
        predictions or {},
        notes or {},
    )


def _refuse_several(bmodel: Path) -> None:
    """Raise Refused for a bmodel that never had a side file, since its layers were not packed."""
    if devices_of(nets_of(bmodel)) > 1:
        raise Refused(
            f"{bmodel} is for several devices, where TPU-MLIR writes every layer: it cannot be refitted",
            hint="build it again",
        )


def load(bmodel: Path) -> SideFile:
    """The side file of *bmodel*. Raises Refused when it is missing, damaged, or belongs to another file."""
    path = path_for(bmodel)
    data = read_json(path, "not a side file", limit=_LARGEST)
    if data is None:
        _refuse_several(bmodel)
        hint = "it is written by `qwen-surgery build`; without it nobody knows where the weights lie"
        raise Refused(f"{bmodel} has no side file ({path.name})", hint=hint)
    with parsing(path):
        side = _parse(data)
    if head_digest(bmodel) not in side.heads:
        raise Refused(f"{path} belongs to another bmodel than {bmodel}", hint="build the bmodel again")
    return side


def heads_of(bmodel: Path) -> tuple[str, ...]:
    """The head digest of *bmodel*, or nothing when there is no such bmodel."""
    try:
        return (head_digest(bmodel),)
    except Refused:
        return ()


def _parse(data: dict[str, Any]) -> SideFile:
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']} is not known")
    plans = tuple(PackPlan.from_json(plan) for plan in data["plans"])
    nets = {}
    for name, net in data["nets"].items():
        weights = build(NetWeights, net)
        if plans[whole(weights.plan)].slots - set(weights.tensors):
            raise ValueError(f"net {name} lacks tensors")
        nets[name] = weights
    said = {name: value for name, value in data.items() if name != "format"}
    side = build(SideFile, {**said, "plans": plans, "nets": nets})
    families.of_compiled_facts(side.config)
    whole(side.config["trained_length"], 1)
    for prediction in side.predictions.values():
        if not (whole(prediction.cycles) and 0 < prediction.milliseconds < _LONGEST):
            raise ValueError("a prediction is no time")
    return side
