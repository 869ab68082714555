"""Weights that a checkpoint stores as integers: GPTQ and AWQ releases, as AutoGPTQ and AutoAWQ write them.

A linear layer ``NAME`` of O outputs and I inputs is stored as

- ``NAME.qweight``: GPTQ int32 [I * bits / 32, O], the fields of a word are inputs that follow each other; AWQ
  int32 [I, O / 8], those of a word are eight outputs in the order 0 2 4 6 1 3 5 7
- ``NAME.qzeros``: int32 [I / group, O * bits / 32], the fields of a word are outputs (AWQ: in that order)
- ``NAME.scales``: float16 [I / group, O]
- ``NAME.g_idx``: GPTQ only, int32 [I], the group of each input
- ``NAME.bias``: [O], often there and zero where the layer has none

The lowest bits of a word are its first field, and a weight is ``(code - zero) * scale``. AutoGPTQ stores each
zero less one (``checkpoint_format: gptq``, or nothing said); ``gptq_v2`` and AWQ store it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_surgery.errors import Refused
from qwen_surgery.parsing import parsing, read_json, whole
from qwen_surgery.weights.integers import Integers
from qwen_surgery.weights.refs import TensorRef

if TYPE_CHECKING:
    import numpy as np

#: Where a release says how it is quantised: a file, and the key in it ('' for the whole file).
_PLACES = (("config.json", "quantization_config"), ("quantize_config.json", ""), ("quant_config.json", ""))
_CODES, _ZEROS, _SCALES, _GROUPS = ENDINGS = (".qweight", ".qzeros", ".scales", ".g_idx")
#: Zeros of these GPTQ formats are stored less one, or as they are.
_LESS_ONE = {"gptq": True, "gptq_v2": False}
#: Output that AWQ keeps in each field of a word, and the field that each output is in.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_FIELDS = tuple(_AWQ_ORDER.index(output) for output in range(8))
_HINT = "start from the bf16 or fp16 checkpoint; build quantises it for the chip"


@dataclass(frozen=True)
class Release:
    """How a release is quantised: *method* ``gptq`` or ``awq``, *bits* of a code, inputs that share a scale
    (*group*, -1 for all), whether zeros are stored *less_one*."""

    method: str
    bits: int
    group: int
    less_one: bool

    def __str__(self) -> str:
        group = "one group a row" if self.group == -1 else f"groups of {self.group}"
        return f"{self.method.upper()}, {self.bits} bits, {group}"

    @classmethod
    def of(cls, folder: Path) -> Release | None:
        """What the checkout *folder* says of itself; None when it is not quantised.

        Raises Refused, naming the file and the reason, for a quantisation that cannot be kept on the chip.
        """
        for name, key in _PLACES:
            said = read_json(folder / name, "not valid JSON")
            said = said.get(key) if key and isinstance(said, dict) else said
            if said:
                with parsing(folder / name, "its quantisation cannot be read"):
                    return cls._read(folder / name, dict(said))
        return None

    @classmethod
    def _read(cls, where: Path, said: dict[str, Any]) -> Release:
        method = str(said.get("quant_method", "awq" if "w_bit" in said else "gptq")).lower()
        if method not in ("gptq", "awq"):
            raise Refused(f"{where}: {method:.40} checkpoints are not supported", hint=_HINT)
        bits = said.get("bits", said.get("w_bit"))
        if bits is None:
            raise Refused(f"{where}: {method.upper()} without its bits", hint=_HINT)
        bits = whole(bits)
        group = said.get("group_size", said.get("q_group_size", -1))
        if bits not in (4, 8) or (method == "awq" and bits != 4):
            raise Refused(f"{where}: {method.upper()} with {bits} bits: the chip has 4 and 8", hint=_HINT)
        if said.get("desc_act") is True:
            why = "desc_act: inputs of one scale lie apart, and the chip wants them side by side"
            raise Refused(f"{where}: {why}", hint=_HINT)
        form = str(said.get("checkpoint_format") or "gptq").lower()
        form = "marlin" if said.get("is_marlin_format") else form
        packing = str(said.get("version", "gemm")).lower() if method == "awq" else form
        if packing not in (("gemm",) if method == "awq" else _LESS_ONE):
            raise Refused(
                f"{where}: {method.upper()} weights in {packing:.40} order are not supported", hint=_HINT
            )
        return cls(method, bits, -1 if group == -1 else whole(group, 1), method == "gptq" and _LESS_ONE[form])


@dataclass(frozen=True)
class QuantisedRef(TensorRef):
    """A weight [O, I] that is stored as integers in *codes*, *zeros* and *scales*, as *release* says.

    Its values are what the release's own runtime makes of them: float16, rounded once. ``file``, ``offset``
    and ``nbytes`` are those of the codes. ``group`` is in inputs.
    """

    release: Release
    group: int
    codes: TensorRef
    zeros: TensorRef
    scales: TensorRef

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        return self.codes, self.zeros, self.scales

    def moved(self, place: Callable[[TensorRef], Path]) -> QuantisedRef:
        codes, zeros, scales = (part.moved(place) for part in self.parts)
        return replace(self, file=codes.file, codes=codes, zeros=zeros, scales=scales)

    def read_raw(self) -> np.ndarray:
        """float16 [O, I]. Raises Refused when a shard ends too early."""
        import numpy as np

        return self.integers().values().astype(np.float16)  # exact in float32, so that it is rounded once

    def read_rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        picked: np.ndarray = self.read()[list(rows)]
        return picked

    def integers(self) -> Integers:
        """The checkpoint's own integers. Raises Refused when a shard ends too early."""
        import numpy as np

        zero = self._by_outputs(self.zeros.read_raw()).T + np.uint8(self.release.less_one)
        scale = self.scales.read_raw().T.astype(np.float32, order="C")
        return Integers(self._codes(), scale, np.ascontiguousarray(zero), self.release.bits)

    def _codes(self) -> np.ndarray:
        import numpy as np

        words = self.codes.read_raw()
        if self.release.method == "awq":
            return np.ascontiguousarray(self._by_outputs(words).T)
        return fields_of(words.T, self.release.bits)

    def _by_outputs(self, words: np.ndarray) -> np.ndarray:
        """[groups or I, O] of words whose fields are outputs."""
        fields = fields_of(words, self.release.bits)
        if self.release.method == "awq":
            fields = fields.reshape(len(words), -1, 8)[:, :, list(AWQ_FIELDS)].reshape(len(words), -1)
        return fields


