"""A Qwen2-shaped checkpoint of random weights, for the vendor's newer tool, which does not take Qwen v1.

Qwen2 has the same products of the same sizes in a layer (its MLP width is half the number in Qwen v1's
config.json), so compiling it is the same work.
"""

from __future__ import annotations

import json
from pathlib import Path


def make_qwen2(folder: Path, *, layers: int, hidden: int, heads: int, intermediate: int, vocab: int) -> Path:
    """Write it (bf16, one shard a layer) into *folder*. *intermediate* is Qwen v1's number."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    width = intermediate // 2
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": vocab, "hidden_act": "silu",
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "use_cache": True,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator)
        return (1 + 0.2 * values if shape == (hidden,) else 0.02 * values).to(torch.bfloat16)

    shards = {"embedding": {"model.embed_tokens.weight": random(vocab, hidden)}}
    shards["head"] = {"lm_head.weight": random(vocab, hidden), "model.norm.weight": random(hidden)}
    index = {}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        tensors = {f"{name}{norm}.weight": random(hidden) for norm in _NORMS}
        for part in "qkvo":
            tensors[f"{name}self_attn.{part}_proj.weight"] = random(hidden, hidden)
            if part != "o":
                tensors[f"{name}self_attn.{part}_proj.bias"] = random(hidden)
        for part in ("gate", "up"):
            tensors[f"{name}mlp.{part}_proj.weight"] = random(width, hidden)
        tensors[f"{name}mlp.down_proj.weight"] = random(hidden, width)
        shards[f"layer{layer}"] = tensors
    for number, tensors in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


_NORMS = ("input_layernorm", "post_attention_layernorm")
