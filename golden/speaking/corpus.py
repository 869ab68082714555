"""The conversations that the small chat model learns, and those that are kept out to ask it later."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from golden.speaking import stories

DIALOGUES = Path(__file__).with_name("dialogues.txt")
SYSTEM = "You are a helpful assistant."
NAMES = {
    "name": ("Ann", "Bob", "Eve", "Tom", "Mia", "Leo", "Ida", "Max"),
    "名": ("小明", "小红", "小李", "小王"),
    "thing": ("tea", "cats", "music", "rain", "books", "chips"),
}

#: A conversation: (question, answer) after (question, answer).
Turns = list[tuple[str, str]]


@dataclass(frozen=True)
class Turn:
    """One answer and the ways to ask for it; ``held`` are kept out of the training text."""

    ways: tuple[str, ...]
    held: tuple[str, ...]
    answer: str


def blocks(path: Path = DIALOGUES) -> list[list[Turn]]:
    """Every block of the file. Raises ValueError, naming the line, for one that is not of the form."""
    found: list[list[Turn]] = []
    block: list[Turn] = []
    ways: list[str] = []
    held: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        mark, _, text = line.partition(" ")
        if not line.strip():
            found += [block] if block else []
            block = []
        elif mark == "?":
            ways.append(text)
        elif mark == "?-":
            held.append(text)
        elif mark == "=" and ways:
            block.append(Turn(tuple(ways), tuple(held), text))
            ways, held = [], []
        elif not mark.startswith("#"):
            raise ValueError(f"{path.name}, line {number}: neither a question nor the answer to one")
    return [*found, block] if block else found


_SUMS_EN = ("What is {a} + {b}?", "{a} + {b}", "What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b} = ?")
_SUMS_ZH = ("{a} + {b} 等于几？", "{a}加{b}等于几？", "{a} + {b} 是多少？")
_HELD_SUMS = ((2, 7), (3, 3), (4, 8), (6, 1), (9, 5), (7, 7), (5, 2), (8, 6), (1, 4), (0, 3))


def sums(*, held: bool) -> list[tuple[str, str]]:
    """Sums of two digits, in every way of asking; *held* are the pairs kept out of the training text."""
    return [
        (way.format(a=a, b=b), f"{a} + {b} = {a + b}")
        for a in range(10)
        for b in range(10)
        if ((a, b) in _HELD_SUMS) == held
        for way in (*_SUMS_EN, *_SUMS_ZH)
    ]


def _filled(turns: Turns, chance: random.Random) -> Turns:
    """*turns* with a name drawn for each blank, the same one throughout."""
    drawn = {key: chance.choice(values) for key, values in NAMES.items()}
    return [tuple(text.format(**drawn) if "{" in text else text for text in turn) for turn in turns]  # type: ignore[misc]


def conversations(seed: int) -> Iterator[Turns]:
    """Conversations without end: blocks and sums, one or two after each other."""
    chance = random.Random(seed)
    known, additions = blocks(), sums(held=False)
    while True:
        turns: Turns = []
        for _ in range(chance.choice((1, 1, 2))):
            if chance.random() < 0.25:
                turns.append(chance.choice(additions))
            else:
                block = chance.choice(known)
                turns += _filled([(chance.choice(turn.ways), turn.answer) for turn in block], chance)
        yield turns


def held_out() -> list[Turns]:
    """Every conversation that ends in a question kept out of the training text, with its right answer."""
    chance = random.Random(0)
    found: list[Turns] = []
    for block in blocks():
        for number, turn in enumerate(block):
            before = [(earlier.ways[0], earlier.answer) for earlier in block[:number]]
            found += [_filled([*before, (way, turn.answer)], chance) for way in turn.held]
    pairs = {answer: question for question, answer in reversed(sums(held=True))}
    return found + [[(question, answer)] for answer, question in pairs.items()]


def text() -> str:
    """All of the training text, once: what the tokenizer is trained on."""
    parts = [part for block in blocks() for turn in block for part in (*turn.ways, turn.answer)]
    return "\n".join([*parts, *(f"{q}\n{a}" for q, a in sums(held=False)[::7]), stories.text(0, 60)])
