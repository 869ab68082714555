"""The classes of a checkout's modeling code that an export needs, found by inspection."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_surgery.errors import Refused
from qwen_surgery.exporting import remote_code

if TYPE_CHECKING:
    from torch import nn

_BLOCK, _NORM, _ROTARY = "QWenBlock", "RMSNorm", "RotaryEmbedding"


@dataclass(frozen=True)
class ModelCode:
    """Imported modeling code with its configuration, set to fp32 on the CPU.

    ``config`` is an instance of the checkout's own configuration class; flash attention and the automatic
    precision are switched off in it, since traces and references run in fp32 on the CPU.
    """

    module: types.ModuleType
    config: Any

    @classmethod
    def load(
        cls, files: Mapping[str, bytes], modeling: str = "modeling_qwen.py", *, installed: bool = True
    ) -> ModelCode:
        """Import the file *modeling* out of *files*. Runs the checkout's code: see remote_code.

        *installed* says whether the code gets the installed transformers: its whole model needs them, its
        layers do not.
        """
        module = remote_code.load(files, modeling.removesuffix(".py"), installed=installed)
        return cls(module, _config(module, read_config(files)))

    def _class(self, name: str) -> type[nn.Module]:
        from torch import nn

        found = getattr(self.module, name, None)
        if not (inspect.isclass(found) and issubclass(found, nn.Module)):
            raise Refused(f"{self.module.__name__.rpartition('.')[2]}.py has no class {name}")
        return found

    def block(self) -> nn.Module:
        """One transformer layer, as the code builds it, in evaluation mode."""
        block_class = self._class(_BLOCK)
        optional = {"layer_idx": 1, "layer_number": 1}  # very early revisions number their layers from 1
        wanted = inspect.signature(block_class.__init__).parameters
        return block_class(self.config, **{k: v for k, v in optional.items() if k in wanted}).eval()

    def norm(self) -> nn.Module:
        """The final norm."""
        epsilon = self.config.layer_norm_epsilon
        return self._class(_NORM)(self.config.hidden_size, eps=epsilon).eval()

    def rotary(self, block: nn.Module) -> nn.Module:
        """The rotary embedding: the attention's own where it has one, else as the model builds it."""
        attention: Any = block.attn
        own = getattr(attention, "rotary_emb", None)
        if own is not None:
            return own
        config = self.config
        width = config.kv_channels
        if getattr(config, "rotary_pct", 1.0) != 1.0:
            width = int(width * config.rotary_pct)
        return self._class(_ROTARY)(width, base=getattr(config, "rotary_emb_base", 10000)).eval()


def read_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """config.json out of *files*."""
    return json.loads(files["config.json"].decode("utf-8-sig"))


def _config(module: types.ModuleType, values: Mapping[str, Any]) -> Any:
    config_class = getattr(module, "QWenConfig", None)
    if config_class is None:
        raise Refused(f"{module.__name__.rpartition('.')[2]}.py does not import QWenConfig")
    plain = {k: v for k, v in values.items() if k not in ("torch_dtype", "dtype", "quantization_config")}
    config = config_class(**plain)
    for name, value in {"bf16": False, "fp16": False, "fp32": True, "use_flash_attn": False}.items():
        setattr(config, name, value)
    return config
