"""Who may write the storage that a name refers to: a small abstract interpretation of one file.

For each function, names that may share storage are put into one class: a view of a tensor with the tensor, a
container with what it holds, ``self.x`` with what was stored there. What arithmetic and most of torch's
functions give is new. A write (an in-place method, ``out=``, a subscript store, ``.data``) is a write to the
whole class. What a function of the file may write, and what it may return, is summed up by parameter; calls
are looked up until nothing changes. A call of something not known here is taken to write all it is given.

The order of statements plays no part: a write anywhere in a function counts. Lines tell the rest.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from codemods.analysis import syntax
from codemods.analysis.source import Source, kept_on_source


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VIEWS = words(
    """
    view reshape transpose permute expand expand_as squeeze unsqueeze contiguous to type type_as
    float half double bfloat16 bool int long detach cpu cuda split chunk unbind narrow select
    flatten unflatten swapaxes swapdims movedim diagonal unfold view_as reshape_as t ravel
    as_strided tensor_split hsplit vsplit atleast_4d as_tensor from_numpy numpy broadcast_to broadcast_tensors
    dropout rearrange requires_grad_ items values keys get pop copy buffers parameters to_tuple
    """
)
_READS = words(
    """
    size dim ndimension numel item tolist sum mean max min amax amin argmax argmin abs sqrt rsqrt
    pow square exp log log2 sin cos tanh sigmoid softmax log_softmax relu silu gelu clone repeat
    repeat_interleave masked_fill where eq ne lt le gt ge logical_not logical_and logical_or any all
    isnan isinf nonzero cumsum cumprod prod norm add sub mul div true_divide matmul bmm mm neg
    reciprocal round floor ceil clamp clip tril triu roll flip gather index_select masked_select
    scatter index_fill index_copy masked_scatter sort topk argsort unique std var new_zeros new_ones
    new_full new_tensor new_empty is_floating_point is_contiguous element_size data_ptr stride
    storage_offset type_as_string startswith endswith lower upper format join strip count index warn
    warn_once warning warning_once info debug error is_file is_available get_head_mask
    get_seq_length maximum minimum allclose equal
    """
)
#: Functions of torch whose second parameter is ``inplace``.
_SECOND_INPLACE = words("relu relu6 silu mish hardswish hardsigmoid selu")
#: Packages whose classes keep what they are given and write none of it.
_KNOWN_PACKAGES = words("torch transformers typing einops dataclasses collections functools")
_BUILTINS = words(
    """
    len int float str bool range isinstance issubclass hasattr print abs sum round repr id all any
    type callable hash divmod super property format slice ValueError RuntimeError TypeError
    Exception ImportError KeyError NotImplementedError AssertionError
    """
)
_CONTAINERS = words(
    """
    tuple list set dict zip enumerate reversed iter next sorted max min map filter vars
    """
)
_ADDERS = frozenset(("append", "extend", "insert", "add", "update", "setdefault"))
#: What a file imports where it can, as upstream does: kernels that give a new tensor and write none.
_KERNELS = frozenset(
    ("flash_attn_unpadded_func", "flash_attn_func", "apply_rotary_emb_func", "apply_rotary_emb", "rms_norm")
)
#: Modules of kernels for the quantised cache, built beside the file.
_QUANTISED_KERNELS = frozenset(("cache_kernels", "cache_autogptq_cuda_256"))
_DESCRIBES = words(
    """
    shape dtype device is_cuda ndim training requires_grad layout itemsize nbytes
    """
)
_STANDARD = frozenset(("math", "logger", "logging", "warnings", "importlib", "os", "pathlib", "sys"))

#: The nodes that bind, write or return something, and those that decide what is read.
_READ = (
    *(ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.AugAssign, ast.For, ast.AsyncFor, ast.comprehension),
    *(ast.withitem, ast.Return, ast.Yield, ast.YieldFrom, ast.Call, ast.FunctionDef, ast.If),
)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Roots = frozenset[str]
NOTHING: Roots = frozenset()


@dataclass
class Summary:
    """What a call of a function may do: parameters (and ``@attributes``) it may write, and may return."""

    writes: Roots = NOTHING
    returns: Roots = NOTHING


@dataclass(frozen=True)
class Write:
    """A place that may write storage: the line, and the names whose storage it may be."""

    line: int
    roots: Roots


@dataclass
class Flow:
    """The names of one function: classes of names that may share storage, and the writes."""

    function: Function
    parent: dict[str, str] = field(default_factory=dict)
    writes: set[Write] = field(default_factory=set)
    returned: set[str] = field(default_factory=set)
    uses: set[str] = field(default_factory=set)  #: names of the functions whose summaries were asked for

    def find(self, name: str) -> str:
        while (above := self.parent.get(name, name)) != name:
            name = above
        return name

    def join(self, names: Iterable[str]) -> None:
        first = None
        for name in names:
            self.parent.setdefault(name, name)
            root = self.find(name)
            first = root if first is None else first
            self.parent[root] = self.find(first)

    def same(self, names: Iterable[str]) -> set[str]:
        """``names`` and every name that may share storage with one of them."""
        roots = {self.find(name) for name in names}
        return {name for name in self.parent if self.find(name) in roots} | set(names)


class Effects:
    """The effects of every function of a file."""

    def __init__(self, source: Source) -> None:
        self.tree = source.tree
        self.functions: dict[str, list[Function]] = {}
        self.classes = {n.name: n for n in source.tree.body if isinstance(n, ast.ClassDef)}
        self.owners: dict[int, ast.ClassDef] = {}
        for node in source.tree.body:
            for inner in [node, *(node.body if isinstance(node, ast.ClassDef) else ())]:
                if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    self.functions.setdefault(inner.name, []).append(inner)
                    if isinstance(node, ast.ClassDef):
                        self.owners[id(inner)] = node
        self.modules = _made_modules(source.tree)
        self.imported = _imported(source.tree)
        self.strange = _strange(source.tree)
        self.buffers = frozenset(f"@{name}" for name in _registered(source.tree))
        self.summaries = {id(f): Summary() for fs in self.functions.values() for f in fs}
        self.flows: dict[int, Flow] = {}
        self._whole: dict[int, Flow] = {}
        changed = set(self.functions)
        while changed:  # summaries only grow, so this ends
            changed = self._round(changed)
        self.written_attributes = {
            n for flow in self.flows.values() for w in flow.writes for n in flow.same(w.roots) if n[0] == "@"
        }

    def _round(self, changed: set[str]) -> set[str]:
        """Read again what calls one of ``changed``; the names whose summary is another one now."""
        found = set()
        for name, functions in self.functions.items():
            for function in functions:
                known = self.flows.get(id(function))
                if (known is None or known.uses & changed) and self._read(function):
                    found.add(name)
        return found

    def _read(self, function: Function) -> bool:
        """Read one function; whether its summary is another one than before."""
        flow = self.flows[id(function)] = _Reader(self, function).flow
        names = set(_parameters(function))
        hit = flow.same({n for w in flow.writes for n in w.roots}) if flow.writes else set()
        given = flow.same(flow.returned) if flow.returned else set()
        before = self.summaries[id(function)]
        summary = Summary(
            before.writes | {n for n in hit if n in names or n[0] == "@"},
            before.returns | {n for n in given if n in names or n[0] == "@"},
        )
        self.summaries[id(function)] = summary
        return summary != before

    def whole(self, function: Function) -> Flow:
        """The names and writes of ``function``, its branch with torch's fused attention read too."""
        if id(function) not in self._whole:
            fused = syntax.calls(function, "scaled_dot_product_attention")
            known = _Reader(self, function, whole=True).flow if fused else self.flows[id(function)]
            self._whole[id(function)] = known
        return self._whole[id(function)]

    def written(self, function: Function, names: Iterable[str]) -> list[Write]:
        """The places in ``function`` that may write what ``names`` refer to, in order of lines."""
        flow = self.flows.get(id(function))
        if flow is None:
            return []
        alike = flow.same(set(names))
        found = [w for w in flow.writes if alike & flow.same(w.roots)]
        kept = {n for n in alike if n[0] == "@"} & self.written_attributes
        if kept and not found:  # stored in an attribute that another function writes
            found.append(Write(function.lineno, frozenset(kept)))
        return sorted(found, key=lambda w: w.line)

    def aliases(self, function: Function, name: str) -> set[str]:
        flow = self.flows.get(id(function))
        return flow.same({name}) if flow is not None else {name}


