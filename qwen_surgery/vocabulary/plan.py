"""The pack plan of a net extended to the full vocabulary (:mod:`qwen_surgery.vocabulary.narrow`).

Two things are shown. That the narrow plan is right was proven on bytes that the compiler made of real
weights (:mod:`qwen_surgery.packing.proof`). That it holds for the real vocabulary is shown here: the extended
net has the narrow net's arrays, each at its real size, and every byte of the probe that it was compiled from
stands where the plan puts the weights' bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qwen_surgery.packing import formats
from qwen_surgery.packing.arrays import Array, arrays_in_text
from qwen_surgery.packing.container import Bmodel, check_code, coefficients
from qwen_surgery.packing.plans import PackPlan, Placement, Quantised
from qwen_surgery.vocabulary.narrow import CannotExtend, Vocabulary
from qwen_surgery.vocabulary.probe import ProbeArray, probe


def extend_plan(
    narrow: PackPlan,
    vocabulary: Vocabulary,
    texts: tuple[str, str],
    bmodel: Path,
    probes: Sequence[ProbeArray],
) -> PackPlan:
    """The plan of the extended net in *bmodel*, proven.

    *texts* are the final MLIR of the narrow and of the extended net; *probes* what the latter was compiled
    from. Raises :class:`CannotExtend` when anything is not as expected.
    """
    with Bmodel(bmodel) as opened:
        region = coefficients(opened)
        if check_code(opened) != opened.sha256(region):
            raise CannotExtend("the check code of the extended net is not that of its weights")
        start = opened.base + region.start
        moved = _moved(texts, vocabulary, region.size)
        plan = PackPlan(region.size, tuple(_extended(p, vocabulary, moved) for p in narrow.placements))
        section = np.memmap(bmodel, np.uint8, "r", start, (region.size,))
        _find_probes(plan, vocabulary, section, list(moved.values()), probes)
    return plan


def _base(text: str) -> int:
    found = re.search(r"module\.coeff_addr = (\d+)", text)
    if found is None:
        raise CannotExtend("the final text does not say where the weights begin")
    return int(found[1])


def _moved(texts: tuple[str, str], vocabulary: Vocabulary, size: int) -> dict[int, Array]:
    """Offset of every array of the narrow net -> that array of the extended one, its address an offset."""
    narrow, full = (arrays_in_text(text) for text in texts)
    if len(narrow) != len(full):
        raise CannotExtend("the extended net has other arrays than the narrow one")
    result = {}
    bases = [_base(text) for text in texts]
    for old, new in zip(narrow, full, strict=True):
        alike = len(old.shape) == len(new.shape) and old.type == new.type
        pairs = list(zip(old.shape, new.shape, strict=True)) if alike else []
        scaled = [a * vocabulary.full == b * vocabulary.narrow for a, b in pairs if a != b]
        if not alike or len(scaled) > 1 or not all(scaled):
            raise CannotExtend(f"an array of {old.shape} became one of {new.shape}")
        offset = new.address - bases[1]
        if not 0 <= offset <= size - new.nbytes:
            raise CannotExtend("an array of the extended net lies outside its section")
        result[old.address - bases[0]] = replace(new, address=offset)
    return result


def _extended(placement: Placement, vocabulary: Vocabulary, moved: Mapping[int, Array]) -> Placement:
    def at(offset: int) -> int:
        if offset not in moved:
            raise CannotExtend("the plan names a place that is no array's")
        return moved[offset].address

    shape, stop = placement.shape, placement.stop
    if vocabulary.narrow in shape:
        if (shape[0], placement.start, stop) != (vocabulary.narrow, 0, vocabulary.narrow):
            raise CannotExtend("a weight of the vocabulary is not stored as a whole")
        if placement.expression[0] != "slot":
            raise CannotExtend("a weight of the vocabulary is not stored as it is in the checkpoint")
        shape, stop = (vocabulary.full, shape[1]), vocabulary.full
    offset = at(placement.offset)
    if isinstance(placement, Quantised):
        zeros = None if placement.zeros is None else at(placement.zeros)
        scales = at(placement.scales)
        return replace(placement, offset=offset, scales=scales, zeros=zeros, shape=shape, stop=stop)
    return replace(placement, offset=offset, shape=shape, stop=stop)


def _find_probes(
    plan: PackPlan,
    vocabulary: Vocabulary,
    section: np.ndarray,
    arrays: list[Array],
    probes: Sequence[ProbeArray],
) -> None:
    """Raise :class:`CannotExtend` unless every probe stands where *plan* puts what it stands for."""
    extended = [p for p in plan.placements if vocabulary.full in p.shape]
    places = {offset: p for p in extended for offset, _ in p.extents()}
    left = list(probes)
    for array in arrays:
        placement = places.pop(array.address, None)
        if placement is None:
            continue
        fitting = [one for one in left if one.nbytes == array.nbytes]
        if len(fitting) != 1:
            raise CannotExtend(f"{len(fitting)} arrays of the lowered net may be the one of {array.shape}")
        left.remove(fitting[0])
        found = section[array.address : array.address + array.nbytes]
        by_lanes = isinstance(placement, Quantised) and array.address != placement.offset
        if not _stands(fitting[0], found, placement.form if by_lanes else None):  # type: ignore[union-attr]
            raise CannotExtend(f"the array of {array.shape} is not stored as in the narrow net")
    if left or places:
        raise CannotExtend("the plan and the lowered net have different arrays of the vocabulary")


def _stands(one: ProbeArray, found: np.ndarray, form: formats.Quantisation | None) -> bool:
    """Whether the bytes *found* are those of the probe, by lanes where *form* says so."""
    if form is not None and not form.signed:
        values = np.frombuffer(b"".join(probe(one.index, one.nbytes)), f"u{one.itemsize}").reshape(one.shape)
        packed = formats.by_lanes(values.reshape(one.shape[0], -1), form.lanes)
        return np.array_equal(packed.view(np.uint8).reshape(-1), found)
    start = 0
    for piece in probe(one.index, one.nbytes):
        if found[start : start + len(piece)].tobytes() != piece:
            return False
        start += len(piece)
    return True
