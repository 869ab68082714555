"""The small chat model as a checkout: trained weights around any era's modeling code."""

from __future__ import annotations

from pathlib import Path

from golden.eras.checkout import make_checkout, read_safetensors

HERE = Path(__file__).parent
WEIGHTS, TOKENS = HERE / "model.safetensors", HERE / "qwen.tiktoken"
#: Stories in two languages, kept out of training: what is measured on where nothing else is given.
TEXT = HERE / "heldout.txt"
LAYERS, HIDDEN, HEADS, VOCAB = 2, 128, 2, 1024


def make_chat_checkout(
    path: str | Path, era: str = "sdpa", *, shards: int = 2, weight_dtype: str = "bf16"
) -> Path:
    """Write a checkout of the trained model into the folder *path* and return that path."""
    return make_checkout(
        path,
        era=era,
        layers=LAYERS,
        hidden=HIDDEN,
        heads=HEADS,
        vocab=VOCAB,
        shards=shards,
        weight_dtype=weight_dtype,
        weights=read_safetensors(WEIGHTS),
        tokens=TOKENS.read_bytes(),
    )
