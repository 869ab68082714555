"""Qwen's tokenizer from its vocabulary file alone, its chat format, and the files that a demo needs.

Nothing here runs a checkout's Python: ``qwen.tiktoken``, and ``tokenizer.json`` of newer models, are data.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from golden.eras.vocabulary import CUTS
from qwen_surgery import parsing
from qwen_surgery.chat_template import FILE, ChatTemplate
from qwen_surgery.errors import Refused
from qwen_surgery.files import read_regular

VOCABULARY = "qwen.tiktoken"
#: What the vendor's demos load, in the layout of a Hugging Face tokenizer. The optional ones are wanted, not
#: needed.
DEMO_FILES = (VOCABULARY, "tokenization_qwen.py", "tokenizer_config.json")
OPTIONAL_FILES = ("generation_config.json", FILE)
#: The same where a model has its tokenizer in one file of the tokenizers library.
WHOLE = "tokenizer.json"
WHOLE_FILES = (WHOLE, "tokenizer_config.json")
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
#: Where a model that thinks aloud stops thinking and answers.
_THOUGHT = "</think>"
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


def files_of(folder: Path) -> tuple[str, ...]:
    """The files of *folder* that a demo needs."""
    return DEMO_FILES if (folder / VOCABULARY).exists() or not (folder / WHOLE).exists() else WHOLE_FILES


@dataclass(frozen=True)
class Tokenizer:
    """A Qwen tokenizer. ``ranks`` are the ordinary tokens; ``special`` ones (name -> id) follow them in id.

    ``cuts`` is the expression that cuts text before merging; ``composed`` says that text is brought into
    Unicode's composed form (NFC) first. ``template`` is the checkpoint's own chat format, where it has one.
    """

    ranks: dict[bytes, int]
    special: dict[str, int]
    cuts: str = CUTS
    composed: bool = False
    template: ChatTemplate | None = None

    @classmethod
    def open(cls, folder: Path | str) -> Tokenizer:
        """From a folder that holds ``qwen.tiktoken`` or ``tokenizer.json``. Raises Refused when neither is
        there, or the one that is there is damaged."""
        folder = Path(folder)
        template = ChatTemplate.of(folder)
        if files_of(folder) == WHOLE_FILES:
            return replace(_read_whole(folder / WHOLE), template=template)
        extras = read_json(folder / "tokenizer_config.json").get("extras", _EXTRAS)
        with parsing.parsing(folder / "tokenizer_config.json", "extras is no number of tokens"):
            parsing.whole(extras, most=_MOST_EXTRAS)
        ranks = read_ranks(folder / VOCABULARY)
        names = [END_OF_TEXT, START, END, *(f"<|extra_{i}|>" for i in range(extras))]
        return cls(ranks, {name: len(ranks) + i for i, name in enumerate(names)}, template=template)

    @cached_property
    def _encoding(self) -> Any:
        import tiktoken

        return tiktoken.Encoding(
            "qwen", pat_str=self.cuts, mergeable_ranks=self.ranks, special_tokens=self.special
        )

    @property
    def size(self) -> int:
        """Number of ids, special ones included."""
        return max(len(self.ranks) - 1, *self.special.values()) + 1

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.special[END], self.special[START], self.special[END_OF_TEXT]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of *text*. Names of special tokens in it are plain text unless *special*."""
        text = unicodedata.normalize("NFC", text) if self.composed else text
        if special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode(text, disallowed_special=())

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of *ids*; ids beyond the vocabulary (padding rows of the model) become nothing."""
        known = self._ids
        return self._encoding.decode_bytes([i for i in ids if i in known])

    @cached_property
    def _ids(self) -> frozenset[int]:
        return frozenset((*self.ranks.values(), *self.special.values()))

    def chat(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of a conversation in the checkpoint's chat format, or else Qwen's: all before the next answer.

        *turns* are (role, text); what a user typed never becomes a special token. What the assistant thought
        before it answered is left out. Raises Refused when the checkpoint's format cannot hold *turns*.
        """
        said = [(role, self._answer(text) if role == "assistant" else text) for role, text in turns]
        pieces = _lay_out(said) if self.template is None else self.template.lay_out(said)
        ids: list[int] = []
        plain = ""  # what lies between two special tokens is cut and merged as one text
        for text, typed in pieces:
            for part in [text] if typed else self._named.split(text):
                if typed or part not in self.special:
                    plain += part
                else:
                    ids += [*self.encode(plain), self.special[part]]
                    plain = ""
        return [*ids, *self.encode(plain)]

    def _answer(self, text: str) -> str:
        """What follows the thoughts in an assistant's *text*."""
        if _THOUGHT not in self.special or _THOUGHT not in text:
            return text
        return text.rpartition(_THOUGHT)[2].lstrip("\n")

    @cached_property
    def _named(self) -> re.Pattern[str]:
        """Cuts text at names of special tokens, and keeps them."""
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def _lay_out(turns: Sequence[tuple[str, str]]) -> list[tuple[str, bool]]:
    """Qwen's chat format, in pieces as of :meth:`ChatTemplate.lay_out`."""
    pieces: list[tuple[str, bool]] = []
    for role, text in turns:
        pieces += [(f"{START}{role}\n", False), (text, True), (f"{END}\n", False)]
    return [*pieces, (f"{START}assistant\n", False)]


