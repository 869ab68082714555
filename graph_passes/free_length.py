"""Reshapes that leave the sequence's length open."""

from __future__ import annotations

from typing import Any

import numpy as np

from graph_passes.framework.base import GraphPass
from graph_passes.framework.graphs import constant, constant_of, nodes, shape


class FreeLength(GraphPass):
    name = "free-length"
    summary = "writes -1 in place of the sequence's length in the constant shapes of Reshapes"
    why = (
        "a net compiled with --dynamic and launched at a prompt's own length otherwise still reshapes to the "
        "whole length: bmruntime ends the process, or gives wrong numbers"
    )
    precondition = "a Reshape from [1, S, ...] to a constant [1, S, ...], S more than one"

    def rewrite(self, graph: Any) -> list[str]:
        sites = []
        for node in nodes(graph, "Reshape"):
            wanted = constant(node.inputs[1])
            if wanted is None or not _fixes_length(shape(node.inputs[0]), wanted):
                continue
            free = np.array([1, -1, *wanted[2:]], np.int64)
            node.inputs[1] = constant_of(graph, f"{node.name}/shape", free)
            sites.append(node.name)
        return sites


def _fixes_length(given: tuple[int, ...] | None, wanted: np.ndarray) -> bool:
    if given is None or len(given) < 2 or wanted.size < 2 or (wanted <= 0).any():
        return False
    return given[0] == wanted[0] == 1 and given[1] == wanted[1] > 1
