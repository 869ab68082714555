"""Nodes nobody reads."""

from __future__ import annotations

from typing import Any

from graph_passes.framework.base import GraphPass


class DeadCode(GraphPass):
    name = "dead-code"
    summary = "drops nodes whose results reach no output, and sorts the rest"
    why = "TPU-MLIR converts every node it finds, and refuses some that are dead"
    precondition = "no output of the net depends on the node"

    def rewrite(self, graph: Any) -> list[str]:
        before = {n.name or n.op: n for n in graph.nodes}
        graph.cleanup(remove_unused_node_outputs=False, remove_unused_graph_inputs=False).toposort()
        kept = {id(n) for n in graph.nodes}
        return [name for name, node in before.items() if id(node) not in kept]
