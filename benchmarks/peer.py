"""Checkpoints of random weights that both this program and the vendor's newer tool, llm_convert, can take.

Qwen2 has the same products of the same sizes in a layer as Qwen v1 (its MLP width is half the number in Qwen
v1's config.json), so compiling it stands for compiling that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from codemods.config.facts import CONFIG
from golden.cycles import LayerSizes
from qwen_surgery import families
from qwen_surgery.families.family import Shapes
from qwen_surgery.measuring.prediction import config_of
from qwen_surgery.nets import Net, NetKind

if TYPE_CHECKING:
    import torch


def make(folder: Path, sizes: LayerSizes, layers: int, *, tied: bool = False, vocab: int = 0) -> Path:
    """Write a checkpoint of *sizes* (bf16, a shard a layer) into *folder*; *vocab* rows instead of its own.

    One shard's weights are in memory at a time. A folder that is whole is left as it is.
    """
    if (folder / _INDEX).exists():
        return folder
    family = families.of({"model_type": sizes.model_type})
    config = {
        **config_of(sizes, 32768, family),
        "num_hidden_layers": layers, "vocab_size": vocab or sizes.vocab, "tie_word_embeddings": tied,
        "architectures": list(family.architectures), "torch_dtype": "bfloat16", "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    facts = family.facts_of(config)
    geometry = family.geometry(facts, 512)
    nets = [Net("lm_head", NetKind.LM_HEAD), *(Net(f"block_{i}", NetKind.BLOCK, i) for i in range(layers))]
    shards: list[Shapes] = []
    for net in nets:
        slots = family.weight_shapes(net.kind, geometry, facts)
        shards.append({family.anatomy.tensor(net, slot, tied=tied): shape for slot, shape in slots.items()})
    if not tied:
        shards.append({family.anatomy.table_tensor: (geometry.vocab, geometry.hidden)})
    _write(folder, shards)
    return folder


def _write(folder: Path, shards: list[Shapes]) -> None:
    from safetensors.torch import save_file

    random = np.random.Generator(np.random.SFC64(0))
    index: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _values(name, shape, random) for name, shape in shapes.items()}
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, file)
    (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _values(name: str, shape: tuple[int, ...], random: np.random.Generator) -> torch.Tensor:
    """bfloat16 values of the size a trained model has: gains about 1, all else 2**-7 to 2**-4 in magnitude.

    (Normal draws would take longer than the builds they are for.)
    """
    import torch

    if len(shape) == 1 and name.endswith("norm.weight"):
        return torch.from_numpy(random.normal(1, 0.2, shape)).to(torch.bfloat16)
    count = int(np.prod(shape))
    bits = np.frombuffer(random.bytes(2 * count), np.uint16) & np.uint16(0x81FF) | np.uint16(0x3C00)
    return torch.from_numpy(bits.reshape(shape)).view(torch.bfloat16)


_INDEX = "model.safetensors.index.json"
