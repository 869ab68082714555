"""Whether the branch with torch's fused attention computes what the branch without it computes.

Both branches are evaluated into expressions: names are followed, calls of the class's own methods are put in
place, casts and copies are left out. The two must be the same expression, but for one place: where one has
``scaled_dot_product_attention(q, k, v, mask)`` the other has the softmax of ``q k / sqrt(d)``, masked, times
``v``.

The other branch has perhaps never run: torch 2 takes the fused one. So it must also be shown to run at all:
every name and attribute that it reads is set, and what it does besides is known to raise nothing.
"""

from __future__ import annotations

import ast
import builtins
from typing import Any

from codemods.analysis import syntax
from codemods.analysis.effects import effects
from codemods.analysis.handed import unwrapped
from codemods.analysis.raising import NONE as _NONE
from codemods.analysis.raising import Raising, Term
from codemods.analysis.source import Source, kept_on_source

SDPA = "scaled_dot_product_attention"
#: What a name stands for where some way to it does not set it.
_UNSET: Term = ("unset",)
_LIMIT = 400  #: statements followed, calls included
_LARGEST, _DEEPEST = 20_000, 300  #: expressions in one, and levels; upstream's have 2,123 and 23


class _Unknown(Exception):
    """Something in a branch that is not followed; says what."""


def difference(source: Source, owner: ast.ClassDef, choice: ast.If, flag: str) -> str:
    """Why the branches of ``choice``, which tests ``flag``, are not shown to compute the same; or nothing."""
    methods = {n.name: n for n in owner.body if isinstance(n, ast.FunctionDef)}
    given = [part for part in syntax.conjuncts(choice.test) if not syntax.is_name(part, flag)]
    around = next(m for m in methods.values() if choice in syntax.walk(m))
    try:
        fused = _Branch(source, methods, given, around, choice).names(choice.body)
        other = _Branch(source, methods, given, around, choice)
        plain = other.names(choice.orelse)
    except _Unknown as error:
        return str(error)
    missing = sorted(name for name in other.own if not _always_set(owner, name))
    if missing:
        return f"the branch without {SDPA} reads self.{missing[0]}, which __init__ does not set on every way"
    compared = [name for name, ours in fused.items() if ours != _NONE and name in plain]
    raising = Raising(plain[name] for name in compared)
    for line, term in other.met:
        if raising.may(term):
            return f"line {line} of the branch without {SDPA} may raise an error there"
    for name, ours in fused.items():
        theirs = plain.get(name, ("name", name))
        kept = name not in plain and not _read_later(source, choice, name)
        if ours != _NONE and not kept and not _Match(owner).same(ours, theirs):
            return f"the branch without {SDPA} does not compute the same `{name}`"
    for name in set(plain) - set(fused):
        if _read_later(source, choice, name):
            return f"only the branch without {SDPA} binds `{name}`"
    return ""


def lost_fill(choice: ast.If) -> int | None:
    """The line of the fused branch that fills a mask and throws the result away."""
    for stmt in syntax.statements(choice.body):
        if isinstance(stmt, ast.Expr) and syntax.call_name(stmt.value) == "masked_fill":
            return stmt.lineno
    return None


def _read_later(source: Source, choice: ast.If, name: str) -> bool:
    end = choice.end_lineno or choice.lineno
    owners = [
        n
        for n in syntax.walk(source.tree)
        if isinstance(n, ast.FunctionDef) and n.lineno <= choice.lineno <= (n.end_lineno or 0)
    ]
    later = (n for o in owners[-1:] for n in syntax.walk(o) if isinstance(n, ast.Name) and n.lineno > end)
    return any(n.id == name and isinstance(n.ctx, ast.Load) for n in later)


