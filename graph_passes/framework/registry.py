"""Which passes there are, and in which order they run.

Built-in passes are listed here by hand: their order is part of their meaning. Other packages add passes
through the entry-point group ``qwen_surgery.passes`` (name = ``module:Class``, a :class:`GraphPass` or an
:class:`MlirPass`); those run after the built-in ones of their kind, sorted by entry-point name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from graph_passes.framework.base import BasePass, GraphPass, MlirPass

Kind = TypeVar("Kind", bound=BasePass)

ENTRY_POINT_GROUP = "qwen_surgery.passes"

#: module:class of every built-in pass on ONNX graphs, in running order.
ONNX_PASSES = (
    "graph_passes.fold_constants:FoldConstants",
    "graph_passes.rotary:Rotary",
    "graph_passes.joint_mlp:JointMlp",
    "graph_passes.zero_bias:ZeroBias",
    "graph_passes.token_lanes:TokenLanes",
    "graph_passes.free_length:FreeLength",
    "graph_passes.bounded_mask:BoundedMask",
)
#: module:class of every built-in pass on the Top-dialect text, in running order.
MLIR_PASSES = (
    "graph_passes.mlir.top_rope:TopRope",
    "graph_passes.mlir.fused_attention:FusedAttention",
    "graph_passes.mlir.kv_join:KvJoin",
    "graph_passes.mlir.grouped_norm:GroupedNorm",
    "graph_passes.mlir.split_attention:SplitAttention",
)


class UnknownPass(ValueError):
    """A name that no pass has. ``known`` lists those that exist."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"there is no pass {name!r}")
        self.known = tuple(known)


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)()


@cache
def _third_party() -> tuple[Any, ...]:
    found = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name)
    return tuple(point.load()() for point in found)


@cache
def onnx_passes() -> tuple[GraphPass, ...]:
    """Every pass on ONNX graphs in running order; raises ValueError when two passes share a name."""
    provided = (one for one in _third_party() if isinstance(one, GraphPass))
    return _distinct([*map(_load, ONNX_PASSES), *provided])


@cache
def mlir_passes() -> tuple[MlirPass, ...]:
    """Every pass on the Top-dialect text in running order; raises ValueError as :func:`onnx_passes` does."""
    provided = (one for one in _third_party() if isinstance(one, MlirPass))
    return _distinct([*map(_load, MLIR_PASSES), *provided])


def _distinct(passes: Sequence[Kind]) -> tuple[Kind, ...]:
    seen: set[str] = set()
    for one in passes:
        if one.name in seen:
            raise ValueError(f"two passes are called {one.name!r}")
        seen.add(one.name)
    return tuple(passes)


def all_passes() -> tuple[GraphPass | MlirPass, ...]:
    """ONNX passes, then passes on the Top-dialect text."""
    return _distinct([*onnx_passes(), *mlir_passes()])


def select(passes: Iterable[Kind], names: Iterable[str] | None) -> tuple[Kind, ...]:
    """Of *passes* those in *names* (all for None), in running order whatever the order of *names*."""
    passes = tuple(passes)
    if names is None:
        return passes
    wanted = set(names)
    return tuple(p for p in passes if p.name in wanted)


def require_known(names: Iterable[str]) -> None:
    """Raise :class:`UnknownPass` for a name that no pass has."""
    known = [p.name for p in all_passes()]
    for name in names:
        if name not in known:
            raise UnknownPass(name, known)


def undivided() -> set[str]:
    """Names of the passes that hide from TPU-MLIR what it splits over several devices."""
    return {p.name for p in all_passes() if p.undivided}


def unfit(toolchain: str) -> set[str]:
    """Names of the passes whose result TPU-MLIR *toolchain* ("1.6", "1.30.2") cannot take."""
    return {
        p.name
        for p in all_passes()
        if any(toolchain == v or toolchain.startswith(v + ".") for v in p.not_for)
    }
