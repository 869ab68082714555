"""Is this expression a causal mask: true exactly where a key's position is not after its query's?

Every form upstream has used: a lower-triangular buffer of the class (``bias``) or of the model
(``registered_causal_mask``), sliced to the last ``query_length`` rows and ``key_length`` columns; a
triangle built with ``torch.tril`` in ``forward``; and ``None`` where a single query sees every key. Each
function returns an empty string when it is shown, otherwise the reason why not.
"""

from __future__ import annotations

import ast

from codemods.analysis import syntax
from codemods.analysis.attention import ScorePath, uncast
from codemods.analysis.effects import effects
from codemods.analysis.handed import Found, changed_buffer, passed_on

Seen = frozenset[tuple[str, str]]  #: functions with their names that are being looked into already


def not_causal(path: ScorePath, node: ast.expr) -> str:
    """Why ``node`` (a condition inside ``path``) is not shown to be the causal mask; empty when it is."""
    return _in_function(path, path.function, node, frozenset())


def not_negative(path: ScorePath, node: ast.expr, depth: int = 0, above: frozenset[str] = frozenset()) -> str:
    """Why ``node`` is not shown to be a fill value that softmax turns into zero; empty when it is.

    The names in ``above`` are being looked into already: what they are bound to otherwise decides.
    """
    node = uncast(node)
    if depth > 6:
        return "the fill value cannot be followed"
    if isinstance(node, ast.Attribute) and node.attr == "min" and syntax.call_name(node.value) == "finfo":
        return ""
    if isinstance(node, ast.Attribute) and node.attr == "masked_bias" and syntax.is_name(node.value, "self"):
        return ""
    if isinstance(node, ast.Call) and syntax.last_name(node.func) in {"full", "tensor"} and node.args:
        return not_negative(path, node.args[-1], depth + 1, above)
    if isinstance(node, ast.Name) and node.id in above:
        return ""
    if isinstance(node, ast.Name):
        for write in effects(path.attention.source).written(path.function, [node.id]):
            return f"the fill value `{node.id}` may be changed in place on line {write.line}"
        found = list(syntax.assignments(path.function.body, node.id))
        if not found or node.id in syntax.parameters(path.function):
            return f"the fill value `{node.id}` is not made in this method"
        for _, value in found:
            if value is None:
                return f"the fill value `{node.id}` cannot be followed"
            # `v = torch.full([], v)` refers to the value before it; the others are checked in their own turn
            problem = not_negative(path, value, depth + 1, above | {node.id})
            if problem:
                return problem
        return ""
    if _is_minus_infinity(node) or _at_most(node, -1e4):
        return ""
    return f"the fill value `{ast.unparse(node)}` is not the lowest value of the dtype"


def _at_most(node: ast.expr, bound: float) -> bool:
    value = syntax.constant(node)
    return isinstance(value, (int, float)) and value <= bound


def _is_minus_infinity(node: ast.expr) -> bool:
    if syntax.call_name(node) == "float" and isinstance(node, ast.Call) and node.args:
        return syntax.constant(node.args[0]) in ("-inf", "-Infinity")
    return (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and (
            (isinstance(node.operand, ast.Attribute) and node.operand.attr in {"inf", "infty"})
            or (syntax.call_name(node.operand) == "float" and syntax.constant(node.operand.args[0]) == "inf")  # type: ignore[attr-defined]
        )
    )


def _in_function(path: ScorePath, function: ast.FunctionDef, node: ast.expr, above: Seen) -> str:
    node = uncast(node)
    if isinstance(node, ast.Subscript):
        if isinstance(node.value, ast.Name) and (function.name, node.value.id) in above:
            return f"`{ast.unparse(node)}` cuts a mask that may be cut already"
        return _slice_problem(path, function, node) or _in_function(path, function, node.value, above)
    if is_triangle(node):
        return ""
    if isinstance(node, ast.Attribute) and syntax.is_name(node.value, "self"):
        return _buffer_problem(path, node.attr)
    if isinstance(node, ast.Name):
        return _name_problem(path, function, node.id, above)
    return f"`{ast.unparse(node)}` is not a causal mask in a form known here"


