"""Seeded mutations of valid files: bytes flipped, cut, doubled, spliced; JSON values swapped in place."""

from __future__ import annotations

import copy
import json
import struct
from random import Random
from typing import Any

#: Stand for text that json.dumps would not write.
_TEXTS = {'"@deep@"': "[" * 3000 + "]" * 3000, '"@huge@"': "9" * 5000, '"@deeper@"': '{"a":' * 200_000}
_NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**48, 2**63, 2**64, 10**30, 10**400),
    *(0.0, 0.5, -1.5, 1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
)
_STRINGS = (
    *("", "a", "\0", "a\0b", "..", ".", "/", "../x", "/etc/hostname", "a/b", "x" * 300, "y" * 5000, "\ud800"),
    *("\n", "\x1b[2J", "0", "-1", "1e9", "F32", "BF16", "I64", "block", "slot", "concat", "null", "\u0660"),
)
_INSIDE: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": ""}, [1, 2, 3], "@deep@", "@huge@")


def value(rng: Random) -> Any:
    """Some JSON value that is likely to be wrong where it is put."""
    if rng.random() < 0.002:
        return "@deeper@"
    return copy.deepcopy(rng.choice(rng.choice((_NUMBERS, _STRINGS, _INSIDE))))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of *tree*."""
    found: list[tuple[Any, Any]] = []
    todo = [tree]
    while todo:
        inner = todo.pop()
        keys = (
            list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        )
        for key in keys:
            found.append((inner, key))
            todo.append(inner[key])
    return found


def _change(tree: Any, rng: Random) -> Any:
    places = _places(tree)
    if not places or rng.random() < 0.02:
        return value(rng)
    inner, key = rng.choice(places)
    other, elsewhere = rng.choice(places)
    what = rng.randrange(10)
    if what < 5:
        inner[key] = value(rng)
    elif what == 5:
        inner[key] = copy.deepcopy(other[elsewhere])
    elif what == 6:
        del inner[key]
    elif what == 7 and isinstance(inner, list):
        inner.insert(key, copy.deepcopy(other[elsewhere]))
    elif what == 7:
        inner[rng.choice(_STRINGS)] = inner.pop(key)
    elif isinstance(inner[key], int):
        inner[key] += rng.choice((-1, 1, 8, -8, 1000))
    else:
        inner[key] = [inner[key]] * rng.choice((1, 2, 100))
    return tree


def tree(valid: Any, rng: Random) -> bytes:
    """The text of the JSON value *valid* with one to three values changed."""
    changed = copy.deepcopy(valid)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        changed = _change(changed, rng)
    text = json.dumps(changed)
    for mark, instead in _TEXTS.items():
        text = text.replace(mark, instead)
    return text.encode()


def _span(size: int, rng: Random) -> tuple[int, int]:
    start = rng.randrange(size + 1)
    return start, min(size, start + rng.choice((1, 1, 2, 4, 8, 40, 400)))


def data(valid: bytes, rng: Random, fewest: int = 1) -> bytes:
    """The bytes *valid* with a few of them changed, cut out, doubled or moved."""
    result = bytearray(valid)
    for _ in range(rng.choice((fewest, 1, 2, 4))):
        start, stop = _span(len(result), rng)
        what = rng.randrange(12)
        if what < 4 and result:
            result[rng.randrange(len(result))] ^= 1 << rng.randrange(8)
        elif what < 6:
            result[start : start + 1] = bytes([rng.choice((0, 1, 9, 10, 34, 44, 0x7F, 0x80, 0xFF))])
        elif what < 9:
            number = rng.choice((0, 1, 4, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, len(result)))
            result[start : start + 4] = struct.pack("<I", number)
        elif what == 9:
            del result[start : len(result) if rng.random() < 0.3 else stop]
        elif what == 10:
            result[start:start] = result[start:stop]
        else:
            place = rng.randrange(len(result) + 1)
            result[place : place + stop - start] = result[start:stop]
    return bytes(result)


def json_file(valid: Any, rng: Random) -> bytes:
    """A JSON file: mostly by structure, sometimes by bytes."""
    if rng.random() < 0.85:
        return tree(valid, rng)
    return data(json.dumps(valid).encode(), rng)
