"""How a mask gets from the model's caller to the layers, and what could come between.

The classes that matter are the attention classes, the classes that make one of them, and so on up: block,
model, output head. Each hands the mask to the next one; it must be the very mask that came in. Only in the
class that makes the blocks does it change once, from ones and zeros into upstream's additive mask.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from codemods.analysis import syntax
from codemods.analysis.effects import effects, words
from codemods.analysis.source import Source, kept_on_source

MASK = "attention_mask"
#: Methods that give the same values again.
_SAME = frozenset(("float", "to", "type", "type_as", "half", "bfloat16", "contiguous", "clone", "detach"))
#: Ways to reach a method, a buffer or a name that reading the file does not show.
_HIDDEN = words(
    """
    _modules _parameters __dict__ named_modules __setattr__
    register_forward_hook register_forward_pre_hook register_module_forward_hook __getattribute__
    exec eval globals locals vars _forward_hooks _forward_pre_hooks
    """
)


@dataclass(frozen=True)
class Found:
    """Something in the way: why, and the line."""

    reason: str
    line: int


def unwrapped(node: ast.expr) -> ast.expr:
    """``x`` of ``x.clone()``, ``x.to(...)``, ``x + 0``, ``x * 1``: the same values."""
    while True:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr not in _SAME or syntax.on_torch(node):
                return node
            node = node.func.value
        elif isinstance(node, ast.BinOp) and _changes_nothing(node):
            node = node.left
        else:
            return node


def _changes_nothing(node: ast.BinOp) -> bool:
    neutral = 0 if isinstance(node.op, (ast.Add, ast.Sub)) else 1
    known = isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div))
    value = syntax.constant(node.right)
    return known and isinstance(value, (int, float)) and not isinstance(value, bool) and value == neutral


def carries(function: ast.FunctionDef, node: ast.AST | None, name: str, at: ast.stmt | None = None) -> bool:
    """Whether ``node`` is what the parameter ``name`` of ``function`` was when it was called.

    Statements that cannot run together with ``at``, or run after it, do not count.
    """
    return _carries(function, node, name, at, frozenset())


def _carries(
    function: ast.FunctionDef, node: ast.AST | None, name: str, at: ast.stmt | None, above: frozenset[str]
) -> bool:
    """As :func:`carries`; the names in ``above`` are being looked into already."""
    if not isinstance(node, ast.expr):
        return False
    node = unwrapped(node)
    if isinstance(node, ast.IfExp):
        return all(
            (syntax.is_none(arm) and _tests_none(node.test, name)) or _carries(function, arm, name, at, above)
            for arm in (node.body, node.orelse)
        )
    if not isinstance(node, ast.Name):
        return False
    if node.id in above:
        return True
    own = node.id in syntax.parameters(function)
    bound = [
        value
        for stmt, value in syntax.assignments(function.body, node.id)
        if at is None
        or not (syntax.exclusive(function.body, stmt, at) or syntax.after(function.body, stmt, at))
    ]
    if own != (node.id == name) or not (own or bound):
        return False
    return all(_carries(function, value, name, at, above | {node.id}) for value in bound)


def _tests_none(test: ast.expr, name: str) -> bool:
    return (
        isinstance(test, ast.Compare)
        and syntax.is_name(test.left, name)
        and syntax.is_none(test.comparators[0])
    )


# -- the classes of the way ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holder:
    """A class that makes others of the way: its node, its forward, and the calls that hand on to them."""

    node: ast.ClassDef
    forward: ast.FunctionDef
    calls: tuple[tuple[ast.stmt, ast.Call], ...]
    inner: ast.FunctionDef  #: the forward that the calls run
    level: int  #: 0 for what makes attention (the block), 1 for what makes that (the model), and so on


@kept_on_source
def way(source: Source, attention: ast.ClassDef) -> list[Holder]:
    """The classes that hold ``attention``, from the block upwards; none where nothing makes one.

    What makes one of them without a forward of its own is not here; :func:`tampered` finds it.
    """
    return list(_way(source, attention))


def _way(source: Source, attention: ast.ClassDef) -> Iterator[Holder]:
    seen = {attention.name}
    level, nodes = 0, [attention]
    while nodes:
        above = []
        for node in nodes:
            inner, names = _method(node, "forward"), _called(source, node)
            for maker in _makers(source, node):
                forward = _method(maker, "forward")
                if inner is None or forward is None:
                    continue
                yield Holder(maker, forward, tuple(_handing(maker, forward, names)), inner, level)
                if maker.name not in seen:
                    seen.add(maker.name)
                    above.append(maker)
        level, nodes = level + 1, above


def _called(source: Source, node: ast.ClassDef) -> set[str]:
    """The names that make one of ``node``: its own and those of its subclasses."""
    return {node.name, *(sub.name for sub in _subclasses(source, node.name))}


def _makers(source: Source, node: ast.ClassDef) -> list[ast.ClassDef]:
    names = _called(source, node)
    return [c for c in _classes(source) if c.name not in names and _makes(c, names)]


def _classes(source: Source) -> list[ast.ClassDef]:
    return [n for n in source.tree.body if isinstance(n, ast.ClassDef)]


def _subclasses(source: Source, name: str) -> list[ast.ClassDef]:
    """The classes that have the class ``name`` above them."""
    found = [c for c in _classes(source) if any(syntax.last_name(base) == name for base in c.bases)]
    return found + [below for c in found if c.name != name for below in _subclasses(source, c.name)]


def _method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    found = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == name]
    return found[-1] if found else None


def _makes(node: ast.ClassDef, names: set[str]) -> bool:
    return any(syntax.calls(node, name) for name in names)


def _handing(
    node: ast.ClassDef, forward: ast.FunctionDef, names: set[str]
) -> Iterator[tuple[ast.stmt, ast.Call]]:
    """The calls of ``forward`` that run what was made of ``names``, by attribute or out of a list."""
    held = {
        target.attr
        for stmt in syntax.walk(node)
        if isinstance(stmt, ast.Assign) and any(syntax.calls(stmt.value, name) for name in names)
        for target in stmt.targets
        if isinstance(target, ast.Attribute)
    }
    for stmt in syntax.statements(forward.body):
        for part in (
            [stmt]
            if not any(syntax.blocks(stmt))
            else [c for c in ast.iter_child_nodes(stmt) if isinstance(c, ast.expr)]
        ):
            for call in (n for n in syntax.walk(part) if isinstance(n, ast.Call)):
                function = call.func
                if isinstance(function, ast.Attribute) and syntax.is_name(function.value, "self"):
                    if function.attr in held:
                        yield stmt, call
                elif isinstance(function, ast.Subscript) or (
                    isinstance(function, ast.Name) and _drawn(forward, function.id, held)
                ):
                    yield stmt, call


def _drawn(forward: ast.FunctionDef, name: str, held: set[str]) -> bool:
    """A loop's variable, where the loop goes over something in ``held``."""
    for node in syntax.walk(forward):
        if isinstance(node, ast.For) and name in syntax.binds(node.target):
            return any(isinstance(n, ast.Attribute) and n.attr in held for n in syntax.walk(node.iter))
    return False


