"""Facts about a modeling file of transformers' decoders (Qwen2, Qwen3 and those alike), never executed."""

from __future__ import annotations

import ast

from codemods.analysis import syntax
from codemods.analysis.source import Source, read


def stage(source: bytes, layer_class: str) -> str:
    """The stage of transformers' history that a file with *layer_class* is of; '' when it has no such class.

    ``rotary-inside``: attention asks its own tables for angles. ``attention-classes``: the layer is handed
    them, and there is a class for each way to compute attention. ``attention-interface``: a function for
    each. Raises :class:`~codemods.analysis.source.SourceError` when the source does not parse.
    """
    parsed = read(source)
    layer = next((n for n in parsed.tree.body if isinstance(n, ast.ClassDef) and n.name == layer_class), None)
    forward = method(layer, "forward") if layer else None
    if forward is None:
        return ""
    if "position_embeddings" not in syntax.parameters(forward):
        return "rotary-inside"
    return "attention-interface" if function(parsed, "eager_attention_forward") else "attention-classes"


def method(owner: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    """The method *name* that *owner* itself has."""
    return next((n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == name), None)


def function(source: Source, name: str) -> ast.FunctionDef | None:
    """The function *name* of the module; None too where there are several."""
    found = [n for n in source.tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    return found[0] if len(found) == 1 else None


def body(function: ast.FunctionDef) -> list[ast.stmt]:
    """The statements of *function* without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return function.body[1:] if documented else function.body


def is_swapped(node: ast.AST) -> bool:
    """Whether *node* is ``x.transpose(1, 2)``."""
    if not (
        isinstance(node, ast.Call) and syntax.call_name(node) == "transpose" and not syntax.on_torch(node)
    ):
        return False
    return [syntax.constant(argument) for argument in node.args] == [1, 2] and not node.keywords
