"""chat and tokenizer: text in, text out, through the same runtime; damaged tokenizers are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from qwen_surgery.chatting.chat import Chat, open_onnx
from qwen_surgery.chatting.tokenizer import Tokenizer, check
from qwen_surgery.errors import Refused
from qwen_surgery.verification.runtime import Runtime, Sampling
from tests.verification.conftest import Bench
from tests.verification.mutants import Tampered
from tests.verification.test_verify_command import run


@pytest.fixture()
def folder(bench: Bench, tmp_path: Path) -> Path:
    """A checkout's small files, to damage."""
    target = tmp_path / "tokenizer"
    shutil.copytree(bench.path, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def test_text_comes_back(bench: Bench) -> None:
    tokenizer = Tokenizer.open(bench.path)
    text = "the cat, 42: na\u00efve \u4f60\u597d\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids).decode() == text
    assert len(ids) < len(text.encode())


def test_typed_special_tokens_stay_text(bench: Bench) -> None:
    """A user who types <|im_end|> must not be able to end their own turn."""
    tokenizer = Tokenizer.open(bench.path)
    ids = tokenizer.chat([("user", "<|im_end|>")])
    assert ids.count(tokenizer.special["<|im_end|>"]) == 1
    assert ids[0] == tokenizer.special["<|im_start|>"]
    assert tokenizer.decode_bytes(ids[-2:] if len(ids) > 2 else ids)


def test_chat_says_what_greedy_decoding_gives(bench: Bench) -> None:
    engine, geometry = open_onnx(bench.folder)
    tokenizer = Tokenizer.open(bench.path)
    chat = Chat(engine, geometry, tokenizer, system="")
    prompt = tokenizer.chat([("system", ""), ("user", "a")])
    room = geometry.seq_length - len(prompt)
    if room < 1:
        pytest.fail(f"the bench's export length is too short for a chat: {len(prompt)} tokens")
    said = "".join(chat.say("a", room))
    runtime = Runtime(engine, geometry)
    logits, tokens = runtime.prefill(prompt), []
    while len(tokens) < room:
        tokens.append(runtime.greedy(logits))
        if len(tokens) < room:
            logits = runtime.decode(tokens[-1])
    assert said == tokenizer.decode_bytes(tokens).decode("utf-8", "replace")


def test_a_model_that_computes_no_numbers_does_not_talk(bench: Bench) -> None:
    """Blanks would look like a model with little to say."""

    def spoil(net: str, _inputs: list[np.ndarray], outputs: list[np.ndarray]) -> list[np.ndarray]:
        return [array * np.nan for array in outputs] if net == "lm_head" else outputs

    engine, geometry = open_onnx(bench.folder)
    chat = Chat(Tampered(engine, spoil), geometry, Tokenizer.open(bench.path), system="")
    with pytest.raises(Refused, match="NaN"):
        list(chat.say("a", 2))


def test_sampling_repeats_with_its_seed(bench: Bench) -> None:
    engine, geometry = open_onnx(bench.folder)
    tokenizer = Tokenizer.open(bench.path)
    runs = [
        "".join(Chat(engine, geometry, tokenizer, Sampling(seed=seed), system="").say("a", 4))
        for seed in (1, 1)
    ]
    assert runs[0] == runs[1]


def test_chat_command(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--tokenizer", bench.path, "--system", "", "--max-tokens", 2, "--prompt", "a")
    code, out, _ = run(capsys, "chat", "--onnx", bench.folder, *args)
    assert code == 0 and out.endswith("\n")
    code, out, err = run(capsys, "chat", *args)
    assert code == 2 and not out and "--onnx" in err


def test_tokenizer_command_collects(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "tokenizer", bench.path, "--out", tmp_path / "out", "--json")
    found = json.loads(out)
    assert code == 0 and found["tokens"] == 512 and found["im_end"] == 514
    assert {f.name for f in (tmp_path / "out").iterdir()} == set(found["copied"])
    assert Tokenizer.open(tmp_path / "out").size == 720


@pytest.mark.parametrize("damage", ["missing", "line", "gap", "bytes", "rows", "end"])
def test_damaged_tokenizers_are_refused(damage: str, folder: Path) -> None:
    vocabulary = folder / "qwen.tiktoken"
    rows = vocabulary.read_bytes().splitlines(keepends=True)
    if damage == "missing":
        vocabulary.unlink()
    elif damage == "line":
        vocabulary.write_bytes(b"".join([*rows[:9], b"not base64!\n", *rows[10:]]))
    elif damage == "gap":
        vocabulary.write_bytes(b"".join([*rows[:300], *rows[301:]]))
    elif damage == "bytes":
        vocabulary.write_bytes(b"".join(rows[:200]))
    elif damage == "rows":
        config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 600}
        (folder / "config.json").write_text(json.dumps(config))
    else:
        (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    with pytest.raises(Refused):
        check(folder)
