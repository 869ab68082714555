"""Read and write the Top-dialect text of one net, as TPU-MLIR's ``model_transform`` leaves it.

The text is generic MLIR: one operation a line, ``%3 = "top.Name"(%1, %2) {attrs} : (types) -> type
loc(#loc3)``, inside one module with one function, locations as aliases at the end. Only that shape is read;
anything else raises :class:`NotTopText`. Unchanged operations are written back character for character, so a
module that no pass touches comes out as it went in.

The names in the locations are what TPU-MLIR calls its tensors, and weights are looked up in the weight file
by them: a pass may drop an operation, but an operation that computes the same values must keep its location.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

_OP = re.compile(
    r'^(?P<indent>\s*)(?:(?P<results>%[\w#:]+(?:, %\w+)*) = )?"(?P<name>[\w.]+)"\((?P<operands>[^)]*)\)'
    r"(?: \{(?P<attrs>.*)\})? : \((?P<inputs>.*)\) -> (?P<outputs>.*) loc\((?P<loc>.*)\)$"
)
_RETURN = re.compile(r"^\s*return (?P<operands>[^:]*) : (?P<types>.*) loc\(.*\)$")
_LOC = re.compile(r'^(?P<alias>#loc\d*) = loc\("(?P<name>.*)"\)$')
_TENSOR = re.compile(r"^tensor<(?P<shape>(?:\d+x)*)(?P<dtype>\w+)>$")


class NotTopText(ValueError):
    """The text is not a Top-dialect module in the form this reader knows."""


@dataclass
class Op:
    """One operation. ``attrs`` maps names to raw text; ``raw`` is the original line until a field changes."""

    name: str
    result: str
    operands: list[str]
    attrs: dict[str, str]
    input_types: list[str]
    output_type: str
    loc: str
    raw: str | None = None

    def changed(self) -> None:
        """Say that a field was edited: the line is written from the fields from now on."""
        self.raw = None

    def shape(self) -> tuple[int, ...]:
        """The result's shape; raises :class:`NotTopText` when the result is not one ranked tensor."""
        return shape_of(self.output_type)

    def line(self) -> str:
        if self.raw is not None:
            return self.raw
        attrs = " {" + ", ".join(f"{k} = {v}" for k, v in self.attrs.items()) + "}" if self.attrs else ""
        return (
            f'    {self.result} = "{self.name}"({", ".join(self.operands)}){attrs} : '
            f"({', '.join(self.input_types)}) -> {self.output_type} loc({self.loc})"
        )


def shape_of(type_text: str) -> tuple[int, ...]:
    """``tensor<1x2x3xf32>`` -> ``(1, 2, 3)``."""
    match = _TENSOR.match(type_text)
    if not match:
        raise NotTopText(f"not a ranked tensor type: {type_text}")
    return tuple(int(d) for d in match["shape"].split("x") if d)


def tensor_type(shape: Iterable[int], dtype: str = "f32") -> str:
    """``(1, 2, 3)`` -> ``tensor<1x2x3xf32>``."""
    return "tensor<" + "".join(f"{d}x" for d in shape) + dtype + ">"


def split_top_level(text: str) -> list[str]:
    """Split at commas that are outside brackets and quotes."""
    parts, depth, start, quoted = [], 0, 0, False
    for i, c in enumerate(text):
        if c == '"' and (i == 0 or text[i - 1] != "\\"):
            quoted = not quoted
        elif not quoted and c in "([{<":
            depth += 1
        elif not quoted and c in ")]}>" and text[i - 1 : i] != "-":
            depth -= 1
        elif not quoted and depth == 0 and c == ",":
            parts.append(text[start:i].strip())
            start = i + 1
    if text[start:].strip():
        parts.append(text[start:].strip())
    return parts


def _attributes(text: str | None) -> dict[str, str]:
    result = {}
    for part in split_top_level(text or ""):
        key, _, value = part.partition(" = ")
        result[key] = value
    return result


@dataclass
class Module:
    """A module in order: text before the first operation, operations, return line, locations."""

    head: list[str]
    ops: list[Op]
    return_line: str
    tail: list[str]
    newline_at_end: bool = True
    _names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Module:
        """Read a module; raises :class:`NotTopText` with the line that is not understood."""
        head: list[str] = []
        ops: list[Op] = []
        return_line, tail = "", []
        for line in text.splitlines():
            if return_line:
                tail.append(line)
            elif _RETURN.match(line):
                return_line = line
            elif match := _OP.match(line):
                if not match["results"] or ":" in match["results"] or "," in match["results"]:
                    raise NotTopText(f"an operation without exactly one result: {line.strip()[:80]}")
                ops.append(
                    Op(
                        name=match["name"],
                        result=match["results"],
                        operands=[o for o in match["operands"].split(", ") if o],
                        attrs=_attributes(match["attrs"]),
                        input_types=split_top_level(match["inputs"]),
                        output_type=match["outputs"],
                        loc=match["loc"],
                        raw=line,
                    )
                )
            elif ops:
                raise NotTopText(f"line not understood: {line.strip()[:80]}")
            else:
                head.append(line)
        if not ops or not return_line:
            raise NotTopText("no function body with operations and a return")
        names = {m["alias"]: m["name"] for line in head + tail if (m := _LOC.match(line))}
        return cls(head, ops, return_line, tail, text.endswith("\n"), names)

    def text(self) -> str:
        lines = [*self.head, *(op.line() for op in self.ops), self.return_line, *self.tail]
        return "\n".join(lines) + ("\n" if self.newline_at_end else "")

    def location_name(self, op: Op) -> str:
        """The tensor name TPU-MLIR knows this operation by, or "" when it has none."""
        return self._names.get(op.loc, "")

    def producer(self, value: str) -> Op | None:
        """The operation whose result is *value*."""
        return next((op for op in self.ops if op.result == value), None)

    def shape_of(self, value: str) -> tuple[int, ...]:
        """The shape of a value; raises :class:`NotTopText` where no operation makes it."""
        op = self.producer(value)
        if op is None:
            raise NotTopText(f"nothing makes {value}")
        return op.shape()

    def readers(self) -> Counter[str]:
        """How many times each value is read, by operations and as a result."""
        return Counter([*(o for op in self.ops for o in op.operands), *self.returned()])

    def returned(self) -> list[str]:
        """The values the function returns, in order."""
        match = _RETURN.match(self.return_line)
        assert match is not None
        return [v.strip() for v in match["operands"].split(",")]

    def fresh(self) -> str:
        """A value name nothing uses yet."""
        numbers = [int(op.result[1:]) for op in self.ops if op.result[1:].isdigit()]
        return f"%{max(numbers, default=0) + 1}"

    def new_location(self, name: str) -> str:
        """An alias for a new location called *name*, written at the end of the text."""
        numbers = [int(alias[4:]) for alias in self._names if alias[4:].isdigit()]
        alias = f"#loc{max(numbers, default=0) + 1}"
        self._names[alias] = name
        self.tail.append(f'{alias} = loc("{name}")')
        return alias

    def drop_dead(self) -> int:
        """Remove operations whose result nobody uses, inputs excepted, and say how many they were."""
        removed = 0
        while True:
            used = {o for op in self.ops for o in op.operands} | set(self.returned())
            dead = [
                op for op in self.ops if op.result not in used and op.name not in ("top.Input", "top.None")
            ]
            if not dead:
                return removed
            gone = {id(op) for op in dead}
            self.ops = [op for op in self.ops if id(op) not in gone]
            removed += len(dead)
