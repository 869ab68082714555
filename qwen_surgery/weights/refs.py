"""Where one tensor of a checkpoint lies on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_surgery.errors import Refused

if TYPE_CHECKING:
    import numpy as np

#: Bytes of one element, by the dtype names that safetensors uses.
ITEM_SIZE = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class TensorRef:
    """One tensor: *nbytes* at *offset* of *file*, row-major, little-endian.

    ``dtype`` is ``BF16``, ``F16`` or ``F32``; ``nbytes`` equals the product of ``shape`` times the item size.
    """

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self) -> np.ndarray:
        """The tensor as float32 with its own shape; raises Refused when the file is too short."""
        import numpy as np

        raw = self.read_raw()
        if self.dtype == "BF16":
            bits = raw.astype(np.uint32)
            bits <<= 16  # in place: a second array of a whole matrix costs more than the shift
            return bits.view(np.float32)
        return raw.astype(np.float32, copy=False)

    def read_raw(self) -> np.ndarray:
        """The stored elements without conversion: uint16 bits for BF16, else float16 or float32."""
        import numpy as np

        numpy_dtype = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}[self.dtype]
        with self.file.open("rb") as stream:
            data = np.fromfile(stream, dtype=numpy_dtype, count=self.numel, offset=self.offset)
        if data.size != self.numel:
            raise Refused(
                f"tensor {self.name}: {self.file} ends before byte {self.offset + self.nbytes}",
                hint="the shard is truncated: download it again",
            )
        return data.reshape(self.shape)


def check_ranges(refs: list[TensorRef], file: Path, end: int, *, shared: bool = False) -> None:
    """Raise Refused when a tensor ends after *end* or two tensors overlap.

    ``shared`` allows two names for exactly the same bytes (tied weights in a PyTorch file).
    """
    last: TensorRef | None = None
    for ref in sorted((r for r in refs if r.nbytes), key=lambda r: (r.offset, r.nbytes)):
        if ref.offset + ref.nbytes > end:
            raise Refused(
                f"{file}: truncated: tensor {ref.name} needs bytes up to {ref.offset + ref.nbytes}, "
                f"the file has {end}",
                hint="download this shard again",
            )
        if last is not None and ref.offset < last.offset + last.nbytes:
            same = (ref.offset, ref.nbytes) == (last.offset, last.nbytes)
            if not (shared and same):
                end = min(ref.offset + ref.nbytes, last.offset + last.nbytes)
                raise Refused(
                    f"{file}: tensors {last.name} and {ref.name} overlap (bytes {ref.offset}..{end})",
                    hint="the shard's header is damaged: download it again",
                )
        last = ref
