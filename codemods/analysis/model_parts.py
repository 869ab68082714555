"""The classes of a file that make up the model, and the sizes of the real one."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from codemods.analysis import syntax
from codemods.analysis import values as v
from codemods.analysis.source import Source
from codemods.analysis.values import PLAIN, Value

_MISSING = object()


@dataclass(frozen=True)
class ModelSizes:
    """What the real model is: every key of its unpatched config.json that has a value, given or not, and the
    export length in tokens."""

    config: Mapping[str, Any]
    seq_length: int

    def has(self, key: str) -> bool:
        return key in self.config

    def value(self, key: str) -> Value:
        """``config.<key>``; PLAIN where nothing says what it is."""
        found = self.config.get(key, _MISSING)
        return PLAIN if found is _MISSING else v.constant(found)

    @property
    def layers(self) -> Value:
        """How many layers the model has."""
        return self.value("num_hidden_layers")


@dataclass(frozen=True)
class ModelClass:
    """The class that makes the layers, or the one with the output layer around it."""

    node: ast.ClassDef
    forward: ast.FunctionDef
    head: bool


def models(source: Source) -> Iterator[ModelClass]:
    """The classes of the file that make ``wte`` and ``h``, or ``transformer`` and ``lm_head``."""
    for node in (n for n in source.tree.body if isinstance(n, ast.ClassDef)):
        stored = {
            n.attr for n in syntax.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
        }
        forward = methods(node).get("forward")
        for wanted, head in (({"wte", "h"}, False), ({"transformer", "lm_head"}, True)):
            if wanted <= stored and forward is not None:
                yield ModelClass(node, forward, head)


def methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