class _Branch:
    """Evaluates statements under what a guard says is true."""

    def __init__(
        self,
        source: Source,
        methods: dict[str, ast.FunctionDef],
        given: list[ast.expr],
        around: ast.FunctionDef,
        choice: ast.If,
    ) -> None:
        self.source, self.methods = source, methods
        self.true = {ast.dump(part) for part in given}
        self.false = {
            ast.dump(part.operand)
            for part in given
            if isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.Not)
        }
        self.steps = 0
        self.function = around  #: whose statements are being followed
        self.set = syntax.surely_bound(around.body, choice) | set(syntax.parameters(around))
        self.own: set[str] = set()  #: attributes of self that were read
        self.met: list[tuple[int, Term]] = []  #: what was evaluated, each with its line
        self.extents: dict[int, tuple[int, int]] = {}  #: by the identity of terms

    def names(self, block: list[ast.stmt]) -> dict[str, Term]:
        env: dict[str, Term] = {}
        if self._run(block, env) is not None:
            raise _Unknown("a branch returns before the end")
        return env

    # -- statements ------------------------------------------------------------------------------------------

    def _run(self, block: list[ast.stmt], env: dict[str, Term]) -> Term | None:
        """Follow ``block``; what it returns, or None where it goes on."""
        for stmt in block:
            self.steps += 1
            if self.steps > _LIMIT:
                raise _Unknown("the attention method is too long to follow")
            if isinstance(stmt, ast.Return):
                return self._term(stmt.value, env) if stmt.value is not None else _NONE
            if isinstance(stmt, ast.If):
                self._if(stmt, env)
            else:
                self._simple(stmt, env)
        return None

    def _simple(self, stmt: ast.stmt, env: dict[str, Term]) -> None:
        if isinstance(stmt, (ast.Assign, ast.AnnAssign)) and stmt.value is not None:
            if isinstance(stmt, ast.Assign) and _fills_itself(stmt):
                self._effect(stmt, stmt.value, env)  # type: ignore[arg-type]
                return
            value = self._term(stmt.value, env)
            for target in stmt.targets if isinstance(stmt, ast.Assign) else [stmt.target]:
                self._bind(target, value, env)
            self._writes(stmt, env)
        elif isinstance(stmt, ast.AugAssign) and isinstance(stmt.target, ast.Name):
            name = stmt.target.id
            before, value = self._value(name, stmt.lineno, env), self._term(stmt.value, env)
            self._rewritten(stmt.lineno, frozenset((name,)), env)
            env[name] = self._noted(stmt.lineno, (type(stmt.op).__name__, before, value))
        elif isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Call):
            self._effect(stmt, stmt.value, env)
        elif isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Name):
            self._term(stmt.value, env)
        elif isinstance(stmt, ast.Assert):
            self._noted(stmt.lineno, ("assert", self._term(stmt.test, env)))
        elif not isinstance(stmt, ast.Pass) and not (
            isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Constant)
        ):
            raise _Unknown(f"line {stmt.lineno} is not followed")

    def _effect(self, stmt: ast.stmt, call: ast.Call, env: dict[str, Term]) -> None:
        """``x.masked_fill_(...)``: the same as ``x = x.masked_fill(...)`` where nothing else is called x.

        One upstream revision drops the underscore and loses the result: with padding its fused branch hides
        nothing to come. The other branch does what was meant, as the revisions before and after do;
        :func:`lost_fill` finds the line, and the rule says so.
        """
        function = call.func
        if (
            isinstance(function, ast.Attribute)
            and function.attr in {"masked_fill_", "masked_fill"}
            and isinstance(function.value, ast.Name)
        ):
            name = function.value.id
            before = self._value(name, stmt.lineno, env)
            if before[:2] != ("call", "expand"):  # what is expanded over rows of its own is nobody else's
                self._rewritten(stmt.lineno, frozenset((name,)), env)
            env[name] = ("call", "masked_fill", (before, *(self._term(a, env) for a in call.args)), ())
        else:
            self._term(call, env)
            self._writes(stmt, env)

    def _writes(self, stmt: ast.stmt, env: dict[str, Term]) -> None:
        """What ``stmt`` may write in place has values that are not followed from here on."""
        lines = range(stmt.lineno, (stmt.end_lineno or stmt.lineno) + 1)
        for write in effects(self.source).whole(self.function).writes:
            if write.line in lines:
                self._rewritten(stmt.lineno, write.roots, env)

    def _rewritten(self, line: int, names: frozenset[str], env: dict[str, Term]) -> None:
        """As :meth:`_writes`, for a write to ``names``; raises where it reaches beyond this branch."""
        for name in effects(self.source).whole(self.function).same(names):
            if name[0] == "@" or name in syntax.parameters(self.function) or name in self.set:
                raise _Unknown(f"line {line} may change a tensor in place")
            if name in env:
                env[name] = ("written", line, env[name])

    def _bind(self, target: ast.expr, value: Term, env: dict[str, Term]) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            for i, part in enumerate(target.elts):
                whole = value[0] == "tuple" and len(value[1]) == len(target.elts)
                self._bind(part, value[1][i] if whole else ("item", value, i), env)
        elif not (isinstance(target, ast.Attribute) and self._unread(target)):
            raise _Unknown(f"line {target.lineno} stores into what is not a local name")

    def _unread(self, target: ast.Attribute) -> bool:
        """``self.NAME``, where the file has that name nowhere else."""
        named = [
            n for n in syntax.walk(self.source.tree) if isinstance(n, ast.Attribute) and n.attr == target.attr
        ]
        others = {
            n.name for n in syntax.walk(self.source.tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))
        }
        return syntax.is_name(target.value, "self") and named == [target] and target.attr not in others

    def _if(self, stmt: ast.If, env: dict[str, Term]) -> None:
        known = self._known(stmt.test)
        if known is not None:
            if self._run(stmt.body if known else stmt.orelse, env) is not None:
                raise _Unknown(f"line {stmt.lineno} returns early")
            return
        test = self._term(stmt.test, env)
        self._noted(stmt.lineno, ("test", test))
        arms = [dict(env), dict(env)]
        for arm, block in zip(arms, (stmt.body, stmt.orelse), strict=True):
            if self._run(block, arm) is not None:
                raise _Unknown(f"line {stmt.lineno} returns early")
        for name in set(arms[0]) | set(arms[1]):
            a, b = (arm.get(name, self._before(name)) for arm in arms)
            env[name] = a if a == b else _UNSET if _UNSET in (a, b) else ("if", test, a, b)

    def _known(self, test: ast.expr) -> bool | None:
        if isinstance(test, ast.Constant):
            return bool(test.value)
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            below = self._known(test.operand)
            return None if below is None else not below
        if isinstance(test, ast.BoolOp):
            parts = [self._known(v) for v in test.values]
            decided = isinstance(test.op, ast.Or)
            if decided in parts:
                return decided
            return None if None in parts else not decided
        dumped = ast.dump(test)
        return True if dumped in self.true else False if dumped in self.false else None

    # -- expressions -----------------------------------------------------------------------------------------

    def _term(self, node: ast.expr, env: dict[str, Term]) -> Term:
        bare = unwrapped(node)
        term = self._noted(node.lineno, self._evaluated(bare, env))
        while node is not bare:  # the same values, but None or a number has no such method
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                given = (*node.args, *(k.value for k in node.keywords))
                self._noted(node.lineno, ("same", term, tuple(self._term(a, env) for a in given)))
                node = node.func.value
            elif isinstance(node, ast.BinOp):
                self._noted(node.lineno, ("same", term, ()))
                node = node.left
        return term

    def _noted(self, line: int, term: Term) -> Term:
        size, depth = self._extent(term)
        if size > _LARGEST or depth > _DEEPEST:  # x = x + x, forty times over
            raise _Unknown(f"line {line} makes an expression too large to follow")
        self.met.append((line, term))
        return term

    def _extent(self, term: Term) -> tuple[int, int]:
        """How many expressions ``term`` is written with, and how many levels; each term is asked once."""
        known = self.extents.get(id(term))
        if known is None:
            parts = [self._extent(part) for part in term if isinstance(part, tuple)]
            known = 1 + sum(size for size, _ in parts), 1 + max((depth for _, depth in parts), default=0)
            self.extents[id(term)] = known
        return known

    def _value(self, name: str, line: int, env: dict[str, Term]) -> Term:
        found = env.get(name, self._before(name))
        if found == _UNSET:
            raise _Unknown(f"line {line} reads `{name}`, which is not set on every way there")
        return found

    def _before(self, name: str) -> Term:
        """What a name stands for that the statements followed so far have not set."""
        local = name in syntax.binds(self.function) or name in syntax.parameters(self.function)
        known = name in self.set if local else name in _globals(self.source)
        return ("name", name) if known else _UNSET

    def _evaluated(self, node: ast.expr, env: dict[str, Term]) -> Term:
        if isinstance(node, ast.Name):
            return self._value(node.id, node.lineno, env)
        if isinstance(node, ast.Constant):
            return ("constant", node.value)
        if isinstance(node, ast.Attribute):
            if syntax.is_name(node.value, "self"):
                self.own.add(node.attr)
            return ("attribute", self._term(node.value, env), node.attr)
        if isinstance(node, ast.BinOp):
            if isinstance(node.op, ast.MatMult):
                return ("call", "matmul", (self._term(node.left, env), self._term(node.right, env)), ())
            return (type(node.op).__name__, self._term(node.left, env), self._term(node.right, env))
        if isinstance(node, ast.UnaryOp):
            return (type(node.op).__name__, self._term(node.operand, env))
        if isinstance(node, (ast.Tuple, ast.List)):
            return ("tuple", tuple(self._term(e, env) for e in node.elts))
        if isinstance(node, ast.IfExp):
            known = self._known(node.test)
            if known is not None:
                return self._term(node.body if known else node.orelse, env)
            test = self._term(node.test, env)
            self._noted(node.lineno, ("test", test))
            return ("if", test, *(self._term(part, env) for part in (node.body, node.orelse)))
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return (
                type(node.ops[0]).__name__,
                self._term(node.left, env),
                self._term(node.comparators[0], env),
            )
        if isinstance(node, ast.Subscript):
            whole, index = self._term(node.value, env), self._index(node.slice, env)
            at = syntax.constant(node.slice)
            starred = whole[0] != "tuple" or any(part[0] == "starred" for part in whole[1])
            if not starred and isinstance(at, int) and 0 <= at < len(whole[1]):
                return whole[1][at]
            return ("part", whole, index)
        if isinstance(node, ast.Starred):
            return ("starred", self._term(node.value, env))
        if isinstance(node, ast.Call):
            return self._call(node, env)
        raise _Unknown(f"line {node.lineno} is not followed")

    def _index(self, node: ast.expr, env: dict[str, Term]) -> Term:
        if isinstance(node, ast.Slice):
            return (
                "slice",
                *(self._term(p, env) if p is not None else None for p in (node.lower, node.upper, node.step)),
            )
        if isinstance(node, ast.Tuple):
            return ("tuple", tuple(self._index(e, env) for e in node.elts))
        return self._term(node, env)

    def _call(self, call: ast.Call, env: dict[str, Term]) -> Term:
        name = syntax.last_name(call.func)
        args = tuple(self._term(a, env) for a in call.args)
        keywords = tuple(sorted((k.arg or "**", self._term(k.value, env)) for k in call.keywords))
        if not isinstance(call.func, ast.Attribute):
            return ("builtin" if name in dir(builtins) else "call", name, args, keywords)
        if syntax.on_torch(call):
            return ("call", name, args, keywords)
        if syntax.is_name(call.func.value, "self"):
            self.own.add(name)
            method = self.methods.get(name)
            if method is not None and name not in {"_merge_heads", "_split_heads"}:
                return self._inline(call, method, env)
            return ("own", name, args, keywords)
        return ("call", name, (self._term(call.func.value, env), *args), keywords)

    def _inline(self, call: ast.Call, method: ast.FunctionDef, env: dict[str, Term]) -> Term:
        bound = syntax.arguments(call, method)
        if bound is None:
            raise _Unknown(f"line {call.lineno} is not followed")
        inner = {name: self._term(value, env) for name, value in bound.items()}
        defaults = method.args.defaults
        for arg, value in zip(method.args.args[-len(defaults) :] if defaults else [], defaults, strict=True):
            inner.setdefault(arg.arg, self._term(value, {}))
        inner.setdefault("self", ("name", "self"))
        outer = self.function, self.set
        self.function, self.set = method, set()
        found = self._run(method.body, inner)
        self.function, self.set = outer
        if found is None:
            raise _Unknown(f"{method.name} returns nothing that is followed")
        return found


