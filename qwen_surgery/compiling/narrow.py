"""Compile a net of the vocabulary without its hundreds of millions of weights.

TPU-MLIR's first two steps hold such a net's weights in float32, several times over: at 151,936 x 2,048 they
take 5 GB and most of a build's time. But what they do does not depend on how many rows the table has. So a
*narrow* net with the table's first rows goes through them, the lowered text is *widened* to the real
vocabulary, and the compiler's last steps, which place weights and emit instructions, run on that text.

The weights of the widened net are a *probe*: pseudo-random bytes. :mod:`qwen_surgery.packing.widen` finds
them again in what was compiled, which shows where the real ones belong. The commands are those that
model_deploy itself ran for the narrow net, read from its log.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_surgery.errors import ToolFailed
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.toolchain.preload import SPARSE_COPIES, compile_shared
from qwen_surgery.weights import ITEM_SIZE, TensorRef

if TYPE_CHECKING:
    import onnx

#: A narrow vocabulary has at least this many rows, and the real one's remainder by :data:`_LANES`, so that
#: nothing that depends on how rows fall into a chip's lanes changes.
_LEAST, _LANES = 1280, 256
#: A probe of at least so many bytes has a page of content in every piece, and zeros.
_SPARSE_FROM = 1 << 24
_PIECE, _PAGE = 1 << 18, 1 << 12
_ZEROS = bytes(_PIECE)
_RUNNING = re.compile(r"^\[Running\]: (tpuc-opt .*)$", re.MULTILINE)
_LOCATION = re.compile(r'^(#loc\d+) = loc\("([^"]*)"\)', re.MULTILINE)
_WEIGHT = re.compile(r'"top\.Weight"\(\).*-> tensor<(\d+(?:x\d+)*)x\w+> loc\((#loc\d+)\)')
_TENSOR = re.compile(r"tensor<(\d+(?:x\d+)*)x(\w+)>")


class CannotWiden(Exception):
    """This net's text does not say clearly what depends on the vocabulary; compile it at its full size."""


