"""Answers and texts side by side: equal models agree, a damaged one is caught and named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from golden import tolerances
from golden.speaking import stories
from golden.speaking.model import make_chat_checkout
from qwen_surgery.checkout import Checkout
from qwen_surgery.errors import Refused, Usage
from qwen_surgery.exporting.export import export
from qwen_surgery.nets import Geometry
from qwen_surgery.patching.sources import Sources
from qwen_surgery.tokenizer import Tokenizer
from qwen_surgery.verification.engines import OrtEngine
from qwen_surgery.verification.language import (
    ask_reference,
    check_answers,
    check_text,
    read_reference,
)
from qwen_surgery.verification.reference import ReferenceModel
from qwen_surgery.weights import WeightIndex
from tests.verification.mutants import Tampered
from tests.verification.test_verify_command import run

S = 128
QUESTIONS = ["What is a bmodel?", "3 + 4", "讲个故事。"]
TEXT = stories.text(**stories.HELD_OUT)
LIMITS = tolerances.load()["onnx", "fp32"]


@dataclass
class Speaking:
    path: Path
    nets: Path
    geometry: Geometry
    reference: ReferenceModel
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Speaking:
    root = tmp_path_factory.mktemp("speaking")
    path = make_chat_checkout(root / "Qwen-tiny-Chat")
    opened = Checkout.open(path)
    sources, index, geometry = Sources.of(opened, seq_length=S), WeightIndex.open(path), opened.geometry(S)
    export(sources, index, geometry, root / "nets", trust_remote_code=True)
    return Speaking(
        path, root / "nets", geometry, ReferenceModel(sources.reference, index), Tokenizer.open(path)
    )


def spoilt(net: str, _inputs: list[np.ndarray], outputs: list[np.ndarray]) -> list[np.ndarray]:
    """Half of every decode step's new values lost: wrong, yet every number is finite."""
    return [array * (0.5 if net == "block_cache_1" else 1) for array in outputs]


def test_equal_models_give_equal_answers_in_words(speaking: Speaking) -> None:
    questions = ask_reference(speaking.reference, speaking.tokenizer, QUESTIONS, S)
    checks, answers = check_answers(
        OrtEngine(speaking.nets), speaking.geometry, speaking.tokenizer, LIMITS, questions
    )
    assert [check.passed for check in checks] == [True]
    assert all(answer.equal for answer in answers)
    assert answers[0].candidate_text.startswith("A bmodel is the file that a Sophgo chip runs")
    assert answers[1].candidate_text == "3 + 4 = 7"
    assert "\ufffd" not in answers[2].candidate_text


def test_another_answer_is_a_miss_that_names_the_question(speaking: Speaking) -> None:
    questions = ask_reference(speaking.reference, speaking.tokenizer, QUESTIONS, S)
    engine = Tampered(OrtEngine(speaking.nets), spoilt)
    (check,), answers = check_answers(engine, speaking.geometry, speaking.tokenizer, LIMITS, questions)
    first = next(answer.question for answer in answers if not answer.equal)
    assert not check.passed and first in check.missed[0]


def test_perplexity_of_equal_models_is_equal_and_low(speaking: Speaking) -> None:
    """Stories are text like the trained text: a model that reads them right finds them likely."""
    readings = read_reference(speaking.reference, speaking.tokenizer.encode(TEXT), S, 80)
    (check,) = check_text(OrtEngine(speaking.nets), speaking.geometry, LIMITS, readings)
    assert check.passed and check.values["tokens"] == 80
    assert check.values["perplexity"] < 3


def test_perplexity_sees_a_damaged_model(speaking: Speaking) -> None:
    readings = read_reference(speaking.reference, speaking.tokenizer.encode(TEXT), S, 40)
    engine = Tampered(OrtEngine(speaking.nets), spoilt)
    (check,) = check_text(engine, speaking.geometry, LIMITS, readings)
    assert not check.passed
    assert check.values["perplexity"] > check.values["reference_perplexity"]


def test_what_does_not_fit_is_said_with_its_number(speaking: Speaking) -> None:
    with pytest.raises(Usage, match=f"of {S} tokens"):
        ask_reference(speaking.reference, speaking.tokenizer, ["why? " * S], S)
    with pytest.raises(Refused, match=r"needs more than \d+"):
        read_reference(speaking.reference, speaking.tokenizer.encode("Hi"), S, 40)


def test_verify_command_shows_answers_and_perplexity(
    speaking: Speaking, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, asked = tmp_path / "text.txt", tmp_path / "questions.txt"
    text.write_text(TEXT, encoding="utf-8")
    asked.write_text("5 + 3\n\nwho are you\n", encoding="utf-8")
    args = ("--onnx", speaking.nets, "--level", "onnx", "--prompt-lengths", 9, "--steps", 2)
    words = ("--ask", "Who are you?", "--ask-file", asked, "--text", text, "--text-tokens", 30)
    code, out, _ = run(capsys, "verify", speaking.path, *args, *words, "--trust-remote-code")
    assert code == 0
    assert "5 + 3 = 8" in out and "I am a tiny Qwen" in out and "perplexity of the text" in out
    code, _, err = run(
        capsys, "verify", speaking.path, *args, "--text", tmp_path / "none", "--trust-remote-code"
    )
    assert code == 3 and "none" in err
