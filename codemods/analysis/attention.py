"""What a Qwen v1 attention class does to its scores, read off the tree.

A *score path* is a method that turns query and key into attention probabilities: the product, a scale, a
causal mask, the caller's additive mask, a softmax. Local names are whatever the file calls them; they are
found from the softmax backwards. Anything that touches the scores in a form not listed here is reported as
``unknown``, and the rules decline rather than guess.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property

from codemods.analysis import syntax
from codemods.analysis.effects import effects, is_in_place
from codemods.analysis.handed import MASK, carries, mask_problem, tampered, unwrapped
from codemods.analysis.source import Source, kept_on_source

UPCAST = "_upcast_and_reordered_attn"
PRODUCTS = frozenset(("matmul", "bmm", "baddbmm", "einsum", "zeros", "empty", "dequantize_cache_torch"))
CASTS = frozenset(("float", "to", "type", "type_as", "half", "bfloat16", "contiguous", "clone", "detach"))
SHAPES = frozenset(("reshape", "view", "squeeze", "unsqueeze", "permute", "transpose", "expand"))


@dataclass
class Attention:
    """One attention class: its node, its methods, and the ones that are score paths."""

    source: Source
    node: ast.ClassDef

    @cached_property
    def methods(self) -> dict[str, ast.FunctionDef]:
        return {n.name: n for n in self.node.body if isinstance(n, ast.FunctionDef)}

    @property
    def name(self) -> str:
        return self.node.name

    @cached_property
    def forward(self) -> ast.FunctionDef | None:
        return self.methods.get("forward")

    @cached_property
    def paths(self) -> list[ScorePath]:
        found = []
        for function in self.methods.values():
            softmax = _softmax(function)
            if softmax is not None:
                found.append(ScorePath(self, function, *softmax))
        return found

    def calls_to(self, method: str) -> list[tuple[ast.FunctionDef, ast.stmt, ast.Call]]:
        """Every ``self.method(...)`` in the class: calling method, statement, call."""
        found = []
        for function in self.methods.values():
            for stmt in syntax.statements(function.body):
                if any(syntax.blocks(stmt)):
                    continue
                found += [
                    (function, stmt, call)
                    for call in syntax.calls(stmt, method)
                    if isinstance(call.func, ast.Attribute) and syntax.is_name(call.func.value, "self")
                ]
        return found


@dataclass
class Mask:
    """A causal-mask statement of a score path: what it keeps, what it fills in, and the statement to drop."""

    stmt: ast.stmt  #: top-level statement of the method (an ``if`` around the assignment included)
    condition: ast.expr  #: true where a score is kept
    fill: ast.expr
    problem: str = ""  #: why this is not a mask we know, empty if it is


@dataclass
class ScorePath:
    """One method from product to softmax, its statements classified by what they do to the scores."""

    attention: Attention
    function: ast.FunctionDef
    scores: str  #: the name of the scores, taken from the softmax
    softmax: ast.stmt  #: the top-level statement that contains the softmax

    @cached_property
    def _kinds(self) -> list[tuple[ast.stmt, Mask | str]]:
        return [(stmt, self._kind(stmt)) for stmt in self.before]

    @property
    def masks(self) -> list[Mask]:
        """Causal-mask statements, known ones and those with a problem."""
        return [kind for _, kind in self._kinds if isinstance(kind, Mask)]

    @property
    def added(self) -> list[ast.stmt]:
        """Statements that add the caller's mask to the scores."""
        return [stmt for stmt, kind in self._kinds if kind == "add"]

    @cached_property
    def unknown(self) -> list[ast.stmt]:
        """Statements that rewrite the scores in a form not known, or make them anew after a mask."""
        found, masked = [], False
        for stmt, kind in self._kinds:
            masked = masked or kind == "add" or isinstance(kind, Mask)
            if (
                kind == "unknown"
                or (masked and kind == "make")
                or ((masked or self._masked_in_place) and kind == "write")
                or (kind == "keep" and self._upsets(stmt, masked))
                or (kind == "add" and any(self._upsets(s, masked) for s in self._beside(stmt)))
                or self._goes_by_the_mask(stmt)
            ):
                found.append(stmt)
        return found + [stmt for stmt in self._softmaxes if stmt is not self.softmax]

    def _goes_by_the_mask(self, stmt: ast.stmt) -> bool:
        """Something other than its sum depends on whether there is a mask: the nets are always given one,
        upstream's model need not be."""
        choices = (n.test for n in syntax.walk(stmt) if isinstance(n, (ast.If, ast.IfExp, ast.While)))
        if not any(self.mask_parameter in syntax.reads(test) for test in choices):
            return False
        simple = [s for s in syntax.statements([stmt]) if not any(syntax.blocks(s))]
        inside = [s for s in simple if not (self._adds(s) or _binds_itself(s))]
        bound = frozenset().union(*(syntax.binds(s) for s in inside)) - {self.mask_parameter}
        others = (s for s in self.function.body if s is not stmt)
        elsewhere = frozenset().union(*(syntax.reads(s) for s in others))
        return bool(bound & elsewhere) or any(_gives_away(n) for s in inside for n in syntax.walk(s))

    def _upsets(self, stmt: ast.stmt, masked: bool) -> bool:
        """A statement that may write the scores besides binding them, or keeps masked ones for later."""
        simple = not any(syntax.blocks(stmt)) and self.scores in syntax.binds(stmt)
        if simple or not (masked or self._masked_in_place):
            return False  # what happens to them before a mask is the same with and without it
        flow = effects(self.attention.source)
        lines = range(stmt.lineno, (stmt.end_lineno or stmt.lineno) + 1)
        if any(w.line in lines for w in flow.written(self.function, [self.scores])):
            return True
        bound = syntax.binds(stmt) - {self.scores}
        later = [s for s in self.function.body if s.lineno > stmt.lineno and not _looks(s)]
        kept = bool(bound & frozenset().union(*(syntax.reads(s) for s in later)))
        return self._looks_into(stmt) and (kept or any(_gives_away(s) for s in syntax.walk(stmt)))

    @cached_property
    def _masked_in_place(self) -> bool:
        """A mask is written into the scores, or something else is once they are masked: without the mask
        that goes into the tensor that the scores were before it."""
        if not self.masks:
            return False
        after = [s for s in self.before if s.lineno > self.masks[0].stmt.lineno]
        written = (n for s in after for n in syntax.walk(s) if isinstance(n, ast.AugAssign))
        return any(syntax.is_name(n.target, self.scores) for n in written) or any(
            syntax.calls(mask.stmt, "masked_fill_") for mask in self.masks
        )

    def _looks_into(self, stmt: ast.stmt) -> bool:
        """The values of the scores are read, not only their shape, dtype or device."""
        described = {
            id(n.value)
            for n in syntax.walk(stmt)
            if isinstance(n, ast.Attribute) and n.attr in {"shape", "dtype", "device", "size", "dim", "ndim"}
        }
        return any(syntax.is_name(n, self.scores) and id(n) not in described for n in syntax.walk(stmt))

    @property
    def _softmaxes(self) -> list[ast.stmt]:
        """Top-level statements with a softmax; calls in one must be of the same scores to count as one."""
        found = []
        for stmt in self.function.body:
            calls = syntax.calls(stmt, "softmax")
            names = {_softmax_of(call) for call in calls}
            found += [stmt] if names else []
            odd = len(names) > 1 or _in_a_row(stmt) > 1 or not all(map(_over_keys, calls))
            found += [self.function] if odd else []
        return found

    @property
    def where(self) -> str:
        return f"{self.attention.name}.{self.function.name}"

    @property
    def upcast(self) -> bool:
        return self.function.name == UPCAST

    @cached_property
    def dead(self) -> bool:
        """True when nothing in the file calls this method; upstream never calls its upcast variant."""
        name = self.function.name
        return name != "forward" and not syntax.calls(self.attention.source.tree, name)

    @cached_property
    def before(self) -> list[ast.stmt]:
        """The method's top-level statements before the softmax."""
        body = self.function.body
        return body[: body.index(self.softmax)]

    @cached_property
    def calls(self) -> list[tuple[ast.FunctionDef, ast.stmt, ast.Call]]:
        """Where the class calls this method: calling method, statement, call."""
        return self.attention.calls_to(self.function.name)

    @cached_property
    def stand_in(self) -> ScorePath | None:
        """For a method nothing calls: one that is called and takes as many parameters."""
        if self.calls:
            return None
        count = len(syntax.parameters(self.function))
        alike = (p for p in self.attention.paths if p is not self and p.calls)
        return next((p for p in alike if len(syntax.parameters(p.function)) == count), None)

    def counterpart(self, name: str) -> str | None:
        """The stand-in's parameter at the place of this method's parameter ``name``."""
        names = syntax.parameters(self.function)
        if self.stand_in is None or name not in names:
            return None
        return syntax.parameters(self.stand_in.function)[names.index(name)]

    @cached_property
    def mask_parameter(self) -> str | None:
        """The parameter that carries the caller's additive mask, or None.

        It is what ``forward`` passes its own ``attention_mask`` as. In a method that nothing calls, it is the
        parameter of that name, or the one at the same place as in the stand-in.
        """
        for caller, stmt, call in self.calls:
            bound = syntax.arguments(call, self.function) or {}
            for name, value in bound.items():
                if carries(caller, value, MASK, stmt):
                    return name
        names = syntax.parameters(self.function)
        if self.calls or "attention_mask" in names:
            return None if self.calls else "attention_mask"
        wanted = self.stand_in.mask_parameter if self.stand_in is not None else None
        return next((n for n in names if wanted is not None and self.counterpart(n) == wanted), None)

    def mask_reaches(self) -> str:
        """Whether the caller's mask arrives here unchanged: an empty string, or what is in the way."""
        name = self.mask_parameter
        if name is None:
            return "the caller's attention_mask is not passed to this method"
        if self.function.name != "forward" and not carries(self.function, ast.Name(name, ast.Load()), name):
            return f"`{name}` is given another value inside the method"
        for caller, stmt, call in self.calls:
            value = (syntax.arguments(call, self.function) or {}).get(name)
            if not carries(caller, value, MASK, stmt):
                bound = [
                    s
                    for s, _ in syntax.assignments(caller.body, MASK)
                    if not syntax.exclusive(caller.body, s, stmt)
                ]
                if syntax.is_name(value, MASK) and bound:
                    return f"attention_mask is given another value on line {bound[0].lineno}, before the call"
                return f"the call on line {call.lineno} passes something else as `{name}`"
        return self._mask_written(name) or self._mask_handed()

    def _mask_written(self, name: str) -> str:
        """Where the mask may be changed in place, from attention's forward to the sum."""
        for function, known in ((self.function, name), *((caller, MASK) for caller, _, _ in self.calls)):
            for write in effects(self.attention.source).written(function, [known]):
                return f"`{known}` may be changed in place on line {write.line}"
        return ""

    def _mask_handed(self) -> str:
        """Whether the layers are handed what the caller gave. Where upstream never adds it, no matter what
        the model hands them: only what they hand on to attention."""
        found = tampered(self.attention.source, self.attention.node)
        if found is None and not self.dead:
            upto = None if self.added else 0
            found = mask_problem(self.attention.source, self.attention.node, upto)
        return f"{found.reason} (line {found.line})" if found is not None else ""

    def _kind(self, stmt: ast.stmt) -> Mask | str:
        """What one statement does to the scores: a Mask, or add, make, write, keep or unknown."""
        mask = self._mask(stmt)
        if mask is not None:
            return mask
        if self._adds(stmt):
            return "add"
        if self.scores not in syntax.binds(stmt):
            return "write" if self._mutates(stmt) else "keep"
        inner = [s for s in syntax.statements([stmt]) if self.scores in syntax.binds_itself(s)]
        if not all(self._harmless(s) for s in inner):
            return "unknown"
        return "make" if any(self._makes(s) for s in inner) else "keep"

    def _makes(self, stmt: ast.stmt) -> bool:
        """The scores are made anew: by a product, or from something else than themselves."""
        calls = [
            n for n in syntax.walk(stmt) if isinstance(n, ast.Call) and syntax.last_name(n.func) in PRODUCTS
        ]
        return bool(calls) or self.scores not in syntax.reads(stmt)

    def _mutates(self, stmt: ast.stmt) -> bool:
        """In-place methods and subscript stores on the scores, which no plain assignment shows."""
        for node in syntax.walk(stmt):
            if (
                isinstance(node, ast.Call)
                and syntax.is_method_of(node, self.scores)
                and is_in_place(syntax.last_name(node.func))
            ):
                return True
            stored = isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store)
            if stored and syntax.is_name(node.value, self.scores):  # type: ignore[attr-defined]
                return True
        return False

    def _harmless(self, stmt: ast.stmt) -> bool:
        """A product, a scale by something that is not a mask, a cast or a reshape of the scores."""
        if isinstance(stmt, ast.AugAssign):
            return isinstance(stmt.op, (ast.Div, ast.Mult)) and not self._maskish(stmt.value)
        if not isinstance(stmt, ast.Assign) or not syntax.is_name(stmt.targets[0], self.scores):
            return False
        return self._keeps(stmt.value)

    def _keeps(self, value: ast.expr) -> bool:
        if syntax.is_name(unwrapped(value), self.scores):
            return True
        if isinstance(value, ast.BinOp) and isinstance(value.op, (ast.Div, ast.Mult)):
            return self._keeps(value.left) and not self._maskish(value.right)
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.MatMult):
            return True
        if not isinstance(value, ast.Call):
            return False
        name = syntax.last_name(value.func)
        if name in PRODUCTS:
            return True
        if name == "div" and value.args:
            operands = [*([] if syntax.on_torch(value) else [value.func.value]), *value.args]  # type: ignore[attr-defined]
            return self._keeps(operands[0]) and not any(self._maskish(o) for o in operands[1:])
        if name in CASTS | SHAPES and isinstance(value.func, ast.Attribute):
            return self._keeps(value.func.value)
        return False

    def _maskish(self, node: ast.expr) -> bool:
        """Whether a factor or divisor could carry a mask: comparisons, tril, where, or a mask's name."""
        for child in syntax.walk(node):
            if isinstance(child, (ast.Compare, ast.IfExp)):
                return True
            if isinstance(child, ast.Call) and syntax.last_name(child.func) in {
                "tril",
                "triu",
                "where",
                "masked_fill",
            }:
                return True
            if isinstance(child, ast.Name) and child.id != self.scores and "mask" in child.id:
                return True
        return False

    def _adds(self, stmt: ast.stmt) -> bool:
        """``scores = scores + attention_mask``, bare or under ``if attention_mask is not None:``."""
        name = self.mask_parameter
        if name is None:
            return False
        if isinstance(stmt, ast.If):
            others = self._beside(stmt)
            guarded = is_not_none(stmt.test, name) and not stmt.orelse and len(stmt.body) == len(others) + 1
            return guarded and not any(self.scores in syntax.binds(s) for s in others)
        if isinstance(stmt, ast.AugAssign):
            plus = isinstance(stmt.op, ast.Add) and syntax.is_name(stmt.target, self.scores)
            return plus and self._is_mask_value(stmt.value)
        if (
            not isinstance(stmt, ast.Assign)
            or not syntax.is_name(stmt.targets[0], self.scores)
            or len(stmt.targets) != 1
        ):
            return False
        value = stmt.value
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
            pair = (value.left, value.right)
        elif syntax.call_name(value) == "add" and isinstance(value, ast.Call):
            own = [] if syntax.on_torch(value) else [value.func.value]  # type: ignore[attr-defined]
            operands = [*own, *value.args]
            if len(operands) != 2 or value.keywords:
                return False
            pair = (operands[0], operands[1])
        else:
            return False
        return any(
            syntax.is_name(uncast(a), self.scores) and self._is_mask_value(b) for a, b in (pair, pair[::-1])
        )

    def _beside(self, stmt: ast.stmt) -> list[ast.stmt]:
        """The statements beside the sum in the ``if`` around it."""
        return [s for s in stmt.body if not self._adds(s)] if isinstance(stmt, ast.If) else []

    def _is_mask_value(self, node: ast.expr) -> bool:
        return carries(self.function, node, self.mask_parameter or "")

    def _mask(self, stmt: ast.stmt) -> Mask | None:
        """The statement as a where/masked_fill of the scores by a condition, or None."""
        if isinstance(stmt, ast.If):
            inner = self._mask(stmt.body[0]) if len(stmt.body) == 1 and not stmt.orelse else None
            if inner is None:
                return None
            bare = uncast(inner.condition)
            guarded = isinstance(bare, ast.Name) and is_not_none(stmt.test, bare.id)
            problem = inner.problem or ("" if guarded else "the mask is applied under a condition of its own")
            return Mask(stmt, inner.condition, inner.fill, problem)
        value: ast.expr
        if (
            isinstance(stmt, ast.Assign)
            and len(stmt.targets) == 1
            and syntax.is_name(stmt.targets[0], self.scores)
        ) or (isinstance(stmt, ast.Expr) and syntax.call_name(stmt.value) == "masked_fill_"):
            value = stmt.value
        else:
            return None
        name = syntax.call_name(value)
        if not isinstance(value, ast.Call) or name not in {"where", "masked_fill", "masked_fill_"}:
            return None
        if name == "where" and syntax.on_torch(value) and len(value.args) == 3:
            condition, kept, fill = value.args
            problem = (
                ""
                if self._is_scores(kept)
                else "torch.where does not keep the scores where its condition holds"
            )
            return Mask(stmt, condition, fill, problem)
        if name != "where" and isinstance(value.func, ast.Attribute) and len(value.args) == 2:
            condition, fill = value.args
            if not self._is_scores(value.func.value):
                return None
            inverted = _inverse(condition)
            if inverted is None:
                return Mask(
                    stmt, condition, fill, "masked_fill fills where its condition holds, not where it fails"
                )
            return Mask(stmt, inverted, fill)
        return Mask(stmt, value, value, "a mask call in a form not known")

    def _is_scores(self, node: ast.expr) -> bool:
        return syntax.is_name(uncast(node), self.scores)


