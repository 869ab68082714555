"""The arrays of a compiled net, read from the ``*_final.mlir`` that model_deploy leaves behind.

Each ``top.Weight`` line there gives an array's type and device address; the coefficient section of the bmodel
holds the same bytes at that address less the section's own.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_WEIGHT = re.compile(r'"top\.Weight"\(\).*?-> tensor<([\dx]+)x([a-z]+\d+), (\d+) : i64>')
_A16 = re.compile(r'"tpu\.A16MatMul"\([^)]*\) \{([^}]*)\} : \(([^)]*)\) ->')
_TYPE = re.compile(r"tensor<([\dx]+)x([a-z]+\d+), (\d+) : i64>|none")
_SIZES = {"bf16": 2, "f16": 2, "f32": 4, "i8": 1, "si8": 1, "ui8": 1, "i16": 2, "si16": 2, "ui16": 2}
_SIZES |= {"i32": 4, "si32": 4, "ui32": 4}
#: element types that hold weights, by the names used for plain formats
FLOATS = {"bf16": "BF16", "f16": "F16", "f32": "F32"}


@dataclass(frozen=True)
class Array:
    """One array: its device *address*, *shape* and element *type* (``bf16``, ``f32``, ``ui8``, ...)."""

    address: int
    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _SIZES[self.type]


@dataclass(frozen=True)
class GroupedMatMul:
    """The weight, scale and zero-point arrays of one 4- or 8-bit matrix product, with its attributes.

    ``zero`` is None for signed codes, which have no zero points; ``group`` is then a whole row.
    """

    weight: Array
    scale: Array
    zero: Array | None
    bits: int
    group: int


def _array(shape: str, type_: str, address: str) -> Array:
    return Array(int(address), tuple(int(size) for size in shape.split("x")), type_)


def _attribute(text: str, name: str) -> str | None:
    found = re.search(rf"\b{name} = (\w+)", text)
    return found.group(1) if found else None


def grouped_matmuls(mlir: str) -> list[GroupedMatMul]:
    """The grouped matrix products of a final MLIR text whose weight lies row by output channel."""
    result = []
    for attributes, types in _A16.findall(mlir):
        operands = [_array(*match) if match[0] else None for match in _TYPE.findall(types)]
        bits, group = _attribute(attributes, "weight_bits"), _attribute(attributes, "q_group_size")
        if len(operands) < 4 or bits is None or _attribute(attributes, "w_transpose") != "true":
            continue
        weight, scale, zero = operands[1:4]
        if weight is None or scale is None or (zero is None) != (weight.type == "si8"):
            continue
        columns = weight.shape[-1] * 8 // int(bits)
        groups = 1 if zero is None else scale.shape[-1]
        result.append(GroupedMatMul(weight, scale, zero, int(bits), int(group or 0) or columns // groups))
    return result


def arrays_in_text(mlir: str) -> list[Array]:
    """Every constant array of a final MLIR text, in the order of the text, each address once."""
    return list({int(match[2]): _array(*match) for match in _WEIGHT.findall(mlir)}.values())


def arrays(mlir: str) -> list[Array]:
    """Every constant array of a final MLIR text, by address, each address once."""
    return sorted(arrays_in_text(mlir), key=lambda array: array.address)
