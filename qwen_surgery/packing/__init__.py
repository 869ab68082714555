"""Pack weights instead of compiling them: one compiled net per kind becomes every layer's net.

How the build uses it::

    plan = packing.prove(packing.Compiled(block_0_bmodel, block_0_final_mlir), template.model,
    refs_of_layer_0) pieces = [packing.Piece("embedding", embedding_bmodel, plan=..., tensors=...), ...]
    for layer in range(layers):
        pieces.append(packing.Piece(f"block_{layer}", block_0_bmodel, plan=plan, tensors=refs, pack=True))
        pieces.append(packing.Piece(f"block_cache_{layer}", block_cache_0_bmodel, plan=..., tensors=refs,
        pack=True))
    packing.write(output, pieces)               # one bmodel, as model_tool --combine would have left it
    packing.sidefile.save(output, pieces, ...)   # what `refit` and `inspect` need later

:func:`prove` raises :class:`Unproven` when packing cannot be shown to give the compiler's own bytes; such a
kind is compiled layer by layer and its pieces are given without ``pack``. Nets that were compiled from their
own weights (layer 0, the embedding, heads) need no packing either; with their plan and tensors they can still
be refitted.
"""

from __future__ import annotations

from qwen_surgery.packing.expand import Piece, Progress, Written, write
from qwen_surgery.packing.plans import Plan, Tensors
from qwen_surgery.packing.proof import Compiled, Unproven, prove

__all__ = ["Compiled", "Piece", "Plan", "Progress", "Tensors", "Unproven", "Written", "prove", "write"]