def given(call: ast.Call, inner: ast.FunctionDef, name: str) -> ast.expr | None:
    """What ``call`` hands on as the parameter ``name`` of ``inner``; None where that cannot be told."""
    value = syntax.keyword(call, name)
    if value is not None:
        return value
    names = syntax.parameters(inner)[1:]
    at = names.index(name) if name in names else len(call.args)
    if any(isinstance(a, ast.Starred) for a in call.args[: at + 1]) or at >= len(call.args):
        return None
    return call.args[at]


# -- what could be in the way --------------------------------------------------------------------------------


def mask_problem(source: Source, attention: ast.ClassDef, upto: int | None = None) -> Found | None:
    """Why attention is not shown to be handed the caller's mask, as upstream expands it.

    With ``upto`` only the classes of that level and below are looked at: 0 is the block alone.
    """
    holders = [h for h in way(source, attention) if upto is None or h.level <= upto]
    for holder in holders:
        written = effects(source).written(holder.forward, [MASK])
        if written:
            return Found(f"{MASK} may be changed in place in {holder.node.name}", written[0].line)
        if MASK not in syntax.parameters(holder.forward):
            return Found(f"{holder.node.name}.forward takes no {MASK}", holder.forward.lineno)
        if not holder.calls:
            return Found(f"it is not seen how {holder.node.name} runs its layers", holder.forward.lineno)
        for stmt, call in holder.calls:
            value = given(call, holder.inner, MASK)
            whole = (
                _expanded(holder.forward, value, stmt)
                if holder.level == 1
                else carries(holder.forward, value, MASK, stmt)
            )
            if not whole:
                return Found(f"{holder.node.name} hands on another mask than the caller's", call.lineno)
    return None


PAST = "layer_past"


