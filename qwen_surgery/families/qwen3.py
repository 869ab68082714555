"""Qwen3: dense text models whose code is part of transformers since 4.51."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from codemods.config.facts import ModelFacts
from qwen_surgery.families.decoder import DecoderFamily
from qwen_surgery.families.family import Shapes, whole
from qwen_surgery.nets import Geometry

#: The defaults of its configuration class.
_UPSTREAM = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "num_key_value_heads": 32,
    "head_dim": 128,
    "attention_bias": False,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "tie_word_embeddings": False,
}


class Qwen3(DecoderFamily):
    """Qwen3: heads of a size of their own, normed one by one before the rotary; biases are a choice."""

    name = "qwen3"
    title = "Qwen3"
    model_types = ("qwen3",)
    architectures = ("Qwen3ForCausalLM",)
    modeling = "modeling_qwen3.py"
    home = "transformers.models.qwen3"
    releases = (
        *(f"Qwen3-{s}{k}" for s, k in product(("0.6B", "1.7B", "4B", "8B", "14B"), ("", "-Base"))),
        "Qwen3-32B",
    )
    upstream = _UPSTREAM
    compiled_in = ("rms_norm_eps", "hidden_act", "rope", "attention_bias")
    config_class = "Qwen3Config"
    model_class = "Qwen3ForCausalLM"
    layer_class = "Qwen3DecoderLayer"
    norm_class = "Qwen3RMSNorm"
    rotary_class = "Qwen3RotaryEmbedding"

    def head_dim(self, facts: ModelFacts, sizes: Mapping[str, int]) -> int:
        return whole(facts["head_dim"], "head_dim")

    def biased(self, facts: ModelFacts) -> tuple[str, ...]:
        return ("q", "k", "v", "o") if facts["attention_bias"] else ()

    def norms_of_heads(self, geometry: Geometry) -> Shapes:
        size = (geometry.head_dim,)
        return {"self_attn.q_norm.weight": size, "self_attn.k_norm.weight": size}
