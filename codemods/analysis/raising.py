"""Whether evaluating an expression may raise an error, given some that are known not to.

Expressions are the terms of :mod:`codemods.analysis.fused`. The tensors of attention have four axes and hold
numbers; nothing here holds for a number of no axes, but where it says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from codemods.analysis.effects import words

Term = tuple[Any, ...]
NONE: Term = ("constant", None)

#: Methods of any tensor of numbers that raise nothing, given nothing.
_SAFE = words("clone detach contiguous float size dim sum mean abs numel")
#: Functions of a tensor that give another of its shape.
_ALIKE = words("zeros_like ones_like as_tensor")
#: Methods that change a tensor of numbers in place, given nothing or a number.
_IN_PLACE = words("add_ sub_ mul_ neg_ zero_ fill_")
_DESCRIBED = words("shape dtype device data ndim")
_DTYPES = words(
    "float16 bfloat16 float32 float64 half float double bool int8 uint8 int16 int32 int64 long int"
)
#: Functions and methods that give a tensor of four axes, whatever they are given, unless they raise.
_MADE = words("where masked_fill expand matmul transpose softmax permute")
_ARITHMETIC = words("Add Sub Mult Div USub")
_AXES = tuple(("constant", n) for n in (0, 1)) + tuple(("USub", ("constant", n)) for n in (1, 2))


class Raising:
    """What is known: that nothing in ``results`` raises, and which of it are tensors."""

    def __init__(self, results: Iterable[Term]) -> None:
        self.used = set(_parts(tuple(results), set()))
        made = {p for p in self.used if p[:1] == ("call",) and p[1] in {"matmul", "transpose", "softmax"}}
        others = {p[2][1] for p in made if p[1] == "matmul"}
        self.tensors = made | {p[2][0] for p in made} | others

    def may(self, term: Term) -> bool:
        """Whether ``term``, evaluated, may raise; its own parts are asked one by one."""
        return term not in self.used and not self._safe(term)

    def _safe(self, term: Term) -> bool:
        head = term[0]
        if head in {"constant", "name", "slice"}:
            return True
        if head == "tuple":
            return not any(map(self.may, term[1]))
        if head in {"Is", "IsNot", "if"}:
            return not any(map(self.may, term[1:]))
        if head == "test":
            return self._decides(term[1])
        if head == "same":
            return self._has_methods(term[1]) and not any(map(self.may, term[2]))
        if head == "assert":
            return term[1][0] == "IsNot" and term[1][2] == NONE and self._has_methods(term[1][1])
        if head == "attribute":
            own = term[1] == ("name", "self") or (term[1] == ("name", "torch") and term[2] in _DTYPES)
            return own or (term[2] in _DESCRIBED and self._has_methods(term[1]))
        if head == "builtin":  # float(x.sum()): one number
            one = term[2][0] if len(term[2]) == 1 else NONE
            return term[1] in {"float", "int"} and one[:1] == ("call",) and one[1] in {"sum", "mean", "numel"}
        return self._is_tensor(term) or (head == "call" and self._measures(term))

    def _decides(self, test: Term) -> bool:
        """``test`` is no tensor: what an ``if`` asks of one raises where it has several numbers."""
        if test[0] == "Not":
            return self._decides(test[1])
        own = test[0] == "attribute" and test[1] == ("name", "self")
        return own or test[0] in {"Is", "IsNot", "constant"}

    def _has_methods(self, term: Term) -> bool:
        """A tensor, of four axes or of none."""
        return self._is_tensor(term) or (
            term in self.used and term[:2] in {("call", "full"), ("call", "tensor")}
        )

    def _measures(self, term: Term) -> bool:
        """``x.size(axis)``."""
        of, axis = term[2][:1], term[2][1:]
        return term[1] == "size" and bool(of) and self._is_tensor(of[0]) and all(a in _AXES for a in axis)

    def _is_tensor(self, term: Term) -> bool:
        """``term`` is a tensor of numbers with four axes, or as good, made in a way that raises nothing."""
        if term in self.tensors or (term in self.used and self._made(term)):
            return True
        if term[0] == "written":
            return self._is_tensor(term[2])
        if term[0] == "call" and not term[3]:
            return (
                bool(term[2])
                and self._is_tensor(term[2][0])
                and self._calls(term[1], term[2][0], term[2][1:])
            )
        if term[0] in _ARITHMETIC:
            numbers = [p for p in term[1:] if _is_number(p)]
            others = [p for p in term[1:] if p not in numbers]
            return len(others) == 1 and self._is_tensor(others[0])
        return term[0] == "part" and self._is_tensor(term[1]) and _is_part(term[2])

    def _calls(self, name: str, of: Term, rest: tuple[Term, ...]) -> bool:
        """A call that raises for no tensor ``of`` and gives another."""
        if name in {"expand_as", "type_as", "view_as"}:
            return rest == (of,)
        if name in {"view", "reshape"}:
            return rest == (("attribute", of, "shape"),)
        if name in {"transpose", "swapaxes"}:
            return len(rest) == 2 and all(axis in _AXES[2:] for axis in rest)
        return (name in _SAFE | _ALIKE and not rest) or (name in _IN_PLACE and all(map(_is_number, rest)))

    def _made(self, term: Term) -> bool:
        """``term``, which raises nothing, can be nothing but a tensor."""
        if term[0] == "if":
            return all(map(self._is_tensor, term[2:]))
        if term[0] == "own":
            return term[1] == "attn_dropout"
        if term[0] in _ARITHMETIC:
            return any(map(self._is_tensor, term[1:]))
        return term[0] == "call" and term[1] in _MADE


def _parts(term: Any, seen: set[int]) -> Iterator[Term]:
    """``term`` and every term in it, those that were ``seen`` left out."""
    if isinstance(term, tuple) and id(term) not in seen:
        seen.add(id(term))
        yield term
        for part in term:
            yield from _parts(part, seen)


def _is_number(term: Term) -> bool:
    if term[0] == "USub":
        return _is_number(term[1])
    return term[0] == "constant" and isinstance(term[1], (int, float))


def _is_part(index: Term) -> bool:
    """``...``, ``:``, or ``..., 1:2``: there whatever the sizes are."""
    if index[0] == "tuple":
        return (
            len(index[1]) == 2
            and index[1][0] == ("constant", ...)
            and index[1][1][0] == "slice"
            and _is_part(index[1][1])
        )
    if index[0] == "slice":
        return index[3] is None and all(p is None or _is_number(p) for p in index[1:3])
    return index == ("constant", ...)
