"""The bmodel file: what is written can be read, and what is damaged is refused.

If these fail, `inspect` and `refit` crash on, or silently accept, broken files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_surgery.cli import main
from qwen_surgery.errors import Refused
from qwen_surgery.packing import container, flat, write
from qwen_surgery.packing.container import Bmodel, Region, RegionWriter
from qwen_surgery.packing.schema import SCALARS, STRUCTS, TABLES
from tests.packing.conftest import Bench

_NUMBERS = {
    "uint8": st.integers(0, 255),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "uint32": st.integers(0, 2**32 - 1),
    "uint64": st.integers(0, 2**64 - 1),
    "float32": st.floats(width=32, allow_nan=False),
}


def _value(type_: str, depth: int) -> st.SearchStrategy[Any]:
    if type_ in SCALARS:
        return _NUMBERS[type_]
    if type_ in STRUCTS:
        return st.fixed_dictionaries({name: _NUMBERS[member] for name, member in STRUCTS[type_]})
    if type_ == "string":
        return st.text(min_size=1, max_size=8)
    if type_.startswith("["):
        return st.lists(_value(type_[1:-1], depth + 1), min_size=1, max_size=2)
    return _table(type_, depth + 1)


def _table(name: str, depth: int = 0) -> st.SearchStrategy[dict[str, Any]]:
    always = {f.name: _value(f.type, depth) for f in TABLES[name] if f.required or f.type in SCALARS}
    rest = {f.name: _value(f.type, depth) for f in TABLES[name] if f.name not in always and depth < 4}
    return st.fixed_dictionaries(always, optional=rest)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(_table("NetParameter", 2))
def test_every_field_of_a_net_survives_writing_and_reading(parameter: dict[str, Any]) -> None:
    model = {
        "type": "B", "version": "2.2", "time": "t\n", "chip": "BM1684X", "neuron_size": 7, "device_num": 1,
        "bmodel_type": 0, "net": [{"name": "n", "addr_mode": 1, "parameter": [parameter]}],
    }  # fmt: skip
    assert flat.read(flat.write(model)) == model


@settings(max_examples=150)
@given(st.binary(max_size=200))
def test_stray_bytes_are_damaged_never_a_crash(data: bytes) -> None:
    with pytest.raises(flat.Damaged):
        flat.read(data)


def test_equal_regions_are_stored_once_and_pages_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "regions"
    with path.open("w+b", buffering=0) as file:
        writer = RegionWriter(file, 0, paged=True)
        places = []
        for data in (b"a" * 10, b"b" * 5000, b"a" * 10, b"c"):
            region = writer.next_region(len(data))
            container.write_at(file, data, writer.offset(region))
            places.append(writer.settle(region, hashlib.sha256(data).digest()))
        writer.finish()
    assert [place.start for place in places] == [0, 4096, 0, 12288]
    assert path.stat().st_size == 16384


@pytest.fixture
def packed(bench: Callable[..., Bench], tmp_path: Path) -> Path:
    return write(tmp_path / "packed.bmodel", bench("int4").pieces()).path


@pytest.mark.tpu
def test_truncation_anywhere_is_refused(packed: Path, tmp_path: Path) -> None:
    data = packed.read_bytes()
    short = tmp_path / "short.bmodel"
    for length in [0, 1, 63, 64, 100, 4096, 20000, len(data) // 2, len(data) - 4096, len(data) - 1]:
        short.write_bytes(data[:length])
        with pytest.raises(Refused, match="not a whole bmodel"):
            Bmodel(short)


@pytest.mark.tpu
def test_a_flipped_byte_in_the_description_is_refused_or_read_never_a_crash(
    packed: Path, tmp_path: Path
) -> None:
    data = packed.read_bytes()
    with Bmodel(packed) as bmodel:
        end = bmodel.base
    flipped = tmp_path / "flipped.bmodel"
    for position in range(0, end, 97):
        changed = bytearray(data)
        changed[position] ^= 0x55
        flipped.write_bytes(changed)
        try:
            with Bmodel(flipped) as opened:
                assert isinstance(opened.nets, list)
        except Refused:
            pass


@pytest.mark.tpu
def test_files_over_4_gib_have_a_wrapped_size_in_their_header(packed: Path, tmp_path: Path) -> None:
    """The header keeps 32 bits; a hole stands for the weights of a real model."""
    large = tmp_path / "large.bmodel"
    with Bmodel(packed) as bmodel:
        base, size, model = bmodel.base, bmodel.size, bmodel.model
    with large.open("w+b", buffering=0) as file:
        container.write_head(file, model, base, size + (1 << 32))
        file.truncate(base + size + (1 << 32))
    with Bmodel(large) as opened:
        assert opened.size == size + (1 << 32)


def _inspect(path: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(path), *options])
    return int(stop.value.code or 0)


@pytest.mark.tpu
def test_inspect_names_what_breaks_the_contract(
    bench: Callable[..., Bench], packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _inspect(packed, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["contract"] == []
    assert report["layers"] == 2
    assert report["nets"][3]["inputs"][2] == {
        "name": "attention_mask", "shape": [1, 1, 32, 32], "dtype": "bfloat16", "device": 0, "share": False,
    }  # fmt: skip
    pieces = bench("int4").pieces()
    swapped = write(tmp_path / "swapped.bmodel", [*pieces[:3], pieces[4], pieces[3], *pieces[5:]]).path
    assert _inspect(swapped) == 1
    assert "block_cache_0, expected block_0" in capsys.readouterr().out
    short = write(tmp_path / "short.bmodel", pieces[:-1]).path
    assert _inspect(short) == 1
    assert "6 nets where the runtimes expect 7" in capsys.readouterr().out


def test_inspect_refuses_what_is_no_bmodel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.bmodel"
    path.write_text("not a bmodel at all, but long enough to hold a header of sixty-four bytes and some more")
    assert _inspect(path) == 3
    assert "magic" in capsys.readouterr().err
    assert Region(0, 0).size == 0