class _Match:
    """Compares an expression of the fused branch with one of the other."""

    def __init__(self, owner: ast.ClassDef) -> None:
        self.scaled = _always_true(owner, "scale_attn_weights")

    def same(self, ours: Any, theirs: Any) -> bool:
        if ours == theirs:
            return True
        if not isinstance(ours, tuple) or not isinstance(theirs, tuple):
            return False
        if ours[:2] == ("call", SDPA):
            return self._plain(ours, theirs)
        return len(ours) == len(theirs) and all(self.same(a, b) for a, b in zip(ours, theirs, strict=True))

    def _plain(self, fused: Term, plain: Term) -> bool:
        """``plain`` is the softmax of the masked, scaled product, times the values."""
        keywords = dict(fused[3])
        mask = keywords.pop("attn_mask", _NONE)
        if len(fused[2]) != 3 or any(
            value not in {("constant", 0.0), ("constant", False), _NONE} for value in keywords.values()
        ):
            return False
        query, key, value = fused[2]
        if plain[:2] != ("call", "matmul") or len(plain[2]) != 2 or plain[2][1] != value:
            return False
        return all(self._scores(scores, query, key, value, mask) for scores in _softmaxed(plain[2][0]))

    def _scores(self, scores: Term | None, query: Term, key: Term, value: Term, mask: Term) -> bool:
        if scores is None:
            return False
        causal, scores = _filled(scores)  # hidden before or after the sum, before or after the scale
        added, scores = _summed(scores)
        if added is None and mask[0] == "if" and mask[1][0] == "IsNot":
            added = mask[1][1]  # not added here: add-attention-mask adds it, or drop-causal-mask declines
        causal, scores = (causal, scores) if causal is not None else _filled(scores)
        scores = self._unscaled(scores, value) or ("unscaled",)
        causal, scores = (causal, scores) if causal is not None else _filled(scores)
        if added is None or not _is_mask(mask, added, causal):
            return False
        product = (
            "call",
            "matmul",
            (query, ("call", "transpose", (key, ("constant", -1), ("constant", -2)), ())),
            (),
        )
        swapped = ("call", "transpose", (key, ("USub", ("constant", 1)), ("USub", ("constant", 2))), ())
        return scores in (product, ("call", "matmul", (query, swapped), ()))

    def _unscaled(self, scores: Term, value: Term) -> Term | None:
        """The product that ``scores`` is divided by the root of the heads' width."""
        if (
            scores[0] == "if"
            and self.scaled
            and scores[1] == ("attribute", ("name", "self"), "scale_attn_weights")
        ):
            scores = scores[2]
        if scores[0] != "Div":
            return None
        divisor = scores[2]
        if divisor[:2] == ("call", "full") and len(divisor[2]) == 2 and divisor[2][0] == ("tuple", ()):
            divisor = divisor[2][1]
        last = (("constant", -1), ("USub", ("constant", 1)))
        roots = [("Pow", ("call", "size", (value, axis), ()), ("constant", 0.5)) for axis in last]
        return scores[1] if divisor in roots else None


