"""A conversation by the checkpoint's own chat template gives the tokens that transformers gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_surgery.errors import Refused
from qwen_surgery.tokenizer import Tokenizer
from tests.families.speaking import THINKING, WITH_SYSTEM, add_tokenizer
from tests.families.test_decoders import cli
from tests.families.tiny import make

CONVERSATIONS = (
    [("user", "the cat")],
    [("system", "You are a hat."), ("user", "  what?\n")],
    [("user", "the cat"), ("assistant", "<think>\na hat?\n</think>\n\nsat on the mat"), ("user", "\n\nand?")],
)


@pytest.mark.parametrize("template", [WITH_SYSTEM, THINKING])
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_ids_are_those_of_transformers(template: str, turns: list[tuple[str, str]], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    if template == WITH_SYSTEM and len(turns) == 3:
        turns = [(role, text.rpartition("\n")[2]) for role, text in turns]
    folder = add_tokenizer(tmp_path, template)
    theirs = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": role, "content": text} for role, text in turns]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert Tokenizer.open(folder).chat(turns) == theirs(text).input_ids


def test_a_template_in_a_file_of_its_own_goes_first(tmp_path: Path) -> None:
    folder = add_tokenizer(tmp_path, WITH_SYSTEM)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    ours = Tokenizer.open(folder)
    assert ours.chat([("user", "the cat")]) == ours.encode("the cat")


def test_what_a_user_types_is_no_token_and_no_template(tmp_path: Path) -> None:
    ours = Tokenizer.open(add_tokenizer(tmp_path, THINKING))
    typed = "<|im_end|> {{ messages }} \ue0000\ue001 <think>"
    ids = ours.chat([("user", typed)])
    assert ids.count(ours.special["<|im_end|>"]) == 1 and ours.special["<think>"] not in ids
    assert typed in ours.decode_bytes(ids).decode()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages[1:] %}{{ m.content }}{% endfor %}", "give every turn"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "give every turn"),
        ("{% for m in messages %}", "does not render"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ ''.__class__.__mro__ }}", "does not render"),
        ("{{ 1 // 0 }}", "does not render"),
        ("{% macro deep() %}{{ deep() }}{% endmacro %}{{ deep() }}", "does not render"),
    ],
)
def test_a_template_that_lays_out_nothing_sound_is_refused(template: str, said: str, tmp_path: Path) -> None:
    ours = Tokenizer.open(add_tokenizer(tmp_path, template))
    with pytest.raises(Refused, match=said):
        ours.chat([("system", "a"), ("user", "b")])


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = add_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": 5}))
    with pytest.raises(Refused, match="chat_template is no text"):
        Tokenizer.open(folder)


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize(
    ("kind", "template", "config"),
    [("qwen2", WITH_SYSTEM, {}), ("qwen3", THINKING, {"head_dim": 64, "tie_word_embeddings": True})],
)
def test_chat_on_the_emulator_says_what_generate_says(
    kind: str, template: str, config: dict[str, object], tmp_path: Path
) -> None:
    """From a checkout to an answer: the model's template, its end tokens, its own words."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = add_tokenizer(make(tmp_path / "model", kind, **config), template)
    theirs, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).float()
    asked = [{"role": "user", "content": "the cat"}]
    text = theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([theirs(text).input_ids])
    ends = theirs.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
    with torch.no_grad():
        said = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=ends)[0, ids.shape[1] :]
    wanted = [token for token in said.tolist() if token not in ends]

    flags = ("--seq-length", 64, "--mode", "bf16", "--verify", "none", "--json")
    made = json.loads(cli("build", path, "--out", tmp_path / "out", *flags).stdout)
    options = ("--tokenizer", path, "--greedy", "--max-tokens", 8, "--prompt", "the cat")
    found = cli("chat", "--bmodel", made["bmodels"][0], *options).stdout
    answer = Tokenizer.open(path).decode_bytes(wanted).decode("utf-8", "replace")
    assert wanted and found.removesuffix("\n") == answer
