"""Pack weights instead of compiling them: one compiled net per kind becomes every layer's net.

How a build uses it::

    plan = prove(Compiled(block_0_bmodel, block_0_final_mlir), template, tensors_of_layer_0)
    pieces = [Piece("embedding", embedding_bmodel, "embedding")]
    for layer in range(layers):
        net, refs = f"block_{layer}", tensors_of_layer[layer]
        pieces.append(Piece(net, block_0_bmodel, "block_0", plan=plan, tensors=refs, pack=True))
    write(output, pieces)  # one bmodel, as model_tool --combine would have left it
    sidefile.describe(output, pieces, geometry, config).save(output)  # what refit and inspect need later

:func:`prove` raises :class:`Unproven` when packing cannot be shown to give the compiler's own bytes; such a
kind is compiled layer by layer and its pieces are given without ``pack``. Nets that were compiled from their
own weights (layer 0, the embedding, heads) need no packing either; with their plan and tensors they can still
be refitted.
"""

from __future__ import annotations

from qwen_surgery.packing.expand import Piece, WrittenBmodel, write
from qwen_surgery.packing.plans import PackPlan
from qwen_surgery.packing.proof import Compiled, Unproven, prove

__all__ = ["Compiled", "PackPlan", "Piece", "Unproven", "WrittenBmodel", "prove", "write"]
