"""The small trained chat model: its texts, its tokenizer, and that it really answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from golden.speaking import corpus, stories, tokens
from golden.speaking.model import TOKENS, WEIGHTS, make_chat_checkout
from qwen_surgery.checkout import Checkout
from qwen_surgery.patching.sources import Sources
from qwen_surgery.tokenizer import Tokenizer
from qwen_surgery.verification.language import ask_reference
from qwen_surgery.verification.reference import ReferenceModel
from qwen_surgery.weights import WeightIndex

FOLDER = WEIGHTS.parent


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkout(tmp_path_factory.mktemp("chat") / "Qwen-tiny-Chat")


def test_questions_kept_out_are_not_in_the_training_text() -> None:
    """A model that has seen the question proves nothing about answering new ones."""
    learned = {question for block in corpus.blocks() for turn in block for question in turn.ways}
    learned |= {question for question, _ in corpus.sums(held=False)}
    held = [turns[-1][0] for turns in corpus.held_out() if len(turns) == 1]
    assert len(held) >= 90
    assert not learned & set(held)


def test_a_conversation_has_the_same_tokens_for_training_and_for_chat(checkout: Path) -> None:
    """Else the model would be asked in other tokens than it was taught in."""
    tokenizer = Tokenizer.open(checkout)
    encoding = tokens.encoding(TOKENS)
    for turns in [turns for turns, _ in zip(corpus.conversations(3), range(200), strict=False)]:
        ids, learned = tokens.conversation(encoding, turns)
        said = [("system", corpus.SYSTEM)]
        for question, answer in turns[:-1]:
            said += [("user", question), ("assistant", answer)]
        prompt = tokenizer.chat([*said, ("user", turns[-1][0])])
        assert ids[: len(prompt)] == prompt
        answered = [
            token for token, learn in zip(ids[len(prompt) :], learned[len(prompt) :], strict=True) if learn
        ]
        assert tokenizer.decode_bytes(answered[:-1]).decode() == turns[-1][1]
        assert answered[-1] == tokenizer.special["<|im_end|>"]


def test_the_model_answers_questions_it_was_not_taught(checkout: Path) -> None:
    """Every fourth of them, in two languages; the true count over all is in the README."""
    sources = Sources.of(Checkout.open(checkout), seq_length=256)
    reference = ReferenceModel(sources.reference, WeightIndex.open(checkout))
    tokenizer = Tokenizer.open(checkout)
    asked = {turns[0][0]: turns[0][1] for turns in corpus.held_out() if len(turns) == 1}
    questions = list(asked)[::4]
    found = ask_reference(reference, tokenizer, questions, 256)
    right = [
        q.text for q in found if tokenizer.decode_bytes(q.answer).decode("utf-8", "replace") == asked[q.text]
    ]
    assert len(right) >= 0.8 * len(questions), sorted(set(questions) - set(right))


def test_stories_repeat_with_their_seed_and_differ_without() -> None:
    """A text to measure on must not be one that was learned by heart."""
    assert stories.text(1, 50) == stories.text(1, 50)
    assert len(set(stories.text(1, 200).splitlines()) & set(stories.text(2, 200).splitlines())) < 5


def test_the_files_to_measure_on_are_what_was_kept_out() -> None:
    """Else perplexity and answers would be of texts that the model was taught."""
    assert (FOLDER / "heldout.txt").read_text(encoding="utf-8") == stories.text(**stories.HELD_OUT)
    asked = [turns[0][0] for turns in corpus.held_out() if len(turns) == 1]
    assert (FOLDER / "questions.txt").read_text(encoding="utf-8").splitlines() == asked


def test_a_block_of_another_form_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("? Hello\n= Hi\n\nHello?\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 4"):
        corpus.blocks(tmp_path / "bad.txt")


def test_the_weights_are_small_enough_to_ship() -> None:
    assert WEIGHTS.stat().st_size < 1_500_000


@pytest.mark.slow
def test_training_makes_a_model_of_the_same_form(tmp_path: Path) -> None:
    """A few steps of the script as its page says; what it writes is taken where the shipped model is."""
    command = [sys.executable, "-m", "golden.speaking.train", "--steps", "60", "--out", str(tmp_path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert (tmp_path / WEIGHTS.name).stat().st_size == WEIGHTS.stat().st_size
    assert (tmp_path / TOKENS.name).read_bytes() == TOKENS.read_bytes()
    losses = [float(line.split("loss")[1].split()[0]) for line in said.splitlines() if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
