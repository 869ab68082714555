"""A widened bmodel from that of a sibling: a net of the same weights with an input of another length.

``embedding`` and ``embedding_cache`` look rows up in one table, S at a time or one. Compiled narrow, some
words of their descriptions and instructions differ from one another. In the widened ``embedding`` (compiled,
see :mod:`qwen_surgery.vocabulary.narrow`) some words differ from the narrow one's. As long as no word does
both, that also tells what TPU-MLIR writes for the widened ``embedding_cache``::

                      narrow             widened
    embedding           a        ->         b           (both compiled)
    embedding_cache     c        ->    a == b ? c : b   (c compiled; needs a == b or a == c)

One more kind of word is clear: an address behind the weights, which moves by as much as the weights grew.
Anything else raises :class:`CannotWiden`, and the net is widened on its own. That this gives the compiler's
bytes is a test (``tests/building/test_narrow.py``; once also run at 151,936 rows, on bm1684x and bm1688).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_surgery.packing.container import Bmodel, Region, head_size, regions, write_at, write_head
from qwen_surgery.packing.plans import Plan
from qwen_surgery.vocabulary.narrow import CannotWiden

_WORD = 1 << 32


@dataclass(frozen=True)
class Corners:
    """The three bmodels that are there: the sibling's *narrow* and *wide* one, and the net's *own* narrow
    one.
    """

    narrow: Path
    wide: Path
    own: Path


def widen_like(corners: Corners, plan: Plan, target: Path) -> None:
    """Write the net's widened bmodel to *target*; where *plan* puts weights it has holes.

    Raises :class:`CannotWiden` when a word depends both on the vocabulary and on the input's length.
    """
    if plan.rest():
        raise CannotWiden("some bytes of the coefficients are no weights")
    with Bmodel(corners.narrow) as narrow, Bmodel(corners.wide) as wide, Bmodel(corners.own) as own:
        _require_equal_weights(narrow, own)
        moved = _coefficients(wide).size - _coefficients(narrow).size
        model = _value(*({**opened.model, "time": ""} for opened in (narrow, wide, own)), moved=moved)
        model["time"] = own.model["time"]
        with target.open("wb", buffering=0) as file:
            base = head_size(model, paged=wide.paged)
            write_head(file, model, base, wide.size)
            models = (narrow.model, wide.model, own.model, model)
            for found in zip(*map(regions, models), strict=True):
                places = [Region.of(binary) for binary in found]
                if places[3] != places[1]:
                    raise CannotWiden("the siblings share their instructions differently")
                if places[1] == _coefficients(wide):
                    continue
                parts = [opened.read(at) for opened, at in zip((narrow, wide, own), places[:3], strict=True)]
                write_at(file, _words(*parts, moved=moved), base + places[1].start)
            file.truncate(base + wide.size)


def _coefficients(opened: Bmodel) -> Region:
    return Region.of(opened.nets[0]["parameter"][0]["coeff_mem"]["binary_coeff"])


def _require_equal_weights(one: Bmodel, other: Bmodel) -> None:
    codes = [bytes(opened.nets[0]["parameter"][0]["coeff_mem"]["check_code"]) for opened in (one, other)]
    if codes[0] != codes[1] or len(one.nets) != 1 or len(one.nets[0]["parameter"]) != 1:
        raise CannotWiden("the siblings hold different weights")


def _value(narrow: Any, wide: Any, own: Any, *, moved: int) -> Any:
    """The fourth corner of three descriptions, field by field."""
    values = (narrow, wide, own)
    if all(isinstance(value, Mapping) for value in values):
        if not narrow.keys() == wide.keys() == own.keys():
            raise CannotWiden("the siblings' descriptions have different fields")
        return {name: _value(narrow[name], wide[name], own[name], moved=moved) for name in own}
    if all(isinstance(value, list) for value in values):
        if not len(narrow) == len(wide) == len(own):
            raise CannotWiden("the siblings' descriptions have lists of different lengths")
        return [_value(*trio, moved=moved) for trio in zip(*values, strict=True)]
    if narrow == wide:
        return own
    if narrow == own:
        return wide
    if all(type(value) is int for value in values) and wide - narrow == moved:
        return own + moved
    raise CannotWiden(f"{narrow!r} became {wide!r} in the sibling, and here it is {own!r}")


def _words(narrow: bytes, wide: bytes, own: bytes, *, moved: int) -> bytes:
    """The fourth corner of three regions, 32 bits at a time."""
    if not len(narrow) == len(wide) == len(own):
        raise CannotWiden("the siblings have different numbers of instructions")
    if narrow == wide:
        return own
    if narrow == own:
        return wide
    if len(own) % 4:
        raise CannotWiden("a region is no whole number of words")
    a, b, c = (np.frombuffer(part, "<u4").astype(np.int64) for part in (narrow, wide, own))
    step = moved % _WORD
    both = (a != b) & (a != c)
    # The low half of an address; its high half, another word, must carry alike.
    shifted = ((b - a) % _WORD == step) & ((a + step >= _WORD) == (c + step >= _WORD))
    if (both & ~shifted).any():
        raise CannotWiden("an instruction depends both on the vocabulary and on the input's length")
    return np.where(both, (c + step) % _WORD, np.where(a == b, c, b)).astype("<u4").tobytes()


def hollow(source: Path, plan: Plan, target: Path) -> None:
    """A copy of the bmodel *source* at *target* with holes where *plan* puts weights: they take no disk."""
    with Bmodel(source) as opened, target.open("wb", buffering=0) as file:
        section = _coefficients(opened)
        kept = [(0, opened.base + section.start)]
        kept += [(opened.base + section.start + start, size) for start, size in plan.rest()]
        behind = opened.base + section.start + section.size
        kept.append((behind, opened.length - behind))
        for start, size in kept:
            for piece in opened.chunks(Region(start - opened.base, size)):
                write_at(file, piece, start)
                start += len(piece)
        file.truncate(opened.length)
