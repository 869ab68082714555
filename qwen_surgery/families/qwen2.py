"""Qwen1.5, Qwen2 and Qwen2.5: dense text models whose code is part of transformers since 4.37."""

from __future__ import annotations

from itertools import product

from codemods.config.facts import ModelFacts
from qwen_surgery.families.decoder import DecoderFamily

#: The defaults of its configuration class.
_UPSTREAM = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "tie_word_embeddings": False,
}


class Qwen2(DecoderFamily):
    """Qwen1.5, Qwen2 and Qwen2.5: q, k and v have biases."""

    name = "qwen2"
    title = "Qwen1.5, Qwen2 or Qwen2.5"
    model_types = ("qwen2",)
    architectures = ("Qwen2ForCausalLM",)
    modeling = "modeling_qwen2.py"
    home = "transformers.models.qwen2"
    releases = (
        *(f"Qwen1.5-{s}{k}" for s, k in product(("0.5B", "1.8B", "4B", "7B", "14B"), ("", "-Chat"))),
        *(f"Qwen2-{s}{k}" for s, k in product(("0.5B", "1.5B", "7B", "72B"), ("", "-Instruct"))),
        *(f"Qwen2.5-{s}{k}" for s, k in product(("0.5B", "1.5B", "3B", "7B", "14B"), ("", "-Instruct"))),
    )
    upstream = _UPSTREAM
    compiled_in = ("rms_norm_eps", "hidden_act", "rope")
    config_class = "Qwen2Config"
    model_class = "Qwen2ForCausalLM"
    layer_class = "Qwen2DecoderLayer"
    norm_class = "Qwen2RMSNorm"
    rotary_class = "Qwen2RotaryEmbedding"

    def biased(self, facts: ModelFacts) -> tuple[str, ...]:
        return ("q", "k", "v")
