"""Words instead of numbers: questions answered side by side, and how likely a text is found.

The unpatched model is the reference of both. An *answer* is generated greedily by each model on its own,
through the same chat format, until it ends; a *text* is read token by token through prefill and decode, and
each model's distribution for every next token is compared with the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from golden.tolerances import Limit
from qwen_surgery.errors import Refused, SurgeryError, Usage
from qwen_surgery.nets import Geometry
from qwen_surgery.verification.metrics import agreement, kl_divergence, log_softmax
from qwen_surgery.verification.results import AnswerPair, Check, judge
from qwen_surgery.verification.runtime import Runtime

if TYPE_CHECKING:
    from qwen_surgery.tokenizer import Tokenizer
    from qwen_surgery.verification.engines import Engine
    from qwen_surgery.verification.reference import ReferenceModel

SYSTEM = "You are a helpful assistant."
#: Tokens of an answer at most.
ANSWER_LIMIT = 96
#: The share of a window of S tokens that is read as a prompt; the rest is scored through the cache.
_PROMPT_SHARE = 4


@dataclass(frozen=True)
class Question:
    """A question as tokens, and what the unpatched model answers greedily."""

    text: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def ask_reference(
    reference: ReferenceModel, tokenizer: Tokenizer, questions: Sequence[str], seq_length: int
) -> list[Question]:
    """The unpatched model's answers. Raises Usage for a question that leaves no room in S."""
    asked = []
    for text in questions:
        prompt = tokenizer.chat([("system", SYSTEM), ("user", text)])
        if len(prompt) >= seq_length:
            raise Usage(f"the question {text!r} takes {len(prompt)} of {seq_length} tokens")
        logits = reference.prefill(prompt).logits
        said: list[int] = []
        while (token := _best(logits)) not in tokenizer.stops:
            said.append(token)
            if len(said) == min(ANSWER_LIMIT, seq_length - len(prompt)):
                break
            logits = reference.decode(token).logits
        asked.append(Question(text, tuple(prompt), tuple(said)))
    return asked


def _best(logits: np.ndarray | None) -> int:
    assert logits is not None  # a reference cut to its first layers is never asked
    return int(np.argmax(logits))


def generate(run: Runtime, prompt: Sequence[int], stops: Sequence[int], limit: int) -> list[int]:
    """What the engine of *run* says greedily after *prompt*: at most *limit* tokens, no end token."""
    logits = run.prefill(prompt)
    said: list[int] = []
    while (token := run.greedy(logits)) not in stops:
        said.append(token)
        if len(said) == limit:
            break
        logits = run.decode(token)
    return said


def check_answers(
    engine: Engine,
    geometry: Geometry,
    tokenizer: Tokenizer,
    limits: dict[str, Limit],
    questions: Sequence[Question],
    progress: Callable[[str], None] = lambda what: None,
) -> tuple[list[Check], list[AnswerPair]]:
    """Put each question to *engine*; one check for all, whose agreement is the share of equal answers."""
    answers = []
    try:
        for number, question in enumerate(questions, start=1):
            progress(f"question {number}/{len(questions)}")
            room = min(ANSWER_LIMIT, geometry.seq_length - len(question.prompt))
            found = generate(Runtime(engine, geometry), question.prompt, tokenizer.stops, room)
            texts = (
                tokenizer.decode_bytes(said).decode("utf-8", "replace") for said in (question.answer, found)
            )
            answers.append(AnswerPair(question.text, question.answer, tuple(found), *texts))
    except SurgeryError as error:
        return [Check("end-to-end", None, "answers", "tokens", {}, (f"does not run: {error}",))], answers
    values = {"agreement": sum(answer.equal for answer in answers) / len(answers)}
    missed = judge(limits, "answers", values)
    unlike = [answer.question for answer in answers if not answer.equal]
    if missed and unlike:
        missed = tuple(f"{miss} (first: {unlike[0]!r})" for miss in missed)
    return [Check("end-to-end", None, "answers", "tokens", values, missed)], answers


@dataclass(frozen=True)
class Reading:
    """A window of text and the unpatched model's logits, float32 [V], before each of its scored tokens."""

    tokens: tuple[int, ...]
    prompt: int  # how many of them are read before the first that is scored
    logits: tuple[np.ndarray, ...]

    @property
    def scored(self) -> tuple[int, ...]:
        return self.tokens[self.prompt :]


def read_reference(
    reference: ReferenceModel, tokens: Sequence[int], seq_length: int, limit: int
) -> list[Reading]:
    """The unpatched model reads *tokens* in windows of S, at most *limit* of them scored.

    Raises Refused when the text is too short to score one token.
    """
    prompt = max(1, seq_length // _PROMPT_SHARE)
    found: list[Reading] = []
    left = limit
    for first in range(0, len(tokens) - prompt, seq_length):
        window = list(tokens[first : first + min(seq_length, prompt + left)])
        if len(window) <= prompt or left < 1:
            break
        record = reference.prefill(window[:prompt])
        logits = [record.logits]
        logits += [reference.decode(token).logits for token in window[prompt:-1]]
        found.append(Reading(tuple(window), prompt, tuple(row for row in logits if row is not None)))
        left -= len(window) - prompt
    if not found:
        raise Refused(
            f"the text has {len(tokens)} tokens, at S = {seq_length} it needs more than {prompt}",
            hint="give a longer --text",
        )
    return found


def check_text(
    engine: Engine,
    geometry: Geometry,
    limits: dict[str, Limit],
    readings: Sequence[Reading],
    progress: Callable[[str], None] = lambda what: None,
) -> list[Check]:
    """Let *engine* read the same windows: both perplexities, mean KL in nats, share of equal best tokens."""
    own, given, divergences = [], [], []
    wanted: list[int] = []
    best: list[int] = []
    try:
        run = Runtime(engine, geometry)
        if run.fused_head:
            return []  # it gives tokens, no distribution to compare
        for number, reading in enumerate(readings, start=1):
            progress(f"text {number}/{len(readings)}")
            logits = run.prefill(reading.tokens[: reading.prompt])
            for place, (token, expected) in enumerate(zip(reading.scored, reading.logits, strict=True)):
                given.append(-log_softmax(expected)[token])
                own.append(-log_softmax(logits)[token])
                divergences.append(kl_divergence(expected, logits))
                wanted.append(int(np.argmax(expected)))
                best.append(int(np.argmax(logits)))
                if place + 1 < len(reading.scored):
                    logits = run.decode(token)
    except SurgeryError as error:
        return [Check("end-to-end", None, "text", "logits", {}, (f"does not run: {error}",))]
    values = {
        "perplexity": _perplexity(own),
        "reference_perplexity": _perplexity(given),
        "perplexity_ratio": _perplexity(own) / _perplexity(given),
        "kl": float(np.mean(divergences)),
        "agreement": agreement(wanted, best),
        "tokens": float(len(own)),
    }
    return [Check("end-to-end", None, "text", "logits", values, judge(limits, "text", values))]


def _perplexity(losses: Sequence[float]) -> float:
    mean = float(np.mean(losses))
    return math.exp(mean) if mean < 700 else math.inf