def _fills_itself(stmt: ast.Assign) -> bool:
    """``x = x.masked_fill_(...)``."""
    target = stmt.targets[0]
    return (
        isinstance(target, ast.Name)
        and syntax.call_name(stmt.value) == "masked_fill_"
        and syntax.is_method_of(stmt.value, target.id)
    )


def _softmaxed(term: Term) -> list[Term | None]:
    """What the softmax is taken of, dropout and head mask aside; None for another form."""
    if term[0] == "if":
        test, then, other = term[1:]
        if then[0] == "Mult" and then[1] == other and test == ("IsNot", then[2], _NONE):
            return _softmaxed(other)
        return [*_softmaxed(then), *_softmaxed(other)]
    if term[:2] == ("own", "attn_dropout") and len(term[2]) == 1:
        return _softmaxed(term[2][0])
    if term[:2] == ("call", "softmax"):
        axis = dict(term[3]).get("dim", term[2][1] if len(term[2]) > 1 else None)
        return [term[2][0] if axis in (("constant", -1), ("USub", ("constant", 1))) else None]
    return [None]


def _summed(scores: Term) -> tuple[Term | None, Term]:
    """The mask that is added where it is given, and what it is added to."""
    if scores[0] == "if" and scores[2][0] == "Add":
        test, total, other = scores[1:]
        for mask, rest in ((total[2], total[1]), (total[1], total[2])):
            if rest == other and test == ("IsNot", mask, _NONE):
                return mask, rest
    return None, scores


