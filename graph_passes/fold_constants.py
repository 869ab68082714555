"""Constants and shapes folded by onnxsim."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from graph_passes.framework.base import GraphPass

# onnxsim's optimizers that move arithmetic into weights. Weights are inputs here, so they cannot fire
# usefully, and fusing MatMul and Add to Gemm hides the bias from TPU-MLIR's attention and rotary patterns.
_SKIPPED = [
    "eliminate_nop_with_unit",
    "fuse_matmul_add_bias_into_gemm",
    "fuse_add_bias_into_conv",
    "fuse_bn_into_conv",
]


class FoldConstants(GraphPass):
    name = "fold-constants"
    summary = (
        "computes everything that depends on constants and shapes only; drops casts and identities that pass "
        "their input on, and nodes that nobody reads"
    )
    why = (
        "the tracer leaves a third of the graph as Constant, Shape and index arithmetic; TPU-MLIR would run "
        "onnxsim itself, on the graph with weights, at five times the time and twice the memory, and loses "
        "weights behind an Identity"
    )
    precondition = "static shapes; weights are inputs and stay untouched"

    def rewrite(self, graph: Any) -> list[str]:
        import onnx_graphsurgeon as gs

        onnxsim = _onnxsim()
        before = {n.name or n.outputs[0].name: n.op for n in graph.nodes}
        model = gs.export_onnx(graph, do_type_check=False)
        simplified, _ = onnxsim.simplify(
            model, check_n=0, skipped_optimizers=_SKIPPED, perform_optimization=True
        )
        folded = gs.import_onnx(simplified)
        _lift_constants(folded)
        after = {n.name or n.outputs[0].name: n.op for n in folded.nodes}
        if list(before.values()) == list(after.values()):
            return []
        graph.nodes[:] = folded.nodes
        graph.inputs, graph.outputs = folded.inputs, folded.outputs
        return [name for name in before if name not in after] or ["(reordered)"]


def _onnxsim() -> Any:
    """The module onnxsim, imported without torch: it would load it for quantisers that are not used here,
    which takes three times as long as everything else.
    """
    if "onnxsim" not in sys.modules and "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]  # importing it raises ImportError
        try:
            return importlib.import_module("onnxsim")
        finally:
            del sys.modules["torch"]
    return importlib.import_module("onnxsim")


def _lift_constants(graph: Any) -> None:
    """Make initializers of Constant nodes, so that nets can share large tables in one file."""
    for node in [n for n in graph.nodes if n.op == "Constant" and "value" in n.attrs]:
        values = node.attrs["value"].values
        result = node.outputs[0]
        node.outputs.clear()
        result.to_constant(values)
    graph.cleanup(remove_unused_graph_inputs=False)
