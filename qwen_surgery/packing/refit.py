"""Put another fine-tune's weights into an existing bmodel, without TPU-MLIR.

Only weights change. Whatever config.json turns into instructions or tables (sizes, rotary base, epsilon, ...)
has to be the same, and is compared. The new file is laid out again from the start, so that refitting back to
the first checkpoint gives the first file's bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from codemods.config.facts import CONFIG, ModelFacts
from qwen_surgery import families
from qwen_surgery.checkout import Checkout
from qwen_surgery.errors import Refused
from qwen_surgery.nets import NetKind
from qwen_surgery.packing import formats, sidefile
from qwen_surgery.packing.container import Bmodel, Region
from qwen_surgery.packing.expand import Piece, Progress, write
from qwen_surgery.packing.plans import Given, Quantise, Quantised
from qwen_surgery.packing.sidefile import MEASURED, RELEASE, NetWeights, SideFile
from qwen_surgery.patching.receipt import Receipt
from qwen_surgery.weights.quantised import (
    Release,
    own_integers,
    refuse_half_quantised,
    refuse_stray_bias,
    release_of,
)

if TYPE_CHECKING:
    from qwen_surgery.weights import TensorRef

#: Nets without weights of the checkpoint.
_CHOOSING = tuple(kind.value for kind in NetKind if kind.chooses)
#: Gives the integers of weights for a side file and its nets' tensors, all by net and slot.
Choose = Callable[[SideFile, Mapping[str, Mapping[str, "TensorRef"]]], Mapping[str, Given]]


@dataclass(frozen=True)
class Refitted:
    """What a refit did: the file, its size in bytes, weights packed, nets without checkpoint weights."""

    path: Path
    size: int
    packed: int
    untouched: tuple[str, ...]


def _facts(checkout: Checkout) -> ModelFacts:
    """What config.json means as upstream wrote it, also when the checkout has been patched in place."""
    receipt = Receipt.load(checkout.path)
    if receipt is None or CONFIG not in receipt.files:
        return checkout.facts
    files = {**checkout.read_files(), CONFIG: receipt.original(checkout.path, CONFIG)}
    return checkout.family.facts(files)


def refuse_other_model(side: SideFile, checkout: Checkout, bmodel: Path) -> None:
    """Raise Refused when *checkout* is another model than the one *bmodel* was built from (*side*)."""
    geometry = asdict(side.geometry)
    other = asdict(checkout.geometry(side.geometry.seq_length))
    differ = [
        f"{name} {geometry[name]} / {other[name]}" for name in geometry if geometry[name] != other[name]
    ]
    config = checkout.family.compiled_facts(_facts(checkout))
    if set(config) != set(side.config):
        title = families.of_compiled_facts(side.config).title
        raise Refused(f"{checkout.path} is {checkout.family.title}, {bmodel} was built from {title}")
    stretched = side.geometry.seq_length > min(side.config["trained_length"], config["trained_length"])
    for name, value in side.config.items():
        if config[name] != value and (name != "trained_length" or stretched):
            differ.append(f"{name} {value} / {config[name]}")
    if differ:
        raise Refused(
            f"{checkout.path} is another model than {bmodel} was built from: {', '.join(differ)}",
            hint="a refit changes weights only; build a new bmodel",
        )


def _tensors(name: str, net: NetWeights, index: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    result = {}
    for slot, (tensor, shape) in net.tensors.items():
        ref = index.get(tensor)
        if ref is None:
            raise Refused(f"tensor {tensor} is missing from the checkpoint (net {name} needs it)")
        if tuple(ref.shape) != shape:
            raise Refused(
                f"{ref.file}: tensor {tensor} has shape {list(ref.shape)}, the bmodel has {list(shape)}"
            )
        result[slot] = ref
    return result


def quantised(side: SideFile) -> bool:
    """Whether any weight of the bmodel of *side* is kept as integers."""
    return any(isinstance(placement, Quantised) for plan in side.plans for placement in plan.placements)


def check_weights(bmodel: Path) -> None:
    """Raise Refused when a net's weights in *bmodel* are not the bytes its check code was made from."""
    seen: dict[Region, bytes] = {}
    with Bmodel(bmodel) as opened:
        for net in opened.nets:
            for parameter in net.get("parameter", []):
                memory = parameter.get("coeff_mem")
                if not memory or "binary_coeff" not in memory:
                    continue
                region = Region.of(memory["binary_coeff"])
                if region not in seen:
                    seen[region] = opened.sha256(region)
                if seen[region] != bytes(memory.get("check_code", [])):
                    raise Refused(f"{bmodel}: the weights of {net['name']} are damaged (check code mismatch)")


