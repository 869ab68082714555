"""What a value in a model's forward can be, as far as reading its source tells: no tensor, no torch.

Numbers are intervals, so that a length stands for all lengths that can come. What a token passes on its way
from ids to logits is named by the step it has reached. Everything else is :data:`PLAIN`, or :class:`Odd`
where something of the way is in it in a form that is not one of the known steps.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from codemods.analysis import syntax


@dataclass(frozen=True)
class Value:
    """Base of all values."""


@dataclass(frozen=True)
class _Plain(Value):
    """Nothing of the way is in it: flags, devices, outputs that are not read."""


PLAIN = _Plain()


@dataclass(frozen=True)
class Fixed(Value):
    """None, True, False or a string."""

    value: object


@dataclass(frozen=True)
class Number(Value):
    """Any number from ``low`` to ``high``. Two with the same name in ``of`` are the same number."""

    low: float
    high: float
    of: str = ""


@dataclass(frozen=True)
class Waypoint(Value):
    """Something of the way, as it should be there. ``name`` is one of the constants below."""

    name: str


#: Token ids [1, L]; what the embedding makes of them; that, on its way into and out of one layer; out of the
#: last one; normed; logits.
IDS, EMBEDDED, INTO, OUT_OF = (
    Waypoint("ids"),
    Waypoint("embedded"),
    Waypoint("into a layer"),
    Waypoint("out of a layer"),
)
LAYERED, NORMED, LOGITS = Waypoint("out of the last layer"), Waypoint("normed"), Waypoint("logits")
#: The caller's mask in any form; rotary tables; self.h and one of it; what that and the model returned.
MASK, TABLES, LAYERS, LAYER = Waypoint("mask"), Waypoint("tables"), Waypoint("layers"), Waypoint("layer")
GIVEN, BODY = Waypoint("what a layer returned"), Waypoint("what the model returned")
#: past_key_values; one layer's; the same by a fixed number; one tensor of it; one part of a quantised one.
CACHE, UNIT, SOME_UNIT = Waypoint("cache"), Waypoint("one layer's history"), Waypoint("some layer's history")
TENSOR, PART = Waypoint("keys or values"), Waypoint("a part of them")
CONFIG, ITSELF = Waypoint("config"), Waypoint("self")

#: Those whose numbers a net must have as they are.
STATES = frozenset((EMBEDDED, INTO, OUT_OF, LAYERED, NORMED, LOGITS))
_OF_THE_WAY = STATES | {IDS, TABLES, GIVEN, BODY, LAYERS, LAYER}


@dataclass(frozen=True)
class Group(Value):
    """A tuple or list of known length."""

    items: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Each(Value):
    """A tuple or list of unknown length whose items are all alike."""

    item: Value


@dataclass(frozen=True)
class Built(Value):
    """What a constructor call made, by the class's name."""

    name: str


@dataclass(frozen=True)
class Returned(Value):
    """One of transformers' output classes: the value that counts."""

    first: Value


@dataclass(frozen=True)
class Odd(Value):
    """Something of the way that is not as it should be: where that began, and how."""

    line: int
    reason: str


NONE, TRUE, FALSE = Fixed(None), Fixed(True), Fixed(False)


def number(value: float, of: str = "") -> Number:
    return Number(value, value, of)


ONE = number(1)