@kept_on_source
def effects(source: Source) -> Effects:
    """The effects of ``source``."""
    return Effects(source)


def _parameters(function: Function) -> list[str]:
    args = function.args
    more = [a.arg for a in (args.vararg, args.kwarg) if a is not None]
    return [*(a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)), *more]


def _made_modules(tree: ast.Module) -> dict[str, set[str]]:
    """Attribute -> what is stored there anywhere in the file: names of called constructors, or ``?``."""
    found: dict[str, set[str]] = {}
    setters = [
        n for n in syntax.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.endswith("_embeddings")
    ]
    passed = {id(n) for setter in setters for n in syntax.walk(setter)}
    for node in syntax.walk(tree):
        if isinstance(node, ast.Assign) and id(node) not in passed:
            for target in node.targets:
                if isinstance(target, ast.Attribute):
                    made = syntax.call_name(node.value) or (
                        "" if syntax.constant(node.value) is None else "?"
                    )
                    harmless = "" if _in_place_constructor(node.value) else made
                    found.setdefault(target.attr, set()).add(harmless or "?")
    return found


def _passed(node: ast.AST, function: Function) -> list[ast.stmt]:
    """What is not read: the branch with torch's fused attention, which a rule of its own looks at; and
    ``if isinstance(module, nn.Linear):`` where ``_init_weights`` fills such a layer's weights and no more."""
    if not isinstance(node, ast.If):
        return []
    if any(
        syntax.calls(stmt, "scaled_dot_product_attention")
        for stmt in node.body
        if not any(syntax.blocks(stmt))
    ):
        return node.body
    return node.body if function.name == "_init_weights" and _fills_weights(node) else []


