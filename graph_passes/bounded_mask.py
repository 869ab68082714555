"""A floor under the attention mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from graph_passes.framework.base import GraphPass
from graph_passes.framework.graphs import constant_of, make, shape

#: What a closed position holds; lower values are raised to it.
FLOOR = -10000.0
MASK = "attention_mask"


class BoundedMask(GraphPass):
    name = "bounded-mask"
    summary = "raises a prompt's mask values below -10000 to it"
    why = (
        "one generation of the vendor's demos writes float16's -10000 to bf16 nets, where the same bits are "
        "-5.6e29: rows that are closed everywhere, as those of padding are, then hold no number, and through "
        "the cache every token after. A token's own row has an open place and needs nothing. Prefill is "
        "0.4 % slower (1.8B, S=512, int4), so it is on for that runtime alone"
    )
    optional = True
    undivided = True
    precondition = "a graph input called attention_mask of more than one row that is read as it is"

    def rewrite(self, graph: Any) -> list[str]:
        mask = next((tensor for tensor in graph.inputs if tensor.name == MASK), None)
        if mask is None or any(node.op == "Max" for node in mask.outputs):
            return []
        if (shape(mask) or ())[-2:-1] == (1,):
            return []
        readers = list(mask.outputs)
        floor = constant_of(graph, f"{MASK}/floor", np.asarray(FLOOR, np.float32))
        bounded = make(graph, "Max", [mask, floor], f"{MASK}/bounded", shape(mask) or (), np.float32)
        for node in readers:
            slot = next(i for i, tensor in enumerate(node.inputs) if tensor is mask)
            node.inputs[slot] = bounded
        graph.toposort()
        return [node.name for node in readers]