@kept_on_source
def attentions(source: Source) -> list[Attention]:
    """The attention classes of a file: those whose ``__init__`` makes ``c_attn`` and ``c_proj`` and has
    a forward."""
    classes = (node for node in source.tree.body if isinstance(node, ast.ClassDef))
    return [Attention(source, node) for node in classes if _is_attention(node)]


def _is_attention(node: ast.ClassDef) -> bool:
    names = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    if not {"__init__", "forward"} <= names:
        return False
    made = {
        n.attr for n in syntax.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
    }
    return {"c_attn", "c_proj"} <= made


def uncast(node: ast.expr) -> ast.expr:
    """``x`` of ``x.to(...)``, ``x.float()``, ``x.type(...)``: casts and device moves change no position."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr not in CASTS | {"bool"} or syntax.on_torch(node):
            break
        node = node.func.value
    return node


def is_not_none(test: ast.expr, name: str) -> bool:
    """``name is not None``."""
    return (
        isinstance(test, ast.Compare)
        and syntax.is_name(test.left, name)
        and len(test.ops) == 1
        and isinstance(test.ops[0], ast.IsNot)
        and isinstance(test.comparators[0], ast.Constant)
        and test.comparators[0].value is None
    )


def _binds_itself(stmt: ast.stmt) -> bool:
    """``x = x``, ``x = x * 1`` and the like."""
    return isinstance(stmt, ast.Assign) and all(syntax.same(t, unwrapped(stmt.value)) for t in stmt.targets)


def _gives_away(node: ast.AST) -> bool:
    """A return, a store into something that has no name, a call for its effect."""
    if isinstance(node, (ast.Attribute, ast.Subscript)):
        return isinstance(node.ctx, ast.Store)
    effect = isinstance(node, ast.Expr) and not syntax.is_pure(node)
    return effect or isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom))


def _looks(stmt: ast.stmt) -> bool:
    """An expression statement that is a name: nothing comes of it."""
    return isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Name)


def _inverse(node: ast.expr) -> ast.expr | None:
    """``m`` of ``~m``, ``torch.logical_not(m)``, ``m.logical_not()``, ``m == 0``; None otherwise."""
    node = uncast(node)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return node.operand
    if isinstance(node, ast.Call) and syntax.last_name(node.func) == "logical_not":
        return node.args[0] if syntax.on_torch(node) and node.args else node.func.value  # type: ignore[attr-defined]
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq):
        zero = node.comparators[0]
        return node.left if isinstance(zero, ast.Constant) and zero.value in (0, False) else None
    return None


def _softmax(function: ast.FunctionDef) -> tuple[str, ast.stmt] | None:
    """The scores' name and the top-level statement of the first softmax in a method, if there is one."""
    for stmt in function.body:
        for call in syntax.calls(stmt, "softmax"):
            name = _softmax_of(call)
            if name is not None:
                return name, stmt
    return None


def _in_a_row(stmt: ast.stmt) -> int:
    """How many softmaxes run one after the other in a statement; of two arms only one runs."""
    if not isinstance(stmt, ast.If):
        return len(syntax.calls(stmt, "softmax"))
    return max(sum(map(_in_a_row, arm)) for arm in (stmt.body, stmt.orelse))


def _over_keys(call: ast.Call) -> bool:
    """Whether a softmax is taken over the last axis of four, that of the keys, and says so."""
    place = 1 if syntax.on_torch(call) or isinstance(call.func, ast.Name) else 0
    given = syntax.keyword(call, "dim") or (call.args[place] if len(call.args) > place else None)
    try:
        return given is not None and ast.literal_eval(given) in (-1, 3)
    except ValueError:
        return False


def _softmax_of(call: ast.Call) -> str | None:
    """The name a softmax is taken of, casts aside; None when it is not a name."""
    given: ast.expr | None = syntax.keyword(call, "input")
    if syntax.on_torch(call) and call.args:
        given = call.args[0]
    elif isinstance(call.func, ast.Attribute) and not syntax.on_torch(call):
        given = call.func.value
    name = uncast(given) if given is not None else None
    return name.id if isinstance(name, ast.Name) else None
