"""Data from outside, taken in: whatever is wrong with it ends in one line that names the file.

A file may come from anybody. Every reader of one goes through here: :func:`parsing` is the edge at which a
value of a wrong type, size or shape becomes Refused; :func:`build` makes a record out of JSON values only
when each has the type that the record declares.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import json
import os
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from qwen_surgery.errors import Refused, SurgeryError
from qwen_surgery.files import read_regular

#: What data of a wrong type, size or depth raises in code that takes it apart. Not MemoryError: what is read
#: is limited beforehand.
DATA_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
#: Bytes of a JSON file that are read at most: as Python values they take up to thirty times as much memory.
LARGEST_JSON = 16 << 20
#: Dimensions of a tensor, and the size of each, that anything here can address.
MOST_DIMENSIONS, LARGEST_SIZE = 16, 1 << 48
_LONGEST_REASON = 200

Record = TypeVar("Record")


def reason(error: BaseException) -> str:
    """What *error* says, in one line of bounded length."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= _LONGEST_REASON else said[:_LONGEST_REASON] + "..."


@contextlib.contextmanager
def parsing(what: object, says: str = "damaged", *, hint: str = "") -> Iterator[None]:
    """Turn whatever data raises inside the block into Refused: ``WHAT: SAYS (reason)``.

    The program's own errors pass as they are.
    """
    try:
        yield
    except SurgeryError:
        raise
    except DATA_ERRORS as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise Refused(f"{what}: {says} ({kind}{reason(error)})", hint=hint) from error


def read_json(path: Path, says: str, *, limit: int = LARGEST_JSON) -> Any:
    """The JSON value of the file *path*, links followed; None when there is no such file.

    Raises Refused, ``PATH: SAYS (reason)``, when it is not JSON, or nested too deep, or over *limit* bytes.
    """
    data = read_regular(path, limit, follow=True)
    if data is None:
        return None
    with parsing(path, says):
        value = json.loads(data.decode("utf-8-sig"))
        if value is None:
            raise ValueError("it holds null")
        return value


def is_plain_name(name: object) -> TypeGuard[str]:
    """Whether *name* is the name of a file in a folder: no path, nothing that a file system cannot hold."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    try:
        return len(os.fsencode(name)) <= 255
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def inner_path(name: object) -> str:
    """*name* when it leads to a file below a folder, by plain names; raises ValueError when it does not."""
    if isinstance(name, str) and all(map(is_plain_name, name.split("/"))):
        return name
    raise ValueError(f"{name!r:.100} is no file of this folder")


def sizes(values: object) -> tuple[int, ...]:
    """*values* as a shape; raises ValueError when they are none (or so large that no file holds them)."""
    if not isinstance(values, (list, tuple)) or len(values) > MOST_DIMENSIONS:
        raise ValueError(f"{values!r:.100} is no shape")
    return tuple(whole(value) for value in values)


def whole(value: object, least: int = 0, most: int = LARGEST_SIZE) -> int:
    """*value* when it is a whole number from *least* to *most*; raises ValueError when not."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{value!r:.100} is no whole number from {least} to {most}")
    return value


def build(record: type[Record], data: Any) -> Record:
    """The dataclass *record* of the JSON object *data*: its fields, each of the type it declares.

    Knows numbers, texts, None, unions, dataclasses, mappings and tuples of these (a list is a tuple). Raises
    TypeError or ValueError for anything else, a missing or an unknown field.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"{data!r:.100} is no {record.__name__}")
    hints = _hints(typing.cast(Any, record))
    unknown = sorted(set(map(str, data)) - set(hints))
    if unknown:
        raise ValueError(f"a {record.__name__} has no {unknown[0]!r:.100}")
    return record(**{name: _of_type(hints[name], value, name) for name, value in data.items()})


@functools.cache
def _hints(record: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(record)
    return {field.name: hints[field.name] for field in dataclasses.fields(record)}


def _of_type(kind: Any, value: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_of_type(inner, item, name) for inner, item in zip(kinds, value, strict=True))
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {_of_type(arguments[0], k, name): _of_type(arguments[1], v, name) for k, v in value.items()}
    if origin is list and isinstance(value, list):
        return [_of_type(arguments[0], item, name) for item in value]
    if origin in (types.UnionType, typing.Union):
        kind = next((part for part in arguments if fits(part, value)), arguments[0])
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build(kind, value)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(value)
    if isinstance(kind, type) and fits(kind, value):
        return value
    raise TypeError(f"{name} is {value!r:.100}")


def fits(kind: Any, value: Any) -> bool:
    """Whether *value* is of the plain type *kind*; a whole number is a float too, a truth value no number."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
