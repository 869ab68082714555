"""Reads a model's own ``forward``: what a token passes on its way from ids to logits, and what else is done.

The method is run on abstract values (:mod:`codemods.analysis.values`), once as a prompt of 1 to S tokens is
read and once as a token is decoded through a cache, with the model's own config. What is known to change
nothing leaves a value as it is; anything else makes it odd, with its line. Odd values count only where they
go on: into a layer, the final norm, the output layer or the result. A branch that no length and no config
value allows is not read, but for saying so.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from codemods.analysis import syntax
from codemods.analysis import values as v
from codemods.analysis.effects import effects
from codemods.analysis.expressions import Expressions, Frame, tells
from codemods.analysis.handed import Found
from codemods.analysis.model_parts import ModelClass, ModelSizes, methods
from codemods.analysis.source import Source
from codemods.analysis.values import PLAIN, Env, Group, Odd, Value


@dataclass
class ForwardReading:
    """What was found in one class's forward. ``never`` are branches that sizes keep from running."""

    problems: list[Found] = field(default_factory=list)
    never: list[Found] = field(default_factory=list)


def read(source: Source, model: ModelClass, sizes: ModelSizes) -> ForwardReading:
    """Read one forward, as it reads a prompt and as it decodes."""
    found = ForwardReading()
    skipped: list[dict[tuple[int, str], Found]] = []
    entered: set[int] = set()
    for decoding in (False, True):
        reader = Statements(source, model, sizes, decoding=decoding)
        reader.run()
        entered |= reader.entered
        skipped.append(reader.never)
        found.problems += [p for p in reader.problems if p not in found.problems]
    found.never = [
        one
        for (line, _), one in {**skipped[0], **skipped[1]}.items()
        if line not in entered and one.line not in {p.line for p in found.problems}
    ]
    found.problems += _written(source, model, entered, found.problems)
    found.problems.sort(key=lambda one: one.line)
    return found


def _written(source: Source, model: ModelClass, entered: set[int], known: list[Found]) -> Iterator[Found]:
    """Calls that may write into the states by another name. (What a layer does, its net does too.)"""
    names = {"hidden_states", "inputs_embeds", "lm_logits", "logits"} & syntax.binds(model.forward)
    body = list(syntax.statements(model.forward.body))
    drawn = frozenset(name for s in body if isinstance(s, ast.For) for name in syntax.binds(s.target))
    passed = {
        line
        for stmt in body
        if _read_here(stmt, drawn)
        for line in range(stmt.lineno, (stmt.end_lineno or stmt.lineno) + 1)
    }
    for write in effects(source).written(model.forward, sorted(names)):
        if write.line in entered - passed and write.line not in {p.line for p in known}:
            yield Found("the states may be changed in place here", write.line)


def _read_here(stmt: ast.stmt, drawn: frozenset[str]) -> bool:
    """A statement whose writes are read one by one here, or a call of a layer or of the whole model."""
    if isinstance(stmt, ast.AugAssign):
        return True
    if not isinstance(stmt, ast.Assign):
        return False
    called = stmt.value.func if isinstance(stmt.value, ast.Call) else None
    return (
        any(isinstance(target, ast.Subscript) for target in stmt.targets)
        or (isinstance(called, ast.Name) and called.id in drawn)
        or (called is not None and ast.unparse(called) in {"self.transformer", "self.h[i]"})
    )


