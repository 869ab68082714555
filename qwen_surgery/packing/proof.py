"""Find how a compiled net stores its weights, and prove it on that net's own bytes.

Nothing is assumed from names. Every array of the compiled net is searched for among the template's weight
expressions, evaluated on the weights that were compiled and packed by :mod:`.formats`; a plan is only given
out when

- every array is explained: by weights, by a table of the template, or as a single number or integers;
- every array has one explanation only (equal weights in two places would leave it open which belongs where);
- every element of every weight is used by the plan;
- packing the same weights by the plan gives the compiler's bytes, all of them.

Otherwise :class:`Unproven` says why, and that kind of net has to be compiled layer by layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_surgery.packing import formats
from qwen_surgery.packing.arrays import FLOATS, Array, GroupedMatMul, arrays, grouped_matmuls
from qwen_surgery.packing.container import Bmodel, Region
from qwen_surgery.packing.coverage import Coverage, ElementOrigins
from qwen_surgery.packing.expressions import (
    Expression,
    Placed,
    Stored,
    evaluate,
    read_template,
    slots,
    transpose,
)
from qwen_surgery.packing.plans import PackPlan, Placement, Plain, Quantised, Tensors, pack

if TYPE_CHECKING:
    import onnx

_MAX_HITS = 64
_PROBE = 1 << 22  # elements quantised at once while searching
_ELEMENTS = {"bf16": "<u2", "f16": "<f2", "f32": "<f4", "ui8": "u1", "si8": "u1"}


class Unproven(Exception):
    """This kind of net cannot be packed; the message says why. Compile every layer of it instead."""


@dataclass(frozen=True)
class Compiled:
    """One net as model_deploy left it: a *bmodel* of this net alone, the ``*_final.mlir`` beside it."""

    bmodel: Path
    final_mlir: Path


@dataclass(frozen=True)
class _Candidate:
    """A matrix that an array's rows may come from."""

    expression: Expression
    values: Stored  # [rows, columns]

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.array.shape


@dataclass(frozen=True)
class _Hit:
    candidate: _Candidate
    start: int
    transposed: bool = False
    symmetric: bool = False


def _matrices(expression: Expression, value: Stored) -> Iterator[_Candidate]:
    """*value* seen as matrices: vectors as one column, matrices both ways round."""
    shape = tuple(size for size in value.array.shape if size != 1)
    if len(shape) <= 1:
        count = int(np.prod(shape)) if shape else 1
        yield _Candidate(["reshape", [count, 1], expression], Stored(value.array.reshape(-1, 1), value.dtype))
        return
    if value.array.ndim > 2 or len(shape) != value.array.ndim:
        flat = [int(np.prod(shape[:-1])), int(shape[-1])]
        expression, value = ["reshape", flat, expression], Stored(value.array.reshape(flat), value.dtype)
    yield _Candidate(expression, value)
    yield _Candidate(transpose([1, 0], expression), Stored(value.array.T, value.dtype))


