"""A step's parameters travel as JSON and come back as they were."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qwen_surgery.building.step import PLACE, Step, decode, encode, load
from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.nets import Net, NetKind
from qwen_surgery.toolchain import Toolchain


@dataclass(frozen=True)
class Everything(Step):
    net: Net
    kinds: dict[NetKind, str]
    flags: tuple[str, ...]
    nothing: Path | None
    something: Path | None
    config: dict[str, Any]
    options: CompileOptions = field(metadata=PLACE)
    toolchain: Toolchain = field(metadata=PLACE)


def step(flags: tuple[str, ...] = ("--a", "--b"), mode: str = "int8") -> Everything:
    return Everything(
        net=Net("block_0", NetKind.BLOCK, 0),
        kinds={NetKind.LM_HEAD: "prove:lm_head"},
        flags=flags,
        nothing=None,
        something=Path("/a/b"),
        config={"hidden_size": 128, "list": [1, {"x": None}]},
        options=CompileOptions(mode=mode),
        toolchain=Toolchain(Path("/p"), Path("/r"), "1.30.2", "envsetup.sh", (("PATH", "/bin"), ("A", "b"))),
    )


def test_parameters_come_back_as_they_were() -> None:
    one = step()
    assert load(one.action, json.loads(json.dumps(encode(one)))) == one


def test_where_things_are_decides_nothing_and_the_rest_does() -> None:
    assert step(mode="int8").decisive == step(mode="int4").decisive
    assert step(flags=("--a",)).decisive != step().decisive
    assert "toolchain" not in step().decisive


@pytest.mark.parametrize(
    ("kind", "value"),
    [(NetKind, "no kind"), (Net, {"name": "a"}), (Net, {"name": "a", "kind": "block", "more": 1})],
)
def test_what_cannot_be_one_is_refused(kind: Any, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        decode(kind, value)
