"""Which integers stand for a weight: the storage leaves them open, so they can be chosen to lose little.

``rtn`` rounds as the compiler does, ``search`` looks for each group's best scale, ``gptq`` makes up for each
column's error in those behind it, by what a text shows of the inputs. All give integers in the compiler's own
formats, so that instructions, bytes and cycles stay the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import golden
from qwen_surgery.errors import Refused

if TYPE_CHECKING:
    import numpy as np

    from qwen_surgery.packing.formats import Quantisation
    from qwen_surgery.packing.plans import Quantise
    from qwen_surgery.weights.integers import Integers

#: What ``gptq`` reads where no other text is given: prose, talk and code in English and Chinese.
TEXT = Path(golden.__file__).with_name("calibration.txt")
#: Tokens of it at most, and of a window: each window is read from its start, as a prompt.
TOKENS, WINDOW = 8192, 512


def by_name(name: str) -> Quantise:
    """The quantiser called *name*, one of :data:`qwen_surgery.compiling.options.QUANTIZERS`."""
    from qwen_surgery.packing import formats
    from qwen_surgery.quantising import search

    return {"rtn": formats.quantise, "search": search.quantise, "gptq": _not_chosen}[name]


def _not_chosen(values: np.ndarray, form: Quantisation) -> Integers:
    """Stands where every weight's integers have been chosen before packing."""
    raise Refused(
        f"a weight of {values.shape[1]} columns is stored as integers that nobody has chosen",
        hint="use --quantizer search",
    )
