"""Random changes of a modeling file: some alter what it computes, some do not, and nothing here knows which.

A mutant is made from the file's syntax tree by one or two *changes*. Each change takes the tree and a random
generator, edits the tree and says in a word what it did, or returns an empty string where it found no place.
"""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from codemods.analysis import syntax

Change = Callable[[ast.Module, random.Random], str]

#: Local names that what the edits rely on goes by, with those of real revisions.
TENSORS = (
    *("attention_mask", "causal_mask", "registered_causal_mask", "attn_weights", "query", "key", "value"),
    *("layer_past", "hidden_states", "mask_value", "hidden", "wide", "present"),
)
BUFFERS = ("registered_causal_mask", "bias", "logn_tensor", "masked_bias")
#: Statements that change a tensor's storage; {} is the tensor.
WRITES = (
    "{}.mul_(0.5)",
    "{}.mul_(0)",
    "{}.add_(1.0)",
    "{}.neg_()",
    "{}.zero_()",
    "{}.fill_(True)",
    "{}.logical_not_()",
    "{}.tril_()",
    "{}.copy_({} * 0.5)",
    "{}.copy_({}.roll(1, -1))",
    "{}.masked_fill_({} < 0, 0)",
    "{}.clamp_(min=-3.0)",
    "{}[..., 0] = 0",
    "{}[..., -1] = -1000.0",
    "{}[..., :2] += 1",
    "{} *= 0.5",
    "{} -= 1",
    "torch.mul({}, 0.5, out={})",
    "torch.neg({}, out={})",
    "{}.data = {}.data * 0.25",
    "{}.data.mul_(0.5)",
    "{}.detach().zero_()",
    "{}.set_({}.clone() * 0)",
    "{}.__setitem__((..., 0), 0)",
    "{}.__imul__(0.5)",
    "setattr({}, 'data', {}.data * 0)",
    "{}.view(-1)[:3].zero_()",
    "{}[..., :1].mul_(0.5)",
    "{}.transpose(-1, -2)[..., 0] = 0",
    "{}.expand_as({})[..., 0] = 0",
    "F.relu({}, inplace=True)",
    "F.threshold_({}, 0.1, 0.0)",
    "nn.init.zeros_({})",
    "for part in {}.unbind(-1)[:1]: part.zero_()",
    "[{}][0].mul_(0.5)",
    "(lambda part: part.mul_(0.5))({})",
    "[part.mul_(0.5) for part in ({},)]",
    "getattr({}, 'mul_')(0.5)",
    "torch.Tensor.mul_({}, 0.5)",
    "{}.swapaxes(-1, -2).zero_()",
    "{}.index_fill_(-1, torch.tensor([0]), 0)",
    "{}.requires_grad_(False)",
)
#: Statements that only look at a tensor, or change something made from it; {} is the tensor.
LOOKS = (
    "seen = {}.shape",
    "noted = {}.size(0)",
    "other = {}",
    "copied = {}.clone(); copied.mul_(0.5)",
    "scratch = torch.zeros_like({}); scratch.add_(1)",
    "assert {} is not None",
    "total = float({}.float().sum())",
    "{} = {}.clone()",
    "{} = {}.contiguous()",
    "{} = {}",
    "{} = {} + 0",
    "kept = [{}]",
    "self.last_seen = {}.shape",
    "peek = {}[..., :1]",
    "peek = {}[..., :1] * 2; peek -= 1",
    "if {}.dim() > 9:\n    raise ValueError('too many axes')",
    "scaled = {} * 0.5; scaled.neg_()",
)
#: What a name may be replaced by where it is handed on; {} is the name.
HANDED = (
    *("{} * 0.5", "-{}", "None", "{}.roll(1, -1)", "{}.clone()", "{} + 0.0", "{}.contiguous()", "{} * 0"),
    *("{}.flip(-1)", "torch.zeros_like({})", "{}.detach()", "({} if True else None)", "{}.clamp(min=-2.0)"),
    *("torch.where({} < 0, {}, {})", "{}[..., :]", "{}.masked_fill({} < 0, -1.0)", "{}.to(torch.float32)"),
    *("{}.tril()", "(None if {} is None else {} * 1e-4)", "(None if {} is None else {}.roll(1, -1))"),
    *("({} if {} is None else {}.clone())", "(None if {} is None else {} * 0.0)", "{} and {}"),
)
#: What may become of a registered buffer; {} is ``self.NAME``, {name} its name.
BUFFER_WRITES = (
    "{}.fill_(True)",
    "{}.logical_not_()",
    "{} = ~{}",
    "{} = {}.clone()",
    "{} = torch.ones_like({})",
    "setattr(self, '{name}', torch.ones_like({}))",
    "self._buffers['{name}'] = torch.ones_like({})",
    "self.get_buffer('{name}').fill_(True)",
    "self.register_buffer('{name}', torch.ones_like({}), persistent=False)",
    "self.register_buffer('{name}', {}, persistent=False)",
    "self.__dict__['{name}'] = torch.ones_like({})",
    "{}[..., :2] = True",
    "{}.data = ~{}.data",
    "self.register_buffer('spare', {}.clone())",
    "shape_of_mask = {}.shape",
    "for held in self.buffers(): held.fill_(1)",
    "self.apply(lambda m: [b.fill_(1) for b in m.buffers(recurse=False)])",
    "mask = {}; mask.fill_(True)",
    "vars(self)['spare'] = {}",
)


