"""What an expression of a model's forward gives, on abstract values."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from codemods.analysis import syntax
from codemods.analysis import values as v
from codemods.analysis.effects import words
from codemods.analysis.handed import Found
from codemods.analysis.model_parts import ModelClass, ModelSizes, methods, models
from codemods.analysis.source import Source
from codemods.analysis.values import PLAIN, Env, Fixed, Group, Number, Odd, Value, Waypoint

#: Methods that give the same numbers again.
_SAME = frozenset(
    ("to", "float", "type", "type_as", "half", "bfloat16", "contiguous", "clone", "detach", "cuda", "cpu")
)
_SHAPED = frozenset(("view", "reshape"))
_DESCRIBES = frozenset(("device", "dtype", "is_cuda", "requires_grad", "ndim", "training"))
#: Calls that tell somebody something.
_TELLS = frozenset(("logger", "logging", "warnings"))
#: What a block takes besides its states, by what it must be given.
_PAST, _MASK, _TABLES = "layer_past", "attention_mask", frozenset(("rotary_pos_emb", "rotary_pos_emb_list"))
_FREE = words(
    """
    registered_causal_mask head_mask encoder_hidden_states encoder_attention_mask use_cache output_attentions
    """
)
_DEEPEST = 8  #: loops and calls of the file's own functions inside one another
#: Part of the model -> what it takes, what it gives, the class it must be of (its own where that is empty).
_PARTS: dict[str, tuple[Waypoint, Waypoint, str]] = {
    "wte": (v.IDS, v.EMBEDDED, "Embedding"),
    "ln_f": (v.LAYERED, v.NORMED, ""),
    "lm_head": (v.NORMED, v.LOGITS, "Linear"),
}
_DEEPER: dict[Value, Value] = {
    v.CACHE: v.SOME_UNIT,
    v.UNIT: v.TENSOR,
    v.SOME_UNIT: v.TENSOR,
    v.TENSOR: v.PART,
}
_NEUTRAL: dict[type, Value] = {
    ast.Add: v.number(0),
    ast.Sub: v.number(0),
    ast.Mult: v.ONE,
    ast.Div: v.ONE,
}


@dataclass
class Frame:
    """One function being read: the values it has returned, and in a loop the names where it goes on."""

    returned: list[tuple[Value, int]] = field(default_factory=list)
    going_on: list[Env] = field(default_factory=list)
    broken: list[Env] = field(default_factory=list)


class Expressions:
    """Evaluates one forward on abstract values, in one of the two ways in which it is called."""

    def __init__(self, source: Source, model: ModelClass, sizes: ModelSizes, *, decoding: bool) -> None:
        self.source, self.model, self.sizes, self.decoding = source, model, sizes, decoding
        self.functions = {n.name: n for n in source.tree.body if isinstance(n, ast.FunctionDef)}
        self.classes = {n.name: n for n in source.tree.body if isinstance(n, ast.ClassDef)}
        self.methods = methods(model.node)
        self.constants = dict(_constants(source))
        self.problems: list[Found] = []
        self.never: dict[tuple[int, str], Found] = {}
        self.entered: set[int] = set()
        self.tests: list[str] = []  #: the undecided conditions around what is being read
        self.frames: list[Frame] = [Frame()]
        self.by_size = False  #: whether a length or a number of config.json decided the last test
        self.attributes: Env = {}
        longest = sizes.seq_length
        self.new = v.ONE if decoding else Number(1, longest, "new")
        self.past = Number(1, max(1, longest - 1), "past")
        self.total = Number(2, max(2, longest)) if decoding else self.new

    def _block(self, body: Sequence[ast.stmt], env: Env) -> Env | None:
        """The names behind the statements ``body``; None where nothing comes behind them."""
        raise NotImplementedError

    def _bind(self, target: ast.expr, value: Value, env: Env, at: ast.stmt) -> None:
        """Give ``target`` its value in ``env``; ``at`` is the statement that does."""
        raise NotImplementedError

    def _problem(self, reason: str, line: int) -> None:
        where = f" (where `{self.tests[-1]}`)" if self.tests else ""
        found = Found(reason + where, line)
        if found.line not in {p.line for p in self.problems}:
            self.problems.append(found)

    def _expect(self, value: Value, wanted: Value, line: int, what: str) -> None:
        if value == wanted:
            return
        odd = v.odd_in(value)
        if odd is not None:
            self._report(odd)
        else:
            self._problem(f"{what} something else than what is {v.called(wanted)}", line)

    def _report(self, odd: Odd) -> None:
        if odd.line not in {p.line for p in self.problems}:
            self.problems.append(Found(odd.reason, odd.line))

    def _odd(self, node: ast.AST, why: str = "") -> Odd:
        where = f" (where `{self.tests[-1]}`)" if self.tests else ""
        text = ast.unparse(node).splitlines()[0]
        text = text if len(text) < 70 else text[:67] + "..."
        return Odd(getattr(node, "lineno", 1), f"{why or f'`{text}` is no step known here'}{where}")

    def _test(self, test: ast.expr, env: Env) -> bool | None:
        self.by_size = False
        return v.truth(self.value(test, env))

    def _drawn(self, node: ast.expr, env: Env) -> Value:
        """What a loop goes over: a list of the values that its variable takes."""
        name = (
            syntax.call_name(node) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        )
        if isinstance(node, ast.Call) and name in {"zip", "enumerate", "range"}:
            parts = [self.value(a, env) for a in node.args]
            if name == "range":
                return v.counted(parts)
            lists = [v.Each(Number(0, float("inf"), "index")), parts[0]] if name == "enumerate" else parts
            if name == "enumerate":
                lists[1] = self._drawn(node.args[0], env)
            return v.zipped(lists, self.sizes.layers)
        return self.value(node, env)

    # -- expressions -----------------------------------------------------------------------------------------

    def value(self, node: ast.expr, env: Env) -> Value:
        """What ``node`` gives."""
        reader: Callable[..., Value] | None = getattr(self, f"_{type(node).__name__}", None)
        if reader is not None:
            return reader(node, env)
        return self._unknown(node, [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr)], env)

    def _unknown(self, node: ast.expr, parts: Iterable[ast.expr], env: Env) -> Value:
        """Something not known of ``parts``: odd if anything of the way is in it."""
        found = [self.value(part, env) for part in parts]
        odd = next((one for value in found if (one := v.odd_in(value))), None)
        if odd is not None:
            return odd
        if any(map(v.of_the_way, found)):
            return self._odd(node)
        return v.MASK if v.MASK in found else PLAIN

    def _Constant(self, node: ast.Constant, env: Env) -> Value:
        return v.constant(node.value)

    def _Name(self, node: ast.Name, env: Env) -> Value:
        return env[node.id] if node.id in env else self.constants.get(node.id, PLAIN)

    def _Starred(self, node: ast.Starred, env: Env) -> Value:
        return self.value(node.value, env)

    def _NamedExpr(self, node: ast.NamedExpr, env: Env) -> Value:
        env[node.target.id] = self.value(node.value, env)
        return env[node.target.id]

    def _Tuple(self, node: ast.Tuple | ast.List, env: Env) -> Value:
        items: list[Value] = []
        for part in node.elts:
            value = self.value(part, env)
            if isinstance(part, ast.Starred):
                items += value.items if isinstance(value, Group) else [v.element(value)]
            else:
                items.append(value)
        return Group(tuple(items))

    _List = _Tuple

    def _IfExp(self, node: ast.IfExp, env: Env) -> Value:
        answer = self._test(node.test, env)
        if answer is not None:
            return self.value(node.body if answer else node.orelse, env)
        text = ast.unparse(node.test)
        return v.join(self.value(node.body, env), self.value(node.orelse, env), node.lineno, text)

    def _BoolOp(self, node: ast.BoolOp, env: Env) -> Value:
        stops = isinstance(node.op, ast.Or)
        values: list[Value] = []
        sized = False
        for part in node.values:
            self.by_size = False
            value = self.value(part, env)
            if v.truth(value) is stops:  # of all parts this one decides
                self.by_size = self.by_size or (sized and not values)
                return value
            sized |= self.by_size
            values.append(value)
        self.by_size = sized
        undecided = [value for value in values if v.truth(value) is None]
        if not undecided:
            return values[-1]
        return v.odd_in(Group(tuple(undecided))) or PLAIN

    def _UnaryOp(self, node: ast.UnaryOp, env: Env) -> Value:
        value = self.value(node.operand, env)
        if isinstance(node.op, ast.Not):
            answer = v.truth(value)
            return v.known(None if answer is None else not answer)
        if isinstance(node.op, ast.USub) and isinstance(value, Number):
            return Number(-value.high, -value.low)
        return self._unknown(node, [node.operand], env)

    def _Compare(self, node: ast.Compare, env: Env) -> Value:
        sides = [self.value(side, env) for side in (node.left, *node.comparators)]
        answers = [v.compared(op, a, b) for op, a, b in zip(node.ops, sides[:-1], sides[1:], strict=True)]
        if all(answer is not None for answer in answers) or False in answers:
            self.by_size |= any(isinstance(side, Number) for side in sides)
            return Fixed(False not in answers)
        return PLAIN

    def _BinOp(self, node: ast.BinOp, env: Env) -> Value:
        left, right = self.value(node.left, env), self.value(node.right, env)
        if isinstance(left, Number) and isinstance(right, Number):
            found = v.arithmetic(node.op, left, right)
            both = {left, right} == {v.ONE, self.past} and self.decoding
            return self.total if both and isinstance(node.op, ast.Add) else found
        if isinstance(node.op, ast.Add) and isinstance(left, Group) and isinstance(right, Group):
            return Group((*left.items, *right.items))
        if isinstance(node.op, ast.Add) and isinstance(left, Group) and right == PLAIN:
            return Group((*left.items, PLAIN))
        if isinstance(node.op, ast.Add) and isinstance(left, v.Each) and isinstance(right, Group):
            return v.join(left, right, node.lineno, "how many rounds ran")
        if isinstance(node.op, ast.Mult) and isinstance(left, Group) and len(left.items) == 1:
            return v.Each(left.items[0])
        if right == _NEUTRAL.get(type(node.op)) and (left in v.STATES or left == v.TABLES):
            return left
        return self._unknown(node, [node.left, node.right], env)

    def _Attribute(self, node: ast.Attribute, env: Env) -> Value:
        owner = self.value(node.value, env)
        if owner == v.ITSELF:
            return self._own(node.attr)
        if owner == v.CONFIG:
            return self.sizes.value(node.attr)
        if node.attr == "shape":
            return self._shape(owner)
        if node.attr in _DESCRIBES:
            return PLAIN
        if owner == v.BODY:
            return v.NORMED if node.attr == "last_hidden_state" else PLAIN
        if isinstance(owner, v.Returned):
            return owner.first if node.attr in {"last_hidden_state", "logits"} else PLAIN
        if isinstance(owner, v.Built):
            return self._first_of(node)
        return self._unknown(node, [node.value], env)

    def _own(self, name: str) -> Value:
        if name == "training":
            return v.FALSE
        if name == "config":
            return v.CONFIG
        return v.LAYERS if name == "h" else self.attributes.get(name, PLAIN)

    def _first_of(self, node: ast.Attribute) -> Value:
        """What ``self.part.name`` holds from the start, where only its class and this forward set it, both to
        what they are given: then it stays that as long as they are given nothing else."""
        made = self.value(node.value, {"self": v.ITSELF})
        owner = self.classes.get(made.name) if isinstance(made, v.Built) else None
        for stmt in (
            syntax.statements(methods(owner)["__init__"].body)
            if owner and "__init__" in methods(owner)
            else ()
        ):
            if isinstance(stmt, ast.Assign) and ast.unparse(stmt.targets[0]) == f"self.{node.attr}":
                return self.value(stmt.value, {})
        return PLAIN

    def _shape(self, owner: Value) -> Value:
        if owner == v.IDS:
            return Group((v.ONE, self.new))
        if owner in v.STATES:
            return Group((v.ONE, self.new, Fixed("width")))
        if owner in (v.TENSOR, v.PART):
            at = 1 if owner == v.TENSOR else 2
            return Group(tuple(self.past if i == at else PLAIN for i in range(4)))
        return PLAIN

    def _Subscript(self, node: ast.Subscript, env: Env) -> Value:
        held, at = self.value(node.value, env), node.slice
        if isinstance(held, (Group, v.Each)):
            return self._item(held, at, env)
        index = self.value(at, env) if not isinstance(at, (ast.Slice, ast.Tuple)) else None
        if held in _DEEPER and isinstance(index, Number):
            return v.UNIT if held == v.CACHE and index.of == "index" else _DEEPER[held]
        if held == v.LAYERS:
            return self._some_layers(node, index, env)
        if held in (v.GIVEN, v.BODY):
            first = v.OUT_OF if held == v.GIVEN else v.NORMED
            return first if syntax.constant(at) == 0 else self._rest(node, at)
        if held in (v.NORMED, v.LOGITS) and ast.unparse(at).strip("()") in {":, -1:", ":, -1:, :"}:
            return held  # a row a token: the last one's is as it was
        return self._unknown(node, [node.value], env)

    def _rest(self, node: ast.Subscript, at: ast.expr) -> Value:
        lower = syntax.constant(at.lower) if isinstance(at, ast.Slice) else None
        number = isinstance(at, ast.IfExp) or isinstance(syntax.constant(at), int)
        return PLAIN if number or (isinstance(lower, int) and lower > 0) else self._odd(node)

    def _some_layers(self, node: ast.Subscript, index: Value | None, env: Env) -> Value:
        if isinstance(index, Number):
            return (
                v.LAYER
                if index.of == "index"
                else self._odd(node, f"`{ast.unparse(node)}` is one layer alone")
            )
        if isinstance(node.slice, ast.Slice) and node.slice.step is None and _none_or_zero(node.slice.lower):
            upper = self.value(node.slice.upper, env) if node.slice.upper is not None else None
            if upper is None or (isinstance(upper, Number) and upper == self.sizes.layers):
                return v.LAYERS
        return self._odd(node, f"`{ast.unparse(node)}` is not every layer in its order")

    def _item(self, held: Group | v.Each, at: ast.expr, env: Env) -> Value:
        if isinstance(held, v.Each):
            return held if isinstance(at, ast.Slice) else held.item
        if isinstance(at, ast.Slice):
            bounds = [None if b is None else syntax.constant(b) for b in (at.lower, at.upper, at.step)]
            if all(b is None or isinstance(b, int) for b in bounds):
                return Group(held.items[slice(*bounds)])  # type: ignore[arg-type]
        place = syntax.constant(at)
        if isinstance(place, int) and -len(held.items) <= place < len(held.items):
            return held.items[place]
        return v.element(held)

    def _ListComp(self, node: ast.ListComp | ast.GeneratorExp, env: Env) -> Value:
        if len(node.generators) != 1:
            return self._unknown(node, [node.elt, *(g.iter for g in node.generators)], env)
        loop, items = node.generators[0], []
        drawn = self._drawn(loop.iter, env)
        for item in drawn.items if isinstance(drawn, Group) else (v.element(drawn),):
            inner = dict(env)
            self._bind(loop.target, item, inner, ast.copy_location(ast.Pass(), node))
            if not any(v.truth(self.value(test, inner)) is False for test in loop.ifs):
                items.append(self.value(node.elt, inner))
        return Group(tuple(items)) if isinstance(drawn, Group) else v.Each(items[0] if items else PLAIN)

    _GeneratorExp = _ListComp

    # -- calls -----------------------------------------------------------------------------------------------

    def _Call(self, node: ast.Call, env: Env) -> Value:
        function = node.func
        if isinstance(function, ast.Attribute) and not syntax.on_torch(node):
            owner = self.value(function.value, env)
            if owner == v.ITSELF:
                return self._of_itself(node, function.attr, env)
            found = self._method(node, function.attr, owner, env)
            if found is not None:
                return found
        if isinstance(function, ast.Name):
            return self._named(node, function.id, env)
        called = self.value(function, env)
        if called == v.LAYER:
            return self._layer(node, env)
        if called == v.LAYERS:
            return self._odd(node)
        return self._of_library(node, env)

    def _of_library(self, node: ast.Call, env: Env) -> Value:
        """torch, math, and what else is imported."""
        name = syntax.last_name(node.func)
        given = [self.value(a, env) for a in node.args]
        if name.endswith("dropout") and given and self._is_off(node, env):
            return given[0]
        if name[:1].isupper() and not any(map(v.of_the_way, given)):
            return v.Built(name)
        found = v.applied(name, given)
        return found if found != PLAIN else self._unknown(node, _arguments(node), env)

    def _is_off(self, node: ast.Call, env: Env) -> bool:
        off = (syntax.keyword(node, "training"), syntax.keyword(node, "p"))
        return any(part is not None and v.truth(self.value(part, env)) is False for part in off)

    def _method(self, node: ast.Call, name: str, owner: Value, env: Env) -> Value | None:
        """A method of a value; None where the value has nothing to do with it."""
        if name == "size":
            shape = self._shape(owner)
            if not node.args or not isinstance(shape, Group):
                return shape
            return self._item(shape, node.args[0], env)
        if name == "to_tuple" and (isinstance(owner, v.Returned) or owner == v.BODY):
            return owner
        if owner == v.LAYER or not (v.of_the_way(owner) or owner in (v.MASK, v.CONFIG)):
            return None
        if owner == v.CONFIG:
            return PLAIN
        if name in _SAME or (name in _SHAPED and self._same_shape(node, owner, env)):
            return owner
        return self._unknown(node, [node.func.value, *_arguments(node)], env)  # type: ignore[attr-defined]

    def _same_shape(self, node: ast.Call, owner: Value, env: Env) -> bool:
        shape = self._shape(owner)
        given = [self.value(a, env) for a in node.args]
        wanted = list(given[0].items) if len(given) == 1 and isinstance(given[0], Group) else given
        if not isinstance(shape, Group) or len(wanted) != len(shape.items):
            return False
        free = [a == v.number(-1) for a in wanted]
        return sum(free) < 2 and all(
            left_free or a == b for a, b, left_free in zip(wanted, shape.items, free, strict=True)
        )

    def _named(self, node: ast.Call, name: str, env: Env) -> Value:
        held = env.get(name)
        if held == v.LAYER:
            return self._layer(node, env)
        given = [self.value(a, env) for a in node.args]
        if held is not None:
            return held if isinstance(held, Odd) else self._unknown(node, _arguments(node), env)
        if name in {"getattr", "hasattr"} and given[:1] == [v.CONFIG] and isinstance(given[1], Fixed):
            return self._of_config(name, str(given[1].value), given[2:])
        if name == "len" and given:
            return self._length(given[0])
        if name in {"tuple", "list"} and len(given) == 1:
            return given[0]
        if name.endswith(("OutputWithPast", "ModelOutput", "OutputWithPastAndCrossAttentions")):
            return self._output(node, env)
        if name in self.functions:
            return self._inlined(self.functions[name], node, env, PLAIN)
        if name[:1].isupper() and not any(map(v.of_the_way, given)):
            return v.Built(name)
        found = v.applied(name, given)
        return found if found != PLAIN else self._unknown(node, _arguments(node), env)

    def _of_config(self, name: str, key: str, default: list[Value]) -> Value:
        if name == "hasattr":
            return Fixed(True) if self.sizes.has(key) else PLAIN
        return self.sizes.value(key) if self.sizes.has(key) else default[0] if default else PLAIN

    def _length(self, value: Value) -> Value:
        if value == v.LAYERS:
            return self.sizes.layers
        return v.number(len(value.items)) if isinstance(value, Group) else PLAIN

    def _output(self, node: ast.Call, env: Env) -> Value:
        """One of transformers' classes of outputs; hidden states and the like in it are not read."""
        name = "logits" if self.model.head else "last_hidden_state"
        first = syntax.keyword(node, name) or (node.args[0] if node.args else None)
        return v.Returned(self.value(first, env)) if first is not None else PLAIN

    def _of_itself(self, node: ast.Call, name: str, env: Env) -> Value:
        """``self.name(...)``: one of the model's parts, or a method of its own."""
        part = self.attributes.get(name, PLAIN)
        if name in {"wte", "ln_f", "lm_head", "transformer", "rotary_emb"}:
            return self._part(node, name, part, env)
        given = [self.value(a, env) for a in node.args]
        if isinstance(part, v.Built) and part.name in {"Dropout", "Identity"} and given:
            return given[0]
        if name in self.methods:
            return self._inlined(self.methods[name], node, env, v.ITSELF)
        return self._unknown(node, _arguments(node), env)

    def _part(self, node: ast.Call, name: str, part: Value, env: Env) -> Value:
        if name == "rotary_emb":
            return self._tables(node, env)
        if name == "transformer":
            return self._body(node, env)
        given = self.value(node.args[0], env) if node.args else PLAIN
        wanted, gives, kind = _PARTS[name]
        if kind and part != v.Built(kind):
            return self._odd(node, f"self.{name} is not seen to be a plain nn.{kind}")
        if given != wanted:
            return v.odd_in(given) or self._odd(
                node, f"self.{name} is given something else than what is {v.called(wanted)}"
            )
        return gives

    def _tables(self, node: ast.Call, env: Env) -> Value:
        """Rotary tables as long as all tokens, with the base as it is."""
        given = [self.value(a, env) for a in node.args]
        named = {k.arg or "": self.value(k.value, env) for k in node.keywords}
        lengths, bases = given[:1], [*given[1:], *(named.pop(k) for k in ("ntk_alpha",) if k in named)]
        if lengths != [self.total] or named:
            return self._odd(node, f"`{ast.unparse(node)}`: its length is not seen to be that of all tokens")
        for base in bases:
            if base != v.ONE and not (isinstance(base, Number) and base.low == base.high == 1):
                return v.odd_in(base) or self._odd(
                    node, f"`{ast.unparse(node)}`: the rotary base may change ({v.shown(base)})"
                )
        return v.TABLES

    def _body(self, node: ast.Call, env: Env) -> Value:
        """The head's call of the model: it hands on ids, cache and mask as they are."""
        inner = next((m.forward for m in models(self.source) if not m.head), None)
        named = {k.arg: k.value for k in node.keywords if k.arg}
        bound = named if inner is None else syntax.arguments(_without_rest(node), inner)
        wanted: Env = {"input_ids": v.IDS, "past_key_values": v.CACHE if self.decoding else v.NONE}
        for name, value in wanted.items():
            part = (bound or {}).get(name)
            found = self.value(part, env) if part is not None else v.NONE
            if found != value:
                return v.odd_in(found) or self._odd(
                    node, f"the model is given other {name} than the caller's"
                )
        mask = (bound or {}).get(_MASK)
        if mask is not None and self.value(mask, env) not in (v.MASK, v.NONE):
            return self._odd(node, "the model is given another mask than the caller's")
        embeds = (bound or {}).get("inputs_embeds")
        if embeds is not None and self.value(embeds, env) != v.NONE:
            return self._odd(node, "the model is given embeddings of the caller's own making")
        return v.BODY

    def _layer(self, node: ast.Call, env: Env) -> Value:
        """A layer's call: states, history, mask and tables as they should be, and nothing more."""
        bound = self._bound(node)
        if bound is None:
            return self._odd(node, "it is not seen what a layer is given")
        states = self.value(bound.pop("hidden_states", node), env) if "hidden_states" in bound else PLAIN
        self._expect(states, v.INTO, node.lineno, "a layer is given")
        for name, part in bound.items():
            problem = self._argument(name, self.value(part, env))
            if isinstance(problem, Odd):
                self._report(problem)
            elif problem:
                self._problem(f"a layer is given {problem} as {name}", part.lineno)
        return v.GIVEN

    def _bound(self, node: ast.Call) -> dict[str, ast.expr] | None:
        """Argument name -> what a layer is given; None where that cannot be told."""
        if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
            return None
        blocks = [c for c in self.classes.values() if syntax.calls(self.model.node, c.name)]
        forwards = [methods(c)["forward"] for c in blocks if "hidden_states" in _forward_names(c)]
        names = syntax.parameters(forwards[0])[1:] if forwards else ["hidden_states"]
        if len(node.args) > len(names):
            return None
        return {**dict(zip(names, node.args, strict=False)), **{k.arg or "": k.value for k in node.keywords}}

    def _argument(self, name: str, value: Value) -> Odd | str:
        """What is wrong with one argument of a layer; empty when nothing is."""
        odd = v.odd_in(value)
        if odd is not None and name not in _FREE:
            return odd
        if name == _PAST:
            return "" if value in (v.UNIT, v.NONE) else "something else than its own history"
        if name == _MASK:
            return "" if value in (v.MASK, v.NONE) else "something else than the caller's mask"
        if name in _TABLES:
            return "" if v.only(value, v.TABLES) or value == v.NONE else "something else than rotary tables"
        return "" if name in _FREE or value == v.NONE else "something that the nets do not have"

    def _inlined(self, function: ast.FunctionDef, node: ast.Call, env: Env, itself: Value) -> Value:
        """The result of a function of this file."""
        static = any(syntax.last_name(d) == "staticmethod" for d in function.decorator_list)
        decorated = bool(function.decorator_list) and not static
        if len(self.frames) > _DEEPEST or decorated or tells(node):
            return self._unknown(node, _arguments(node), env)
        own = syntax.parameters(function)[0 if static or itself == PLAIN else 1 :]
        inner: Env = {**dict.fromkeys(own, PLAIN), "self": itself}
        inner |= {name: self.value(a, env) for name, a in zip(own, node.args, strict=False)}
        inner |= {k.arg: self.value(k.value, env) for k in node.keywords if k.arg}
        self.frames.append(Frame())
        self._block(function.body, inner)
        returned = self.frames.pop().returned
        if not returned:
            return v.NONE
        found = returned[0][0]
        for value, line in returned[1:]:
            found = v.join(found, value, line, f"how {function.name} returns")
        return found