def _fills_weights(choice: ast.If) -> bool:
    asked = [call for call in syntax.calls(choice.test, "isinstance") if len(call.args) == 2]
    kinds = [syntax.last_name(n) for call in asked for n in syntax.walk(call.args[1])]
    modules = {syntax.last_name(call.args[0]) for call in asked}
    if not {"Linear", "Embedding", "RMSNorm"} & set(kinds):
        return False
    used = [n for stmt in choice.body for n in syntax.walk(stmt) if isinstance(n, ast.Attribute)]
    return all(
        n.attr in ({"config"} if syntax.is_name(n.value, "self") else {"weight", "bias", "padding_idx"})
        for n in used
        if syntax.last_name(n.value) in modules | {"self"} and isinstance(n.value, ast.Name)
    )


def _imported(tree: ast.Module) -> set[str]:
    """Names of modules, classes and functions from elsewhere, but for those known to write no tensor."""
    found = [n for n in syntax.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {(alias.asname or alias.name).split(".")[0] for node in found for alias in node.names}
    return names - _STANDARD - {"torch", "F", "nn"}


def _strange(tree: ast.Module) -> set[str]:
    """Names imported from files that nobody here has read; a class among them may do anything."""
    found = set()
    for node in syntax.walk(tree):
        if isinstance(node, ast.ImportFrom):
            package = (node.module or "").partition(".")[0]
            if node.level or package not in _KNOWN_PACKAGES:
                found |= {alias.asname or alias.name for alias in node.names}
    return found


def _registered(tree: ast.Module) -> set[str]:
    labels = (
        syntax.constant(call.args[0] if call.args else syntax.keyword(call, "name"))
        for call in syntax.calls(tree, "register_buffer")
    )
    return {label for label in labels if isinstance(label, str)}


def _root(node: ast.AST) -> str:
    """``a`` of ``a.b.c``; empty where it starts with something else."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _in_place_constructor(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and syntax.keyword(node, "inplace") is not None


class _Reader:
    """Reads one function once, with what is known of the others so far."""

    def __init__(self, file: Effects, function: Function, *, whole: bool = False) -> None:
        self.file = file
        self.flow = Flow(function)
        nodes = [n for n in syntax.walk(function) if isinstance(n, _READ)]
        below = [n for n in nodes if isinstance(n, ast.FunctionDef)]
        self.nested = {n.name: _parameters(n) for n in below if n is not function}
        self.bound = syntax.binds(function) | {name for n in below for name in _parameters(n)}
        self.containers = {name for n in nodes for name in _filled_later(n)}
        self.known: dict[int, Roots] = {}
        self.cut = {id(call) for call, value in _cut_up(function) if not self.roots(value)}
        self.paired = {id(c.generators[0]) for c in _paired(nodes) if not self._writes_in(c.elt)}
        left_out = [] if whole else [part for branch in nodes for part in _passed(branch, function)]
        passed = {id(n) for part in left_out for n in syntax.walk(part)}
        for node in nodes:
            if id(node) not in passed:
                self._node(node)

    # -- statements ------------------------------------------------------------------------------------------

    def _node(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, node.value)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            self._bind(node.target, node.value)
        elif isinstance(node, ast.AugAssign):
            self._augment(node)
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            if id(node) not in self.paired:
                self._bind(node.target, node.iter)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self._bind(node.optional_vars, node.context_expr)
        elif isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom)) and node.value is not None:
            self.flow.returned |= self.roots(node.value)
        elif isinstance(node, ast.Call):
            self.roots(node)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, (ast.Tuple, ast.List)) and self._one_by_one(target, value):
            return
        if isinstance(target, (ast.Tuple, ast.List)):
            pairs = isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts)
            for i, part in enumerate(target.elts):
                self._bind(part, value.elts[i] if pairs else value)  # type: ignore[attr-defined]
        elif isinstance(target, ast.Starred):
            self._bind(target.value, value)
        elif isinstance(target, ast.Name):
            self.flow.join((target.id, *sorted(self.roots(value))))
        else:
            self._store(target, self.roots(value))

    def _one_by_one(self, target: ast.Tuple | ast.List, value: ast.expr) -> bool:
        """``a, b = (f(t) for t in (x, y))``: a shares with what f gives of x, b of y, not the one with the
        other. And ``a, b = x.split(...)``, where nothing else reads x: no part shares with another."""
        names = [part.id for part in target.elts if isinstance(part, ast.Name)]
        if len(names) != len(target.elts):
            return False
        if id(value) in self.cut:
            for name in names:
                self.flow.join((name,))
            return True
        each = value.generators[0] if isinstance(value, (ast.GeneratorExp, ast.ListComp)) else None
        if each is None or id(each) not in self.paired:
            return False
        assert isinstance(value, (ast.GeneratorExp, ast.ListComp)) and isinstance(each.target, ast.Name)
        assert isinstance(each.iter, (ast.Tuple, ast.List))
        given = self.roots(value.elt)
        for name, one in zip(names, each.iter.elts, strict=True):
            own = self.roots(one) if each.target.id in given else NOTHING
            self.flow.join((name, *sorted((given - {each.target.id}) | own)))
        return True

    def _writes_in(self, node: ast.expr) -> bool:
        before = len(self.flow.writes)
        self.roots(node)
        for call in (n for n in syntax.walk(node) if isinstance(n, ast.Call)):
            self.roots(call)
        return len(self.flow.writes) > before

    def _store(self, target: ast.expr, given: Roots) -> None:
        if isinstance(target, ast.Subscript):
            if _of_buffers(target):  # the attribute has another tensor from here on
                self.flow.join((f"@{syntax.constant(target.slice)}", *sorted(given)))
                return
            held = self.roots(target.value)
            self._write(target, held)
            if held & self.containers:  # a list keeps what it is given; a tensor copies it
                self.flow.join(sorted(held | given))
        elif isinstance(target, ast.Attribute):
            if target.attr == "data":
                self._write(target, self.roots(target.value))
            self.flow.join((f"@{target.attr}", *sorted(given)))

    def _augment(self, node: ast.AugAssign) -> None:
        """``x += (y,)`` puts y into x; with anything else than a tuple or a list it writes x."""
        given, target = self.roots(node.value), node.target
        if isinstance(node.value, (ast.Tuple, ast.List)):
            self.flow.join(sorted(self.roots(target) | given))
        else:
            self._write(node, self.roots(target))

    def _write(self, node: ast.AST, roots: Roots) -> None:
        if roots:
            self.flow.writes.add(Write(getattr(node, "lineno", self.flow.function.lineno), roots))

    # -- expressions -----------------------------------------------------------------------------------------

    def roots(self, node: ast.AST | None) -> Roots:
        """The names whose storage the value of ``node`` may share; none for a new value."""
        if node is None:
            return NOTHING
        known = self.known.get(id(node))
        if known is None:
            self.known[id(node)] = NOTHING
            known = self.known[id(node)] = self._roots(node)
        return known

    def _all(self, nodes: Iterable[ast.AST | None]) -> Roots:
        return NOTHING.union(*(self.roots(n) for n in nodes))

    def _roots(self, node: ast.AST) -> Roots:
        if isinstance(node, ast.Name):
            return frozenset((node.id,)) if node.id != "self" else NOTHING
        if isinstance(node, ast.Attribute):
            if node.attr in _DESCRIBES:
                return NOTHING
            if node.attr in {"data", "T", "mT"}:
                return self.roots(node.value)
            if node.attr == "_buffers":
                return self.file.buffers
            own = self.roots(node.value) if isinstance(node.value, ast.Name) else NOTHING
            return own | {f"@{node.attr}"}
        if _of_buffers(node):
            return frozenset((f"@{syntax.constant(node.slice)}",))  # type: ignore[attr-defined]
        if isinstance(node, (ast.Subscript, ast.Starred, ast.NamedExpr, ast.Await)):
            return self.roots(node.value)
        if isinstance(node, ast.IfExp):
            return self._all((node.body, node.orelse))
        if isinstance(node, ast.BoolOp):
            return self._all(node.values)
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return self._all(node.elts)
        if isinstance(node, ast.Dict):
            return self._all(node.values)
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp)):
            return self.roots(node.elt)
        if isinstance(node, ast.DictComp):
            return self.roots(node.value)
        if isinstance(node, ast.Lambda):
            return self.roots(node.body)
        if isinstance(node, ast.BinOp):
            return (
                self._all((node.left, node.right))
                if isinstance(node.op, ast.Add) and _holds(node)
                else NOTHING
            )
        return self._call(node) if isinstance(node, ast.Call) else NOTHING

    def _call(self, call: ast.Call) -> Roots:
        args = [*call.args, *(k.value for k in call.keywords)]
        given = self._all(args)
        for item in call.keywords:
            if item.arg == "out":
                self._write(call, self.roots(item.value))
            if item.arg == "inplace" and syntax.constant(item.value) is not False:
                self._write(call, given)
        if syntax.last_name(call.func) in _SECOND_INPLACE and syntax.on_torch(call) and call.args[1:]:
            self._write(call, given)
        name, function = syntax.last_name(call.func), call.func
        if isinstance(function, ast.Name):
            return self._called_by_name(call, name, given)
        if not isinstance(function, ast.Attribute):
            self._write(call, given | self.roots(function))
            return given | self.roots(function)
        if _of_torch(function):
            return self._of_torch(call, function, given)
        own = self.roots(function.value)
        if name in self.file.functions:
            return self._summed(call, self.file.functions[name], own)
        if syntax.is_name(function.value, "self") and name in self.file.modules:
            return self._module(call, self.file.modules[name], given)
        return self._method(call, name, own, given)

    def _called_by_name(self, call: ast.Call, name: str, given: Roots) -> Roots:
        if name in self.nested:  # its body is read with this function's
            met = given.union(self.nested[name])
            self.flow.join(sorted(met))
            return met
        if name in self.file.functions:
            return self._summed(call, self.file.functions[name], NOTHING)
        if name in {"setattr", "delattr"} and call.args:
            self._write(call, self.roots(call.args[0]) | {f"@{syntax.constant(a)}" for a in call.args[1:2]})
            return NOTHING
        if name == "getattr" and call.args:
            return self.roots(call.args[0]) | {f"@{syntax.constant(a)}" for a in call.args[1:2]}
        if name in _BUILTINS or name in _KERNELS:
            return NOTHING
        if name in self.file.strange:
            self._write(call, given)
            return given
        if name in _CONTAINERS or name == "rearrange" or name[:1].isupper():
            return given
        if name in self.bound:
            return self._forwards(call)  # a layer out of a list of layers
        self._write(call, given)
        return given

    def _of_torch(self, call: ast.Call, function: ast.Attribute, given: Roots) -> Roots:
        name = function.attr
        root: ast.expr = function
        between: set[str] = set()
        while isinstance(root, ast.Attribute):
            between.add(root.attr)
            root = root.value
        if is_in_place(name) or between & {"ops", "_C", "library", "jit", "_foreach"}:
            self._write(call, given)
            return given
        if name == "checkpoint":  # a layer run for training: it gives what the layer gives
            return self._all(call.args[1:2])
        return given if name in _VIEWS or between & {"autograd"} else NOTHING

    def _register(self, call: ast.Call, given: Roots) -> Roots:
        """A buffer is born where a class's ``__init__`` registers it on self; anywhere else, and under a name
        that does not show, one may be replaced."""
        label = syntax.constant(call.args[0] if call.args else syntax.keyword(call, "name"))
        own = isinstance(call.func, ast.Attribute) and syntax.is_name(call.func.value, "self")
        if not isinstance(label, str):
            self._write(call, self.file.buffers)
            return NOTHING
        self.flow.join((f"@{label}", *sorted(given)))
        if not own or self.flow.function.name != "__init__":
            self._write(call, frozenset((f"@{label}",)))
        return NOTHING

    def _method(self, call: ast.Call, name: str, own: Roots, given: Roots) -> Roots:
        if is_in_place(name):
            self._write(call, own)
            return own | given
        if name == "register_buffer":
            return self._register(call, given)
        if name in {"buffers", "named_buffers"}:
            return self.file.buffers
        if name in {"get_buffer", "get_parameter"} and call.args:
            return frozenset((f"@{syntax.constant(call.args[0])}",))
        root = _root(call.func)
        if root in self.file.imported - _QUANTISED_KERNELS:  # not a tensor's method, whatever its name
            self._write(call, own | given)
            return own | given
        if name in _ADDERS:
            self.flow.join(sorted(own | given))
            return own
        if name in _VIEWS:
            return own
        if name in _READS:
            return NOTHING
        receiver = call.func.value if isinstance(call.func, ast.Attribute) else None
        if syntax.is_name(receiver) and receiver.id in _STANDARD:  # type: ignore[union-attr]
            return given
        if (
            syntax.last_name(receiver or call) in _QUANTISED_KERNELS
        ):  # the third argument is where their result goes
            self._write(call, self.roots(call.args[2]) if len(call.args) > 2 else given)
            return NOTHING
        if isinstance(receiver, ast.Call) and syntax.is_name(receiver.func, "super"):
            return given
        if name[:1].isupper():
            return given
        self._write(call, own | given)
        return own | given

    def _module(self, call: ast.Call, made: set[str], given: Roots) -> Roots:
        """A call of what ``self.x`` was set to: one of this file's classes, or one of torch's modules."""
        returned = NOTHING
        for name in made:
            if name in self.file.classes:
                returned |= self._summed(call, _methods(self.file.classes[name], "forward"), NOTHING)
            elif name in {"Dropout", "Identity"}:
                returned |= given
            elif not name[:1].isupper() or name in self.file.strange:
                self._write(call, given)
                returned |= given
        return returned

    def _forwards(self, call: ast.Call) -> Roots:
        made = [
            c
            for n, c in self.file.classes.items()
            for o in [self.file.owners.get(id(self.flow.function))]
            if o is not None and syntax.calls(o, n)
        ]
        functions = [f for c in made for f in _methods(c, "forward")] or self.file.functions.get(
            "forward", []
        )
        return self._summed(call, functions, NOTHING)

    def _summed(self, call: ast.Call, functions: list[Function], own: Roots) -> Roots:
        """The summaries of every function that may be meant, for the arguments of this call."""
        returned = NOTHING
        for function in functions:
            self.flow.uses.add(function.name)
            summary = self.file.summaries[id(function)]
            bound = _bound_arguments(call, function)
            for names, act in ((summary.writes, True), (summary.returns, False)):
                hit = NOTHING
                for name in names:
                    hit |= frozenset((name,)) if name[0] == "@" else self._all(bound.get(name, ()))
                if act:
                    self._write(call, hit)
                else:
                    returned |= hit
        return returned | (own if not functions else NOTHING)


def _bound_arguments(call: ast.Call, function: Function) -> dict[str, list[ast.expr]]:
    """Parameter -> the arguments that may be bound to it."""
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
    if names[:1] == ["self"] and not _on_class(call.func):
        names = names[1:]
    rest = [a.arg for a in (function.args.vararg, function.args.kwarg) if a is not None]
    bound: dict[str, list[ast.expr]] = {}
    starred = any(isinstance(a, ast.Starred) for a in call.args)
    for i, value in enumerate(call.args):
        for at in [*names, *rest] if starred else [*names[i : i + 1], *(rest if i >= len(names) else ())]:
            bound.setdefault(at, []).append(value)
    known = set(_parameters(function))
    for item in call.keywords:
        for at in [item.arg] if item.arg in known else (known if item.arg is None else rest):
            bound.setdefault(at or "", []).append(item.value)
    return bound


def _on_class(function: ast.expr) -> bool:
    """``Class.method``, which is given its ``self``."""
    return isinstance(function, ast.Attribute) and syntax.last_name(function.value)[:1].isupper()


def _methods(node: ast.ClassDef, name: str) -> list[Function]:
    return [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.name == name]


def _cut_up(function: Function) -> Iterator[tuple[ast.Call, ast.expr]]:
    """Calls that cut a local up into parts, ``x.split(...)``, where nothing else of the function reads x,
    each with the one value that x is given."""
    for call in (n for name in ("split", "chunk", "unbind") for n in syntax.calls(function, name)):
        owner = call.func.value if isinstance(call.func, ast.Attribute) else None
        if isinstance(owner, ast.Name) and owner.id not in _parameters(function):
            uses = [n for n in syntax.walk(function) if isinstance(n, ast.Name) and n.id == owner.id]
            values = [value for _, value in syntax.assignments(function.body, owner.id)]
            if len(uses) == 2 and len(values) == 1 and values[0] is not None:
                yield call, values[0]


def _paired(nodes: Iterable[ast.AST]) -> Iterator[ast.GeneratorExp | ast.ListComp]:
    """The comprehensions of ``a, b = (f(t) for t in (x, y))``."""
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.GeneratorExp, ast.ListComp)):
            target, each = node.targets[0], node.value.generators[0]
            sides = isinstance(target, (ast.Tuple, ast.List)) and isinstance(each.iter, (ast.Tuple, ast.List))
            plain = len(node.targets) == len(node.value.generators) == 1 and not each.ifs
            if not (sides and plain and isinstance(each.target, ast.Name)):
                continue
            parts, given = target.elts, each.iter.elts  # type: ignore[attr-defined]
            names = all(isinstance(part, ast.Name) for part in parts)
            if names and len(parts) == len(given) and not any(isinstance(g, ast.Starred) for g in given):
                yield node.value


def _filled_later(node: ast.AST) -> Iterator[str]:
    """The names that are bound to a list or a dictionary."""
    if isinstance(node, ast.Assign) and (
        isinstance(node.value, (ast.List, ast.Dict, ast.ListComp, ast.DictComp))
        or syntax.call_name(node.value) in {"list", "dict"}
    ):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _of_buffers(node: ast.AST) -> bool:
    """``x._buffers["name"]``."""
    return (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "_buffers"
        and isinstance(syntax.constant(node.slice), str)
    )


def is_in_place(name: str) -> bool:
    dunder = name.startswith("__i") and name not in {"__init__", "__invert__", "__iter__", "__int__"}
    return (
        (name.endswith("_") and not name.startswith("_") and name != "requires_grad_")
        or dunder
        or name in {"__setitem__", "__delitem__", "__setattr__"}
    )


def _of_torch(function: ast.Attribute) -> bool:
    return _root(function) in {"torch", "F", "nn"}


def _holds(node: ast.BinOp) -> bool:
    """A sum of tuples or lists, as far as it can be seen."""
    return any(
        isinstance(part, (ast.Tuple, ast.List)) or syntax.call_name(part) in {"tuple", "list"}
        for part in (node.left, node.right)
    ) or any(isinstance(part, ast.BinOp) and _holds(part) for part in (node.left, node.right))
