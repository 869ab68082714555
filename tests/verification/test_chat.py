"""chat and tokenizer: text in, text out, through the same runtime; damaged tokenizers are refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from golden.speaking.model import make_chat_checkout
from qwen_surgery.chatting.chat import Chat, Generation, open_onnx
from qwen_surgery.checkout import Checkout
from qwen_surgery.commands.chat import _answer
from qwen_surgery.errors import Refused
from qwen_surgery.exporting.export import export
from qwen_surgery.patching.sources import Sources
from qwen_surgery.runtime.host import Sampling
from qwen_surgery.tokenizer import Tokenizer, check
from qwen_surgery.verification.runtime import Runtime
from qwen_surgery.weights import WeightIndex
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


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkout that answers in words, and its nets."""
    root = tmp_path_factory.mktemp("talking")
    path = make_chat_checkout(root / "Qwen-tiny-Chat")
    opened = Checkout.open(path)
    sources, geometry = Sources.of(opened, seq_length=96), opened.geometry(96)
    export(sources, WeightIndex.open(path), geometry, root / "nets", trust_remote_code=True)
    return path, root / "nets"


def converse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, *args: object
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return run(capsys, "chat", *args)


def test_a_conversation_keeps_its_turns_until_reset(
    talking: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name said before is known after; after /reset the answer is that of a fresh conversation."""
    path, nets = talking
    lines = "My name is Bob.\nWhat is my name?\n/reset\nWhat is my name?\n\n"
    args = ("--onnx", nets, "--tokenizer", path, "--greedy")
    _, fresh, _ = run(capsys, "chat", *args, "--prompt", "What is my name?")
    code, out, err = converse(monkeypatch, capsys, lines, *args)
    said = out.splitlines()
    assert code == 0 and len(said) == 3
    assert said == ["Hello, Bob!", "Your name is Bob.", fresh.strip()] and fresh.strip() != said[1]
    assert "a second here" in err


def test_a_prompt_too_long_says_its_number_and_the_conversation_goes_on(
    talking: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, nets = talking
    lines = f"{'why? ' * 60}\n3 + 4\n\n"
    code, out, err = converse(monkeypatch, capsys, lines, "--onnx", nets, "--tokenizer", path, "--greedy")
    assert code == 0 and out == "3 + 4 = 7\n" and "of 96 tokens" in err


def test_an_interrupt_stops_the_answer_and_not_the_program(
    talking: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the third token: what was said stays said, the next question is answered."""
    path, nets = talking
    engine, geometry = open_onnx(nets)
    calls = 0

    def interrupt(net: str, _inputs: list[np.ndarray], outputs: list[np.ndarray]) -> list[np.ndarray]:
        nonlocal calls
        calls += net == "lm_head"
        if net == "lm_head" and calls == 3:
            raise KeyboardInterrupt
        return outputs

    chat = Chat(Tampered(engine, interrupt), geometry, Tokenizer.open(path))
    _answer(chat, "What is a bmodel?", 40)
    assert capsys.readouterr().out.endswith(" ...\n")
    assert chat.spoken == 2 and chat.turns[1][1]
    chat.turns.clear()
    _answer(chat, "3 + 4", 40)
    assert capsys.readouterr().out == "3 + 4 = 7\n"


def test_sampling_is_what_generation_config_says(talking: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    assert Generation.of(tmp_path).sampling is None
    settings = {"do_sample": True, "top_p": 0.5, "repetition_penalty": 1.3, "eos_token_id": [5, 6]}
    file.write_text(json.dumps(settings))
    found = Generation.of(tmp_path)
    assert found.sampling == Sampling(0.5, 1.0, 1.3) and found.stops == (5, 6)
    for said, top_k in ((20, 20), (0, 50), (151936, 50)):
        file.write_text(json.dumps({**settings, "top_k": said}))
        assert Generation.of(tmp_path).sampling == Sampling(0.5, 1.0, 1.3, top_k=top_k)
    file.write_text('{"do_sample": true, "top_p": "much"}')
    with pytest.raises(Refused, match="generation_config"):
        Generation.of(tmp_path)


def test_chat_draws_by_the_generic_demo_s_head_from_as_many_as_top_k_says(
    talking: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From one candidate the draw is the best token, whatever the temperature; from fifty it is not."""
    path = talking[0]
    flags = ("--onnx-path", tmp_path / "nets", "--seq-length", 96, "--generic", "--no-twin", "--json")
    code, out, _ = run(capsys, "export", path, *flags, "--trust-remote-code")
    assert code == 0 and "sample_head" in {net["name"] for net in json.loads(out)["nets"]}
    folder = tmp_path / "tokenizer"
    shutil.copytree(path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    said = {}
    for top_k in (1, 50):
        settings = {"do_sample": True, "temperature": 100.0, "top_k": top_k, "eos_token_id": []}
        (folder / "generation_config.json").write_text(json.dumps(settings))
        args = ("--onnx", tmp_path / "nets", "--tokenizer", folder, "--prompt", "3 + 4", "--max-tokens", 8)
        said[top_k] = run(capsys, "chat", *args, "--seed", 1)[1]
        greedy = run(capsys, "chat", *args, "--greedy")[1]
    assert said[1] == greedy != said[50]


def test_heads_of_two_kinds_cannot_be_asked_for(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--onnx-path", tmp_path / "nets", "--generic", "--multi-device", "--trust-remote-code")
    code, _, err = run(capsys, "export", bench.path, *flags)
    assert code == 2 and "--generic has no use with --multi-device" in err
    assert not (tmp_path / "nets").exists()


def test_greedy_takes_no_sampling_settings(
    talking: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, nets = talking
    args = ("--onnx", nets, "--tokenizer", path, "--prompt", "hi", "--greedy", "--top-p", "0.5")
    code, out, err = run(capsys, "chat", *args)
    assert code == 2 and not out and "--top-p" in err
