"""What a pass is, and what it reports.

An ONNX pass works on an onnx-graphsurgeon graph of one template: static shapes, opset 15, weights as graph
inputs named ``weight/<slot>``. An MLIR pass works on the Top-dialect text that TPU-MLIR makes of such a
graph. Both must keep every input and output (name, shape, dtype, order) and compute the same values; how the
graph between them looks is the pass's business. Passes never see weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from graph_passes.mlir.text import Module

WEIGHT_PREFIX = "weight/"


class PassError(Exception):
    """A pass, or a check after it, failed. ``pass_name`` says which."""

    def __init__(self, pass_name: str, message: str) -> None:
        super().__init__(f"pass {pass_name}: {message}")
        self.pass_name = pass_name


class BasePass:
    """What every pass says about itself. Passes are stateless: ``rewrite`` edits the copy it is given."""

    #: How recipes, reports and the command line call it.
    name: ClassVar[str]
    #: One line: what it does.
    summary: ClassVar[str]
    #: Why that helps the chip or the compiler.
    why: ClassVar[str]
    #: What must hold at a site for it to be rewritten; anything else is left alone.
    precondition: ClassVar[str]
    #: Toolchain versions ("1.6") that cannot take this pass's result; it is switched off for them by name.
    not_for: ClassVar[tuple[str, ...]] = ()
    #: Whether it only runs where it is asked for by name.
    optional: ClassVar[bool] = False
    #: Whether it hides from TPU-MLIR what that splits over several devices; there it is off.
    undivided: ClassVar[bool] = False


class GraphPass(BasePass, ABC):
    """One rewrite of an ONNX graph."""

    @abstractmethod
    def rewrite(self, graph: Any) -> list[str]:
        """Edit *graph* (an ``onnx_graphsurgeon.Graph``) and name each rewritten site; empty for no site."""


class MlirPass(BasePass, ABC):
    """One rewrite of a Top-dialect module."""

    @abstractmethod
    def rewrite(self, module: Module) -> list[str]:
        """Edit *module* and name each rewritten site; empty for no site."""


@dataclass(frozen=True)
class PassReport:
    """What one pass did to one graph, over all rounds.

    ``sites`` are node or tensor names, ``nodes_before``/``nodes_after`` count nodes around its first and last
    run; ``ops`` gives, per op type that changed, (before, after). ``seconds`` holds the pass and its checks.
    """

    name: str
    sites: tuple[str, ...]
    nodes_before: int
    nodes_after: int
    ops: dict[str, tuple[int, int]] = field(default_factory=dict)
    rounds: int = 1
    seconds: float = 0.0

    @property
    def changed(self) -> bool:
        return bool(self.sites)

    def to_json(self) -> dict[str, Any]:
        return {
            "pass": self.name,
            "sites": list(self.sites),
            "nodes": [self.nodes_before, self.nodes_after],
            "ops": {op: list(counts) for op, counts in self.ops.items()},
            "rounds": self.rounds,
            "seconds": round(self.seconds, 3),
        }
