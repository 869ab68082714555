"""The full bmodel of a net derived from that of a *partner*: another net of the same table.

``embedding`` and ``embedding_cache`` look rows up in one table, S at a time or one. Compiled narrow, some
words of their descriptions and instructions differ from one another. In the full ``embedding`` (compiled, see
:mod:`.narrow`) some words differ from the narrow one's. As long as no word does both, that also tells what
TPU-MLIR writes for the full ``embedding_cache``::

                      narrow             full
    embedding           a        ->         b           (both compiled)
    embedding_cache     c        ->    a == b ? c : b   (c compiled; needs a == b or a == c)

One more kind of word is clear: an address behind the weights, which moves by as much as the weights grew.
Anything else raises :class:`CannotExtend`, and the net is extended on its own. That this gives the compiler's
bytes is a test (``tests/building/test_narrow.py``; once also run at 151,936 rows, on bm1684x and bm1688).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_surgery.packing.container import (
    Bmodel,
    Region,
    check_code,
    coefficients,
    head_size,
    regions,
    write_at,
    write_head,
)
from qwen_surgery.packing.plans import PackPlan
from qwen_surgery.vocabulary.narrow import CannotExtend

_WORD = 1 << 32


@dataclass(frozen=True)
class Known:
    """The bmodels that are there: the partner's *narrow* and *full* one, and the net's *own* narrow one."""

    narrow: Path
    full: Path
    own: Path


def derive(known: Known, plan: PackPlan, target: Path) -> None:
    """Write the net's full bmodel to *target*; where *plan* puts weights it has holes.

    Raises :class:`CannotExtend` when a word depends both on the vocabulary and on the input's length.
    """
    if plan.rest():
        raise CannotExtend("some bytes of the coefficients are no weights")
    with Bmodel(known.narrow) as narrow, Bmodel(known.full) as full, Bmodel(known.own) as own:
        _require_equal_weights(narrow, own)
        moved = coefficients(full).size - coefficients(narrow).size
        model = _value(*({**opened.model, "time": ""} for opened in (narrow, full, own)), moved=moved)
        model["time"] = own.model["time"]
        with target.open("wb", buffering=0) as file:
            base = head_size(model, paged=full.paged)
            write_head(file, model, base, full.size)
            models = (narrow.model, full.model, own.model, model)
            for found in zip(*map(regions, models), strict=True):
                places = [Region.of(binary) for binary in found]
                if places[3] != places[1]:
                    raise CannotExtend("the two nets share their instructions differently")
                if places[1] == coefficients(full):
                    continue
                parts = [opened.read(at) for opened, at in zip((narrow, full, own), places[:3], strict=True)]
                write_at(file, _words(*parts, moved=moved), base + places[1].start)
            file.truncate(base + full.size)


def _require_equal_weights(one: Bmodel, other: Bmodel) -> None:
    code = check_code(one)
    alike = bool(code) and code == check_code(other)
    if not alike or len(one.nets) != 1 or len(one.nets[0]["parameter"]) != 1:
        raise CannotExtend("the two nets hold different weights")


def _value(narrow: Any, full: Any, own: Any, *, moved: int) -> Any:
    """The description that completes three, field by field."""
    values = (narrow, full, own)
    if all(isinstance(value, Mapping) for value in values):
        if not narrow.keys() == full.keys() == own.keys():
            raise CannotExtend("the two nets' descriptions have different fields")
        return {name: _value(narrow[name], full[name], own[name], moved=moved) for name in own}
    if all(isinstance(value, list) for value in values):
        if not len(narrow) == len(full) == len(own):
            raise CannotExtend("the two nets' descriptions have lists of different lengths")
        return [_value(*trio, moved=moved) for trio in zip(*values, strict=True)]
    if narrow == full:
        return own
    if narrow == own:
        return full
    if all(type(value) is int for value in values) and full - narrow == moved:
        return own + moved
    raise CannotExtend(f"{narrow!r} became {full!r} in the partner, and here it is {own!r}")


def _words(narrow: bytes, full: bytes, own: bytes, *, moved: int) -> bytes:
    """The region that completes three, 32 bits at a time."""
    if not len(narrow) == len(full) == len(own):
        raise CannotExtend("the two nets have different numbers of instructions")
    if narrow == full:
        return own
    if narrow == own:
        return full
    if len(own) % 4:
        raise CannotExtend("a region is no whole number of words")
    a, b, c = (np.frombuffer(part, "<u4").astype(np.int64) for part in (narrow, full, own))
    step = moved % _WORD
    both = (a != b) & (a != c)
    # The low half of an address; its high half, another word, must carry alike.
    shifted = ((b - a) % _WORD == step) & ((a + step >= _WORD) == (c + step >= _WORD))
    if (both & ~shifted).any():
        raise CannotExtend("an instruction depends both on the vocabulary and on the input's length")
    return np.where(both, (c + step) % _WORD, np.where(a == b, c, b)).astype("<u4").tobytes()


def copy_without_weights(source: Path, plan: PackPlan, target: Path) -> None:
    """A copy of the bmodel *source* at *target* with holes where *plan* puts weights: they take no disk."""
    with Bmodel(source) as opened, target.open("wb", buffering=0) as file:
        section = coefficients(opened)
        kept = [(0, opened.base + section.start)]
        kept += [(opened.base + section.start + start, size) for start, size in plan.rest()]
        behind = opened.base + section.start + section.size
        kept.append((behind, opened.length - behind))
        for start, size in kept:
            for piece in opened.chunks(Region(start - opened.base, size)):
                write_at(file, piece, start)
                start += len(piece)
        file.truncate(opened.length)