def _name_problem(path: ScorePath, function: ast.FunctionDef, name: str, above: Seen) -> str:
    if (function.name, name) in above:
        return ""
    above |= {(function.name, name)}
    found = [
        (s, v)
        for s, v in syntax.assignments(function.body, name)
        if v is None or not syntax.is_name(uncast(v), name)
    ]
    for write in effects(path.attention.source).written(function, [name]):
        return f"`{name}` may be changed in place on line {write.line}"
    for stmt, value in found:
        if value is None:
            return f"`{name}` is bound on line {stmt.lineno} in a way that cannot be followed"
        if isinstance(value, ast.Constant) and value.value is None:
            problem = _none_problem(function, stmt, name)
        else:
            problem = _in_function(path, function, value, above)
        if problem:
            return problem
    if found and name not in syntax.parameters(function):
        return ""
    if name not in syntax.parameters(function):
        return f"`{name}` is not made in {function.name} nor passed to it"
    if function.name == "forward":
        return _model_buffer_problem(path, name)
    if not path.calls:  # dead code upstream (the upcast path): its parameters mean what the called path's do
        forward, twin = path.attention.forward, path.counterpart(name)
        if forward is not None and name in syntax.parameters(forward):
            return _model_buffer_problem(path, name)
        if path.stand_in is None or twin is None:
            return f"`{name}` cannot be followed: nothing calls {function.name}"
        return _name_problem(path.stand_in, path.stand_in.function, twin, above)
    for caller, _, call in path.calls:
        value = (syntax.arguments(call, function) or {}).get(name)
        if value is None:
            return f"the call on line {call.lineno} does not pass `{name}`"
        problem = _in_function(path, caller, value, above)
        if problem:
            return problem
    return ""


def _none_problem(function: ast.FunctionDef, stmt: ast.stmt, name: str) -> str:
    """``None`` in place of a mask is right only where query and key lengths differ (a decode step)."""
    around = syntax.path_to(function.body, stmt)
    choices = [(node, arm) for node, arm in around if isinstance(node, ast.If)]
    for node, arm in choices[::-1]:
        test = node.test
        if not isinstance(test, ast.Compare) or len(test.ops) != 1:
            continue
        equal = isinstance(test.ops[0], ast.Eq) and arm == "orelse"
        unequal = isinstance(test.ops[0], ast.NotEq) and arm == "body"
        if (equal or unequal) and _is_length_pair(function, test.left, test.comparators[0]):
            return ""
    return f"`{name}` is None on line {stmt.lineno} without a test that query and key lengths differ"


def _is_length_pair(function: ast.FunctionDef, left: ast.expr, right: ast.expr) -> bool:
    a, b = _length_of(function, left), _length_of(function, right)
    return a is not None and b is not None and a != b


def _length_of(function: ast.FunctionDef, node: ast.expr, depth: int = 0) -> str | None:
    """The tensor whose sequence length ``node`` is: the name before ``.size(k)``, ``.shape[k]``, or None."""
    if depth > 4:
        return None
    if (
        isinstance(node, ast.Call)
        and syntax.last_name(node.func) == "size"
        and isinstance(node.func, ast.Attribute)
    ):
        return _root(node.func.value) if _is_sequence_axis(function, node.func.value, node.args) else None
    if (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "shape"
    ):
        return (
            _root(node.value.value) if _is_sequence_axis(function, node.value.value, [node.slice]) else None
        )
    if isinstance(node, ast.IfExp):
        pair = {_length_of(function, arm, depth + 1) for arm in (node.body, node.orelse)}
        return pair.pop() if len(pair) == 1 else None
    if isinstance(node, ast.Name):
        found = {
            _length_of(function, value, depth + 1) if value is not None else None
            for _, value in syntax.assignments(function.body, node.id)
        }
        return found.pop() if len(found) == 1 else None
    return None


def _is_sequence_axis(function: ast.FunctionDef, tensor: ast.expr, index: list[ast.expr]) -> bool:
    """Axis 1 of [batch, sequence, heads, dim], or axis 2 or -2 of [batch, heads, sequence, dim].

    ``forward`` has the first order until it permutes; what it calls is given the second.
    """
    axis = syntax.constant(index[0]) if len(index) == 1 else None
    if axis not in (1, 2, -2) or not isinstance(tensor, ast.Name):  # a part of the quantised cache
        return axis in (1, 2, -2)
    permuted = function.name != "forward" or any(
        stmt.lineno < tensor.lineno
        and (
            syntax.call_name(value) in {"permute", "transpose"}
            if value is not None
            else syntax.calls(stmt, "permute")
        )
        for stmt, value in syntax.assignments(function.body, tensor.id)
    )
    return permuted == (axis != 1)