def refit(
    bmodel: Path,
    checkout: Checkout,
    index: Mapping[str, TensorRef],
    output: Path,
    *,
    quantise: Quantise = formats.quantise,
    quantizer: str = "rtn",
    choose: Choose | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Refitted:
    """Write *output*, the nets of *bmodel* with the weights of *index* (*checkout*'s), and its side file.

    Integers of a quantised checkpoint are kept. *choose*, asked when all is checked, gives those of other
    weights, *quantise* chooses what is left; *quantizer* is their name, for the side file.
    *output* may be *bmodel* itself; it is replaced whole or not at all. Raises Refused when the side file is
    missing or belongs to another file, when *bmodel* is damaged, when the checkout is another model, or when
    its integers do not fit the file's layout; ToolFailed when the disk fails.
    """
    if not bmodel.is_file():
        raise Refused(f"{bmodel}: no such file")
    if output.is_dir():
        raise Refused(f"{output} is a folder", hint="name the file to write")
    side = sidefile.load(bmodel)
    refuse_other_model(side, checkout, bmodel)
    with Bmodel(bmodel) as opened:
        names = [net["name"] for net in opened.nets]
        weighty = [net["name"] for net in opened.nets if "coeff_mem" in net["parameter"][0]]
    fixed = [name for name in weighty if name not in side.nets]
    needed = [name for name in fixed if name not in _CHOOSING]
    if needed:
        raise Refused(
            f"{bmodel}: it is not known where the weights of {', '.join(needed[:4])} lie",
            hint="their packing could not be proven at build time; build a new bmodel from the checkout",
        )
    tensors = {name: _tensors(name, net, index) for name, net in side.nets.items()}
    _refuse_extra_layers(side, index, bmodel, checkout.family.anatomy.every_layer)
    refs = {ref.name: ref for net in tensors.values() for ref in net.values()}
    refuse_half_quantised(refs.values(), checkout.family.anatomy.every_layer)
    refuse_stray_bias(index, refs)
    check_weights(bmodel)
    chosen = choose(side, tensors) if choose else {}
    pieces = [_piece(name, bmodel, side, tensors, chosen.get(name, {}), quantise) for name in names]
    side = dataclasses.replace(side, notes=_notes(side, quantizer, release_of(refs.values())))

    def record(new: Path) -> None:
        # Both heads are named while the files change places, so that a kill never parts bmodel and side file.
        both = (sidefile.head_digest(new), *sidefile.heads_of(output))
        dataclasses.replace(side, heads=both).save(output)

    written = write(output, pieces, workers=workers, progress=progress, before_replace=record)
    dataclasses.replace(side, heads=(sidefile.head_digest(output),)).save(output)
    return Refitted(output, written.size, written.packed, tuple(n for n in names if n not in side.nets))


def _notes(side: SideFile, quantizer: str, release: Release | None) -> dict[str, str]:
    notes = {**side.notes, "quantizer": quantizer}
    for old in (RELEASE, MEASURED):
        notes.pop(old, None)
    return notes if release is None else {**notes, RELEASE: str(release)}


def _piece(
    name: str,
    bmodel: Path,
    side: SideFile,
    tensors: Mapping[str, dict[str, TensorRef]],
    chosen: Given,
    quantise: Quantise,
) -> Piece:
    if name not in side.nets:
        return Piece(name, bmodel, name)
    plan = side.plans[side.nets[name].plan]
    given = {**own_integers(tensors[name]), **chosen}
    return Piece(name, bmodel, name, plan, tensors[name], pack=True, given=given, quantise=quantise)


def _refuse_extra_layers(side: SideFile, index: Mapping[str, TensorRef], bmodel: Path, prefix: str) -> None:
    known = {tensor for net in side.nets.values() for tensor, _ in net.tensors.values()}
    for name in index:
        extra = name.startswith(prefix) and name.endswith(".weight") and name not in known
        if extra:
            raise Refused(
                f"tensor {name} has no place in {bmodel}", hint="this is another model; build a new bmodel"
            )
