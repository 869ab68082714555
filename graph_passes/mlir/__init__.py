"""Passes on the Top dialect's text of a net, for what no ONNX form can say; :func:`apply` runs them."""

from __future__ import annotations

from graph_passes.mlir.runner import apply

__all__ = ["apply"]
