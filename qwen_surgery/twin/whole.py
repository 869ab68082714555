"""The unpatched whole model of a twin, and a record of what it hands from part to part."""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_surgery.errors import Refused
from qwen_surgery.exporting.model_code import ModelCode
from qwen_surgery.exporting.modules import weightless
from qwen_surgery.families.family import states_of
from qwen_surgery.weights import TensorRef

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qwen_surgery.families.family import Anatomy
    from qwen_surgery.patching.sources import Sources

#: Matrices that make queries and keys.
_SHARP = re.compile(r"c_attn|[qk]_proj")


@dataclass(frozen=True)
class HeldTensor(TensorRef):
    """A tensor of a checkpoint that exists in memory only."""

    values: np.ndarray = field(compare=False, kw_only=True)

    @classmethod
    def of(cls, name: str, values: np.ndarray) -> HeldTensor:
        return cls(name, Path("twin"), 0, values.nbytes, "F32", values.shape, values=values)

    def read(self) -> np.ndarray:
        return self.values


@dataclass
class Trail:
    """What one forward pass over L tokens handed from part to part. All arrays are float32.

    ``embedded`` [L, H] left the embedding; ``inputs`` and ``outputs`` [L, H] are each layer's, ``keys`` and
    ``values`` its new units [L, n, d]; ``order`` are the layers as they ran; ``closing`` [L, H] entered the
    final norm; ``head`` [V] left the output layer and ``logits`` [V] the model, after the last token.
    ``odd_mask`` is the first layer that got an attention_mask with more in it than open and closed.
    """

    embedded: np.ndarray | None = None
    inputs: dict[int, np.ndarray] = field(default_factory=dict)
    outputs: dict[int, np.ndarray] = field(default_factory=dict)
    keys: dict[int, np.ndarray] = field(default_factory=dict)
    values: dict[int, np.ndarray] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    closing: np.ndarray | None = None
    head: np.ndarray | None = None
    logits: np.ndarray | None = None
    odd_mask: int | None = None