def _filled(scores: Term) -> tuple[Term | None, Term]:
    """The condition where scores are kept, the others being lowest, and the scores; no condition if none."""
    test, inner = None, scores
    if scores[0] == "if":
        test, inner = scores[1], scores[2]
    if inner[:2] == ("call", "where") and len(inner[2]) == 3 and _is_lowest(inner[2][2]):
        kept, rest = inner[2][0], inner[2][1]
    elif (
        inner[:2] == ("call", "masked_fill")
        and len(inner[2]) == 3
        and _is_lowest(inner[2][2])
        and inner[2][1][0] == "Invert"
    ):
        kept, rest = inner[2][1][1], inner[2][0]
    else:
        return None, scores
    if test is not None and (test != ("IsNot", kept, _NONE) or scores[3] != rest):
        return None, scores
    return kept, rest


def _is_mask(mask: Term, added: Term, causal: Term | None) -> bool:
    """``mask`` hides what the sum of ``added`` and the choice by ``causal`` hide, ``added`` given or not."""
    if mask[0] != "if" or mask[1] != ("IsNot", added, _NONE):
        return False
    given, absent = mask[2], mask[3]
    if causal is None:
        return False
    if given[0] == "if":
        if given[1] != ("IsNot", causal, _NONE) or _unexpanded(given[3]) != added:
            return False
        given = given[2]
    filled = given[:2] == ("call", "masked_fill") and len(given[2]) == 3 and _is_lowest(given[2][2])
    return (
        filled
        and _unexpanded(given[2][0]) == added
        and given[2][1] == ("Invert", causal)
        and absent == causal
    )