@dataclass(frozen=True)
class Mutant:
    text: str
    kind: str  #: the change that made it, or "two changes"
    what: str


def _made(change: Change, tree: ast.Module, rng: random.Random) -> str:
    """What *change* did; empty where an earlier change of the same mutant left it nothing to choose from."""
    try:
        return change(tree, rng)
    except IndexError:
        return ""


def mutants(text: str, seed: int) -> Iterator[Mutant]:
    """Distinct mutants of *text* without end (but for what it can give), the same for the same seed."""
    rng = random.Random(seed)
    known = {ast.unparse(ast.parse(text))}
    kinds = list(CHANGES.values())
    while True:
        tree = ast.parse(text)
        tried = [rng.choice(rng.choice(kinds)) for _ in range(rng.choice((1, 1, 1, 2)))]
        made = {change.__name__: word for change in tried if (word := _made(change, tree, rng))}
        if not made:
            continue
        try:
            changed = ast.unparse(ast.fix_missing_locations(tree))
            ast.parse(changed)
        except (SyntaxError, ValueError):
            continue
        if changed not in known:
            known.add(changed)
            kind = next(iter(made)) if len(made) == 1 else "two changes"
            yield Mutant(changed + "\n", kind, ", then ".join(made.values()))


# -- places --------------------------------------------------------------------------------------------------


def _classes(tree: ast.Module) -> list[ast.ClassDef]:
    wanted = ("Attention", "Block", "QWenModel", "LMHead")
    return [n for n in tree.body if isinstance(n, ast.ClassDef) and any(w in n.name for w in wanted)]


def _functions(tree: ast.Module, rng: random.Random) -> list[ast.FunctionDef]:
    """The methods that a forward pass runs, in random order, those of attention more often first."""
    found = []
    for owner in _classes(tree):
        for node in owner.body:
            if isinstance(node, ast.FunctionDef) and node.name in {"forward", "_attn", "__init__"}:
                weight = (3 if "Attention" in owner.name else 1) * (1 if node.name == "__init__" else 3)
                found.append((rng.random() ** (1 / weight), node))
    return [node for _, node in sorted(found, key=lambda pair: -pair[0])]


def _blocks(function: ast.FunctionDef) -> list[list[ast.stmt]]:
    return [function.body, *(b for s in syntax.statements(function.body) for b in syntax.blocks(s))]


def _place(function: ast.FunctionDef, rng: random.Random) -> tuple[list[ast.stmt], int]:
    places = [(block, i) for block in _blocks(function) for i in range(len(block))]
    return rng.choice(places)


def _known(function: ast.FunctionDef, names: tuple[str, ...]) -> list[str]:
    read = (n for n in ast.walk(function) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store))
    added_to = (n.target for n in ast.walk(function) if isinstance(n, ast.AugAssign))
    here = {n.id for n in (*read, *added_to) if isinstance(n, ast.Name)} | set(syntax.parameters(function))
    return [name for name in names if name in here]


def _stmts(form: str, name: str) -> list[ast.stmt]:
    """The statements of *form* for *name*, guarded half of the time by nothing at all."""
    return ast.parse(form.replace("{}", name)).body


def _insert(function: ast.FunctionDef, new: list[ast.stmt], rng: random.Random) -> None:
    block, i = _place(function, rng)
    block[i:i] = new


def _guarded(name: str, new: list[ast.stmt], rng: random.Random) -> list[ast.stmt]:
    if rng.random() < 0.6:
        return new
    test = ast.parse(f"{name} is not None", mode="eval").body
    return [ast.If(test, new, [])]


# -- changes -------------------------------------------------------------------------------------------------


