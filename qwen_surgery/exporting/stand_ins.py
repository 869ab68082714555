"""What a whole Qwen v1 model needs of transformers to run its forward: a base class and an output."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Model(nn.Module):
    """Stands for ``PreTrainedModel``: a module with a config, whose weights somebody else puts in."""

    def __init__(self, config: Any, *_: Any, **__: Any) -> None:
        super().__init__()
        self.config = config

    def post_init(self) -> None:
        """Random values for weights are not wanted."""

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def get_head_mask(self, head_mask: Any, num_hidden_layers: int, *_: Any) -> list[None]:
        if head_mask is not None:
            raise NotImplementedError("head_mask is not supported")
        return [None] * num_hidden_layers


class Output(dict[str, Any]):
    """Stands for ``ModelOutput``: fields by name and, without those that are None, by place."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model's output has no {name}") from None

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value for value in self.values() if value is not None)
