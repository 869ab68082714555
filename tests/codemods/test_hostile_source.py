"""Source that no editor would write: codecs that lose bytes, nesting that ends parsers, giants."""

from __future__ import annotations

import time

import pytest

import codemods
from codemods.analysis.source import DEEPEST, LARGEST, SourceError, read
from golden.eras import modeling_source

TEXT = modeling_source("sdpa")
#: Each decodes to Python text; encoded again, it gives other bytes or depends on the lines before.
LOSSY = {
    "utf-7": b"# -*- coding: utf-7 -*-\nx = '+AOk-'  # +ZeVnLIqe-\n",
    "unicode_escape": b"# -*- coding: unicode_escape -*-\nx = '\\x41 \\u00e9'\n",
    "raw_unicode_escape": b"# -*- coding: raw_unicode_escape -*-\nx = '\\u0041'\n",
    "iso2022_jp": b"# -*- coding: iso2022_jp -*-\nx = '\x1b$B$\"\x1b(B\x1b(J\x1b(B'\n",
    "hz": b"# -*- coding: hz -*-\nx = '~{VP~}~{ND~}'\n",
}


@pytest.mark.parametrize("name", LOSSY)
def test_a_codec_that_loses_bytes_is_refused(name: str) -> None:
    """The file written would be broken, or changed beyond the edit."""
    with pytest.raises(SourceError, match=r"does not give back|not readable"):
        read(LOSSY[name])


@pytest.mark.parametrize("name", ["rot13", "zip", "hex", "base64", "punycode", "undefined", "mbcs"])
def test_a_codec_that_is_no_text_encoding_is_refused(name: str) -> None:
    with pytest.raises(SourceError):
        read(f"# -*- coding: {name} -*-\nx = 1\n".encode())


@pytest.mark.parametrize("name", ["utf-8", "latin-1", "cp1252", "gbk", "gb18030", "shift_jis", "euc_jp"])
def test_a_codec_that_keeps_bytes_is_taken(name: str) -> None:
    comment = "# naïve\n" if name in ("latin-1", "cp1252") else "# 中文\n"
    data = f"# -*- coding: {name} -*-\n{comment}{TEXT}".encode(name)
    result = codemods.run(data, "static")
    assert result.changed
    assert result.code.startswith(f"# -*- coding: {name} -*-\n{comment}".encode(name))
    assert result.code.decode(name).encode(name) == result.code


DEEP = {
    "sum": "x = " + "1+" * 100_000 + "1\n",
    "signs": "x = " + "-" * 100_000 + "1\n",
    "attributes": "x = a" + ".b" * 100_000 + "\n",
    "calls": "x = f" + "()" * 100_000 + "\n",
    "a sum that just parses": "x = " + "1+" * 700 + "1\n",
    "brackets": "x = " + "(" * 5_000 + ")" * 5_000 + "\n",
    "branches": "if a: pass\n" + "elif a: pass\n" * 20_000,
    "blocks": "".join(" " * n + "if 1:\n" for n in range(2_000)),
}


@pytest.mark.parametrize("name", DEEP)
def test_nesting_without_end_is_one_error(name: str) -> None:
    """Parsers and readers would run out of stack: an unexpected error, or the end of the process."""
    began = time.monotonic()
    with pytest.raises(SourceError, match=r"nested|does not parse"):
        read((DEEP[name] + TEXT).encode())
    assert time.monotonic() - began < 30


def test_upstream_is_far_from_the_limits() -> None:
    assert len(TEXT) * 20 < LARGEST
    read((TEXT + "y = " + "(" * 40 + "1" + ")" * 40 + "\n").encode())
    assert DEEPEST > 100


def test_a_giant_is_refused_unread() -> None:
    with pytest.raises(SourceError, match="larger"):
        read(b"x = 1\n" * (50_000_000 // 6))


def test_an_edit_that_the_encoding_cannot_hold_is_an_error() -> None:
    source = read(b"# -*- coding: latin-1 -*-\nx = 1\n")
    with pytest.raises(SourceError, match="iso-8859-1"):
        source.encode("x = '\u4e2d'\n")


GROWN = {
    "doubled": "attn_weights = attn_weights + attn_weights",
    "wrapped": "attn_weights = " + "(" * 60 + "attn_weights" + " + 1)" * 60,
}


@pytest.mark.parametrize("name", GROWN)
def test_an_expression_that_grows_with_each_line_is_declined_in_time(name: str) -> None:
    """Each line doubles what attn_weights stands for, or puts it sixty levels deeper."""
    line = "        mask_value = "
    before, _, after = TEXT.partition(line)
    assert after, "the era's text has moved on"
    start = time.monotonic()
    result = codemods.run(before + f"        {GROWN[name]}\n" * 60 + line + after, "static")
    assert time.monotonic() - start < 20
    reasons = [o.reason for o in result.declined if o.codemod == "disable-torch2"]
    assert any("too large to follow" in reason for reason in reasons), reasons