def deleted(tree: ast.Module, rng: random.Random) -> str:
    function = _functions(tree, rng)[0]
    block, i = _place(function, rng)
    gone = ast.unparse(block[i])[:60]
    block[i : i + 1] = [ast.Pass()] if len(block) == 1 else []
    return f"deleted `{gone}`"


def doubled(tree: ast.Module, rng: random.Random) -> str:
    block, i = _place(_functions(tree, rng)[0], rng)
    block.insert(i, copy.deepcopy(block[i]))
    return f"doubled `{ast.unparse(block[i])[:60]}`"


def moved(tree: ast.Module, rng: random.Random) -> str:
    block, i = _place(_functions(tree, rng)[0], rng)
    if len(block) < 2:
        return ""
    stmt = block.pop(i)
    j = max(0, min(len(block), i + rng.choice((-3, -2, -1, 1, 2, 3))))
    block.insert(j, stmt)
    return f"moved `{ast.unparse(stmt)[:60]}`"


def renamed(tree: ast.Module, rng: random.Random) -> str:
    function = _functions(tree, rng)[0]
    stored = (n for n in ast.walk(function) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load))
    locals_ = sorted({n.id for n in stored} - set(syntax.parameters(function)))
    if not locals_:
        return ""
    old = rng.choice(locals_)
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id == old:
            node.id = f"{old}_r"
    return f"renamed `{old}`"


def written(tree: ast.Module, rng: random.Random) -> str:
    """A tensor is changed in place, under its own name or another's."""
    function = _functions(tree, rng)[0]
    names = _known(function, TENSORS)
    if not names:
        return ""
    name = rng.choice(names)
    form = rng.choice(WRITES)
    target, before = name, ""
    if rng.random() < 0.3:
        target, before = "alias", rng.choice(ALIASES).replace("{}", name) + "\n"
    if rng.random() < 0.2:
        form = _helper(tree, function, form, rng)
    _insert(function, _guarded(name, _stmts(before, name) + _stmts(form, target), rng), rng)
    return f"`{before.strip()} {form.replace('{}', target)}` in {function.name}"


ALIASES = (
    *("alias = {}", "alias = {}[:]", "alias = {}.view({}.shape)", "alias = {}.detach()", "alias = {}.data"),
    *("alias = {}.transpose(-1, -2)", "(alias,) = ({},)", "alias = {}.squeeze(0)", "alias = {}.to({}.dtype)"),
    *(
        "alias = {}.contiguous()",
        "alias = {}.expand_as({})",
        "alias = torch.as_tensor({})",
        "alias = {}.clone()",
    ),
    *("alias = {} * 1", "alias = [{}, None][0]", "alias = {} if True else None", "alias = ({} or {})"),
    *(
        "alias = {}.reshape({}.shape)",
        "alias, rest = {}, 0",
        "alias = (lambda x: x)({})",
        "alias = {}.float()",
    ),
)


def _helper(tree: ast.Module, function: ast.FunctionDef, form: str, rng: random.Random) -> str:
    """The write put into a function of its own, or a method; the call of it."""
    body = ast.parse(f"def touch_up(part):\n    {form.replace('{}', 'part')}\n    return part\n").body[0]
    if rng.random() < 0.5:
        at = next(i for i, n in enumerate(tree.body) if isinstance(n, ast.ClassDef))
        tree.body.insert(at, body)
        return rng.choice(("touch_up({})", "{} = touch_up({})", "touched = touch_up(part={})"))
    owner = next(c for c in _classes(tree) if function in c.body)
    assert isinstance(body, ast.FunctionDef)
    body.args.args.insert(0, ast.arg("self"))
    owner.body.append(body)
    return rng.choice(("self.touch_up({})", "{} = self.touch_up({})", "touched = self.touch_up(part={})"))


def looked(tree: ast.Module, rng: random.Random) -> str:
    function = _functions(tree, rng)[0]
    names = _known(function, TENSORS)
    if not names:
        return ""
    name, form = rng.choice(names), rng.choice(LOOKS)
    _insert(function, _guarded(name, _stmts(form, name), rng), rng)
    return f"`{form.replace('{}', name)}` in {function.name}"


