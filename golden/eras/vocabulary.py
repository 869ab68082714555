"""A vocabulary in tiktoken's file format: one line per token, base64 bytes and rank."""

from __future__ import annotations

import base64
from itertools import islice, product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Special tokens that follow the ordinary ones, as in Qwen; after them come <|extra_0|>, <|extra_1|>, ...
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: How Qwen cuts text before merging: contractions, letters with one mark before them, single digits, marks
#: with the line ends after them, line ends, blanks.
CUTS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_LETTERS = b"etaoinshrdlucmfwypvbgkjqxz"


def _merges() -> Iterator[bytes]:
    """Byte strings that each join two earlier tokens: a blank and a letter, two letters, then longer."""
    pairs = [bytes(pair) for pair in product(_LETTERS, repeat=2)]
    blanks = [b" " + bytes([letter]) for letter in _LETTERS]
    yield from blanks
    yield from pairs
    yield from (blank + bytes([letter]) for blank in blanks for letter in _LETTERS)
    yield from (pair + bytes([letter]) for pair in pairs for letter in _LETTERS)
    yield from (first + second for first in pairs for second in pairs)


def split(vocab: int) -> tuple[int, int]:
    """How many ordinary tokens and how many <|extra_i|> a vocabulary of *vocab* rows holds; the rest pads.

    Raises ValueError below 320 rows: all 256 bytes, some merges and the special tokens must fit.
    """
    if vocab < 320:
        raise ValueError(f"a vocabulary of {vocab} rows is too small: 320 is the least")
    extras, padding = (205, 48) if vocab >= 768 else (5, 8)
    return vocab - len(SPECIAL_TOKENS) - extras - padding, extras


def tiktoken_file(tokens: int) -> bytes:
    """The bytes of a ``qwen.tiktoken`` file with *tokens* tokens: the 256 bytes first, then merges."""
    ordinary = [bytes([byte]) for byte in range(256)]
    ordinary += islice(_merges(), tokens - 256)
    if len(ordinary) < tokens:
        raise ValueError(f"cannot make {tokens} tokens: {len(ordinary)} is the most")
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ordinary))
