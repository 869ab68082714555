"""What a build step is: typed parameters and what to do with them.

A step runs in a process of its own, perhaps on another machine, so its parameters travel as JSON. Only
:func:`encode` and :func:`decode` know how.
"""

from __future__ import annotations

import importlib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from qwen_surgery.parsing import fits

#: Metadata of fields that say where something is or how to run: they don't decide the result.
PLACE: Mapping[str, Any] = {"place": True}
Needs = Mapping[str, Path]
Info = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """Base of all steps. The fields of a subclass are its parameters: plain values, paths, enums and
    dataclasses, and tuples and dictionaries of those."""

    def run(self, needs: Needs, work: Path) -> Info:
        """Do it, and say something about it in plain JSON, which goes into the task's record.

        *needs*: task -> its folder (whose name is the task's key). *work* is an empty folder on the store's
        disk; what is left in it is the result. Heavy libraries are imported inside.
        """
        raise NotImplementedError

    @property
    def action(self) -> str:
        """``module:class``, which :func:`load` takes."""
        return f"{type(self).__module__}:{type(self).__qualname__}"

    @property
    def decisive(self) -> dict[str, Any]:
        """The parameters that decide the result, as JSON."""
        return {one.name: encode(getattr(self, one.name)) for one in fields(self) if one.metadata != PLACE}


def load(action: str, parameters: Mapping[str, Any]) -> Step:
    """The step of class *action* with *parameters*, as :func:`encode` gave them."""
    module, name = action.split(":")
    step = decode(getattr(importlib.import_module(module), name), parameters)
    assert isinstance(step, Step)
    return step


def encode(value: Any) -> Any:
    """*value* as plain JSON."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value):
        return {one.name: encode(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(encode(key)): encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, value: Any) -> Any:
    """The value of type *kind* that :func:`encode` made *value* of.

    Raises TypeError, ValueError or AttributeError for a *value* that it cannot have made.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (kind,) = (one for one in inner if one is not types.NoneType)
        return None if value is None else decode(kind, value)
    if origin is tuple:
        each = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(decode(one, item) for one, item in zip(each, value, strict=True))
    if origin in (dict, Mapping):
        return {decode(inner[0], key): decode(inner[1], item) for key, item in value.items()}
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return typing.cast(type, kind)(
            **{name: decode(hints.get(name), item) for name, item in value.items()}
        )
    if isinstance(kind, type) and issubclass(kind, Path | Enum):
        return kind(value)
    if kind in (str, int, float, bool) and not fits(kind, value):
        raise TypeError(f"{value!r:.100} is no {kind.__name__}")
    return value
