"""``drop-upcast-causal-mask``: the same as ``drop-causal-mask`` for ``_upcast_and_reordered_attn``."""

from __future__ import annotations

from codemods.drop_causal_mask import DropCausalMask, mask_examples


class DropUpcastCausalMask(DropCausalMask):
    """Remove the causal mask inside the upcast attention method.

    Why
        It is the same mask as in `_attn`, in the fp32 variant of the method that early and middle revisions
        carry: whichever of the two a fine-tune calls, the mask must come from the net's input.
    """

    name = "drop-upcast-causal-mask"
    absent = "this revision has no _upcast_and_reordered_attn"
    examples = mask_examples("_upcast_and_reordered_attn")
    upcast = True
