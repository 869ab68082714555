"""Qwen v1: 1.8B, 7B, 14B and 72B, chat and base. Its code comes with each checkout.

Upstream computes rotary angles for the whole padded key length and keeps the last ones. A chip's decode net
always sees S history slots, most of them padding, so the angles must come from the true position instead:
cosines and sines are looked up in tables [S, d] that upstream's own rotary class filled. One adapter per
rotary contract of its history hands them to the layer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

from codemods.analysis.identity import identify, may_be_modeling
from codemods.config.facts import UPSTREAM, ModelFacts
from codemods.config.text import ConfigError
from qwen_surgery.errors import Refused
from qwen_surgery.families.family import Anatomy, Family, LayerDriver, Shapes, class_of, whole
from qwen_surgery.nets import Geometry

if TYPE_CHECKING:
    import types

    import torch
    from torch import nn

#: (block's argument name) of the contracts that pass angles in; a third kind computes them inside attention.
LIST_ARGUMENT, PAIR_ARGUMENT = "rotary_pos_emb_list", "rotary_pos_emb"
_WIDTHS = {"head_dim": ("kv_channels",)}
_RECIPES = {"static": "static", "documented": "documented"}


class Qwen1(Family):
    """Qwen v1."""

    name = "qwen"
    title = "Qwen v1"
    model_types = ("qwen",)
    architectures = ("QWenLMHeadModel",)
    modeling = "modeling_qwen.py"
    releases = tuple(
        f"Qwen-{size}{kind}"
        for size, kind in product(("1_8B", "7B", "14B", "72B"), ("", "-Chat", "-Chat-Int4", "-Chat-Int8"))
    )
    upstream = UPSTREAM
    trained = "seq_length"
    anatomy = Anatomy(body="transformer", table="wte", layers="h", norm="ln_f")
    widths = _WIDTHS
    recipes = _RECIPES
    compiled_in = (
        "layer_norm_epsilon",
        "rotary_emb_base",
        "rotary_pct",
        "scale_attn_weights",
        "no_bias",
        "use_logn_attn",
        "use_dynamic_ntk",
    )
    ignored = re.compile(r"(\.rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attn\.logn_tensor)$")
    config_class = "QWenConfig"
    model_class = "QWenLMHeadModel"
    layer_class = "QWenBlock"
    norm_class = "RMSNorm"

    def further_sizes(self, facts: ModelFacts, sizes: Mapping[str, int]) -> dict[str, int]:
        head_dim, hidden, heads = facts.get("kv_channels"), sizes["hidden"], sizes["heads"]
        if head_dim is None and hidden % heads:
            raise ConfigError(f"hidden size {hidden} is not a multiple of {heads} heads")
        return {"head_dim": hidden // heads if head_dim is None else whole(head_dim, "kv_channels")}

    def refuse(self, facts: ModelFacts, geometry: Geometry) -> None:
        """Above the trained length dynamic NTK picks the rotary base from each prompt's length and LogN
        scales queries by their position. One static net has one table, so it could be exact for some prompts
        only."""
        trained, seq_length = facts.trained_length, geometry.seq_length
        if seq_length <= trained:
            return
        for key, what in (("use_dynamic_ntk", "dynamic NTK"), ("use_logn_attn", "LogN attention")):
            if facts[key]:
                raise Refused(
                    f"export length {seq_length} is above the trained length {trained} and {what} ({key}) is "
                    "on: the model's numbers then depend on each prompt's length, which a static net cannot "
                    "follow",
                    hint=f"use --seq-length {trained} or less",
                )

    def layer_shapes(self, geometry: Geometry, facts: ModelFacts) -> Shapes:
        hidden, width = geometry.hidden, geometry.mlp_width
        projection = geometry.heads * geometry.head_dim
        shapes: Shapes = {
            "ln_1.weight": (hidden,),
            "attn.c_attn.weight": (3 * projection, hidden),
            "attn.c_attn.bias": (3 * projection,),
            "attn.c_proj.weight": (hidden, projection),
            "ln_2.weight": (hidden,),
            "mlp.w1.weight": (width, hidden),
            "mlp.w2.weight": (width, hidden),
            "mlp.c_proj.weight": (hidden, width),
        }
        if not facts["no_bias"]:
            shapes |= {
                "attn.c_proj.bias": (hidden,),
                "mlp.w1.bias": (width,),
                "mlp.w2.bias": (width,),
                "mlp.c_proj.bias": (hidden,),
            }
        return shapes

    def era(self, code: bytes) -> str:
        found = identify(code)
        return "" if found is None else found.value

    def may_be_modeling(self, code: bytes) -> bool:
        return may_be_modeling(code)

    def config(self, module: types.ModuleType, values: Mapping[str, Any]) -> Any:
        config_class = getattr(module, self.config_class, None)
        if config_class is None:
            raise Refused(f"{module.__name__.rpartition('.')[2]}.py does not import {self.config_class}")
        config = config_class(**values)
        for name, value in {"bf16": False, "fp16": False, "fp32": True, "use_flash_attn": False}.items():
            setattr(config, name, value)
        return config

    def layer(self, module: types.ModuleType, config: Any) -> nn.Module:
        block_class = class_of(module, self.layer_class)
        optional = {"layer_idx": 1, "layer_number": 1}  # very early revisions number their layers from 1
        wanted = inspect.signature(block_class.__init__).parameters
        return block_class(config, **{k: v for k, v in optional.items() if k in wanted}).eval()

    def norm(self, module: types.ModuleType, config: Any) -> nn.Module:
        norm_class = class_of(module, self.norm_class)
        return norm_class(config.hidden_size, eps=config.layer_norm_epsilon).eval()

    def tables(
        self, module: types.ModuleType, config: Any, layer: nn.Module, seq_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return tables(self._rotary(module, config, layer), seq_length)

    def _rotary(self, module: types.ModuleType, config: Any, layer: nn.Module) -> nn.Module:
        """The rotary embedding: the attention's own where it has one, else as the model builds it."""
        attention: Any = layer.attn
        own = getattr(attention, "rotary_emb", None)
        if own is not None:
            return own
        width = config.kv_channels
        if getattr(config, "rotary_pct", 1.0) != 1.0:
            width = int(width * config.rotary_pct)
        rotary_class = class_of(module, "RotaryEmbedding")
        return rotary_class(width, base=getattr(config, "rotary_emb_base", 10000)).eval()

    def driver(self, module: types.ModuleType, config: Any, layer: nn.Module) -> LayerDriver:
        return Qwen1Driver(adapter_for(layer, self._rotary(module, config, layer)))

    def whole_step(self, run: nn.Module, ids: torch.Tensor, past: Any) -> tuple[Any, Any]:
        result = run(input_ids=ids, past_key_values=past, use_cache=True, return_dict=True)
        return result, result.past_key_values

    def units(
        self, output: Any, given: Mapping[str, Any], i: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        present = output[1] if isinstance(output, (tuple, list)) and len(output) > 1 else None
        if not (isinstance(present, (tuple, list)) and len(present) == 2 and present[0].dim() == 4):
            return None
        return present[0], present[1]


class Qwen1Driver(LayerDriver):
    """One ``QWenBlock`` of any era."""

    def __init__(self, adapter: RotaryAdapter) -> None:
        self._adapter = adapter

    def run(
        self,
        layer: nn.Module,
        states: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        history: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from torch.nn import functional

        ids, *angles = positions
        cos, sin = (functional.embedding(ids, table).unsqueeze(2) for table in angles)
        outputs = layer(
            states,
            layer_past=history,
            attention_mask=mask,
            use_cache=True,
            **self._adapter.arguments(cos, sin),
        )
        hidden, (key, value) = outputs[0], outputs[1]
        if key.shape[1] != states.shape[1]:
            raise Refused(
                f"the layer returns {key.shape[1]} KV units for {states.shape[1]} token(s): it still "
                "joins the history into its present",
                hint="export needs the early-present edit: use recipe static or documented",
            )
        return hidden, key, value


def tables(rotary: nn.Module, seq_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for positions 0..S-1, each float32 [S, rotary dimensions].

    *rotary* is upstream's class; some revisions give the angles, others ``[cos, sin]``.
    """
    import torch

    with torch.no_grad():
        result = rotary(seq_length)
        cos, sin = (result.cos(), result.sin()) if isinstance(result, torch.Tensor) else result[:2]
    width = cos.shape[-1]
    return cos[0, :seq_length, 0].reshape(seq_length, width).float(), sin[0, :seq_length, 0].reshape(
        seq_length, width
    ).float()


class Angles:
    """Stands for the angles tensor of revisions that take ``.cos()`` and ``.sin()`` themselves.

    Cosines and sines taken in the graph would be computed in bf16 on the chip, where a position above 256 is
    not even representable; looked up, they are exact.
    """

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self._cos = cos
        self._sin = sin

    @property
    def shape(self) -> Any:
        return self._cos.shape

    def to(self, *_args: Any, **_kwargs: Any) -> Angles:
        return self

    def __getitem__(self, item: Any) -> Angles:
        return Angles(self._cos[item], self._sin[item])

    def cos(self) -> torch.Tensor:
        return self._cos

    def sin(self) -> torch.Tensor:
        return self._sin


class RotaryAdapter:
    """Feeds looked-up cosines and sines, each [1, L, 1, d], to one block."""

    def arguments(self, cos: torch.Tensor, sin: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments for the block's forward."""
        raise NotImplementedError


class ListAdapter(RotaryAdapter):
    """``rotary_pos_emb_list=[[cos, sin]]``: one entry per sequence of the batch."""

    def arguments(self, cos: torch.Tensor, sin: torch.Tensor) -> dict[str, Any]:
        return {LIST_ARGUMENT: [[cos, sin]]}


class PairAdapter(RotaryAdapter):
    """``rotary_pos_emb=[cos, sin]``, or the angles where the revision's class gives angles."""

    def __init__(self, *, angles: bool) -> None:
        self._angles = angles

    def arguments(self, cos: torch.Tensor, sin: torch.Tensor) -> dict[str, Any]:
        return {PAIR_ARGUMENT: Angles(cos, sin) if self._angles else [cos, sin]}


class InsideAdapter(RotaryAdapter):
    """Attention calls its own ``rotary_emb(length, ...)``: that call gets the looked-up values."""

    def __init__(self, block: nn.Module, *, angles: bool) -> None:
        from torch import nn

        self._angles = angles
        adapter = self

        class Lookup(nn.Module):
            def forward(self, *_args: Any, **_kwargs: Any) -> Any:
                return adapter.current

        self.current: Any = None
        attention: Any = block.attn
        attention.rotary_emb = Lookup()

    def arguments(self, cos: torch.Tensor, sin: torch.Tensor) -> dict[str, Any]:
        self.current = Angles(cos, sin) if self._angles else [cos, sin]
        return {}


def adapter_for(block: nn.Module, rotary: nn.Module) -> RotaryAdapter:
    """The adapter that *block* needs, by its forward's arguments and its attention's attributes.

    Raises Refused when the block fits none of the three known contracts.
    """
    import torch

    with torch.no_grad():
        angles = isinstance(rotary(1), torch.Tensor)
    names = inspect.signature(block.forward).parameters
    if LIST_ARGUMENT in names:
        return ListAdapter()
    if PAIR_ARGUMENT in names:
        return PairAdapter(angles=angles)
    if getattr(block.attn, "rotary_emb", None) is not None:
        return InsideAdapter(block, angles=angles)
    raise Refused(
        f"{type(block).__name__} takes neither {LIST_ARGUMENT} nor {PAIR_ARGUMENT}, and its attention has no "
        "rotary_emb: this rotary contract is not known",
        hint="please report the revision",
    )
