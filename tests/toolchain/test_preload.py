"""Copies of zeros that are not written: every byte must be what it would be, and memory must be saved."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_surgery.toolchain.preload import SPARSE_COPIES, compile_shared

LARGE = 1 << 20
LIBC = ctypes.CDLL(None)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    found = compile_shared(SPARSE_COPIES, tmp_path_factory.mktemp("so"))
    assert found is not None, "the suite needs a C compiler"
    return ctypes.CDLL(str(found))


def content(seed: int, size: int) -> np.ndarray:
    """Bytes of which many pages are zeros."""
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, size, dtype=np.uint8)
    for start in range(0, size, 5000):
        if random.random() < 0.6:
            data[start : start + 5000] = 0
    return data


SIZES = st.integers(0, 3 * LARGE)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), SIZES, st.integers(0, 5000), st.integers(0, 70), st.booleans())
def test_memcpy(sparse: ctypes.CDLL, seed: int, size: int, to: int, start: int, fresh: bool) -> None:
    source = content(seed, size + start)
    target = np.zeros(size + to + 100, np.uint8) if fresh else content(seed + 1, size + to + 100)
    expected = target.copy()
    expected[to : to + size] = source[start:]
    pointers = (ctypes.c_void_p(target.ctypes.data + to), ctypes.c_void_p(source.ctypes.data + start))
    sparse.memcpy(*pointers, ctypes.c_size_t(size))
    assert np.array_equal(target, expected)


@pytest.mark.parametrize("shift", [-5000, -1, 1, 100, 4096, 5000])
def test_overlapping_copies_are_as_before(sparse: ctypes.CDLL, shift: int) -> None:
    results = []
    for library in (LIBC, sparse):
        data = content(4, 3 * LARGE)
        start = data.ctypes.data + 8192
        library.memcpy(ctypes.c_void_p(start + shift), ctypes.c_void_p(start), ctypes.c_size_t(2 * LARGE))
        results.append(data.tobytes())
    assert results[0] == results[1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), SIZES, st.integers(0, 5000), st.sampled_from([0, 1, 256, 300]))
def test_memset(sparse: ctypes.CDLL, seed: int, size: int, to: int, value: int) -> None:
    target = content(seed, size + to + 100)
    expected = target.copy()
    expected[to : to + size] = value % 256
    sparse.memset(ctypes.c_void_p(target.ctypes.data + to), value, ctypes.c_size_t(size))
    assert np.array_equal(target, expected)


@pytest.mark.parametrize(("size", "count"), [(1, 3 * LARGE + 17), (4, LARGE), (7, 1000), (LARGE, 4), (0, 5)])
def test_fread_also_past_the_end_of_a_file(
    sparse: ctypes.CDLL, tmp_path: Path, size: int, count: int
) -> None:
    data = content(3, 3 * LARGE + 10)
    (tmp_path / "data").write_bytes(data.tobytes())
    results = []
    LIBC.fopen.restype = ctypes.c_void_p
    for library in (LIBC, sparse):
        library.fread.restype = ctypes.c_size_t
        file = ctypes.c_void_p(LIBC.fopen(os.fsencode(tmp_path / "data"), b"rb"))
        target = np.full(size * count + 10, 5, np.uint8)
        pieces = (ctypes.c_size_t(size), ctypes.c_size_t(count), file)
        got = library.fread(ctypes.c_void_p(target.ctypes.data), *pieces)
        again = library.fread(
            ctypes.c_void_p(target.ctypes.data), ctypes.c_size_t(1), ctypes.c_size_t(9), file
        )
        results.append((got, again, target.tobytes()))
        LIBC.fclose(file)
    assert results[0] == results[1]


@pytest.mark.parametrize("text", ["no program", "#!/bin/sh\nexit 1\n"])
def test_a_compiler_that_does_not_work_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "cc").write_text(text)
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compile_shared(SPARSE_COPIES, tmp_path) is None


def test_zeros_take_no_memory(sparse: ctypes.CDLL) -> None:
    size = 64 * LARGE
    with mmap.mmap(-1, size) as source, mmap.mmap(-1, size) as target:
        source[5 * LARGE] = 1
        places = [ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in (target, source)]
        before = resident()
        sparse.memset(ctypes.c_void_p(places[0]), 0, ctypes.c_size_t(size))
        sparse.memcpy(*map(ctypes.c_void_p, places), ctypes.c_size_t(size))
        assert resident() - before < LARGE
        assert target[5 * LARGE] == 1


def resident() -> int:
    """Anonymous memory of this process that takes room, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
