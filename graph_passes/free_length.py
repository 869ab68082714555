"""Shapes that leave the sequence's length open."""

from __future__ import annotations

from typing import Any

import numpy as np

from graph_passes.framework.base import GraphPass
from graph_passes.framework.graphs import constant, constant_of, nodes, shape


class FreeLength(GraphPass):
    name = "free-length"
    summary = "takes the sequence's length out of the constant shapes of Reshapes and Expands"
    why = (
        "a net compiled with --dynamic and launched at a prompt's own length otherwise still reshapes to the "
        "whole length: bmruntime ends the process, or gives wrong numbers"
    )
    precondition = "a Reshape or Expand from [1, S, ...] to a constant [1, S, ...], S more than one"

    def rewrite(self, graph: Any) -> list[str]:
        sites = []
        for kind, free in (("Reshape", _free_shape), ("Expand", _free_spread)):
            for node in nodes(graph, kind):
                wanted = constant(node.inputs[1])
                if wanted is None or not _fixes_length(shape(node.inputs[0]), wanted):
                    continue
                new = free(shape(node.inputs[0]), shape(node.outputs[0]), wanted)
                if new is not None:
                    node.inputs[1] = constant_of(graph, f"{node.name}/shape", np.array(new, np.int64))
                    sites.append(node.name)
        return sites


def _fixes_length(given: tuple[int, ...] | None, wanted: np.ndarray) -> bool:
    if given is None or len(given) < 2 or wanted.size < 2:
        return False
    return given[0] == wanted[0] == 1 and given[1] == wanted[1] > 1


def _free_shape(
    _given: tuple[int, ...] | None, made: tuple[int, ...] | None, wanted: np.ndarray
) -> list[int] | None:
    """A Reshape's shape with -1 for the length; another -1 becomes the size that it stands for."""
    if (wanted > 0).all():
        return [1, -1, *wanted[2:]]
    if made is None or len(made) != wanted.size or (wanted == 0).any():
        return None
    return [1, -1, *made[2:]]


def _free_spread(
    given: tuple[int, ...] | None, _made: tuple[int, ...] | None, wanted: np.ndarray
) -> list[int] | None:
    """An Expand's shape with 1, which keeps what is there, in place of the length."""
    if given is None or len(given) != wanted.size:
        return None
    return [1, 1, *wanted[2:]]
