"""tokenizer.json read without its library gives the library's ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_surgery.errors import Refused
from qwen_surgery.tokenizer import Tokenizer, check
from tests.families.speaking import add_tokenizer

TEXTS = (
    "Hello, world! 1234 \u4f60\u597d\n\ttab",
    "the cat sat on the mat, the hat on the cat",
    "  blanks   and\r\n\r\nline ends \n",
    "cafe\u0301 (a letter and its accent apart)",
    "\U0001f600 it's we'LL",
    "",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer of Qwen2's form, trained with the real library on a few words."""
    return add_tokenizer(tmp_path)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_library_s(folder: Path, text: str) -> None:
    from tokenizers import Tokenizer as Library

    library, ours = Library.from_file(str(folder / "tokenizer.json")), Tokenizer.open(folder)
    ids = ours.encode(text)
    assert ids == library.encode(text).ids
    assert ours.decode_bytes(ids).decode() == library.decode(ids)


def test_a_conversation_is_laid_out_in_special_tokens(folder: Path) -> None:
    ours = Tokenizer.open(folder)
    ids = ours.chat([("user", "the cat <|im_end|>")])
    start, end = ours.special["<|im_start|>"], ours.special["<|im_end|>"]
    assert ids.count(end) == 1, "what a user types is never a special token"
    assert ours.decode_bytes(ids).decode().startswith("<|im_start|>user\nthe cat <|im_end|>")
    assert ids.count(start) == 2 and ours.size == max(ours.special.values()) + 1


def test_it_is_checked_against_its_model(folder: Path) -> None:
    size = Tokenizer.open(folder).size
    (folder / "config.json").write_text(json.dumps({"vocab_size": size}))
    assert check(folder)["im_end"] == Tokenizer.open(folder).special["<|im_end|>"]
    (folder / "config.json").write_text(json.dumps({"vocab_size": size - 1}))
    with pytest.raises(Refused, match=f"{size} tokens, the model {size - 1} rows"):
        check(folder)


def _swap(data: dict[str, Any]) -> None:
    merges = data["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_swap, "merges are not in the order of ids"),
        (lambda data: data.update(normalizer={"type": "NFKC"}), "normalizes by NFKC"),
        (lambda data: data["model"].update(type="Unigram"), "no BPE of bytes"),
        (lambda data: data["added_tokens"].pop(2), "has no id of its own"),
        (lambda data: data["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True), "a second time"),
        (lambda data: data["model"].pop("vocab"), "KeyError"),
    ],
)
def test_another_tokenizer_is_refused(
    folder: Path, damage: Callable[[dict[str, Any]], object], said: str
) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(Refused, match=said):
        Tokenizer.open(folder)