class _Search:
    """Looks for a compiled net's arrays among candidates."""

    def __init__(
        self, section: bytes, base: int, candidates: list[list[_Candidate]], sources: ElementOrigins
    ) -> None:
        self._section = section
        self._base = base
        self._tiers = candidates
        self._sources = sources

    def stored(self, array: Array) -> np.ndarray:
        """The compiler's elements of *array*: BF16 as uint16, other types as themselves."""
        kind = _ELEMENTS[array.type]
        count = int(np.prod(array.shape))
        return np.frombuffer(self._section, kind, count, array.address - self._base).reshape(array.shape)

    def plain(self, array: Array) -> _Hit | None:
        """Where a floating-point *array* comes from; None when nowhere, Unproven when that is not certain."""
        values, target = self.stored(array), FLOATS[array.type]
        matrix = values.reshape(-1, array.shape[-1])
        vector = max(array.shape) == values.size
        views = [(values.reshape(-1, 1), False)] if vector else [(matrix, False), (matrix.T, True)]
        for tier in self._tiers:
            hits = [
                _Hit(candidate, start, transposed)
                for candidate in tier
                for view, transposed in views
                for start in _find_plain(candidate, view, target)
            ]
            if hits:
                return self._only(hits, values.size // hits[0].candidate.shape[1])
        return None

    def grouped(self, matmul: GroupedMatMul) -> tuple[_Hit, formats.Quantisation] | None:
        """Where a grouped *matmul*'s weight comes from, and the format it is in."""
        for tier in self._tiers:
            hits = []
            for form in _forms(matmul):
                hits += [
                    (_Hit(candidate, start, symmetric=form.symmetric), form)
                    for candidate in tier
                    for start in self._find_grouped(candidate, matmul, form)
                ]
            if len({form for _, form in hits}) > 1:
                hits = [(hit, form) for hit, form in hits if self._fits_all(hit, matmul, form)]
            if hits:
                hit = self._only([hit for hit, _ in hits], matmul.weight.shape[0])
                return hit, next(form for other, form in hits if other is hit)
        return None

    def _fits_all(self, hit: _Hit, matmul: GroupedMatMul, form: formats.Quantisation) -> bool:
        """Whether every code is that of *form*. Where the extremes of each group are as far from zero one way
        as the other, as in rows of a quantised release, a few rows cannot tell symmetric from not."""
        codes, values = self.stored(matmul.weight), hit.candidate.values
        part = values.array[hit.start : hit.start + len(codes)]
        return bool((_codes(part, values.dtype, form) == codes).all())

    def _only(self, hits: list[_Hit], rows: int) -> _Hit:
        """The one explanation; several are accepted only when they read the very same elements."""
        hits = _without_mirrors(hits)
        first = hits[0]
        for other in hits[1:]:
            one, two = ((hit.candidate.expression, hit.start) for hit in (first, other))
            alike = (first.transposed, first.symmetric) == (other.transposed, other.symmetric)
            if not alike or not self._sources.same(one, two, rows):
                names = sorted(slots(one[0]) | slots(two[0]))
                raise Unproven(f"two explanations fit one compiled array (weights {', '.join(names)})")
        return first

    def _find_grouped(
        self, candidate: _Candidate, matmul: GroupedMatMul, form: formats.Quantisation
    ) -> Iterator[int]:
        codes, columns = self.stored(matmul.weight), candidate.shape[1]
        rows = codes.shape[0]
        if codes.shape[1] * 8 != columns * form.bits or columns % form.group or candidate.shape[0] < rows:
            return
        last = candidate.shape[0] - rows
        for start in _limited(_rows_like(candidate, codes[0], form, last)):
            ends = candidate.values.array[[start, start + rows - 1]]
            if (_codes(ends, candidate.values.dtype, form) == codes[[0, rows - 1]]).all():
                yield start


def _codes(values: np.ndarray, dtype: str, form: formats.Quantisation) -> np.ndarray:
    """The stored codes of *values* [rows, columns] (of *dtype*), rounded as the compiler does."""
    return formats.store_codes(formats.quantise(formats.to_float32(values, dtype), form).codes, form)


def _rows_like(candidate: _Candidate, codes: np.ndarray, form: formats.Quantisation, last: int) -> np.ndarray:
    """Rows of *candidate*, up to row *last*, whose first group is packed as the first group of *codes*."""
    found = []
    step = max(1, _PROBE // form.group)
    for first in range(0, last + 1, step):
        head = np.ascontiguousarray(candidate.values.array[first : min(first + step, last + 1), : form.group])
        packed = _codes(head, candidate.values.dtype, form)
        found.append(first + np.flatnonzero((packed == codes[: packed.shape[1]]).all(axis=1)))
    return np.concatenate(found)


def _forms(matmul: GroupedMatMul) -> list[formats.Quantisation]:
    """The formats that the codes of *matmul* may be in."""
    bits, group, scale = matmul.bits, matmul.group, FLOATS[matmul.scale.type]
    if matmul.zero is None:
        return [formats.Quantisation(bits, group, True, scale, 0, signed=True)]
    return [formats.Quantisation(bits, group, sym, scale, matmul.scale.shape[0]) for sym in (False, True)]


def _without_mirrors(hits: list[_Hit]) -> list[_Hit]:
    """Drop hits that say the same: a matrix stored by columns is its transpose stored by rows."""
    known = {json.dumps([hit.candidate.expression, hit.transposed]) for hit in hits}
    kept = []
    for hit in sorted(hits, key=lambda h: len(json.dumps(h.candidate.expression))):
        mirror = json.dumps([transpose([1, 0], hit.candidate.expression), not hit.transposed])
        if hit.candidate.expression[0] == "transpose" and mirror in known:
            continue
        kept.append(hit)
    return kept


def _find_plain(candidate: _Candidate, view: np.ndarray, target: str) -> Iterator[int]:
    """Rows of *candidate* at which *view* [rows, columns], in the format *target*, begins."""
    rows, columns = view.shape
    if candidate.shape[1] != columns or candidate.shape[0] < rows:
        return
    wanted = view.view(f"<u{view.dtype.itemsize}")
    last = candidate.shape[0] - rows
    starts = np.arange(last + 1)
    probes = [(0, 0), (rows - 1, columns - 1), (rows // 2, columns // 2), (rows // 3, columns // 3)]
    for row, column in probes:
        value = _converted(candidate, starts + row, [column], target)[:, 0]
        starts = starts[value == wanted[row, column]]
    for start in _limited(starts):
        if columns == 1:
            found = _converted(candidate, np.arange(start, start + rows), [0], target)
            if (found == wanted).all():
                yield start
            continue
        ends = np.array([start, start + rows - 1])
        if (_converted(candidate, ends, None, target) == wanted[[0, rows - 1]]).all():
            yield start


def _bits(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values)
    return values.view(f"<u{values.dtype.itemsize}")


def _converted(candidate: _Candidate, rows: np.ndarray, columns: list[int] | None, target: str) -> np.ndarray:
    values = candidate.values.array
    block = values[rows] if columns is None else values[:, columns][rows]
    return _bits(formats.convert(np.ascontiguousarray(block), candidate.values.dtype, target))


def _limited(starts: np.ndarray) -> list[int]:
    if len(starts) > _MAX_HITS:
        raise Unproven("the compiled weights repeat themselves, so it cannot be told which belongs where")
    return [int(start) for start in starts]


def _placements(
    search: _Search, mlir: str, base: int, tables: _Search
) -> tuple[list[Placement], list[Array]]:
    """Placements of every array that holds weights, and the arrays that nothing explains."""
    placements: list[Placement] = []
    taken: set[int] = set()
    for matmul in grouped_matmuls(mlir):
        if matmul.weight.address in taken:
            continue
        found = search.grouped(matmul)
        if found is not None:
            hit, form = found
            placements.append(_quantised(matmul, hit, form, base))
            taken |= {part.address for part in (matmul.weight, matmul.scale, matmul.zero) if part}
    unexplained = []
    for array in arrays(mlir):
        if array.address in taken or max(array.shape) == 1 or "i32" in array.type:
            continue
        hit_ = search.plain(array) if array.type in FLOATS else None
        if hit_ is not None:
            placements.append(_plain(array, hit_, base))
        elif array.type not in FLOATS or tables.plain(array) is None:
            unexplained.append(array)
    return placements, unexplained


def _quantised(matmul: GroupedMatMul, hit: _Hit, form: formats.Quantisation, base: int) -> Quantised:
    return Quantised(
        offset=matmul.weight.address - base,
        scales=matmul.scale.address - base,
        zeros=matmul.zero.address - base if matmul.zero else None,
        expression=hit.candidate.expression,
        shape=hit.candidate.shape,
        start=hit.start,
        stop=hit.start + matmul.weight.shape[0],
        form=form,
    )


def _plain(array: Array, hit: _Hit, base: int) -> Plain:
    rows = int(np.prod(array.shape)) // hit.candidate.shape[1]
    return Plain(
        offset=array.address - base,
        expression=hit.candidate.expression,
        shape=hit.candidate.shape,
        start=hit.start,
        stop=hit.start + rows,
        target=FLOATS[array.type],
        transposed=hit.transposed,
    )


def _candidates(expressions: dict[str, Expression], read: Any) -> list[_Candidate]:
    """Candidate matrices of *expressions*, each distinct matrix once."""
    result: dict[str, _Candidate] = {}
    for expression in expressions.values():
        for candidate in _matrices(expression, evaluate(expression, read)):
            result.setdefault(json.dumps(candidate.expression), candidate)
    return list(result.values())


def _check_bytes(plan: PackPlan, tensors: Tensors, section: bytes) -> None:
    """Raise Unproven unless packing *tensors* gives the bytes of *section*."""
    wrong: list[int] = []

    def compare(offset: int, data: np.ndarray) -> None:
        packed = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        if not np.array_equal(packed, np.frombuffer(section, np.uint8, packed.size, offset)):
            wrong.append(offset)

    pack(plan, tensors, compare)
    if wrong:
        raise Unproven(f"packing gives other bytes than the compiler at offset {min(wrong)}")


def _check_check_code(parameter: dict[str, Any], bmodel: Bmodel, region: Region) -> None:
    if bytes(parameter["coeff_mem"].get("check_code", [])) != bmodel.sha256(region):
        raise Unproven("the check code of the compiled net is not the SHA-256 of its weights")
    if parameter["coeff_mem"].get("encrypt_mode"):
        raise Unproven("the compiled net's weights are encrypted")


def prove(compiled: Compiled, template: onnx.ModelProto, tensors: Tensors) -> PackPlan:
    """The proven pack plan of one kind of net.

    *compiled* is a net of that kind, compiled from *template* (weights are its inputs ``weight/<slot>``) with
    the weights *tensors* (slot -> tensor). Raises :class:`Unproven` when a byte stays unexplained or differs.
    """
    mlir = compiled.final_mlir.read_text(encoding="utf-8", errors="replace")
    with Bmodel(compiled.bmodel) as bmodel:
        if len(bmodel.nets) != 1 or len(bmodel.nets[0].get("parameter", [])) != 1:
            raise Unproven("it is compiled to several nets or stages")
        parameter = bmodel.nets[0]["parameter"][0]
        if "coeff_mem" not in parameter:
            return PackPlan(0, ())
        region = Region.of(parameter["coeff_mem"]["binary_coeff"])
        _check_check_code(parameter, bmodel, region)
        section = bmodel.read(region)
    found = read_template(template)
    base = int(parameter["coeff_mem"]["address"])
    for array in arrays(mlir):
        if not 0 <= array.address - base <= len(section) - array.nbytes:
            raise Unproven("the MLIR text and the bmodel do not belong together")
    plan = PackPlan(len(section), tuple(_explain(found, mlir, base, section, tensors)))
    _check_bytes(plan, tensors, section)
    return plan


def _explain(found: Placed, mlir: str, base: int, section: bytes, tensors: Tensors) -> list[Placement]:
    cache: dict[str, Stored] = {}
    shapes = {name: found.shapes["weight/" + name] for name in tensors}

    def read(name: str) -> Stored:
        if name not in cache:
            cache[name] = Stored(tensors[name].read_raw(), tensors[name].dtype)
        return cache[name]

    tables = [
        candidate
        for array in found.constants.values()
        for candidate in _matrices(["const", [], []], Stored(array, "F32"))
    ]
    sources = ElementOrigins(shapes)
    tiers = [_candidates(found.frontier, read), _candidates(found.inner, read)]
    search = _Search(section, base, tiers, sources)
    placements, unexplained = _placements(search, mlir, base, _Tables(section, base, [tables], sources))
    if unexplained:
        what = ", ".join(f"{'x'.join(map(str, a.shape))} {a.type}" for a in unexplained[:3])
        raise Unproven(f"{len(unexplained)} compiled arrays come from no weight and no table ({what})")
    coverage = Coverage(shapes)
    for placement in placements:
        coverage.add(placement.expression, placement.start, placement.stop)
    if coverage.unused():
        raise Unproven(f"the compiled net does not show where {', '.join(coverage.unused())} went")
    return placements


class _Tables(_Search):
    """Looks among constant tables; there, several equal explanations do no harm."""

    def plain(self, array: Array) -> _Hit | None:
        try:
            return super().plain(array)
        except Unproven:
            return _Hit(self._tiers[0][0], 0)
