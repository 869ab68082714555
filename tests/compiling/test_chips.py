"""A chip is one row of a table: what depends on it is read there, and nothing compares its name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import qwen_surgery
from qwen_surgery.chips import CHIPS, DEFAULT_CHIP, Chip
from qwen_surgery.compiling.options import RUNTIMES, CompileOptions, deploy_flags
from qwen_surgery.errors import Usage
from qwen_surgery.nets import NetKind

ROW = Chip(
    name="bm9999",
    cores=(1, 4),
    several_devices=True,
    dynamic=False,
    heads=True,
    runtimes=("sophon-demo",),
    emulators=("libcmodel_bm9999.so",),
)


def test_a_new_row_is_all_that_a_chip_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHIPS, ROW.name, ROW)
    options = CompileOptions(target=ROW.name, num_device=2).resolved()
    assert (options.runtime, options.cores) == ("sophon-demo", (1, 4))
    assert options.file_name(512, 4).as_posix() == "BM9999/qwen_int4_seq512_bm9999_2dev_4core.bmodel"
    assert "--chip bm9999 --num_device 2 --num_core 4" in " ".join(deploy_flags(NetKind.BLOCK, options, 4))
    heads = {net.name for net in CompileOptions(target=ROW.name).resolved().nets(1)}
    assert {"greedy_head", "penalty_sample_head"} <= heads
    with pytest.raises(Usage, match="--num-core 2 needs bm1688"):
        CompileOptions(target=ROW.name, num_core=2).resolved()
    with pytest.raises(Usage, match="--dynamic is not supported on bm9999"):
        CompileOptions(target=ROW.name, dynamic=True).resolved()


def test_every_row_names_runtimes_that_are_known() -> None:
    for chip in CHIPS.values():
        assert chip.runtimes and set(chip.runtimes) <= set(RUNTIMES), chip.name
    assert DEFAULT_CHIP in CHIPS


def test_an_unknown_chip_is_refused_with_the_known_ones() -> None:
    with pytest.raises(Usage, match="--target bm1 is unknown") as caught:
        CompileOptions(target="bm1").resolved()
    assert "bm1684x, bm1688, cv186x" in caught.value.hint


def test_no_other_module_compares_with_a_chip_s_name() -> None:
    root = Path(qwen_surgery.__file__).parent
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in root.rglob("*.py")
        if path.name != "chips.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and str(node.value).lower() in CHIPS
    ]
    assert found == []