class Statements(Expressions):
    """Runs one forward, statement by statement."""

    layered = False  #: the loop over the layers has been read
    constructing = False  #: it is ``__init__`` that is being read

    # -- the two ends ----------------------------------------------------------------------------------------

    def _construct(self) -> None:
        """What ``__init__`` leaves in the attributes."""
        made = self.methods.get("__init__")
        if made is None:
            return
        env: Env = dict.fromkeys(syntax.parameters(made), PLAIN)
        env |= {"self": v.ITSELF, "config": v.CONFIG}
        self.constructing = True
        self._block(made.body, env)
        self.constructing = False
        self.never.clear()
        self.entered.clear()
        self.frames = [Frame()]
        elsewhere = set(_stored_elsewhere(self.source, self.model.node, made))
        self.attributes = {name: value for name, value in self.attributes.items() if name not in elsewhere}

    def run(self) -> None:
        """Read ``__init__`` and forward, and hold what that returns against what should come out."""
        self._construct()
        env: Env = {name: self._parameter(name) for name in syntax.parameters(self.model.forward)}
        for rest in (self.model.forward.args.vararg, self.model.forward.args.kwarg):
            env |= {rest.arg: PLAIN} if rest is not None else {}
        self._block(self.model.forward.body, env)
        wanted = v.LOGITS if self.model.head else v.NORMED
        for value, line in self.frames[-1].returned:
            self._expect(v.first(value), wanted, line, f"{self.model.node.name}.forward returns")
        if not self.frames[-1].returned:
            self._problem(f"{self.model.node.name}.forward returns nothing", self.model.forward.lineno)

    def _parameter(self, name: str) -> Value:
        cache: Value = v.CACHE if self.decoding else v.NONE
        given: Env = {"self": v.ITSELF, "input_ids": v.IDS, "past_key_values": cache, "use_cache": v.TRUE}
        given |= {"attention_mask": v.MASK, "output_attentions": v.FALSE, "output_hidden_states": v.FALSE}
        given["return_dict"] = PLAIN
        if name in given:
            return given[name]
        function = self.model.forward.args
        names = [a.arg for a in (*function.posonlyargs, *function.args)]
        defaults = dict(zip(names[len(names) - len(function.defaults) :], function.defaults, strict=True))
        defaults |= {
            a.arg: d for a, d in zip(function.kwonlyargs, function.kw_defaults, strict=True) if d is not None
        }
        return self.value(defaults[name], {}) if name in defaults else PLAIN

    # -- statements ------------------------------------------------------------------------------------------

    def _block(self, body: Sequence[ast.stmt], env: Env) -> Env | None:
        """The names behind ``body``; None where nothing comes behind it."""
        here: Env | None = env
        for stmt in body:
            if here is None:
                return None
            self.entered.add(stmt.lineno)
            here = self._statement(stmt, here)
        return here

    def _statement(self, stmt: ast.stmt, env: Env) -> Env | None:
        if isinstance(stmt, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            self._assign(stmt, env)
        elif isinstance(stmt, ast.Expr):
            self._alone(stmt.value, env)
        elif isinstance(stmt, ast.If):
            return self._if(stmt, env)
        elif isinstance(stmt, ast.For):
            return self._for(stmt, env)
        elif isinstance(stmt, ast.Return):
            value = self.value(stmt.value, env) if stmt.value is not None else v.NONE
            self.frames[-1].returned.append((value, stmt.lineno))
            return None
        elif isinstance(stmt, ast.Raise):
            return None
        elif isinstance(stmt, (ast.Continue, ast.Break)):
            ends = self.frames[-1]
            (ends.going_on if isinstance(stmt, ast.Continue) else ends.broken).append(dict(env))
            return None
        elif isinstance(stmt, ast.With):
            return self._with(stmt, env)
        elif isinstance(stmt, (ast.FunctionDef, ast.ClassDef)):
            env[stmt.name] = PLAIN
        elif any(syntax.blocks(stmt)):
            self._unread(stmt, env)
        return env

    def _with(self, stmt: ast.With, env: Env) -> Env | None:
        for item in stmt.items:
            self.value(item.context_expr, env)
            if item.optional_vars is not None:
                self._bind(item.optional_vars, PLAIN, env, stmt)
        return self._block(stmt.body, env)

    def _unread(self, stmt: ast.stmt, env: Env) -> None:
        """A loop or a try that is not read: what it binds is odd."""
        odd = self._odd(stmt, f"what this {type(stmt).__name__.lower()} does is not read")
        for name in syntax.binds(stmt):
            env[name] = odd
        if any(isinstance(n, ast.Return) for n in syntax.walk(stmt)):
            self._report(odd)

    def _assign(self, stmt: ast.Assign | ast.AnnAssign | ast.AugAssign, env: Env) -> None:
        if isinstance(stmt, ast.AugAssign):
            whole = ast.copy_location(ast.BinOp(_loaded(stmt.target), stmt.op, stmt.value), stmt)
            before, after = self.value(_loaded(stmt.target), env), self.value(whole, env)
            if isinstance(after, Odd) and before in v.STATES:  # in place: under every name it has
                env.update({name: after for name, held in env.items() if held == before})
            self._bind(stmt.target, after, env, stmt)
        elif stmt.value is not None:
            value = self.value(stmt.value, env)
            for target in stmt.targets if isinstance(stmt, ast.Assign) else [stmt.target]:
                self._bind(target, value, env, stmt)

    def _bind(self, target: ast.expr, value: Value, env: Env, at: ast.stmt) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part, one in zip(target.elts, self._unpacked(value, target.elts, at), strict=True):
                self._bind(part.value if isinstance(part, ast.Starred) else part, one, env, at)
        elif isinstance(target, ast.Subscript):
            self._store_item(target, value, env)
        elif isinstance(target, ast.Attribute):
            self._store_attribute(target, value, env)

    def _unpacked(self, value: Value, targets: Sequence[ast.expr], at: ast.stmt) -> list[Value]:
        """One value for each target."""
        if isinstance(value, Group) and len(value.items) == len(targets):
            return list(value.items)
        if isinstance(value, v.Each):
            return [value.item] * len(targets)
        if value == v.GIVEN:
            return [v.OUT_OF, *[PLAIN] * (len(targets) - 1)]
        odd = v.odd_in(value) or (self._odd(at) if v.of_the_way(value) else PLAIN)
        return [odd] * len(targets)

    def _store_item(self, target: ast.Subscript, value: Value, env: Env) -> None:
        """``x[...] = value``: as it was, or odd under every name that x has."""
        root: ast.expr = target
        while isinstance(root, ast.Subscript):
            root = root.value
        held = self.value(root, env)
        if self.value(_loaded(target), env) == value or (held == v.TABLES and value == v.TABLES):
            return
        if v.of_the_way(held) or v.of_the_way(value) or held == v.MASK:
            odd = self._odd(target, f"`{ast.unparse(target)}` is written")
            env.update({name: odd for name, other in env.items() if other == held})

    def _store_attribute(self, target: ast.Attribute, value: Value, env: Env) -> None:
        owner = self.value(target.value, env)
        if any(self.value(part, env) in (v.LAYERS, v.LAYER) for part in _owners(target)):
            self._problem(f"`{ast.unparse(target)}` changes a layer", target.lineno)
        elif self.constructing:
            if owner == v.ITSELF:
                self.attributes[target.attr] = value
        elif line := self._kept(target, value):
            self._problem(f"`{ast.unparse(target)}` is kept, and read again on line {line}", target.lineno)

    def _kept(self, target: ast.Attribute, value: Value) -> int:
        """The line that reads what is stored here; 0 where nothing does, or where it is what it was."""
        if v.only(value, v.ONE) and self._first_of(target) == value:
            return 0
        reads = (
            n.lineno
            for n in syntax.walk(self.source.tree)
            if isinstance(n, ast.Attribute) and n.attr == target.attr and isinstance(n.ctx, ast.Load)
        )
        return next(reads, 0)

    def _alone(self, node: ast.expr, env: Env) -> None:
        """A call on its own: it may act on what it is given."""
        if not isinstance(node, ast.Call):
            self.value(node, env)
            return
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in {"append", "extend"}:
            self._appended(function, node, env)
            return
        value = self.value(node, env)
        changed = isinstance(function, ast.Attribute) and function.attr.endswith("_") and function.value
        held = self.value(changed, env) if changed else PLAIN
        if v.of_the_way(held):
            odd = self._odd(node, f"`{ast.unparse(node)}` writes in place")
            env.update({name: odd for name, other in env.items() if other == held})
        elif isinstance(value, Odd) and not tells(node):
            self._report(
                self._odd(node, f"it is not seen what `{ast.unparse(function)}` does with what it is given")
            )

    def _appended(self, function: ast.Attribute, node: ast.Call, env: Env) -> None:
        held, given = self.value(function.value, env), [self.value(a, env) for a in node.args]
        if isinstance(function.value, ast.Name) and isinstance(held, Group) and function.attr == "append":
            env[function.value.id] = Group((*held.items, *given))
        elif isinstance(function.value, ast.Name) and isinstance(held, v.Each) and given:
            env[function.value.id] = v.Each(v.join(held.item, given[0], node.lineno, ast.unparse(node)))

    # -- choices and loops -----------------------------------------------------------------------------------

    def _if(self, stmt: ast.If, env: Env) -> Env | None:
        answer = self._test(stmt.test, env)
        if answer is None:
            text = ast.unparse(stmt.test)
            taken = self._under(text, stmt.body, dict(env))
            other = self._under(f"not ({text})", stmt.orelse, dict(env))
            return v.either(taken, other, stmt.lineno, text)
        if self.by_size:
            self._not_taken(stmt, stmt.orelse if answer else stmt.body, env)
        return self._block(stmt.body if answer else stmt.orelse, env)

    def _under(self, test: str, body: Sequence[ast.stmt], env: Env) -> Env | None:
        self.tests.append(test)
        after = self._block(body, env)
        self.tests.pop()
        return after

    def _not_taken(self, stmt: ast.If, arm: Sequence[ast.stmt], env: Env) -> None:
        """Note an arm that sizes keep from running, if it does more than to complain."""
        if all(map(_complains, arm)):
            return
        text, numbers = ast.unparse(stmt.test), v.said(stmt.test, lambda side: self.value(side, env))
        line = arm[0].lineno
        self.never[line, text] = Found(f"never taken at these sizes: `{text}` ({numbers})", line)

    def _for(self, stmt: ast.For, env: Env) -> Env | None:
        drawn = self._drawn(stmt.iter, env)
        if v.layer_in(drawn) and not self.constructing:
            return self._layers(stmt, v.element(drawn), env)
        if isinstance(drawn, Group) and len(drawn.items) <= 8:
            here: Env | None = env
            for item in drawn.items:
                here = self._once(stmt, item, here) if here is not None else None
            return here
        element = v.element(drawn)
        before = dict(env)
        for _ in range(2):
            after = self._once(stmt, element, dict(before))
            before = (
                v.either(before, after, stmt.lineno, f"how often `{ast.unparse(stmt.iter)}` runs") or before
            )
        return before

    def _once(self, stmt: ast.For, element: Value, env: Env) -> Env | None:
        """The names behind one round of a loop."""
        outer = self.frames[-1]
        self.frames.append(Frame(returned=outer.returned))
        self._bind(stmt.target, element, env, stmt)
        after = self._block(stmt.body, env)
        for other in (*self.frames[-1].going_on, *self.frames[-1].broken):
            after = v.either(after, other, stmt.lineno, "where a round of the loop ends")
        self.frames.pop()
        return after

    def _layers(self, stmt: ast.For, element: Value, env: Env) -> Env | None:
        """The loop over the layers: each takes what the one before it gave."""
        if self.layered or self.tests:
            self._problem("the layers are run more than once, or not always", stmt.lineno)
        carried = {name for name, value in env.items() if value == v.EMBEDDED}
        before = {**env, **dict.fromkeys(carried, v.INTO)}
        goes_on: set[str] = set()
        for _ in range(2):
            after = self._round(stmt, element, dict(before))
            goes_on = {name for name, value in after.items() if value == v.OUT_OF}
            stale = Odd(stmt.lineno, "a layer is given something else than what the one before it gave")
            before = {
                name: self._next(value, env.get(name, value), name in goes_on, name in carried, stale)
                for name, value in after.items()
            }
        if not goes_on:
            odd = next((found for name in carried if (found := v.odd_in(after.get(name, PLAIN)))), None)
            self._report(odd or Odd(stmt.lineno, "what a layer gives is not seen to go on to the next one"))
        self.layered = True
        return {**before, **dict.fromkeys(goes_on, v.LAYERED)}

    @staticmethod
    def _next(value: Value, first: Value, goes_on: bool, carried: bool, stale: Odd) -> Value:
        """What a name holds at the start of the next round."""
        if goes_on:
            return v.INTO
        if carried and value == v.INTO:
            return stale
        return v.join(first, value, stale.line, "how many layers ran")

    def _round(self, stmt: ast.For, element: Value, env: Env) -> Env:
        self.frames.append(Frame(returned=self.frames[-1].returned))
        returned = len(self.frames[-1].returned)
        self._bind(stmt.target, element, env, stmt)
        after = self._block(stmt.body, env)
        ends = self.frames.pop()
        if ends.broken or len(ends.returned) > returned:
            self._problem("the loop over the layers may end early", stmt.lineno)
        for other in ends.going_on:
            after = v.either(after, other, stmt.lineno, "which layers run")
        return after if after is not None else env


def _loaded(node: ast.expr) -> ast.expr:
    """The same place, read."""
    if isinstance(node, ast.Name):
        return ast.copy_location(ast.Name(node.id, ast.Load()), node)
    if isinstance(node, ast.Subscript):
        return ast.copy_location(ast.Subscript(node.value, node.slice, ast.Load()), node)
    assert isinstance(node, ast.Attribute)
    return ast.copy_location(ast.Attribute(node.value, node.attr, ast.Load()), node)


def _owners(target: ast.expr) -> Iterator[ast.expr]:
    """``a.b`` and ``a`` of ``a.b.c``."""
    while isinstance(target, (ast.Attribute, ast.Subscript)):
        target = target.value
        yield target


def _complains(stmt: ast.stmt) -> bool:
    return isinstance(stmt, (ast.Raise, ast.Pass)) or (
        isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Call) and tells(stmt.value)
    )


def _stored_elsewhere(source: Source, node: ast.ClassDef, made: ast.FunctionDef) -> Iterator[str]:
    """Attributes of a ``node`` that something else than ``made`` and ``set_..._embeddings`` may set."""
    setters = [m for m in methods(node).values() if m.name.endswith("_embeddings")]
    for n in syntax.walk(source.tree):
        if isinstance(n, ast.Attribute) and not isinstance(n.ctx, ast.Load):
            own = syntax.is_name(n.value, "self")
            if own != _inside(node, n) or any(_inside(one, n) for one in (made, *setters)):
                continue
            yield n.attr


def _inside(function: ast.AST, node: ast.AST) -> bool:
    return any(node is inner for inner in syntax.walk(function))