@dataclass(frozen=True)
class Vocabulary:
    """The real number of rows and the narrow one."""

    full: int
    narrow: int

    def widened(self, shape: tuple[int, ...]) -> tuple[int, ...]:
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

    Raises :class:`CannotWiden` when other constants hold the vocabulary.
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
            raise CannotWiden(f"constant {tensor.name} depends on the vocabulary")
    for value in [*copy.graph.input, *copy.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value == vocabulary.full:
                dim.dim_value = vocabulary.narrow
    del copy.graph.value_info[:]
    try:
        return onnx.shape_inference.infer_shapes(copy, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise CannotWiden(f"the narrow net's shapes contradict: {str(error).splitlines()[0]}") from error


def narrow_tensor(tensor: TensorRef, vocabulary: Vocabulary) -> TensorRef:
    """The first rows of *tensor*; other tensors than the vocabulary's as they are."""
    if tensor.shape[0] != vocabulary.full:
        return tensor
    shape = (vocabulary.narrow, *tensor.shape[1:])
    return replace(tensor, shape=shape, nbytes=int(np.prod(shape)) * ITEM_SIZE[tensor.dtype])


def widen_text(lowered: str, vocabulary: Vocabulary) -> str:
    """The lowered text of a narrow net for the real vocabulary.

    Raises :class:`CannotWiden` when the narrow size stands anywhere but in tensor types.
    """

    def wide(match: re.Match[str]) -> str:
        shape = vocabulary.widened(tuple(int(size) for size in match[1].split("x")))
        return f"tensor<{'x'.join(map(str, shape))}x{match[2]}>"

    text = _TENSOR.sub(wide, lowered)
    if re.search(rf"(?<!\d){vocabulary.narrow}(?!\d)", text):
        raise CannotWiden("an attribute of the lowered net depends on the vocabulary")
    if text == lowered:
        raise CannotWiden("nothing in the lowered net depends on the vocabulary")
    return text


@dataclass(frozen=True)
class Steps:
    """The compiler's own command lines for a net: *lower* makes its lowered text, *place* puts its weights
    where they will lie and arranges the work, *emit* writes the bmodel.
    """

    lower: tuple[str, ...]
    place: tuple[str, ...]
    emit: tuple[str, ...]

    @classmethod
    def read(cls, log: str) -> Steps:
        """From model_deploy's *log*. Raises :class:`CannotWiden` when it does not name these three."""
        lines = [tuple(shlex.split(line)) for line in _RUNNING.findall(log)]
        does = ("--convert-top-to-tpu", "--address-assign", "--codegen")
        if len(lines) != len(does) or not all(
            "-o" in line and any(part.startswith(what) for part in line)
            for line, what in zip(lines, does, strict=True)
        ):
            raise CannotWiden("model_deploy does not say which steps it ran")
        return cls(*lines)

    @property
    def lowered(self) -> str:
        """File name of the lowered text."""
        return _output(self.lower)

    @property
    def final(self) -> str:
        """File name of the final text."""
        return _output(self.place)

    @property
    def place_and_emit(self) -> tuple[str, ...]:
        """The last two as one command: the weights are read once and not written in between."""
        output = self.place.index("-o")
        emit = [part for part in self.emit[2:] if part.startswith("--codegen")]
        return (*self.place[:output], *emit, *self.place[output:])


def _output(command: tuple[str, ...]) -> str:
    return command[command.index("-o") + 1]


def probe(index: int, size: int) -> Iterator[bytes]:
    """*size* bytes, the same for the same *index*, in pieces: pseudo-random, or from :data:`_SPARSE_FROM`
    bytes on zeros with a pseudo-random page at a pseudo-random place of every piece.
    """
    random = np.random.Generator(np.random.SFC64(index))
    for start in range(0, size, _PIECE):
        length = min(_PIECE, size - start)
        if size < _SPARSE_FROM:
            yield random.bytes(length)
            continue
        piece = bytearray(_ZEROS[:length])
        page = int(random.integers(_PIECE // _PAGE)) * _PAGE
        content = random.bytes(_PAGE)
        if page < length:
            piece[page : page + _PAGE] = content[: length - page]
        yield bytes(piece)


class _SparseFile(io.FileIO):
    """A new file in which pages of zeros take no room and no writing."""

    def write(self, data: Any) -> int:
        content = bytes(data)
        whole = np.frombuffer(content, np.uint64, len(content) // _PAGE * (_PAGE // 8))
        written = 0
        for page in np.flatnonzero(whole.reshape(-1, _PAGE // 8).any(axis=1)):
            self.seek(page * _PAGE - written, io.SEEK_CUR)
            super().write(content[page * _PAGE : (page + 1) * _PAGE])
            written = (page + 1) * _PAGE
        self.seek(whole.nbytes - written, io.SEEK_CUR)
        super().write(content[whole.nbytes :])
        return len(content)


@dataclass(frozen=True)
class ProbeArray:
    """One array of a widened net whose content is ``probe(index, nbytes)``."""

    name: str
    index: int
    shape: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.itemsize


def weight_shapes(lowered: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a lowered text. (The weight file keeps some of them flat.)"""
    names = dict(_LOCATION.findall(lowered))
    return {
        names[loc]: tuple(int(size) for size in shape.split("x"))
        for shape, loc in _WEIGHT.findall(lowered)
        if loc in names
    }


def widen_weights(
    source: Path, target: Path, shapes: Mapping[str, tuple[int, ...]], vocabulary: Vocabulary
) -> list[ProbeArray]:
    """Write the weight file (npz) of a widened net: the narrow file *source*'s arrays, those with the
    vocabulary in their shape (*shapes*: name -> narrow shape) at their real size and with a probe in each.
    """
    arrays = []
    with np.load(source) as stored, _SparseFile(target, "w") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as out:
            for index, (name, array) in enumerate(sorted(stored.items())):
                narrow = shapes.get(name, array.shape)
                one = ProbeArray(name, index, vocabulary.widened(narrow), array.dtype.itemsize)
                with out.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    _write_header(stream, array.dtype, one.shape)
                    if one.shape == narrow:
                        stream.write(np.ascontiguousarray(array).tobytes())
                        continue
                    if not array.any():  # a bias that the graph adds; no weight of a checkpoint is all zeros
                        stream.write(bytes(one.nbytes))
                        continue
                    arrays.append(one)
                    for piece in probe(index, one.nbytes):
                        stream.write(piece)
        file.truncate()
    if not arrays:
        raise CannotWiden("no array of the lowered net depends on the vocabulary")
    return arrays


def _write_header(stream: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


def run_steps(
    steps: Steps, vocabulary: Vocabulary, toolchain: Toolchain, narrow: Path, wide: Path, log: Path, net: str
) -> list[ProbeArray]:
    """Lower the net in *narrow* again (model_deploy deletes that text), widen it into the folder *wide*, and
    run the compiler's other steps there: the bmodel and the final text have the names model_deploy gave them.

    Gives the widened net's probe arrays. Raises :class:`CannotWiden` and ToolFailed.
    """
    wide.mkdir(parents=True, exist_ok=True)
    toolchain.run(steps.lower[0], steps.lower[1:], narrow, log.with_suffix(".lower.log"), net=net)
    lowered = (narrow / steps.lowered).read_text(encoding="utf-8")
    (wide / steps.lowered).write_text(widen_text(lowered, vocabulary), encoding="utf-8")
    weights = _weight_file(lowered)
    shapes = weight_shapes(lowered)
    arrays = widen_weights(narrow / weights, wide / weights, shapes, vocabulary)
    if len(shapes) == 1:
        # The compiler leaves a copy of the placed weights that nobody reads. (Of several arrays it reads its
        # own file again while writing.)
        final = (narrow / steps.final).read_text(encoding="utf-8")
        (wide / _weight_file(final)).symlink_to(os.devnull)
    command, log = steps.place_and_emit, log.with_suffix(".wide.log")
    sparse = compile_shared(SPARSE_COPIES, wide)
    try:
        toolchain.run(command[0], command[1:], wide, log, net=net, preload=sparse)
    except ToolFailed as error:
        if sparse is None or error.signal == 9:
            raise
        toolchain.run(command[0], command[1:], wide, log, net=net)
    return arrays


def _weight_file(text: str) -> str:
    found = re.search(r'module\.weight_file = "([^"]+)"', text)
    if found is None:
        raise CannotWiden("the text of the net names no weight file")
    return found[1]


def narrow_refs(tensors: Mapping[str, TensorRef], vocabulary: Vocabulary) -> dict[str, TensorRef]:
    """slot -> the first rows of its tensor."""
    return {slot: narrow_tensor(tensor, vocabulary) for slot, tensor in tensors.items()}