def fields_of(words: np.ndarray, bits: int) -> np.ndarray:
    """The fields of 32-bit *words* [rows, n], first ones first: uint8 [rows, n * 32 / bits]."""
    import numpy as np

    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data
    fields = np.empty((len(data), data.shape[1], 2), np.uint8)
    np.bitwise_and(data, 15, out=fields[:, :, 0])
    np.right_shift(data, 4, out=fields[:, :, 1])
    return fields.reshape(len(data), -1)


def gathered(refs: Mapping[str, TensorRef], release: Release | None, folder: Path) -> dict[str, TensorRef]:
    """*refs* with the parts of each quantised weight joined to one :class:`QuantisedRef` ``NAME.weight``.

    Raises Refused, naming the tensor, for parts that are missing, of other shapes than the release says, or
    in an order or with zeros that the chip does not have.
    """
    names = [name.removesuffix(_CODES) for name in refs if name.endswith(_CODES)]
    stray = next((n for n in refs if n.endswith(ENDINGS) and n.rpartition(".")[0] not in names), None)
    if stray is not None:
        raise Refused(
            f"{refs[stray].file}: tensor {stray} has no {stray.rpartition('.')[0]}{_CODES} beside it"
        )
    if release is None:
        if names:
            where = refs[names[0] + _CODES]
            raise Refused(
                f"{where.file}: tensor {where.name} is quantised, and {folder} does not say how",
                hint="config.json or quantize_config.json of the release belongs beside the weights",
            )
        return dict(refs)
    if not names:
        raise Refused(f"{folder}: it says {release}, and no tensor of it is quantised")
    kept = {name: ref for name, ref in refs.items() if not name.endswith(ENDINGS)}
    for name in names:
        if f"{name}.weight" in kept:
            raise Refused(
                f"{kept[f'{name}.weight'].file}: tensor {name}.weight is there twice, also quantised"
            )
        kept[f"{name}.weight"] = _found(name, refs, release)
    return kept


def _found(name: str, refs: Mapping[str, TensorRef], release: Release) -> QuantisedRef:
    """The weight of layer *name*, its order and zeros checked."""
    codes = refs[name + _CODES]
    for ending in (_ZEROS, _SCALES):
        if name + ending not in refs:
            raise Refused(f"{codes.file}: tensor {name + ending} is missing beside {codes.name}")
    ref = joined(f"{name}.weight", codes, refs[name + _ZEROS], refs[name + _SCALES], release)
    _refuse_moved_inputs(ref, refs.get(name + _GROUPS))
    _refuse_far_zeros(ref)
    return ref