def constant(value: object) -> Value:
    """A literal, or a value of config.json."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number(value)
    return Fixed(value) if value is None or isinstance(value, (bool, str)) else PLAIN


def odd_in(value: Value) -> Odd | None:
    """The first odd thing in ``value``."""
    if isinstance(value, Odd):
        return value
    inner = value.items if isinstance(value, Group) else (value.item,) if isinstance(value, Each) else ()
    return next((found for item in inner if (found := odd_in(item))), None)


def of_the_way(value: Value) -> bool:
    """Whether anything of the way is in ``value``."""
    if isinstance(value, (Group, Each)):
        return any(map(of_the_way, value.items if isinstance(value, Group) else (value.item,)))
    return isinstance(value, (Odd, Returned)) or value in _OF_THE_WAY


def masked(values: Iterable[Value]) -> bool:
    return MASK in values


def truth(value: Value) -> bool | None:
    """Whether ``value`` is true; None where that is not known."""
    if isinstance(value, Fixed):
        return bool(value.value)
    if isinstance(value, Number):
        return False if value.low == value.high == 0 else True if value.low > 0 or value.high < 0 else None
    if isinstance(value, Group):
        return bool(value.items)
    return True if value in (CACHE, UNIT, LAYERS, CONFIG) else None


def known(value: bool | None) -> Value:
    return PLAIN if value is None else Fixed(value)


def join(a: Value, b: Value, line: int, test: str) -> Value:
    """What a name holds behind a choice at ``line`` that is not decided, by ``test``."""
    if a == b:
        return a
    if isinstance(a, Number) and isinstance(b, Number):
        return Number(min(a.low, b.low), max(a.high, b.high))
    if isinstance(a, Odd) or isinstance(b, Odd):
        return a if isinstance(a, Odd) else b
    if {a, b} <= {MASK, NONE}:
        return MASK
    if isinstance(a, (Group, Each)) and isinstance(b, (Group, Each)):
        return _joined_lists(a, b, line, test)
    if of_the_way(a) or of_the_way(b):
        return Odd(line, f"what comes out depends on `{test}`")
    return PLAIN


def _joined_lists(a: Group | Each, b: Group | Each, line: int, test: str) -> Value:
    if isinstance(a, Group) and isinstance(b, Group) and len(a.items) == len(b.items):
        pairs = zip(a.items, b.items, strict=True)
        return Group(tuple(join(left, right, line, test) for left, right in pairs))
    items = {item for one in (a, b) for item in (one.items if isinstance(one, Group) else (one.item,))}
    found = list(items)
    alike = found[0] if found else PLAIN
    for item in found[1:]:
        alike = join(alike, item, line, test)
    return Each(alike)


# -- numbers -------------------------------------------------------------------------------------------------

_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Pow: lambda a, b: a**b,
}
#: Functions that are largest and smallest at the ends of an interval.
_MONOTONE: dict[str, Callable[..., float]] = {
    "log": math.log,
    "log2": math.log2,
    "sqrt": math.sqrt,
    "ceil": math.ceil,
    "floor": math.floor,
    "int": int,
    "float": float,
    "round": round,
    "max": max,
    "min": min,
}


def arithmetic(operator: ast.operator, a: Number, b: Number) -> Value:
    """``a`` and ``b`` under ``operator``, which is at its extremes where they are."""
    act = _OPERATORS.get(type(operator))
    if act is None or (isinstance(operator, (ast.Div, ast.FloorDiv)) and b.low <= 0 <= b.high):
        return PLAIN
    if isinstance(operator, ast.Pow) and a.low <= 0:
        return PLAIN
    return _ends(act, a, b)


def applied(name: str, arguments: Iterable[Value]) -> Value:
    """``name(arguments)`` for one of the functions of numbers known here; PLAIN for others."""
    given = list(arguments)
    function = _MONOTONE.get(name)
    if function is None or not given or not all(isinstance(one, Number) for one in given):
        return PLAIN
    found = given[0]
    if len(given) == 1:
        return _ends(function, found) if name not in {"max", "min"} else PLAIN
    for other in given[1:]:
        found = _ends(function, found, other) if isinstance(found, Number) else PLAIN
    return found


def _ends(function: Callable[..., float], *numbers: Value) -> Value:
    ends: list[tuple[float, ...]] = [()]
    for one in numbers:
        assert isinstance(one, Number)
        ends = [(*before, end) for before in ends for end in {one.low, one.high}]
    try:
        found = [function(*end) for end in ends]
    except (ValueError, OverflowError, ZeroDivisionError, TypeError):
        return PLAIN
    if any(isinstance(one, complex) or math.isnan(one) for one in found):
        return PLAIN
    return Number(min(found), max(found))


def compared(operator: ast.cmpop, a: Value, b: Value) -> bool | None:
    """Whether ``a operator b``; None where that is not known."""
    if isinstance(operator, (ast.Is, ast.IsNot)):
        found = _is(a, b)
    elif isinstance(operator, (ast.Eq, ast.NotEq)):
        found = _equal(a, b)
    elif isinstance(operator, (ast.In, ast.NotIn)):
        found = _in(a, b)
    elif isinstance(a, Number) and isinstance(b, Number):
        return _ordered(operator, a, b)
    else:
        return None
    negated = isinstance(operator, (ast.IsNot, ast.NotEq, ast.NotIn))
    return found if found is None else found != negated


def _is(a: Value, b: Value) -> bool | None:
    if isinstance(a, Fixed) and isinstance(b, Fixed):
        return a.value is b.value
    some, other = (a, b) if isinstance(b, Fixed) else (b, a)
    if isinstance(other, Fixed) and other.value is None:
        return None if some in (PLAIN, MASK) or isinstance(some, Odd) else False
    return None


def _equal(a: Value, b: Value) -> bool | None:
    if isinstance(a, Fixed) and isinstance(b, Fixed):
        return a.value == b.value
    if not isinstance(a, Number) or not isinstance(b, Number):
        return None
    if (a.of and a.of == b.of) or a.low == a.high == b.low == b.high:
        return True
    return False if a.high < b.low or b.high < a.low else None


def _in(a: Value, b: Value) -> bool | None:
    if not isinstance(b, Group):
        return None
    answers = [_equal(a, item) for item in b.items]
    return True if True in answers else None if None in answers else False


def _ordered(operator: ast.cmpop, a: Number, b: Number) -> bool | None:
    if isinstance(operator, (ast.Gt, ast.GtE)):
        a, b = b, a
    strict = isinstance(operator, (ast.Lt, ast.Gt))
    if a.of and a.of == b.of:
        return not strict
    if a.high < b.low or (a.high == b.low and not strict):
        return True
    return False if a.low > b.high or (a.low == b.high and strict) else None


def said(test: ast.AST, value: Callable[[ast.expr], Value]) -> str:
    """The numbers that a test compares, for people: ``kv_seq_len is 1 to 512``."""
    parts = []
    for node in syntax.walk(test):
        for side in (node.left, *node.comparators) if isinstance(node, ast.Compare) else ():
            found = value(side)
            if isinstance(found, Number) and not isinstance(side, ast.Constant):
                size = f"{found.low:g}" if found.low == found.high else f"{found.low:g} to {found.high:g}"
                parts.append(f"{ast.unparse(side)} is {size}")
    return ", ".join(dict.fromkeys(parts))


# -- lists and choices --------------------------------------------------------------------------------------

Env = dict[str, Value]


def called(value: Value) -> str:
    return value.name if isinstance(value, Waypoint) else "known"


def shown(value: Value) -> str:
    if isinstance(value, Number):
        return f"by {value.low:g} to {value.high:g}"
    return "by how much is not known"


def first(value: Value) -> Value:
    """The value that counts of what a forward returns."""
    if isinstance(value, Returned):
        return value.first
    if isinstance(value, Group) and value.items:
        return value.items[0]
    return value.item if isinstance(value, Each) else value


def element(value: Value) -> Value:
    """What one item of a list is."""
    if isinstance(value, Each):
        return value.item
    if isinstance(value, Group):
        found = value.items[0] if value.items else PLAIN
        for item in value.items[1:]:
            found = join(found, item, 1, "which item it is")
        return found
    if value == LAYERS:
        return LAYER
    return (
        UNIT if value == CACHE else value if isinstance(value, (Odd, Waypoint)) and value != MASK else PLAIN
    )


def layer_in(drawn: Value) -> bool:
    """Whether a loop goes over the layers, or over the numbers of all of them."""
    one = element(drawn)
    if drawn == LAYERS or one == LAYER:
        return True
    if isinstance(one, Number):
        return one.of == "index" and isinstance(drawn, Each) and one.high < float("inf")
    return isinstance(one, Group) and any(layer_in(Each(item)) for item in one.items)


def zipped(lists: Sequence[Value], layers: Value) -> Value:
    """Pairs of what the lists hold; an index counts the layers where one of them does."""
    items = [element(one) for one in lists]
    if LAYER in items or any(isinstance(i, Group) and LAYER in i.items for i in items):
        last = layers.high - 1 if isinstance(layers, Number) else float("inf")
        items = [Number(0, last, "index") if isinstance(i, Number) and i.of == "index" else i for i in items]
    return Each(Group(tuple(items)))


def counted(parts: Sequence[Value]) -> Value:
    """``range(...)``. From 0 to the number of layers it counts them."""
    stop = parts[0] if len(parts) == 1 else PLAIN
    if isinstance(stop, Number) and stop.low == stop.high:
        return Each(Number(0, max(0, stop.high - 1), "index" if stop.high > 1 else ""))
    return Each(PLAIN)


def only(value: Value, item: Value) -> bool:
    """``item``, or lists of nothing else."""
    if isinstance(value, Group):
        return bool(value.items) and all(only(one, item) for one in value.items)
    return only(value.item, item) if isinstance(value, Each) else value == item


def either(a: Env | None, b: Env | None, line: int, test: str) -> Env | None:
    """The names behind a choice: those of the way that comes to its end, or of both."""
    if a is None or b is None:
        return b if a is None else a
    return {name: join(a.get(name, PLAIN), b.get(name, PLAIN), line, test) for name in {**a, **b}}