def _unexpanded(term: Term) -> Term:
    """``m`` of ``m.expand(-1, -1, rows, -1)``."""
    if term[:2] == ("call", "expand") and len(term[2]) == 5:
        sizes = [term[2][i] for i in (1, 2, 4)]
        if all(s in (("constant", -1), ("USub", ("constant", 1))) for s in sizes):
            return term[2][0]
    return term


def _is_lowest(term: Term) -> bool:
    if term[:2] in {("call", "full"), ("call", "tensor")} and term[2]:
        term = term[2][-1]
    return term[0] == "attribute" and term[2] == "min" and term[1][:2] == ("call", "finfo")


@kept_on_source
def _globals(source: Source) -> frozenset[str]:
    """Names that are set at the top of the file, and those of the language."""
    names = syntax.binds_at_top(source.tree) | set(dir(builtins))
    for node in syntax.statements(source.tree.body):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
    return frozenset(names)


def _always_set(owner: ast.ClassDef, name: str) -> bool:
    """Whether every instance has ``name``: a method, an attribute of the class, or set by __init__ always."""
    of_class = {n.name for n in owner.body if isinstance(n, ast.FunctionDef)} | {"training"}
    if name in of_class.union(*(syntax.binds(n) for n in owner.body if isinstance(n, ast.Assign))):
        return True
    made = [n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    return any(_sets(function.body, name) for function in made)


def _sets(block: list[ast.stmt], name: str) -> bool:
    """Whether ``block`` sets ``self.NAME`` whichever way it runs."""
    for stmt in block:
        if isinstance(stmt, ast.If):
            if stmt.orelse and _sets(stmt.body, name) and _sets(stmt.orelse, name):
                return True
        elif isinstance(stmt, (ast.Assign, ast.AnnAssign)):
            targets = stmt.targets if isinstance(stmt, ast.Assign) else [stmt.target]
            if any(
                isinstance(n, ast.Attribute) and n.attr == name and syntax.is_name(n.value, "self")
                for target in targets
                for n in syntax.walk(target)
            ):
                return True
        elif isinstance(stmt, ast.Expr):
            calls = syntax.calls(stmt, "register_buffer")
            if any(call.args and syntax.constant(call.args[0]) == name for call in calls):
                return True
    return False


def _always_true(owner: ast.ClassDef, name: str) -> bool:
    """Every store of ``self.NAME`` is the constant True, or the config's value of that name."""
    values = [
        stmt.value
        for stmt in syntax.walk(owner)
        if isinstance(stmt, ast.Assign)
        for target in stmt.targets
        if isinstance(target, ast.Attribute) and target.attr == name
    ]
    return bool(values) and all(
        (isinstance(v, ast.Constant) and v.value is True) or (isinstance(v, ast.Attribute) and v.attr == name)
        for v in values
    )