def _byte_letters() -> dict[str, int]:
    """The letter that tokenizer.json writes for each byte -> the byte.

    Printable Latin-1 stands for itself; every other byte, in order, for the next letter from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _read_whole(path: Path) -> Tokenizer:
    """The tokenizer in the tokenizers library's own file. Raises Refused for one that is damaged or that is
    made in another way than Qwen's."""
    with parsing.parsing(path, "not a tokenizer of the form known here"):
        data = read_json(path)
        letters = _byte_letters()
        ranks = {bytes(letters[x] for x in token): int(i) for token, i in data["model"]["vocab"].items()}
        special = {str(one["content"]): int(one["id"]) for one in data["added_tokens"]}
        cut, last = data["pre_tokenizer"]["pretokenizers"]
        if (data["model"]["type"], cut["type"], last["type"]) != ("BPE", "Split", "ByteLevel"):
            raise ValueError("it is no BPE of bytes behind one cut")
        if last.get("use_regex", True) or last.get("add_prefix_space", True):
            raise ValueError("it cuts text a second time, or puts a blank before it")
        cuts, normalizer = str(cut["pattern"]["Regex"]), data.get("normalizer")
        if normalizer is not None and normalizer["type"] != "NFC":
            raise ValueError(f"it normalizes by {normalizer['type']}")
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"ids are not 0..{len(ranks) - 1}, each once")
        _refuse_disorder(data["model"]["merges"], ranks, letters)
        missing = [name for name in (END_OF_TEXT, START, END) if name not in special]
        if missing or not set(special.values()).isdisjoint(ranks.values()):
            raise ValueError(f"{', '.join(missing) or 'a special token'} has no id of its own")
    return Tokenizer(ranks, special, cuts, normalizer is not None)


def _refuse_disorder(merges: list[Any], ranks: dict[bytes, int], letters: dict[str, int]) -> None:
    """Raise ValueError unless tokens are merged in the order of their ids, as they are from ``ranks``."""
    before = -1
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        made = ranks[bytes(letters[x] for x in "".join(pair))]
        if made <= before:
            raise ValueError(f"merges are not in the order of ids at {''.join(pair)!r:.100}")
        before = made


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in *path*, empty when there is none; Refused for a file that is no JSON."""
    data = parsing.read_json(path, "not JSON")
    return data if isinstance(data, dict) else {}


def check(folder: Path) -> dict[str, Any]:
    """Check a tokenizer folder against its model. Returns what it holds.

    Raises Refused for a missing or damaged file, a vocabulary that does not fit the model's rows, or an end
    token in generation_config.json that is none of the tokenizer's.
    """
    for name in files_of(folder):
        if not (folder / name).is_file():
            raise Refused(f"{folder / name} is missing", hint="it is beside config.json upstream")
    tokenizer = Tokenizer.open(folder)
    rows = read_json(folder / "config.json").get("vocab_size")
    if isinstance(rows, int) and tokenizer.size > rows:
        raise Refused(f"{folder}: the tokenizer has {tokenizer.size} tokens, the model {rows} rows")
    said = read_json(folder / "generation_config.json").get("eos_token_id")
    for end in said if isinstance(said, list) else [said]:
        if isinstance(end, int) and end not in tokenizer.special.values():
            raise Refused(
                f"{folder / 'generation_config.json'}: eos_token_id {end} is no special token of the "
                "vocabulary",
                hint=f"special tokens begin at {len(tokenizer.ranks)}",
            )
    sample = "Hello, world! 1234 \u4f60\u597d\n\ttab"
    if tokenizer.decode_bytes(tokenizer.encode(sample)).decode() != sample:
        raise Refused(f"{folder / files_of(folder)[0]}: text does not come back as it went in")
    return {
        "tokens": len(tokenizer.ranks),
        "special": len(tokenizer.special),
        "model_rows": rows,
        "im_end": tokenizer.special[END],
        "end_of_text": tokenizer.special[END_OF_TEXT],
    }
