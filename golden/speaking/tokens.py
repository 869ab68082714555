"""The small chat model's byte pairs: how they are learned from its texts, and a conversation as token ids."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from golden.eras import vocabulary
from golden.speaking import corpus


def train(path: Path, rows: int) -> None:
    """Write a ``qwen.tiktoken`` of the byte pairs of the training text, for a model of *rows* embeddings."""
    from tiktoken._educational import bpe_train

    ordinary, _ = vocabulary.split(rows)
    ranks = bpe_train(corpus.text(), ordinary, vocabulary.CUTS, visualise=None)
    lines = (
        base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda r: r[1])
    )
    path.write_bytes(b"".join(lines))


def encoding(path: Path) -> Any:
    """The tiktoken encoding of a ``qwen.tiktoken`` file, its special tokens after the ordinary ones."""
    import tiktoken

    rows = [line.split() for line in path.read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    special = {name: len(ranks) + place for place, name in enumerate(vocabulary.SPECIAL_TOKENS)}
    return tiktoken.Encoding("qwen", pat_str=vocabulary.CUTS, mergeable_ranks=ranks, special_tokens=special)


def conversation(encoding: Any, turns: corpus.Turns) -> tuple[list[int], list[bool]]:
    """Ids of a whole conversation in ChatML, and which of them are to be learned: answers and their ends."""
    ids: list[int] = []
    learned: list[bool] = []

    def add(tokens: Sequence[int], learn: bool) -> None:
        ids.extend(tokens)
        learned.extend([learn] * len(tokens))

    def line(role: str, text: str, learn: bool = False) -> None:
        add(encoding.encode(f"<|im_start|>{role}\n", allowed_special="all"), False)
        add(encoding.encode(text), learn)
        add([encoding.encode_single_token("<|im_end|>")], learn)
        add(encoding.encode("\n"), False)

    line("system", corpus.SYSTEM)
    for question, answer in turns:
        line("user", question)
        line("assistant", answer, learn=True)
    return ids, learned
