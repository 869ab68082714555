"""Integers that were chosen for a net's weights, kept in a file until they are packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from qwen_surgery.errors import Refused
from qwen_surgery.packing.expressions import slots
from qwen_surgery.packing.formats import Quantisation
from qwen_surgery.packing.plans import Quantised
from qwen_surgery.weights.integers import Integers
from qwen_surgery.weights.quantised import fields_of

if TYPE_CHECKING:
    from qwen_surgery.packing.plans import PackPlan
    from qwen_surgery.weights import TensorRef

#: What a net's integers are called in a folder of their own.
FILE = "integers.npz"


@dataclass(frozen=True)
class ChosenRef:
    """The integers of the weight *name* of *shape*, under *slot* in *file*."""

    name: str
    shape: tuple[int, ...]
    file: Path
    slot: str

    def integers(self) -> Integers:
        """Read them. Raises Refused when the file cannot be read."""
        try:
            with np.load(self.file, allow_pickle=False) as kept:
                parts = [kept[f"{self.slot}/{part}"] for part in ("codes", "scale", "zero", "bits")]
        except (OSError, KeyError, ValueError, BadZipFile) as error:
            raise Refused(f"{self.file}: the integers of {self.name} cannot be read: {error}") from error
        codes, scale, zero, bits = parts
        return Integers(fields_of(codes, 4) if _in_pairs(codes, int(bits)) else codes, scale, zero, int(bits))


def save(file: Path, chosen: Mapping[str, Integers]) -> None:
    """Keep the integers *chosen* for slots of a net in *file*; two unsigned codes of 4 bits take
    one byte."""
    arrays: dict[str, np.ndarray] = {}
    for slot, one in chosen.items():
        codes = one.codes
        if _in_pairs(codes, one.bits):
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        parts = {"codes": codes, "scale": one.scale, "zero": one.zero, "bits": np.array(one.bits)}
        arrays |= {f"{slot}/{part}": array for part, array in parts.items()}
    with file.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def refs(file: Path, weights: Mapping[str, TensorRef]) -> dict[str, ChosenRef]:
    """What *file* keeps, by slot; *weights* are the tensors of the same net."""
    with np.load(file, allow_pickle=False) as kept:
        found = {name.rpartition("/")[0] for name in kept.files}
    return {slot: ChosenRef(weights[slot].name, weights[slot].shape, file, slot) for slot in sorted(found)}


def forms(plan: PackPlan) -> dict[str, Quantisation]:
    """Slot -> the format in which *plan* stores its integers. Raises Refused where a slot has two."""
    found: dict[str, Quantisation] = {}
    for placement in plan.placements:
        if not isinstance(placement, Quantised):
            continue
        for slot in slots(placement.expression):
            if found.setdefault(slot, placement.form) != placement.form:
                raise Refused(f"{slot} is stored in two formats, and can be quantised for one")
    return found


def _in_pairs(codes: np.ndarray, bits: int) -> bool:
    """Whether two of *codes* share a byte in the file. Signed ones do not: their signs would be lost."""
    return bits == 4 and codes.dtype == np.uint8
