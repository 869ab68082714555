"""Byte preservation, as properties: whatever surrounds the edited lines comes out as it went in."""

from __future__ import annotations

import difflib

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import codemods
from golden.eras import ERAS, modeling_source
from qwen_surgery.patching import plan

_SOURCES = {era: modeling_source(era) for era in ERAS}
# Anything a comment may hold, other planes and odd spaces included; no line ends.
_COMMENT = st.text(st.characters(blacklist_categories=("Cc", "Cs"), blacklist_characters="\u2028\u2029\x85"))
_SLOW = settings(max_examples=25, suppress_health_check=list(HealthCheck))


def _commented(text: str, comments: list[tuple[float, str]]) -> str:
    """*text* with comment lines put before top-level statements, where nothing else can be meant."""
    lines = text.splitlines(keepends=True)
    tops = [i for i, line in enumerate(lines) if line.startswith(("class ", "import ", "from "))]
    for where, comment in sorted(comments, reverse=True):
        lines.insert(tops[int(where * (len(tops) - 1))], f"# {comment}\n")
    return "".join(lines)


@_SLOW
@given(
    era=st.sampled_from(ERAS),
    comments=st.lists(st.tuples(st.floats(0, 1), _COMMENT), max_size=4),
    newline=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
    final=st.booleans(),
)
def test_lines_that_no_outcome_reports_keep_their_bytes(
    era: str, comments: list[tuple[float, str]], newline: str, bom: bool, final: bool
) -> None:
    text = _commented(str(_SOURCES[era]), comments)
    text = text if final else text.rstrip("\n")
    data = (b"\xef\xbb\xbf" if bom else b"") + text.replace("\n", newline).encode()
    result = codemods.run(data, "static")
    assert not result.declined
    assert not result.failed
    before, after = data.split(b"\n"), result.code.split(b"\n")
    reported = set()
    for o in result.outcomes:
        if o.status is codemods.Status.APPLIED and o.line:
            reported |= set(range(o.line, (o.end_line or o.line) + 1))
    kept = set(range(1, len(before) + 1))
    for tag, a, b, _, _ in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag != "equal":
            kept -= set(range(a + 1, b + 1))
    assert set(range(1, len(before) + 1)) - kept <= reported
    assert (after[-1] == b"") == (before[-1] == b"")
    assert result.code.startswith(b"\xef\xbb\xbf") == bom
    assert (b"\r\n" in result.code) == (newline == "\r\n")
    assert codemods.run(result.code, "static").code == result.code


_LINE = st.text(st.sampled_from("ab\r\f\t é")).map(str.encode)
_FILE = st.tuples(st.lists(_LINE, max_size=8), st.booleans()).map(
    lambda f: b"\n".join(f[0]) + (b"\n" if f[1] and f[0] else b"")
)


def _apply(data: bytes, diff: bytes) -> bytes:
    """What a unified diff makes of *data*: an own reading of the format, to check the writer against."""
    old = plan._lines(data)
    new: list[bytes] = []
    at = 0
    hunks = diff.split(b"\n")[2:]
    for index, line in enumerate(hunks):
        text = line[1:] + b"\n"
        if index + 1 < len(hunks) and hunks[index + 1].startswith(b"\\"):
            text = text[:-1]
        if line.startswith(b"@@"):
            span = line.split()[1][1:].split(b",")
            start = int(span[0]) - (0 if len(span) > 1 and span[1] == b"0" else 1)
            new += old[at:start]
            at = start
        elif line.startswith((b" ", b"-")):
            assert old[at] == text
            new += [text] if line.startswith(b" ") else []
            at += 1
        elif line.startswith(b"+"):
            new.append(text)
    return b"".join([*new, *old[at:]])


@given(old=_FILE, new=_FILE)
def test_a_diff_of_any_two_files_leads_from_one_to_the_other(old: bytes, new: bytes) -> None:
    made = plan.diff(old, new, "file")
    assert bool(made) == (old != new)
    assert _apply(old, made) == new