def cache_problem(source: Source, attention: ast.ClassDef) -> Found | None:
    """Why attention is not shown to be handed each layer's whole history."""
    for holder in (h for h in way(source, attention) if h.level < 2):
        tracked = [PAST, "past_key_values"]
        for stmt, call in holder.calls:
            value = given(call, holder.inner, PAST)
            drawn = holder.level == 1 and isinstance(value, ast.Name) and _zipped(holder.forward, value.id)
            if not drawn and not (holder.level == 0 and carries(holder.forward, value, PAST, stmt)):
                return Found(f"{holder.node.name} hands on another history than the caller's", call.lineno)
        written = effects(source).written(holder.forward, tracked)
        if written:
            return Found(f"the history may be changed in place in {holder.node.name}", written[0].line)
    return None


def _zipped(forward: ast.FunctionDef, name: str) -> bool:
    """The variable of one loop over the layers and past_key_values, the caller's own or made of None."""
    bound = list(syntax.assignments(forward.body, name))
    if len(bound) != 1 or not isinstance(bound[0][0], ast.For):
        return False
    found = syntax.calls(bound[0][0].iter, "zip")
    pairs = found[0] if len(found) == 1 else None
    if pairs is None or len(pairs.args) != 2 or not syntax.is_name(pairs.args[1], "past_key_values"):
        return False
    for stmt, value in syntax.assignments(forward.body, "past_key_values"):
        tests = [
            n.test for n, arm in syntax.path_to(forward.body, stmt) if isinstance(n, ast.If) and arm == "body"
        ]
        if value is None or not any(_is_absent(test) for test in tests):
            return False
        if {n.id for n in syntax.walk(value) if isinstance(n, ast.Name)} - {
            "self",
            "len",
            "tuple",
            "range",
            "_",
            "i",
        }:
            return False
    return True


def _is_absent(test: ast.expr) -> bool:
    """``past_key_values is None``."""
    return (
        isinstance(test, ast.Compare)
        and _tests_none(test, "past_key_values")
        and isinstance(test.ops[0], ast.Is)
    )


def passed_on(source: Source, attention: ast.ClassDef, name: str) -> Found | str | None:
    """The attribute that the model hands down as ``name``; or where it does not arrive as it was; or None."""
    holders = way(source, attention)
    for level in sorted({holder.level for holder in holders}):
        found: set[str | None] = set()  # of every call at this level: an attribute, or None for the parameter
        for holder in (h for h in holders if h.level == level):
            if name in syntax.parameters(holder.forward) and (
                written := effects(source).written(holder.forward, [name])
            ):
                return Found(f"{name} may be changed in place in {holder.node.name}", written[0].line)
            for stmt, call in holder.calls:
                value = given(call, holder.inner, name)
                bare = unwrapped(value) if value is not None else None
                own = isinstance(bare, ast.Attribute) and syntax.is_name(bare.value, "self")
                found.add(bare.attr if own else None)  # type: ignore[union-attr]
                if len(found) > 1 or not (own or carries(holder.forward, value, name, stmt)):
                    return Found(f"{holder.node.name} hands on something else as {name}", call.lineno)
        if found - {None}:
            return found.pop()
    return None


