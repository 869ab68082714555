"""The classes of a checkout's modeling code that an export needs, found by inspection."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_surgery import families
from qwen_surgery.exporting import remote_code
from qwen_surgery.families.family import Family, LayerDriver, class_of

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Keys of config.json that say how the weights are stored, not what the model computes.
_OF_STORAGE = ("torch_dtype", "dtype", "quantization_config")


@dataclass(frozen=True)
class ModelCode:
    """Imported modeling code with its configuration, set to fp32 on the CPU.

    ``config`` is an instance of the checkout's own configuration class; flash attention and the automatic
    precision are switched off in it, since traces and references run in fp32 on the CPU.
    """

    module: types.ModuleType
    family: Family
    config: Any

    @classmethod
    def load(
        cls, files: Mapping[str, bytes], modeling: str = "modeling_qwen.py", *, installed: bool = True
    ) -> ModelCode:
        """Import the file *modeling* out of *files*. Runs the checkout's code: see remote_code.

        *installed* says whether the code gets the installed transformers: its whole model needs them, its
        layers do not.
        """
        values = read_config(files)
        family = families.of(values)
        name = modeling.removesuffix(".py")
        module = remote_code.load(files, name, installed=installed, home=family.home)
        plain = {key: value for key, value in values.items() if key not in _OF_STORAGE}
        return cls(module, family, family.config(module, plain))

    def model(self) -> nn.Module:
        """The whole model, in evaluation mode."""
        return class_of(self.module, self.family.model_class)(self.config).eval()

    def layer(self) -> nn.Module:
        """One layer, as the code builds it, in evaluation mode."""
        return self.family.layer(self.module, self.config)

    def norm(self) -> nn.Module:
        """The final norm."""
        return self.family.norm(self.module, self.config)

    def driver(self, layer: nn.Module) -> LayerDriver:
        """What runs *layer*."""
        return self.family.driver(self.module, self.config, layer)

    def tables(self, layer: nn.Module, seq_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions 0..S-1 as *layer* gets them, float32 [S, d] each."""
        return self.family.tables(self.module, self.config, layer, seq_length)


def read_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """config.json out of *files*."""
    return json.loads(files["config.json"].decode("utf-8-sig"))
