"""One adapter per rotary contract, so that every revision's block is driven by ``position_ids``.

Upstream computes angles for the whole padded key length and keeps the last ones. A chip's decode net always
sees S history slots, most of them padding, so the angles must come from the true position instead. Each
adapter looks cosines and sines up in tables [S, d] that upstream's own rotary class filled; so a graph holds
one Gather per table and no trigonometry, and the tables are exactly upstream's numbers.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from qwen_surgery.errors import Refused

if TYPE_CHECKING:
    import torch
    from torch import nn

#: (block's argument name) of the contracts that pass angles in; a third kind computes them inside attention.
LIST_ARGUMENT, PAIR_ARGUMENT = "rotary_pos_emb_list", "rotary_pos_emb"


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