def _root(node: ast.expr) -> str | None:
    """``key`` of ``key`` and of ``key[0]`` (the quantised cache is a tuple that starts with the data)."""
    if isinstance(node, ast.Subscript) and syntax.constant(node.slice) == 0:
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _slice_problem(path: ScorePath, function: ast.FunctionDef, node: ast.Subscript) -> str:
    """``m[:, :, key - query : key, :key]``: the last query rows and the first key columns, nothing else."""
    shown = f"`{ast.unparse(node)}` is not the last query rows and the first key columns"
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
    if len(parts) != 4 or not all(isinstance(p, ast.Slice) and p.step is None for p in parts):
        return shown
    batch, head, rows, columns = (p for p in parts if isinstance(p, ast.Slice))
    if any(p.lower is not None or p.upper is not None for p in (batch, head)):
        return shown
    start = rows.lower
    if not isinstance(start, ast.BinOp) or not isinstance(start.op, ast.Sub) or columns.lower is not None:
        return shown
    if (
        not (syntax.same(start.left, rows.upper) and syntax.same(rows.upper, columns.upper))
        or rows.upper is None
    ):
        return shown
    key, query = _length_of(function, start.left), _length_of(function, start.right)
    names = syntax.parameters(function)
    if function.name == "forward":
        return "" if key and query and key != query else shown
    ordered = key in names and query in names and names.index(query or "") < names.index(key or "")
    return "" if ordered else shown


def is_triangle(node: ast.expr) -> bool:
    """``torch.tril(torch.ones((n, n), ...))``, viewed or unsqueezed: true on and below the diagonal."""
    node = uncast(node)
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not syntax.on_torch(node):
        if node.func.attr not in {"view", "reshape", "unsqueeze"}:
            return False
        node = uncast(node.func.value)
    if syntax.call_name(node) != "tril" or not isinstance(node, ast.Call):
        return False
    diagonal = syntax.keyword(node, "diagonal") or (node.args[1] if len(node.args) > 1 else ast.Constant(0))
    if syntax.constant(diagonal) != 0 or not node.args:
        return False
    ones = uncast(node.args[0])
    if syntax.call_name(ones) != "ones" or not isinstance(ones, ast.Call) or not ones.args:
        return False
    first = ones.args[0]
    shape = first.elts if isinstance(first, (ast.Tuple, ast.List)) else ones.args
    return len(shape) == 2 and syntax.same(shape[0], shape[1])


def _buffer_problem(path: ScorePath, name: str) -> str:
    """A buffer of the attention class must be registered there as a triangle."""
    values = _registered(path.attention.node, name)
    if not values:
        return f"self.{name} is not registered in {path.attention.name}"
    if not all(is_triangle(v) for v in values):
        return f"self.{name} is not registered as a lower triangle"
    return _changed(path, name)


def _changed(path: ScorePath, name: str) -> str:
    found = changed_buffer(path.attention.source, name)
    return f"{found.reason} (line {found.line})" if found is not None else ""


def _model_buffer_problem(path: ScorePath, parameter: str) -> str:
    """A mask that ``forward`` is handed must be some class's registered triangle, passed under that name."""
    passed = {parameter}
    handed = passed_on(path.attention.source, path.attention.node, parameter)
    if isinstance(handed, Found):
        return f"{handed.reason} (line {handed.line})"
    if handed is not None:
        passed = {handed}
    for name in sorted(passed):
        values = _registered(path.attention.source.tree, name)
        if values:
            triangles = all(is_triangle(v) for v in values)
            return _changed(path, name) if triangles else f"the buffer `{name}` is not a lower triangle"
    return f"`{parameter}` is not a registered lower triangle anywhere in this file"


def _registered(scope: ast.AST, name: str) -> list[ast.expr]:
    found = []
    for call in syntax.calls(scope, "register_buffer"):
        label = call.args[0] if call.args else syntax.keyword(call, "name")
        value = call.args[1] if len(call.args) > 1 else syntax.keyword(call, "tensor")
        if syntax.constant(label) == name and value is not None:
            found.append(value)
    return found
