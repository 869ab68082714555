"""Pack plans: where in a net's coefficient section each weight lies, and how it is packed. Plain JSON values.

A plan is found and proven on one compiled layer (:mod:`.proof`) and then applied to any other layer's
tensors, or to another fine-tune's. It holds no weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from qwen_surgery.errors import Refused
from qwen_surgery.packing import formats
from qwen_surgery.packing.coverage import whole_rows
from qwen_surgery.packing.expressions import Expression, Stored, evaluate, slots
from qwen_surgery.parsing import build, parsing, sizes, whole
from qwen_surgery.weights.integers import Integers

#: Elements handled at once: few enough to stay in a cache through all passes over them, and so many that
#: threads seldom meet where the interpreter lets one of them in.
_BLOCK = 1 << 18
#: Columns turned into rows at once.
_STRIP = 64


class StoredTensor(Protocol):
    """What packing needs of a checkpoint tensor; :class:`qwen_surgery.weights.TensorRef` is one."""

    @property
    def name(self) -> str: ...
    @property
    def file(self) -> Any: ...
    @property
    def offset(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def parts(self) -> tuple[StoredTensor, ...]: ...
    def read_raw(self) -> np.ndarray: ...


class HasIntegers(Protocol):
    """A matrix whose integers were chosen elsewhere than in the compiler, and where to read them."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def integers(self) -> Integers: ...


#: slot -> integers of a weight of one net, for the weights that are not to be rounded as the compiler does
Given = Mapping[str, HasIntegers]
#: Chooses the integers of float32 values [rows, columns], in a format.
Quantise = Callable[[np.ndarray, formats.Quantisation], Integers]
#: slot -> tensor of one net
Tensors = Mapping[str, StoredTensor]
#: Takes packed bytes and where they go, counted from the start of the coefficient section.
Sink = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class Plain:
    """Rows *start* to *stop* of the matrix *expression*, in the plain format *target* at byte *offset*;
    ``transposed`` stores them column by column."""

    offset: int
    expression: Expression
    shape: tuple[int, int]
    start: int
    stop: int
    target: str
    transposed: bool

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.shape[1] * formats.STORAGE[self.target].itemsize

    def extents(self) -> list[tuple[int, int]]:
        """(offset, size) of the runs of bytes that this placement writes."""
        return [(self.offset, self.nbytes)]


