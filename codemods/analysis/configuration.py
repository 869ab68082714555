"""What a configuration class gives to keys that config.json does not mention, read from its source.

Three ways of writing a default are known: a keyword of ``__init__`` (upstream's way), ``.pop("key", value)``
or ``.get`` in it, and a loop over a table (``for name, value in TABLE.items(): setattr(self, name, ...)``).
Values that are not literals are not known.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from codemods.analysis.source import read


def defaults(source: bytes | str) -> dict[str, Any]:
    """Key -> default of the configuration class in *source*; empty when no class in it has an ``__init__``.

    Raises :class:`~codemods.analysis.source.SourceError` when the source does not parse.
    """
    tree = read(source.encode() if isinstance(source, str) else source).tree
    found: dict[str, Any] = {}
    for function in _constructors(tree):
        found |= dict(_literals(_keywords(function.args)))
        found |= dict(_literals(_taken_with_default(function)))
        found |= dict(_literals(_from_tables(function, tree)))
    return found


def _constructors(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and _is_configuration(node):
            yield from (
                part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"
            )


def _is_configuration(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).rpartition(".")[2].lower() == "pretrainedconfig" for base in node.bases)


def _literals(pairs: Iterator[tuple[str, ast.expr]]) -> Iterator[tuple[str, Any]]:
    for name, value in pairs:
        try:
            yield name, ast.literal_eval(value)
        except ValueError:
            continue


def _keywords(arguments: ast.arguments) -> Iterator[tuple[str, ast.expr]]:
    positional = [*arguments.posonlyargs, *arguments.args]
    with_default = positional[len(positional) - len(arguments.defaults) :]
    pairs = [
        *zip(with_default, arguments.defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    yield from ((argument.arg, default) for argument, default in pairs if default is not None)


def _taken_with_default(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(function):
        match node:
            case ast.Call(
                func=ast.Attribute(attr="pop" | "get"), args=[ast.Constant(value=str(name)), default]
            ):
                yield name, default


def _from_tables(function: ast.FunctionDef, tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    tables = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(function):
        match node:
            case ast.For(iter=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="items"))):
                if name in tables and _sets_attributes(node):
                    yield from _members(tables[name])


def _sets_attributes(loop: ast.For) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "setattr" for node in ast.walk(loop))


def _members(table: ast.Dict) -> Iterator[tuple[str, ast.expr]]:
    for key, value in zip(table.keys, table.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value, value
