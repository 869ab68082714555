"""Qwen's tokenizer from its vocabulary file alone, its chat format, and the files that a demo needs.

Nothing here runs a checkout's Python: a ``qwen.tiktoken`` file is data.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from golden.eras.vocabulary import CUTS
from qwen_surgery import parsing
from qwen_surgery.errors import Refused
from qwen_surgery.files import read_regular

VOCABULARY = "qwen.tiktoken"
#: What the vendor's demos load, in the layout of a Hugging Face tokenizer. The last is wanted, not needed.
DEMO_FILES = (VOCABULARY, "tokenization_qwen.py", "tokenizer_config.json")
OPTIONAL_FILES = ("generation_config.json",)
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_EXTRAS = 205
_MOST_EXTRAS = 1 << 16
_LARGEST = 64 << 20  # bytes of a vocabulary; Qwen's has 2.5 million


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank of a tiktoken file. Raises Refused, naming the line, when it is not one."""
    data = read_regular(path, _LARGEST, follow=True)
    if data is None:
        raise Refused(f"{path} is missing", hint="it is beside config.json upstream")
    rows = data.splitlines()
    ranks: dict[bytes, int] = {}
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            token, rank = row.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise Refused(f"{path}, line {number}: not a base64 token and a rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise Refused(f"{path}: ranks are not 0..{len(ranks) - 1}, each once")
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        raise Refused(f"{path}: {len(lacking)} of the 256 bytes have no token")
    return ranks


@dataclass(frozen=True)
class Tokenizer:
    """A Qwen tokenizer. ``ranks`` are the ordinary tokens; special ones follow them in id."""

    ranks: dict[bytes, int]
    extras: int = _EXTRAS

    @classmethod
    def open(cls, folder: Path | str) -> Tokenizer:
        """From a folder that holds ``qwen.tiktoken``. Raises Refused when that is missing or damaged."""
        folder = Path(folder)
        extras = read_json(folder / "tokenizer_config.json").get("extras", _EXTRAS)
        with parsing.parsing(folder / "tokenizer_config.json", "extras is no number of tokens"):
            parsing.whole(extras, most=_MOST_EXTRAS)
        return cls(read_ranks(folder / VOCABULARY), extras)

    @cached_property
    def special(self) -> dict[str, int]:
        """Special token -> id."""
        names = [END_OF_TEXT, START, END, *(f"<|extra_{i}|>" for i in range(self.extras))]
        return {name: len(self.ranks) + i for i, name in enumerate(names)}

    @cached_property
    def _encoding(self) -> Any:
        import tiktoken

        return tiktoken.Encoding(
            "qwen", pat_str=CUTS, mergeable_ranks=self.ranks, special_tokens=self.special
        )

    @property
    def size(self) -> int:
        """Number of ids, special ones included."""
        return len(self.ranks) + len(self.special)

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.special[END], self.special[START], self.special[END_OF_TEXT]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of *text*. Names of special tokens in it are plain text unless *special*."""
        if special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode(text, disallowed_special=())

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of *ids*; ids beyond the vocabulary (padding rows of the model) become nothing."""
        return self._encoding.decode_bytes([i for i in ids if i < self.size])

    def chat(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of a conversation in Qwen's chat format, up to where the assistant speaks.

        *turns* are (role, text); what a user typed never becomes a special token.
        """
        line = self.encode("\n")
        ids: list[int] = []
        for role, text in turns:
            ids += [self.special[START], *self.encode(f"{role}\n{text}"), self.special[END], *line]
        return [*ids, self.special[START], *self.encode("assistant\n")]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in *path*, empty when there is none; Refused for a file that is no JSON."""
    data = parsing.read_json(path, "not JSON")
    return data if isinstance(data, dict) else {}


def check(folder: Path) -> dict[str, Any]:
    """Check a tokenizer folder against its model. Returns what it holds.

    Raises Refused for a missing or damaged file, a vocabulary that does not fit the model's rows, or an end
    token in generation_config.json that is none of the tokenizer's.
    """
    for name in DEMO_FILES:
        if not (folder / name).is_file():
            raise Refused(f"{folder / name} is missing", hint="it is beside config.json upstream")
    tokenizer = Tokenizer.open(folder)
    rows = read_json(folder / "config.json").get("vocab_size")
    if isinstance(rows, int) and tokenizer.size > rows:
        raise Refused(f"{folder}: the tokenizer has {tokenizer.size} tokens, the model {rows} rows")
    end = read_json(folder / "generation_config.json").get("eos_token_id")
    if isinstance(end, int) and end not in tokenizer.special.values():
        raise Refused(
            f"{folder / 'generation_config.json'}: eos_token_id {end} is no special token of the vocabulary",
            hint=f"special tokens begin at {len(tokenizer.ranks)}",
        )
    sample = "Hello, world! 1234 \u4f60\u597d\n\ttab"
    if tokenizer.decode_bytes(tokenizer.encode(sample)).decode() != sample:
        raise Refused(f"{folder / VOCABULARY}: text does not come back as it went in")
    return {
        "tokens": len(tokenizer.ranks),
        "special": len(tokenizer.special),
        "model_rows": rows,
        "im_end": tokenizer.special[END],
        "end_of_text": tokenizer.special[END_OF_TEXT],
    }
