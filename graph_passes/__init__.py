"""Graph passes: rewrites of exported nets that the chip's compiler rewards, each proven to change no result.

``clean(model) -> CleanResult`` runs the ONNX passes over a weight-free template;
``graph_passes.mlir.apply(text)`` runs the passes on the Top-dialect text that TPU-MLIR's ``model_transform``
writes; ``graph_passes.lint.check(model)`` finds what the compiler would refuse or miscompile. Nothing here
knows weights, torch, or how TPU-MLIR is run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graph_passes.framework.base import GraphPass, MlirPass, PassError, PassReport
    from graph_passes.framework.runner import CleanResult, When, clean, find_breaking_pass

__all__ = [
    "CleanResult",
    "GraphPass",
    "MlirPass",
    "PassError",
    "PassReport",
    "When",
    "clean",
    "find_breaking_pass",
]

_HOMES = {
    "GraphPass": "base",
    "MlirPass": "base",
    "PassError": "base",
    "PassReport": "base",
    "When": "runner",
    "CleanResult": "runner",
    "clean": "runner",
    "find_breaking_pass": "runner",
}


def __getattr__(name: str) -> Any:
    """Load onnx and onnx-graphsurgeon only when a pass is really wanted."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"graph_passes.framework.{_HOMES[name]}"), name)
    raise AttributeError(name)