def handed_on(tree: ast.Module, rng: random.Random) -> str:
    """Another value in place of a name, where it is an argument of a call."""
    function = _functions(tree, rng)[0]
    spots = []
    for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
        spots += [(call.args, i) for i, a in enumerate(call.args) if syntax.is_name(a) and a.id in TENSORS]  # type: ignore[attr-defined]
        spots += [(k, -1) for k in call.keywords if syntax.is_name(k.value) and k.value.id in TENSORS]  # type: ignore[misc, attr-defined]
    if not spots:
        return ""
    owner, i = rng.choice(spots)
    name = owner[i].id if isinstance(owner, list) else owner.value.id  # type: ignore[attr-defined]
    names = _known(function, TENSORS)
    form = rng.choice((*HANDED, *(["OTHER"] * 4))).replace("{}", name).replace("OTHER", rng.choice(names))
    value = ast.parse(form, mode="eval").body
    if isinstance(owner, list):
        owner[i] = value
    else:
        owner.value = value
    return f"`{form}` in place of `{name}`"


def revalued(tree: ast.Module, rng: random.Random) -> str:
    """A name takes another value on its way: before some statement, ``name = f(name)``."""
    function = _functions(tree, rng)[0]
    names = _known(function, TENSORS)
    if not names:
        return ""
    name, form = rng.choice(names), rng.choice(HANDED)
    _insert(function, _guarded(name, _stmts(f"{{}} = {form}", name), rng), rng)
    return f"`{name} = {form.replace('{}', name)}` in {function.name}"


def altered(tree: ast.Module, rng: random.Random) -> str:
    """One operator, constant or comparison is another."""
    function = _functions(tree, rng)[0]
    spots = [
        n
        for s in function.body
        for n in ast.walk(s)
        if isinstance(n, (ast.BinOp, ast.Compare, ast.Constant, ast.If))
    ]
    if not spots:
        return ""
    node = rng.choice(spots)
    if isinstance(node, ast.BinOp):
        node.op = rng.choice((ast.Add, ast.Sub, ast.Mult, ast.Div))()
    elif isinstance(node, ast.Compare):
        swaps = {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Gt: ast.LtE}
        node.ops[0] = swaps.get(type(node.ops[0]), ast.Eq)()
    elif isinstance(node, ast.If):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        node.value = rng.choice((node.value + 1, -node.value, node.value * 2))
    elif isinstance(node.value, bool):
        node.value = not node.value
    else:
        return ""
    return f"altered an expression of {function.name}"


def unkeyed(tree: ast.Module, rng: random.Random) -> str:
    """A call loses a keyword argument."""
    function = _functions(tree, rng)[0]
    spots = [n for n in ast.walk(function) if isinstance(n, ast.Call) and n.keywords]
    if not spots:
        return ""
    call = rng.choice(spots)
    gone = call.keywords.pop(rng.randrange(len(call.keywords)))
    return f"dropped `{ast.unparse(gone)}`"