@dataclass(frozen=True)
class Quantised:
    """Rows *start* to *stop* of the matrix *expression*, quantised as *form*: codes at byte *offset*, scales
    at *scales*, zero points at *zeros*."""

    offset: int
    scales: int
    zeros: int | None
    expression: Expression
    shape: tuple[int, int]
    start: int
    stop: int
    form: formats.Quantisation

    def extents(self) -> list[tuple[int, int]]:
        """(offset, size) of the runs of bytes that this placement writes."""
        rows, columns = self.stop - self.start, self.shape[1]
        groups = rows * columns // self.form.group
        runs = [
            (self.offset, rows * columns * self.form.bits // 8),
            (self.scales, groups * formats.STORAGE[self.form.scale].itemsize),
        ]
        return runs if self.zeros is None else [*runs, (self.zeros, groups)]


Placement = Plain | Quantised


@dataclass(frozen=True)
class PackPlan:
    """How one kind of net stores its weights. ``size`` is the coefficient section's length in bytes."""

    size: int
    placements: tuple[Placement, ...]

    @property
    def slots(self) -> set[str]:
        """Every slot that the plan reads."""
        return set().union(*(slots(p.expression) for p in self.placements))

    @property
    def weights(self) -> int:
        """How many weights are packed."""
        return sum((p.stop - p.start) * p.shape[1] for p in self.placements)

    def integers(self) -> str:
        """Bits and groups of the weights kept as integers, in words; nothing where there are none."""
        widest: dict[formats.Quantisation, int] = {}
        for placement in self.placements:
            if isinstance(placement, Quantised):
                widest[placement.form] = max(placement.shape[1], widest.get(placement.form, 0))
        return " and ".join(sorted({_words(form, columns) for form, columns in widest.items()}))

    def rest(self) -> list[tuple[int, int]]:
        """(offset, size) of the bytes that are the same for every layer: constants and padding."""
        runs, end = [], 0
        for offset, size in sorted(extent for p in self.placements for extent in p.extents()):
            if offset > end:
                runs.append((end, offset - end))
            end = max(end, offset + size)
        if end < self.size:
            runs.append((end, self.size - end))
        return runs

    def to_json(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "placements": [{"kind": type(p).__name__.lower(), **asdict(p)} for p in self.placements],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PackPlan:
        """Inverse of :meth:`to_json`. Raises Refused for anything that is not a plan."""
        with parsing("a pack plan"):
            plan = cls(whole(data["size"]), tuple(_placement(entry) for entry in data["placements"]))
            plan.slots  # noqa: B018  (walks every expression)
        for offset, size in (extent for p in plan.placements for extent in p.extents()):
            if offset < 0 or size <= 0 or offset + size > plan.size:
                raise Refused("a pack plan is damaged (it writes outside its section)")
        return plan


def _words(form: formats.Quantisation, columns: int) -> str:
    groups = f"groups of {form.group}" if form.group < columns else "a scale for each row"
    return f"{form.bits} bits, {groups}{', symmetric' if form.symmetric else ''}"


def _placement(data: dict[str, Any]) -> Placement:
    fields = {name: value for name, value in data.items() if name != "kind"}
    placement: Placement
    if data["kind"] == "plain":
        placement = build(Plain, fields)
        formats.STORAGE[placement.target]
    elif data["kind"] == "quantised":
        placement = build(Quantised, fields)
        _check_form(placement.form, placement.stop - placement.start, placement.shape[1])
    else:
        raise ValueError(f"unknown placement {data['kind']!r:.100}")
    rows, _columns = sizes(placement.shape)
    if not 0 <= placement.start < placement.stop <= rows:
        raise ValueError(f"rows {placement.start} to {placement.stop} of {rows}")
    return placement


def _check_form(form: formats.Quantisation, rows: int, columns: int) -> None:
    formats.STORAGE[form.scale]
    known = form.bits in (4, 8) and form.group > 0 and form.lanes > 0
    if not known or columns % form.group or rows % form.lanes:
        raise ValueError(f"no such quantisation of {rows} rows of {columns}: {form!s:.200}")


class Matrix:
    """The value of one placement's expression, by blocks of rows where it is a tensor as it lies."""

    def __init__(self, expression: Expression, shape: tuple[int, int], tensors: Tensors) -> None:
        self._direct: StoredTensor | None = None
        self._whole: Stored | None = None
        self.shape = shape
        if expression[0] == "slot" and len(tensors[expression[1]].parts) == 1:
            self._direct = tensors[expression[1]]
        else:
            with parsing("a pack plan", "its expression cannot be evaluated"):
                value = evaluate(
                    expression, lambda name: Stored(tensors[name].read_raw(), tensors[name].dtype)
                )
                self._whole = Stored(value.array.reshape(shape), value.dtype)

    def rows(self, start: int, stop: int) -> Stored:
        """Rows *start* to *stop*. Raises Refused when the shard ends too early."""
        if self._whole is not None:
            return Stored(self._whole.array[start:stop], self._whole.dtype)
        assert self._direct is not None
        ref, columns = self._direct, self.shape[1]
        kind = formats.STORAGE[ref.dtype]
        position = ref.offset + start * columns * kind.itemsize
        data = np.fromfile(ref.file, dtype=kind, count=(stop - start) * columns, offset=position)
        if data.size != (stop - start) * columns:
            raise Refused(f"tensor {ref.name}: {ref.file} ends too early", hint="the shard is truncated")
        return Stored(data.reshape(-1, columns), ref.dtype)


class Choices:
    """The integers that placements take of *given*. Keeps the last weight it has read."""

    def __init__(self, given: Given) -> None:
        self._given = given
        self._read: dict[str, Integers] = {}

    def of(self, placement: Quantised) -> Integers | None:
        """Those of its rows, in the layout of its form; None where no weight of it is given.

        Raises Refused, naming the weights, where their rows do not stay whole or the layout cannot hold them.
        """
        names = slots(placement.expression)
        if not names & set(self._given):
            return None
        said = ", ".join(sorted(self._given[slot].name for slot in names & set(self._given)))
        with parsing(said, "its integers cannot be packed"):
            if missing := sorted(names - set(self._given)):
                raise ValueError(f"{missing[0]} is stored with them and has none")
            shapes = {slot: self._given[slot].shape for slot in names}
            runs = whole_rows(placement.expression, np.arange(placement.start, placement.stop), shapes)
            if runs is None:
                raise ValueError("the net does not keep their rows whole")
            found = [formats.fitted(self._weight(slot).rows(rows), placement.form) for slot, rows in runs]
            return formats.joined(found)

    def _weight(self, slot: str) -> Integers:
        if slot not in self._read:
            self._read = {slot: self._given[slot].integers()}
        return self._read[slot]


def _blocks(start: int, stop: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK // max(1, columns))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _finite(scale: np.ndarray, tensors: Tensors, expression: Expression) -> None:
    if not np.isfinite(scale).all():
        names = ", ".join(sorted(tensors[slot].name for slot in slots(expression)))
        raise Refused(f"tensor {names} holds values that are not finite; it cannot be quantised")


def _columns(values: np.ndarray, first: int, last: int) -> np.ndarray:
    """Columns *first* to *last* as rows. numpy's own transposed copy takes five times as long."""
    strip = np.ascontiguousarray(values[:, first:last])
    result = np.empty((last - first, values.shape[0]), values.dtype)
    for index in range(last - first):
        result[index] = strip[:, index]
    return result


def _plain_jobs(placement: Plain, matrix: Matrix, sink: Sink) -> Iterator[Callable[[], None]]:
    item = formats.STORAGE[placement.target].itemsize
    rows, columns = placement.stop - placement.start, placement.shape[1]
    if not placement.transposed:

        def by_rows(first: int, last: int) -> None:
            block = matrix.rows(first, last)
            packed = formats.convert(block.array, block.dtype, placement.target)
            sink(placement.offset + (first - placement.start) * columns * item, packed)

        for first, last in _blocks(placement.start, placement.stop, columns):
            yield lambda a=first, b=last: by_rows(a, b)  # type: ignore[misc]
        return
    whole = matrix.rows(placement.start, placement.stop)

    def by_columns(first: int, last: int) -> None:
        packed = formats.convert(_columns(whole.array, first, last), whole.dtype, placement.target)
        sink(placement.offset + first * rows * item, packed)

    for first, last in ((first, min(first + _STRIP, columns)) for first in range(0, columns, _STRIP)):
        yield lambda a=first, b=last: by_columns(a, b)  # type: ignore[misc]


def _run(jobs: Iterator[Callable[[], None]], pool: ThreadPoolExecutor | None) -> None:
    if pool is None:
        for job in jobs:
            job()
        return
    for result in [pool.submit(job) for job in jobs]:
        result.result()


def _rounded(placement: Quantised, matrix: Matrix, quantise: Quantise) -> Callable[[int, int], Integers]:
    """Gives the integers that *quantise* makes of rows of *placement*."""

    def part(first: int, last: int) -> Integers:
        block = matrix.rows(placement.start + first, placement.start + last)
        values = np.ascontiguousarray(formats.to_float32(block.array, block.dtype))
        return quantise(values, placement.form)

    return part


def _pack_quantised(
    placement: Quantised,
    part: Callable[[int, int], Integers],
    tensors: Tensors,
    sink: Sink,
    pool: ThreadPoolExecutor | None,
) -> None:
    """Pack *placement*; *part* gives the integers from one of its rows to another."""
    form, columns = placement.form, placement.shape[1]
    rows = placement.stop - placement.start
    scale = np.empty((rows, columns // form.group), np.float32)
    zero = np.empty(scale.shape, np.uint8)

    def job(first: int, last: int) -> None:
        one = part(first, last)
        scale[first:last], zero[first:last] = one.scale, one.zero
        sink(placement.offset + first * columns * form.bits // 8, formats.store_codes(one.codes, form))

    _run((lambda a=a, b=b: job(a, b) for a, b in _blocks(0, rows, columns)), pool)  # type: ignore[misc]
    _finite(scale, tensors, placement.expression)
    sink(placement.scales, formats.store_scales(scale, form))
    if placement.zeros is not None:
        sink(placement.zeros, formats.by_lanes(zero, form.lanes))


def pack(
    plan: PackPlan,
    tensors: Tensors,
    sink: Sink,
    pool: ThreadPoolExecutor | None = None,
    given: Given = MappingProxyType({}),
    quantise: Quantise = formats.quantise,
) -> None:
    """Pack one net's *tensors* by *plan*, giving the bytes to *sink* (from the threads of *pool*, if given).

    Where the plan quantises a weight that *given* has the integers of, those are packed; every other one
    goes through *quantise*, which by default rounds as the compiler does. Only the plan's placements are
    written, not :meth:`PackPlan.rest`. Raises Refused for a tensor that is missing or of another shape than
    the plan was made for, values that are not finite, a shard that ends too early, or integers that the
    plan's layout cannot hold.
    """
    missing = plan.slots - set(tensors)
    if missing:
        raise Refused(f"no tensor is given for {', '.join(sorted(missing))}")
    matrices: dict[str, Matrix] = {}
    choices = Choices(given)
    for placement in sorted(plan.placements, key=lambda p: json.dumps(p.expression)):
        chosen = choices.of(placement) if isinstance(placement, Quantised) else None
        if isinstance(placement, Quantised) and chosen is not None:
            _pack_quantised(placement, chosen.run, tensors, sink, pool)
            continue
        key = json.dumps(placement.expression)
        if key not in matrices:
            matrices = {key: Matrix(placement.expression, placement.shape, tensors)}
        if isinstance(placement, Plain):
            _run(_plain_jobs(placement, matrices[key], sink), pool)
        else:
            _pack_quantised(placement, _rounded(placement, matrices[key], quantise), tensors, sink, pool)