def _arguments(node: ast.Call) -> Iterator[ast.expr]:
    yield from node.args
    yield from (k.value for k in node.keywords)


def _without_rest(node: ast.Call) -> ast.Call:
    """The call without ``**more``: flags of the caller's."""
    return ast.copy_location(ast.Call(node.func, node.args, [k for k in node.keywords if k.arg]), node)


def tells(node: ast.Call) -> bool:
    """A line for a log, or for the screen."""
    root = node.func
    while isinstance(root, ast.Attribute):
        root = root.value
    return syntax.is_name(root, "print") or (isinstance(root, ast.Name) and root.id in _TELLS)


def _none_or_zero(node: ast.expr | None) -> bool:
    return node is None or syntax.constant(node) == 0


def _forward_names(node: ast.ClassDef) -> list[str]:
    forward = methods(node).get("forward")
    return syntax.parameters(forward) if forward is not None else []


def _constants(source: Source) -> Iterator[tuple[str, Value]]:
    """The names of numbers and flags at the top of the file that nothing else binds."""
    for stmt in source.tree.body:
        value = syntax.constant(stmt.value) if isinstance(stmt, ast.Assign) else None
        if isinstance(stmt, ast.Assign) and value is not None and len(syntax.binds(stmt)) == 1:
            (name,) = syntax.binds(stmt)
            named = (n for n in syntax.walk(source.tree) if isinstance(n, ast.Name) and n.id == name)
            if sum(not isinstance(n.ctx, ast.Load) for n in named) == 1:
                yield name, v.constant(value)
