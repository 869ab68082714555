"""How long the unpatched model and the engines without an emulator take, said before they start.

This is for models that are too big for memory: their weights are read again for every pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

#: Measured on two cores with the files in the page cache: weights a second that are read and converted, and
#: multiply-adds a second in float32.
READ_RATE, COMPUTE_RATE = 4e8, 3e10


def seconds(weights: int, passes: Sequence[int]) -> float:
    """Of as many *passes* over a model of so many *weights*, each over so many tokens."""
    return weights * (len(passes) / READ_RATE + sum(passes) / COMPUTE_RATE)


def net_passes(lengths: Sequence[int], seq_length: int) -> Iterator[int]:
    """The reference's passes for the cases of every net: each prompt, and a step where one fits."""
    for length in lengths:
        yield length
        if length < seq_length:
            yield 1


def end_to_end_passes(length: int, steps: int, sampled: int) -> list[int]:
    """The passes of a greedy and a *sampled* conversation of so many steps after *length* tokens."""
    return [length, *[1] * steps, length, *[1] * sampled]


def in_words(found: float) -> str:
    """*found* seconds for a person: minutes, or hours where there are two."""
    return f"{found / 3600:.1f} h" if found >= 7200 else f"{max(1, round(found / 60))} min"