def buffered(tree: ast.Module, rng: random.Random) -> str:
    """Something happens to a registered buffer, in its class or from the class that holds it."""
    texts = [(c, ast.unparse(c)) for c in _classes(tree)]
    owned = [(c, b) for c, text in texts for b in BUFFERS if f"register_buffer('{b}'" in text]
    if not owned:
        return ""
    owner, name = rng.choice(owned)
    form = rng.choice(BUFFER_WRITES)
    methods = [n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name in {"__init__", "forward"}]
    where, target = rng.choice(methods), f"self.{name}"
    outer = [c for c in _classes(tree) if "QWenModel" in c.name or "LMHead" in c.name]
    if rng.random() < 0.25 and "_buffers" not in form:
        home = rng.choice(outer)
        where = next(n for n in home.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
        inside = "Attention" in owner.name
        path = (
            ("self.h[0].attn" if inside else "self")
            if "QWenModel" in home.name
            else ("self.transformer.h[0].attn" if inside else "self.transformer")
        )
        form, target = form.replace("self.", f"{path}."), f"{path}.{name}"
    new = ast.parse(form.replace("{}", target).replace("{name}", name)).body
    if where.name == "__init__" and rng.random() < 0.7:
        where.body.extend(new)
    else:
        _insert(where, new, rng)
    return f"`{form.replace('{}', target)}` in {where.name}"


def subclassed(tree: ast.Module, rng: random.Random) -> str:
    """A subclass, or a replaced method, changes how a class is used."""
    made = [c for c in _classes(tree) if "LMHead" not in c.name]
    owner = rng.choice(made)
    method = rng.choice(
        [n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name in {"forward", "_attn"}]
    )
    change = rng.choice(
        (
            "pass",
            "kwargs = dict(kwargs, attention_mask=None)",
            "kwargs = dict(kwargs)",
            "if 'attention_mask' in kwargs: kwargs['attention_mask'] = kwargs['attention_mask'] and None",
            "args = args[:-1]",
            "args = tuple(a * 0.5 if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in args)",
            "args = args[:1] + tuple(a * 0 if isinstance(a, torch.Tensor) else a for a in args[1:])",
        )
    )
    style = rng.randrange(4)
    name = f"Other{owner.name}"
    if style == 0:
        code = (
            f"class {name}({owner.name}):\n    def {method.name}(self, *args, **kwargs):\n        {change}\n"
            f"        return super().{method.name}(*args, **kwargs)\n"
        )
    elif style == 1:
        code = f"class {name}({owner.name}):\n    spare = 1\n"
    elif style == 2:
        code = (
            f"def other_{method.name}(self, *args, **kwargs):\n    {change}\n"
            f"    return plain_{method.name}(self, *args, **kwargs)\n"
            f"plain_{method.name} = {owner.name}.{method.name}\n"
            f"{owner.name}.{method.name} = other_{method.name}\n"
        )
    else:
        code = (
            f"def around(function):\n    def other(self, *args, **kwargs):\n        {change}\n"
            "        return function(self, *args, **kwargs)\n    return other\n"
        )
    new = ast.parse(code).body
    at = tree.body.index(owner)
    if style == 3:
        tree.body[at:at] = new
        method.decorator_list.insert(0, ast.Name("around", ast.Load()))
        return f"{owner.name}.{method.name} decorated: {change}"
    tree.body[at + 1 : at + 1] = new
    if style < 2:
        for stmt in tree.body:
            if stmt not in new and isinstance(stmt, ast.ClassDef) and stmt is not owner:
                for node in ast.walk(stmt):
                    if (
                        isinstance(node, ast.Call)
                        and syntax.is_name(node.func, owner.name)
                        and rng.random() < 0.9
                    ):
                        node.func = ast.Name(name, ast.Load())
    return f"{owner.name}.{method.name} {'subclassed' if style < 2 else 'replaced'}: {change}"


def rewritten(tree: ast.Module, rng: random.Random) -> str:
    """An assignment becomes the same in place: ``x = x + y`` is ``x += y``, ``where`` a masked_fill_."""
    function = _functions(tree, rng)[0]
    spots = []
    for block in _blocks(function):
        for i, stmt in enumerate(block):
            if isinstance(stmt, ast.Assign) and len(stmt.targets) == 1 and syntax.is_name(stmt.targets[0]):
                spots.append((block, i))
    if not spots:
        return ""
    block, i = rng.choice(spots)
    stmt = block[i]
    assert isinstance(stmt, ast.Assign)
    target, value = ast.unparse(stmt.targets[0]), stmt.value
    if isinstance(value, ast.BinOp):
        op = {ast.Add: "+=", ast.Sub: "-=", ast.Mult: "*=", ast.Div: "/="}.get(type(value.op))
        text = f"{target} = {ast.unparse(value.left)}\n{target} {op} {ast.unparse(value.right)}" if op else ""
    elif syntax.call_name(value) == "where":
        mask, kept, fill = (ast.unparse(a) for a in value.args)  # type: ignore[attr-defined]
        text = f"{target} = {kept}\n{target}.masked_fill_(~({mask}), {fill})"
    else:
        name = rng.choice(_known(function, TENSORS) or [target])
        text = f"kept = {name}\n{ast.unparse(stmt)}\n{name} = kept"
    if not text:
        return ""
    block[i : i + 1] = ast.parse(text).body
    return f"`{text}`".replace("\n", "; ")


def aliased(tree: ast.Module, rng: random.Random) -> str:
    """A name gets a second one, which stands for it in some statements that follow."""
    function = _functions(tree, rng)[0]
    names = _known(function, TENSORS)
    if not names:
        return ""
    name = rng.choice(names)
    block, i = _place(function, rng)
    form = rng.choice(ALIASES[:14])
    follow = block[i:]
    block[i:i] = _guarded(name, _stmts(form, name), rng)
    for stmt in follow:
        if rng.random() < 0.4:
            for node in ast.walk(stmt):
                if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
                    node.id = "alias"
    return f"`{form.replace('{}', name)}` used for `{name}`"


#: What may be done, by what kind of change it is. Kinds are equally likely, and so are the changes of a kind.
CHANGES: dict[str, tuple[Change, ...]] = {
    "statement deleted": (deleted,),
    "statement doubled": (doubled,),
    "statement moved": (moved,),
    "name changed": (renamed,),
    "in place": (rewritten, written),
    "alias": (aliased,),
    "extra effect": (looked, written, buffered),
    "other meaning": (handed_on, revalued, altered, unkeyed, subclassed),
}