def joined(
    name: str, codes: TensorRef, zeros: TensorRef, scales: TensorRef, release: Release
) -> QuantisedRef:
    """The weight *name* that three stored tensors are. Raises Refused where they do not fit *release*."""
    for ref, dtype in ((codes, "I32"), (zeros, "I32"), (scales, "F16")):
        size = ref.numel * (4 if dtype == "I32" else 2)
        if ref.dtype != dtype or len(ref.shape) != 2 or ref.nbytes != size or not size:
            raise Refused(
                f"{ref.file}: tensor {ref.name}: {ref.dtype} {list(ref.shape)} is no {dtype} matrix"
            )
    fields = 32 // release.bits
    awq = release.method == "awq"
    inputs, outputs = codes.shape[0] * (1 if awq else fields), codes.shape[1] * (fields if awq else 1)
    group = inputs if release.group == -1 else release.group
    groups = inputs // group
    if inputs % group or scales.shape != (groups, outputs) or zeros.shape != (groups, outputs // fields):
        raise Refused(
            f"{codes.file}: tensor {codes.name} of {list(codes.shape)} with scales {list(scales.shape)} and "
            f"zeros {list(zeros.shape)} is not {release}",
            hint="the release's quantisation settings do not belong to these weights",
        )
    return QuantisedRef(
        name, codes.file, codes.offset, codes.nbytes, "F16", (outputs, inputs),
        release, group, codes, zeros, scales,
    )  # fmt: skip


def _refuse_moved_inputs(ref: QuantisedRef, groups: TensorRef | None) -> None:
    """Inputs must be in their groups' order."""
    import numpy as np

    if groups is None:
        return
    inputs = ref.shape[1]
    if groups.dtype != "I32" or groups.shape != (inputs,) or groups.nbytes != 4 * inputs:
        raise Refused(f"{groups.file}: tensor {groups.name} is not I32 [{inputs}]")
    if (groups.read_raw() != np.arange(inputs) // ref.group).any():
        raise Refused(
            f"{groups.file}: tensor {groups.name} is not in order: inputs of one scale lie apart, and "
            "the chip wants them side by side",
            hint=_HINT,
        )


def _refuse_far_zeros(ref: QuantisedRef) -> None:
    """A zero stored less one may be one more than the largest code, which the chip's format ends at."""
    if not ref.release.less_one:
        return
    top = (1 << ref.release.bits) - 1
    if (fields_of(ref.zeros.read_raw(), ref.release.bits) == top).any():
        raise Refused(
            f"{ref.zeros.file}: tensor {ref.zeros.name}: a zero of {top + 1} is out of range (0 to {top})",
            hint="a release that stores zeros as they are says checkpoint_format gptq_v2",
        )


def refuse_stray_bias(index: Mapping[str, TensorRef], used: Iterable[str]) -> set[str]:
    """The biases of quantised weights that no net uses. Raises Refused where one is not zero."""
    idle = set()
    for name in set(index) - set(used):
        weight = index.get(name.removesuffix(".bias") + ".weight") if name.endswith(".bias") else None
        if isinstance(weight, QuantisedRef):
            if index[name].read().any():
                raise Refused(
                    f"{index[name].file}: tensor {name} is not zero, and config.json (no_bias) says that the "
                    "layer has no bias"
                )
            idle.add(name)
    return idle


def refuse_half_quantised(refs: Iterable[TensorRef], layers: str) -> None:
    """Raise Refused where not all matrices of the layers (tensors whose names begin with *layers*), or others
    too, are integers: one flag of the compiler stands for all of a net."""
    refs = list(refs)
    if release_of(refs) is None:
        return
    for ref in refs:
        matrix = ref.name.startswith(layers) and len(ref.shape) == 2
        if isinstance(ref, QuantisedRef) != matrix:
            said = f"is {ref.dtype} among quantised ones" if matrix else "is quantised too"
            raise Refused(f"{ref.file}: tensor {ref.name} {said}, which is not supported")


def own_integers(refs: Mapping[str, TensorRef]) -> dict[str, QuantisedRef]:
    """Those of *refs* that the checkpoint stores as integers."""
    return {name: ref for name, ref in refs.items() if isinstance(ref, QuantisedRef)}


def release_of(refs: Iterable[TensorRef]) -> Release | None:
    """How the weights *refs* are quantised; None when none of them is."""
    return next((ref.release for ref in refs if isinstance(ref, QuantisedRef)), None)
