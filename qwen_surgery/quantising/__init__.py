"""Which integers stand for a weight: the storage leaves them open, so they can be chosen to lose little.

``rtn`` rounds as the compiler does, ``search`` looks for each group's best scale. Both give integers in the
compiler's own formats, so that instructions, bytes and cycles stay the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_surgery.packing.plans import Quantise


def by_name(name: str) -> Quantise:
    """The quantiser called *name*, one of :data:`qwen_surgery.compiling.options.QUANTIZERS`."""
    from qwen_surgery.packing import formats
    from qwen_surgery.quantising import search

    return {"rtn": formats.quantise, "search": search.quantise}[name]
