"""Compile a net of the vocabulary without its hundreds of millions of weights.

TPU-MLIR's first two steps hold such a net's weights in float32, several times over: at 151,936 x 2,048 they
take 5 GB and most of a build's time. But what they do does not depend on how many rows the table has. So a
*narrow* net with the table's first rows goes through them, its lowered text is *extended* to the full
vocabulary (:mod:`.lowered`), and on that text run the compiler's last steps, which place weights and emit
instructions.

The weights of the extended net are a *probe*: pseudo-random bytes (:mod:`.probe`). :mod:`.plan` finds them
again in what was compiled, which shows where the real ones belong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from qwen_surgery.weights import ITEM_SIZE, TensorRef

if TYPE_CHECKING:
    import onnx

#: A narrow vocabulary has at least this many rows, and the real one's remainder by :data:`_LANES`, so that
#: nothing that depends on how rows fall into a chip's lanes changes.
_LEAST, _LANES = 1280, 256


class CannotExtend(Exception):
    """This net's text does not say clearly what depends on the vocabulary; compile it at its full size."""


@dataclass(frozen=True)
class Vocabulary:
    """The real number of rows and the narrow one."""

    full: int
    narrow: int

    def extended(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """*shape* with the narrow number replaced by the real one."""
        return tuple(self.full if size == self.narrow else size for size in shape)


def narrow_vocabulary(full: int, taken: set[int]) -> Vocabulary | None:
    """A narrow size for *full* rows; None when that would save nothing.

    It is none of the numbers *taken*, nor one that packing and grouping make of them.
    """
    size = _LEAST + full % _LANES
    taken = {made for one in taken for made in (one, one // 2, 2 * one, 3 * one)}
    while size in taken:
        size += _LANES
    return Vocabulary(full, size) if size < full // 2 else None


def sizes_of(model: onnx.ModelProto) -> set[int]:
    """Every dimension of every input, output and constant of *model*."""
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    found = {dim.dim_value for value in values for dim in value.type.tensor_type.shape.dim}
    return found | {size for tensor in model.graph.initializer for size in tensor.dims}


def narrow_model(model: onnx.ModelProto, vocabulary: Vocabulary) -> onnx.ModelProto:
    """*model* (a template) with the narrow vocabulary; constants of one value throughout are cut with it.

    Raises :class:`CannotExtend` when other constants hold the vocabulary.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if vocabulary.full in tensor.dims and values.size and (values == values.flat[0]).all():
            shape = [vocabulary.narrow if size == vocabulary.full else size for size in tensor.dims]
            alike = np.full(shape, values.flat[0], values.dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(alike, tensor.name))
        elif vocabulary.full in tensor.dims or (values.dtype.kind == "i" and vocabulary.full in values):
            raise CannotExtend(f"constant {tensor.name} depends on the vocabulary")
    for value in [*copy.graph.input, *copy.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value == vocabulary.full:
                dim.dim_value = vocabulary.narrow
    del copy.graph.value_info[:]
    try:
        return onnx.shape_inference.infer_shapes(copy, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise CannotExtend(f"the narrow net's shapes contradict: {str(error).splitlines()[0]}") from error


def narrow_tensor(tensor: TensorRef, vocabulary: Vocabulary) -> TensorRef:
    """The first rows of *tensor*; other tensors than the vocabulary's as they are."""
    if tensor.shape[0] != vocabulary.full:
        return tensor
    shape = (vocabulary.narrow, *tensor.shape[1:])
    return replace(tensor, shape=shape, nbytes=int(np.prod(shape)) * ITEM_SIZE[tensor.dtype])


def narrow_refs(tensors: Mapping[str, TensorRef], vocabulary: Vocabulary) -> dict[str, TensorRef]:
    """slot -> the first rows of its tensor."""
    return {slot: narrow_tensor(tensor, vocabulary) for slot, tensor in tensors.items()}
