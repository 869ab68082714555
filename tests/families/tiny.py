"""Tiny random checkpoints of the families whose code is part of transformers, made with the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def make(path: Path, kind: str, **config: Any) -> Path:
    """A checkpoint of model_type *kind* at *path*, bfloat16: gains are not 1, biases not 0.

    *config* goes over :data:`SIZES` into its config.json.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | config))).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_values(name, torch.randn_like(parameter)))
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def _values(name: str, noise: Any) -> Any:
    if noise.dim() == 1:
        return 1 + 0.25 * noise if name.endswith("norm.weight") else 0.25 * noise
    if "embed" in name:
        return noise  # as large as what layers add: what four bits lose of random weights is all their noise
    return noise / noise.shape[-1] ** 0.5
