"""Check codes: SHA-256 below 512 MiB; above, the count of bits cut to 32 bits, as TPU-MLIR's bmodels have
it.
"""

from __future__ import annotations

import hashlib

import pytest

from qwen_surgery.packing.check_code import CheckCode


def code(data: bytes, size: int) -> bytes:
    digest = CheckCode(size)
    digest.update(data[:100])
    digest.update(data[100:])
    return digest.digest()


def test_small_sections_have_plain_sha256() -> None:
    data = bytes(range(256)) * 40
    assert code(data, len(data)) == hashlib.sha256(data).digest()


@pytest.mark.parametrize("length", [0, 55, 56, 64, 1000])
def test_the_cut_count_is_plain_sha256_where_nothing_is_cut(length: int) -> None:
    """The other way (OpenSSL's library) on messages whose count fits: it must be SHA-256 there."""
    data = bytes(length)
    assert code(data, 1 << 29) == hashlib.sha256(data).digest()


def test_a_section_of_half_a_gibibyte_ends_in_a_count_of_zero() -> None:
    """2**29 bytes are 2**32 bits: TPU-MLIR's count wraps, so its code is not the SHA-256 of the bytes."""
    chunk, digest, plain = bytes(1 << 24), CheckCode(1 << 29), hashlib.sha256()
    for _ in range(32):
        digest.update(chunk)
        plain.update(chunk)
    assert digest.digest() != plain.digest()
