"""Where one tensor of a checkpoint lies on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_surgery.errors import Refused

if TYPE_CHECKING:
    import numpy as np

#: Bytes of one element, by the dtype names that safetensors uses.
ITEM_SIZE = {"BF16": 2, "F16": 2, "F32": 4}
#: numpy's types of stored elements; BF16 as its bits. I32 is what the fields of quantised weights lie in.
_STORED = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "I32": "<i4"}


@dataclass(frozen=True)
class TensorRef:
    """One tensor: *nbytes* at *offset* of *file*, row-major, little-endian.

    ``dtype`` is ``BF16``, ``F16``, ``F32`` or, for parts of quantised weights, ``I32``; ``nbytes`` equals the
    product of ``shape`` times the item size.
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

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """The tensors as they lie in files: this one, unless its values are made of several."""
        return (self,)

    def moved(self, place: Callable[[TensorRef], Path]) -> TensorRef:
        """The same tensor in the files that *place* gives for its parts, at the same offsets."""
        return replace(self, file=place(self))

    def read_raw(self) -> np.ndarray:
        """The stored elements without conversion: uint16 bits for BF16, else float16, float32 or int32."""
        import numpy as np

        with self.file.open("rb") as stream:
            data = np.fromfile(stream, dtype=_STORED[self.dtype], count=self.numel, offset=self.offset)
        if data.size != self.numel:
            raise Refused(
                f"tensor {self.name}: {self.file} ends before byte {self.offset + self.nbytes}",
                hint="the shard is truncated: download it again",
            )
        return data.reshape(self.shape)

    def read_rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Some rows of a matrix [R, C] as float32 [len(rows), C], without reading the others."""
        import numpy as np

        mapped = np.memmap(
            self.file, dtype=_STORED[self.dtype], mode="r", offset=self.offset, shape=self.shape
        )
        picked = np.asarray(mapped[np.asarray(rows)])
        if self.dtype == "BF16":
            return (picked.astype(np.uint32) << 16).view(np.float32)
        return picked.astype(np.float32)


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
