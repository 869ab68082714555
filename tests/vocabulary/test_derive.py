"""A full net derived from its partner's: what is known of it, and what is not."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_surgery.packing.container import (
    Bmodel,
    Region,
    head_size,
    regions,
    write_at,
    write_head,
)
from qwen_surgery.packing.plans import PackPlan, Plain
from qwen_surgery.vocabulary.derive import Known, copy_without_weights, derive
from qwen_surgery.vocabulary.narrow import CannotExtend

PAGE = 4096
ROW = 256  # bytes of a table's row


def bmodel(
    path: Path,
    rows: int,
    tokens: int,
    instructions: list[int],
    *,
    code: int = 7,
    paged: bool = True,
    again: bool = False,
) -> Path:
    """A bmodel with one net that looks up *tokens* rows in a table of *rows*, as the compiler lays it out:
    in pages, as TPU-MLIR 1.30 does, or not, as 1.6."""
    size = start = rows * ROW
    end = start + (PAGE if paged else 4 * len(instructions))
    half = len(instructions) // 2
    places = [
        {"start": start, "size": 4 * half},
        {"start": start + (0 if again else 4 * half), "size": 4 * half},
    ]
    if len(instructions) < 4:
        places = [{"start": start, "size": 4 * len(instructions)}]
    words = struct.pack(f"<{len(instructions)}I", *instructions)
    model: dict[str, Any] = {
        "type": "B", "version": "2.2", "time": f"at {path.name[:1]}", "chip": "BM1684X",
        "net": [{
            "name": "embedding" if tokens > 1 else "embedding_cache",
            "parameter": [{
                "input_tensor": [{"name": "ids", "device_addr": PAGE + start, "size": 4 * tokens}],
                "output_tensor": [],
                "ctx_addr": PAGE + start,
                "coeff_mem": {
                    "address": PAGE, "check_code": [code] * 32, "binary_coeff": {"start": 0, "size": size},
                },
                "cmd_group": [{"gdma_num": 1, "binary_gdma": place} for place in places],
            }],
        }],
    }  # fmt: skip
    base = head_size(model, paged=paged)
    with path.open("wb", buffering=0) as file:
        write_head(file, model, base, end)
        write_at(file, np.full(size, 9, np.uint8).data, base)
        write_at(file, words, base + start)
        file.truncate(base + end)
    return path


def plan(rows: int) -> PackPlan:
    return PackPlan(rows * ROW, (Plain(0, ["slot", "table"], (rows, ROW // 2), 0, rows, "BF16", False),))


def derived(
    tmp_path: Path,
    narrow: list[int],
    full: list[int],
    own: list[int],
    *,
    code: int = 7,
    paged: bool = True,
) -> list[int]:
    """The instructions of the full net whose narrow ones are *own*."""
    known = Known(
        bmodel(tmp_path / "a", 16, 8, narrow, paged=paged),
        bmodel(tmp_path / "b", 4096, 8, full, paged=paged),
        bmodel(tmp_path / "c", 16, 1, own, code=code, paged=paged),
    )
    target = tmp_path / "d"
    derive(known, plan(4096), target)
    with Bmodel(target) as made, Bmodel(bmodel(tmp_path / "e", 4096, 1, own, paged=paged)) as expected:
        assert made.model["time"] == "at c" and {**made.model, "time": ""} == {**expected.model, "time": ""}
        assert made.length == expected.length
        assert target.stat().st_blocks * 512 < 64 * 1024, "the weights must be a hole"
        content = made.read(Region.of(list(regions(made.model))[-1]))
        return list(struct.unpack(f"<{len(own)}I", content))


MOVED = (4096 - 16) * ROW


@pytest.mark.parametrize("paged", [True, False])
def test_each_word_depends_on_the_vocabulary_or_on_the_length(tmp_path: Path, paged: bool) -> None:
    assert derived(tmp_path, [16, 8, 5], [4096, 8, 5], [16, 1, 5], paged=paged) == [4096, 1, 5]


def test_an_address_behind_the_weights_moves_with_them(tmp_path: Path) -> None:
    assert derived(tmp_path, [100], [100 + MOVED], [50]) == [50 + MOVED]


@pytest.mark.parametrize(
    ("narrow", "full", "own", "why"),
    [
        ([16], [4096], [2], "depends both"),
        ([0xFFFFFFF0], [(0xFFFFFFF0 + MOVED) % 2**32], [0], "depends both"),  # only one of them carries
        ([16], [4096], [16, 1], "different"),
    ],
)
def test_what_is_not_clear_is_refused(
    tmp_path: Path, narrow: list[int], full: list[int], own: list[int], why: str
) -> None:
    with pytest.raises(CannotExtend, match=why):
        derived(tmp_path, narrow, full, own)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotExtend, match="different weights"):
        derived(tmp_path, [16], [4096], [16], code=8)


def test_nets_that_share_equal_instructions_otherwise_are_refused(tmp_path: Path) -> None:
    files = [
        bmodel(tmp_path / "a", 16, 8, [16, 8, 1, 2]),
        bmodel(tmp_path / "b", 4096, 8, [4096, 8, 1, 2]),
        bmodel(tmp_path / "c", 16, 1, [16, 1, 0, 0], again=True),
    ]
    with pytest.raises(CannotExtend, match="share their instructions"):
        derive(Known(*files), plan(4096), tmp_path / "d")


def test_coefficients_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    file = bmodel(tmp_path / "a", 16, 8, [1])
    with pytest.raises(CannotExtend, match="no weights"):
        derive(Known(file, file, file), PackPlan(16 * ROW, ()), tmp_path / "d")


@given(st.integers(0, 15), st.integers(1, 15))
def test_a_hollow_copy_keeps_every_byte_that_is_no_weight(
    tmp_path_factory: Any, start: int, rows: int
) -> None:
    folder = tmp_path_factory.mktemp("holes")
    file = bmodel(folder / "a", 16, 8, [1, 2, 3])
    stop = min(16, start + rows)
    part = Plain(start * ROW, ["slot", "table"], (16, ROW // 2), start, stop, "BF16", False)
    copy_without_weights(file, PackPlan(16 * ROW, (part,)), folder / "b")
    with Bmodel(file) as opened:
        base = opened.base
    was, made = bytearray(file.read_bytes()), (folder / "b").read_bytes()
    was[base + start * ROW : base + stop * ROW] = bytes((stop - start) * ROW)
    assert bytes(was) == made
