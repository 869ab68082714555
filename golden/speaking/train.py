"""Train the small chat model: ``python -m golden.speaking.train``, five minutes on one core of a CPU.

The model is the unpatched code of an own-written checkout. Of conversations it learns the answers alone, of
stories every token. The same seed, torch and kind of processor give the same weights.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from golden.eras import make_checkout
from golden.speaking import corpus, stories, tokens
from golden.speaking.model import HEADS, HERE, HIDDEN, LAYERS, TOKENS, VOCAB, WEIGHTS

STEPS, PEAK_RATE, WARM_UP = 1200, 3e-3, 50
CONVERSATIONS, STORIES = 16, 8  # rows of one batch
LONGEST = 320  # tokens of a row


def _stories(encoding: Any, chance: random.Random) -> tuple[list[int], list[bool]]:
    ids = encoding.encode("".join(stories.story(chance) + "\n" for _ in range(3)))
    return ids, [True] * len(ids)


def batches(encoding: Any, seed: int) -> Iterator[tuple[Any, Any, Any]]:
    """``input_ids``, ``attention_mask`` and ``labels``, each int64 [rows, longest row], without end."""
    import torch

    stream, chance = corpus.conversations(seed), random.Random(seed)
    end = encoding.encode_single_token("<|endoftext|>")
    while True:
        rows = [tokens.conversation(encoding, next(stream)) for _ in range(CONVERSATIONS)]
        rows += [_stories(encoding, chance) for _ in range(STORIES)]
        rows = [row for row in rows if len(row[0]) <= LONGEST]
        shape = (len(rows), max(len(ids) for ids, _ in rows))
        ids, mask, labels = torch.full(shape, end), torch.zeros(shape).long(), torch.full(shape, -100)
        for row, (read, learned) in enumerate(rows):
            ids[row, : len(read)] = torch.tensor(read)
            mask[row, : len(read)] = 1
            labels[row, : len(read)] = torch.where(torch.tensor(learned), torch.tensor(read), -100)
        yield ids, mask, labels


def _model(folder: Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # Not from_pretrained: transformers 5 leaves buffers that no file holds (rotary tables, LogN) unset.
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).float()
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            spread = 0.02 if "lm_head" in name else 0.5 * weight.shape[-1] ** -0.5
            torch.nn.init.normal_(weight, std=spread)
        else:
            torch.nn.init.constant_(weight, 0.0 if name.endswith("bias") else 1.0)
    return model.train()


def _rate(step: int, steps: int) -> float:
    """A short rise, then half a cosine down to a fiftieth."""
    falling = 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps))
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * falling


def train(folder: Path, encoding: Any, steps: int, seed: int) -> Any:
    """Train the model of the checkout *folder*, from new weights; returns it."""
    import torch

    torch.manual_seed(seed)
    model = _model(folder)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    began = time.monotonic()
    for step, (ids, mask, labels) in zip(range(steps), batches(encoding, seed), strict=False):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(
                f"step {step}/{steps}  loss {loss.item():.4f}  {time.monotonic() - began:.0f} s", flush=True
            )
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for weights and tokenizer")
    args = parser.parse_args()
    import torch
    from safetensors.torch import save_file

    args.out.mkdir(parents=True, exist_ok=True)
    tokens.train(args.out / TOKENS.name, VOCAB)
    with tempfile.TemporaryDirectory() as work:
        folder = make_checkout(
            Path(work) / "chat", layers=LAYERS, hidden=HIDDEN, heads=HEADS, vocab=VOCAB, sparse=True
        )
        model = train(folder, tokens.encoding(args.out / TOKENS.name), args.steps, args.seed)
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(weights, args.out / WEIGHTS.name, {"format": "pt"})


if __name__ == "__main__":
    main()
