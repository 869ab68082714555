"""The lowered text of a narrow net, extended to the full vocabulary, and the compiler's steps on it.

The commands are those that model_deploy itself ran for the narrow net, read from its log.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from qwen_surgery.errors import ToolFailed
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.toolchain.preload import SPARSE_COPIES, compile_shared
from qwen_surgery.vocabulary.narrow import CannotExtend, Vocabulary
from qwen_surgery.vocabulary.probe import ProbeArray, extend_weights

_RUNNING = re.compile(r"^\[Running\]: (tpuc-opt .*)$", re.MULTILINE)
_LOCATION = re.compile(r'^(#loc\d+) = loc\("([^"]*)"\)', re.MULTILINE)
_WEIGHT = re.compile(r'"top\.Weight"\(\).*-> tensor<(\d+(?:x\d+)*)x\w+> loc\((#loc\d+)\)')
_TENSOR = re.compile(r"tensor<(\d+(?:x\d+)*)x(\w+)>")


def extend_text(lowered: str, vocabulary: Vocabulary) -> str:
    """The lowered text of a narrow net for the real vocabulary.

    Raises :class:`CannotExtend` when the narrow size stands anywhere but in tensor types.
    """

    def extended(match: re.Match[str]) -> str:
        shape = vocabulary.extended(tuple(int(size) for size in match[1].split("x")))
        return f"tensor<{'x'.join(map(str, shape))}x{match[2]}>"

    text = _TENSOR.sub(extended, lowered)
    if re.search(rf"(?<!\d){vocabulary.narrow}(?!\d)", text):
        raise CannotExtend("an attribute of the lowered net depends on the vocabulary")
    if text == lowered:
        raise CannotExtend("nothing in the lowered net depends on the vocabulary")
    return text


@dataclass(frozen=True)
class Steps:
    """The compiler's own command lines for a net: *lower* makes its lowered text, *place* puts its weights
    where they will lie and arranges the work, *emit* writes the bmodel.
    """

    lower: tuple[str, ...]
    place: tuple[str, ...]
    emit: tuple[str, ...]

    @classmethod
    def read(cls, log: str) -> Steps:
        """From model_deploy's *log*. Raises :class:`CannotExtend` when it does not name these three."""
        lines = [tuple(shlex.split(line)) for line in _RUNNING.findall(log)]
        does = ("--convert-top-to-tpu", "--address-assign", "--codegen")
        if len(lines) != len(does) or not all(
            "-o" in line and any(part.startswith(what) for part in line)
            for line, what in zip(lines, does, strict=True)
        ):
            raise CannotExtend("model_deploy does not say which steps it ran")
        return cls(*lines)

    @property
    def lowered(self) -> str:
        """File name of the lowered text."""
        return _output(self.lower)

    @property
    def final(self) -> str:
        """File name of the final text."""
        return _output(self.place)

    @property
    def place_and_emit(self) -> tuple[str, ...]:
        """The last two as one command: the weights are read once and not written in between."""
        output = self.place.index("-o")
        emit = [part for part in self.emit[2:] if part.startswith("--codegen")]
        return (*self.place[:output], *emit, *self.place[output:])


def _output(command: tuple[str, ...]) -> str:
    return command[command.index("-o") + 1]


def weight_shapes(lowered: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a lowered text. (The weight file keeps some of them flat.)"""
    names = dict(_LOCATION.findall(lowered))
    return {
        names[loc]: tuple(int(size) for size in shape.split("x"))
        for shape, loc in _WEIGHT.findall(lowered)
        if loc in names
    }


def run_steps(
    steps: Steps, vocabulary: Vocabulary, toolchain: Toolchain, narrow: Path, full: Path, log: Path, net: str
) -> list[ProbeArray]:
    """Lower the net in *narrow* again (model_deploy deletes that text), extend it into the folder *full*, and
    run the compiler's other steps there: the bmodel and the final text have the names model_deploy gave them.

    Gives the extended net's probe arrays. Raises :class:`CannotExtend` and ToolFailed.
    """
    full.mkdir(parents=True, exist_ok=True)
    toolchain.run(steps.lower[0], steps.lower[1:], narrow, log.with_suffix(".lower.log"), net=net)
    lowered = (narrow / steps.lowered).read_text(encoding="utf-8")
    (full / steps.lowered).write_text(extend_text(lowered, vocabulary), encoding="utf-8")
    weights = _weight_file(lowered)
    shapes = weight_shapes(lowered)
    arrays = extend_weights(narrow / weights, full / weights, shapes, vocabulary)
    if len(shapes) == 1:
        # The compiler leaves a copy of the placed weights that nobody reads. (Of several arrays it reads its
        # own file again while writing.)
        final = (narrow / steps.final).read_text(encoding="utf-8")
        (full / _weight_file(final)).symlink_to(os.devnull)
    command, log = steps.place_and_emit, log.with_suffix(".full.log")
    sparse = compile_shared(SPARSE_COPIES, full)
    try:
        toolchain.run(command[0], command[1:], full, log, net=net, preload=sparse)
    except ToolFailed as error:
        if sparse is None or error.signal == 9:
            raise
        toolchain.run(command[0], command[1:], full, log, net=net)
    return arrays


def _weight_file(text: str) -> str:
    found = re.search(r'module\.weight_file = "([^"]+)"', text)
    if found is None:
        raise CannotExtend("the text of the net names no weight file")
    return found[1]