class WholeTwin:
    """The checkout's own whole model at a twin's sizes, fp32, with random weights.

    *sources* carry the twin's config; *checkpoint* are the names of the real checkpoint's tensors, *tied*
    says whether the output layer is the embedding's table. ``index`` are the weights by checkpoint name.
    *installed* says whether the code gets the installed transformers. Raises Refused when the code cannot be
    built or does not have its family's parts.
    """

    def __init__(
        self, sources: Sources, checkpoint: Mapping[str, Any], *, tied: bool, installed: bool
    ) -> None:
        self.code = ModelCode.load(sources.reference, sources.modeling, installed=installed)
        # Newer versions warn about arguments that the unpatched code gives; it stays as it is.
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self._anatomy = self.code.family.anatomy
        with weightless():
            self._model: Any = self.code.model()
        self.index = _fill(self._model, checkpoint, self._anatomy, tied=tied)
        self._own_inputs = "prepare_inputs_for_generation" in vars(type(self._model))
        self._trail = Trail()
        self._past: Any = None
        self._tokens: list[int] = []
        self._watch()

    def prefill(self, tokens: Sequence[int]) -> Trail:
        """Read a prompt from the start."""
        self._past, self._tokens = None, list(tokens)
        return self._forward()

    def decode(self, token: int) -> Trail:
        """Read one more token through the model's own cache."""
        self._tokens.append(token)
        return self._forward()

    def _forward(self) -> Trail:
        import torch

        self._trail = Trail()
        with torch.no_grad():
            result, self._past = self._step()
        self._trail.logits = result.logits[0, -1].float().numpy().copy()
        return self._trail

    def _step(self) -> tuple[Any, Any]:
        """The next step's result and cache. What the forward gets is the model's own choice, as generate
        would ask for it, where it makes one."""
        import torch

        ids = torch.tensor([self._tokens])
        if not self._own_inputs:
            new = ids if self._past is None else ids[:, -1:]
            return self.code.family.whole_step(self._model, new, self._past)
        given = {"past_key_values": self._past, "attention_mask": torch.ones_like(ids), "use_cache": True}
        result = self._model(**self._model.prepare_inputs_for_generation(ids, **given), return_dict=True)
        return result, result.past_key_values

    def _watch(self) -> None:
        try:
            body, head = getattr(self._model, self._anatomy.body), getattr(self._model, self._anatomy.head)
            table, norm = getattr(body, self._anatomy.table), getattr(body, self._anatomy.norm)
            blocks = list(getattr(body, self._anatomy.layers))
        except AttributeError as error:
            family = self.code.family
            raise Refused(f"{family.model_class} lacks a part of {family.title}: {error}") from error
        table.register_forward_hook(self._after_table)
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(self._before_block(i), with_kwargs=True)
            block.register_forward_hook(self._after_block(i), with_kwargs=True)
        norm.register_forward_pre_hook(self._before_norm)
        head.register_forward_hook(self._after_head)

    def _after_table(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        self._trail.embedded = _rows(output)

    def _before_block(self, i: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._trail.order.append(i)
            self._trail.inputs[i] = _rows(args[0] if args else kwargs["hidden_states"])
            if self._trail.odd_mask is None and _is_odd(kwargs.get("attention_mask")):
                self._trail.odd_mask = i

        return hook

    def _after_block(self, i: int) -> Any:
        family = self.code.family

        def hook(_module: nn.Module, _args: Any, given: dict[str, Any], output: Any) -> None:
            self._trail.outputs[i] = rows = _rows(states_of(output))
            units = family.units(output, given, i)
            if units is not None:
                self._trail.keys[i], self._trail.values[i] = (_rows(part)[-len(rows) :] for part in units)

        return hook

    def _before_norm(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._trail.closing = _rows(args[0])

    def _after_head(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        self._trail.head = _rows(output)[-1]


def _rows(states: torch.Tensor) -> np.ndarray:
    """The first sequence of a batch, [L, ...]."""
    return states[0].float().numpy().copy()


def _is_odd(mask: Any) -> bool:
    """Whether an additive mask holds anything but 0 and very low numbers."""
    if mask is None or not mask.is_floating_point():
        return False
    return bool(((mask != 0) & (mask > -1e3)).any())


def _fill(
    model: nn.Module, checkpoint: Mapping[str, Any], anatomy: Anatomy, *, tied: bool
) -> dict[str, TensorRef]:
    """Give every parameter random values; returns them by the names that a checkpoint stores them under."""
    import torch

    index: dict[str, TensorRef] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{prefix}.{attribute}"
            stored = anatomy.table_tensor if tied and name == anatomy.head_tensor else name
            if stored not in checkpoint:
                raise Refused(
                    f"the model's code has a parameter {name} that is not in the checkpoint",
                    hint="this code and these weights do not belong together",
                )
            if stored not in index:
                index[stored] = HeldTensor.of(stored, _values(stored, tuple(parameter.shape), anatomy))
            value = torch.from_numpy(index[stored].read())
            module._parameters[attribute] = torch.nn.Parameter(value, requires_grad=False)
    return index


def _values(name: str, shape: tuple[int, ...], anatomy: Anatomy) -> np.ndarray:
    """Random float32 values, the same for the same name, of which every part of the model shows.

    Gains differ from 1 and biases from 0; attention is sharp; logits reach far, so that a cap on them shows.
    """
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        gain = name.endswith("weight")
        return np.asarray(1 + 0.25 * np.clip(values, -3, 3) if gain else 0.5 * values, dtype=np.float32)
    if name == anatomy.table_tensor:
        return values
    scale = 20.0 if name == anatomy.head_tensor else 1.5 if _SHARP.search(name) else 0.8
    return np.asarray(values * np.float32(scale / shape[-1] ** 0.5), dtype=np.float32)