def changed_buffer(source: Source, name: str) -> Found | None:
    """Where a registered buffer may get other values than it was registered with."""
    if f"@{name}" in effects(source).written_attributes:
        line = min(
            (
                w.line
                for f in effects(source).flows.values()
                for w in f.writes
                if f"@{name}" in f.same(w.roots)
            ),
            default=1,
        )
        return Found(f"the buffer {name} may be changed in place", line)
    emptied = {  # or given its own values again
        id(target)
        for node in syntax.walk(source.tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if syntax.is_none(node.value) or syntax.same(unwrapped(node.value), target)
    }
    stored = {
        id(n)
        for n in syntax.walk(source.tree)
        if isinstance(n, ast.Attribute) and not isinstance(n.ctx, ast.Load) and id(n) not in emptied
    }
    for node in syntax.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr == name and id(node) in stored:
            return Found(f"the buffer {name} is replaced", node.lineno)
        if _spoken(source).get(id(node)) == name:
            return Found(f"the buffer {name} may be replaced", node.lineno)  # type: ignore[attr-defined]
        if isinstance(node, ast.Attribute) and node.attr == "_buffers" and id(node) not in _spoken(source):
            return Found(f"_buffers may replace the buffer {name}", node.lineno)
        if isinstance(node, ast.Call) and syntax.call_name(node) in {"setattr", "delattr"}:
            label = syntax.constant(node.args[1]) if len(node.args) > 1 else None
            if not isinstance(label, str) or label == name:
                return Found(f"setattr may replace the buffer {name}", node.lineno)
    return None


@kept_on_source
def tampered(source: Source, attention: ast.ClassDef) -> Found | None:
    """Something that makes a class of the way act otherwise than its methods say."""
    return next(_tampering(source, attention), None)


#: Methods that call the model's forward from outside and that no forward calls: a runtime stands in for them.
_OUTSIDE = {"generate", "chat", "chat_stream"}


def _tampering(source: Source, attention: ast.ClassDef) -> Iterator[Found]:
    nodes = [attention, *(holder.node for holder in way(source, attention))]
    methods = {n.name for node in nodes for n in node.body if isinstance(n, ast.FunctionDef)} - _OUTSIDE
    for node in nodes:
        for sub in _subclasses(source, node.name):
            if any(
                not isinstance(n, (ast.Expr, ast.Pass))
                and (syntax.binds(n) | {getattr(n, "name", "")}) & methods
                and not _only_passes_on(n)
                for n in sub.body
            ):
                yield Found(f"{sub.name} overrides methods of {node.name}", sub.lineno)
        for method in (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name in methods):
            for decorator in method.decorator_list:
                if (
                    syntax.last_name(decorator) not in {"staticmethod", "classmethod", "property"}
                    and syntax.call_name(decorator) not in {"no_grad"}
                    and not syntax.last_name(decorator).endswith("docstrings")
                ):
                    yield Found(f"{node.name}.{method.name} is decorated", decorator.lineno)
    for node in nodes:
        yield from _unfollowed(source, node)
    names = {node.name for node in nodes}
    yield from _reached(source, names, methods)


def _only_passes_on(node: ast.stmt) -> bool:
    """``def f(self, *a, **k): return super().f(*a, **k)``."""
    if not isinstance(node, ast.FunctionDef) or node.decorator_list:
        return False
    shape, done = node.args, [s for s in node.body if not isinstance(s, ast.Pass)]
    if syntax.parameters(node) != ["self"] or shape.vararg is None or shape.kwarg is None or len(done) != 1:
        return False
    wanted = f"return super().{node.name}(*{shape.vararg.arg}, **{shape.kwarg.arg})"
    return ast.unparse(done[0]) == wanted


def _unfollowed(source: Source, node: ast.ClassDef) -> Iterator[Found]:
    """Where one of ``node`` is made, or run, in a way that :func:`way` does not follow."""
    names, makers = _called(source, node), _makers(source, node)
    for maker in makers:
        if _method(maker, "forward") is None or _method(node, "forward") is None:
            yield Found(f"it is not seen how {maker.name} runs its {node.name}", maker.lineno)
    made = {id(call.func) for maker in makers for name in names for call in syntax.calls(maker, name)}
    bases = {id(base) for c in _classes(source) for base in c.bases}
    tests = [c for name in ("isinstance", "super") for c in syntax.calls(source.tree, name)]
    followed = made | bases | _noted(source) | {id(n) for test in tests for n in syntax.walk(test)}
    for n in syntax.walk(source.tree):
        if (
            isinstance(n, ast.Name)
            and n.id in names
            and isinstance(n.ctx, ast.Load)
            and id(n) not in followed
        ):
            yield Found(f"it is not seen what uses {n.id} here", n.lineno)


@kept_on_source
def _noted(source: Source) -> set[int]:
    """Names in annotations."""
    nodes = syntax.walk(source.tree)
    notes = (getattr(n, "annotation", None) or getattr(n, "returns", None) for n in nodes)
    return {id(n) for note in notes if note is not None for n in syntax.walk(note)}


@kept_on_source
def _spoken(source: Source) -> dict[int, str]:
    """``vars(x)["name"]``, ``x.__dict__["name"]`` and the like: what reaches an attribute by its name, as
    the nodes that do, each with the name."""
    return {
        id(inner): label
        for node in syntax.walk(source.tree)
        if isinstance(node, ast.Subscript) and isinstance(label := syntax.constant(node.slice), str)
        if label not in _HIDDEN | {"_buffers"}
        for inner in (node.value, getattr(node.value, "func", None))
        if syntax.call_name(node.value) == "vars" or syntax.last_name(node.value) in {"__dict__", "_buffers"}
        if inner is not None
    }


def _reached(source: Source, names: set[str], methods: set[str]) -> Iterator[Found]:
    """What the rest of the file does to the classes called ``names`` and their ``methods``."""
    for node in syntax.walk(source.tree):
        label = _spoken(source).get(id(node))
        if label is not None and label in methods:
            yield Found(f"the method {label} is replaced", node.lineno)  # type: ignore[attr-defined]
        elif label is not None:
            continue  # an attribute that has a name: a buffer among them is looked after by its own rule
        if isinstance(node, (ast.Name, ast.Attribute)) and syntax.last_name(node) in _HIDDEN:
            yield Found(f"{syntax.last_name(node)} reaches what cannot be followed", node.lineno)
        if isinstance(node, ast.FunctionDef) and node.name in {
            "__call__",
            "__getattr__",
            "__getattribute__",
            "__setattr__",
        }:
            yield Found(f"{node.name} changes what calls and attributes mean", node.lineno)
        if isinstance(node, ast.Name) and node.id in names and not isinstance(node.ctx, ast.Load):
            yield Found(f"{node.id} is given another value", node.lineno)
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and node.attr in methods:
            yield Found(f"the method {node.attr} is replaced", node.lineno)
        if isinstance(node, ast.Call) and syntax.call_name(node) == "setattr":
            name = syntax.constant(node.args[1]) if len(node.args) > 1 else None
            if not isinstance(name, str) or name in methods:
                yield Found("setattr may replace a method", node.lineno)


# -- upstream's expansion ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    """How far a mask is from the caller's: axes put in, ones taken from it, scaled to very low numbers."""

    axes: int = 0
    inverted: bool = False
    scaled: bool = False


_DONE = _State(2, True, True)


def _expanded(forward: ast.FunctionDef, value: ast.expr | None, at: ast.stmt) -> bool:
    """Whether ``value`` is ``(1 - mask)[:, None, None, :] * lowest`` of the parameter, made once."""
    states: dict[str, _State | None] = {MASK: _State()}
    lowest: set[str] = set()
    for stmt in syntax.statements(forward.body):
        bound = syntax.binds_itself(stmt) & (set(states) | {MASK})
        if isinstance(stmt, ast.Assign) and len(stmt.targets) == 1 and isinstance(stmt.targets[0], ast.Name):
            name = stmt.targets[0].id
            if _is_lowest(stmt.value, lowest):
                lowest.add(name)
                continue
            state = _state(stmt.value, states, lowest)
            around = syntax.path_to(forward.body, stmt)
            guarded = all(isinstance(n, ast.If) and arm == "body" and _present(n.test) for n, arm in around)
            if name == MASK and state is not None and state == states.get(MASK):
                continue
            if name in states and name != MASK and state is None:
                states.pop(name)
            elif name == MASK or state is not None:
                states[name] = state if guarded and len(around) == 1 and stmt.lineno < at.lineno else None
        elif bound:
            for name in bound:
                states[name] = None
    found = _state(value, states, lowest) if value is not None else None
    return found == _DONE


def _present(test: ast.expr) -> bool:
    return (
        isinstance(test, ast.Compare)
        and syntax.is_name(test.left, MASK)
        and isinstance(test.ops[0], ast.IsNot)
        and syntax.is_none(test.comparators[0])
    )


def _state(node: ast.expr, states: dict[str, _State | None], lowest: set[str]) -> _State | None:
    node = unwrapped(node)
    if isinstance(node, ast.Name):
        return states.get(node.id)
    if isinstance(node, ast.Subscript):
        return _with_axes(
            _state(node.value, states, lowest), ast.unparse(node.slice).strip("()") == ":, None, None, :", 2
        )
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not syntax.on_torch(node):
        below = _state(node.func.value, states, lowest)
        if (
            node.func.attr in {"view", "reshape"}
            and len(node.args) == 2
            and syntax.constant(node.args[1]) == -1
        ):
            return below if below is not None and below.axes == 0 else None
        if node.func.attr == "unsqueeze" and len(node.args) == 1 and syntax.constant(node.args[0]) in (1, 2):
            axis = 1 if syntax.constant(node.args[0]) == 1 else 2
            return _with_axes(below, below is not None and below.axes + 1 >= axis, 1)
        return None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub) and syntax.constant(node.left) == 1:
        below = _state(node.right, states, lowest)
        return _State(below.axes, True) if below is not None and below == _State(below.axes) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for part, factor in ((node.left, node.right), (node.right, node.left)):
            below = _state(part, states, lowest)
            if below == _State(2, True) and _is_lowest(factor, lowest):
                return _DONE
    return None


def _with_axes(state: _State | None, right: bool, more: int) -> _State | None:
    if state is None or not right or state.axes + more > 2 or state.scaled:
        return None
    return _State(state.axes + more, state.inverted)


def _is_lowest(node: ast.expr, known: set[str]) -> bool:
    """The lowest number of a dtype, a name bound to it, or a number so low that softmax gives zero."""
    value = syntax.constant(node)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value <= -1e4
    if isinstance(node, ast.Name):
        return node.id in known
    return isinstance(node, ast.Attribute) and node.attr == "min" and syntax.call_name(node.value) == "finfo"
