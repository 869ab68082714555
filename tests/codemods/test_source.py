"""Bytes: whatever a file's newlines, mark, encoding or end, only the edited lines change."""

from __future__ import annotations

import ast
import difflib

import pytest

import codemods
from codemods.analysis.source import SourceError, read
from codemods.framework.base import Status
from golden.eras import ERAS, modeling_source

FORMS = {
    "lf": lambda text: text.encode(),
    "crlf": lambda text: text.replace("\n", "\r\n").encode(),
    "bom": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "bom and crlf": lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
    "no final newline": lambda text: text.rstrip("\n").encode(),
    "latin-1": lambda text: ("# -*- coding: latin-1 -*-\n# gr\xfc\xdfe\n" + text).encode("latin-1"),
    "tabs": lambda text: text.replace("    ", "\t").encode(),
    "form feeds": lambda text: text.replace("\n\n\nclass ", "\n\f\n\nclass ").encode(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("era", ["bias-buffer", "sdpa", "late"])
def test_lines_outside_the_outcomes_keep_their_bytes(era: str, form: str) -> None:
    data = FORMS[form](modeling_source(era))
    result = codemods.run(data, "static")
    assert result.changed and not result.failed and not result.declined
    ranges = [
        range((o.line or 0) - 1, o.end_line or 0) for o in result.outcomes if o.status is Status.APPLIED
    ]
    before, after = data.splitlines(keepends=True), result.code.splitlines(keepends=True)
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for tag, first, last, _, _ in matcher.get_opcodes():
        if tag == "insert":
            assert any(r.start <= first <= r.stop for r in ranges), before[first]
        elif tag != "equal":
            assert all(any(n in r for r in ranges) for n in range(first, last)), before[first:last]
    if "crlf" in form:
        assert result.code.count(b"\n") == result.code.count(b"\r\n")
    assert result.code.startswith(b"\xef\xbb\xbf") == data.startswith(b"\xef\xbb\xbf")
    assert codemods.run(result.code, "static").code == result.code


@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"tabs"}))  # tabs change the docstrings too
def test_form_does_not_change_the_program(form: str) -> None:
    """The edits are the same whatever the form: the patched trees are equal."""
    plain = codemods.run(modeling_source("sdpa"), "static").code
    other = codemods.run(FORMS[form](modeling_source("sdpa")), "static").code
    assert ast.dump(ast.parse(other)) == ast.dump(ast.parse(plain))


@pytest.mark.parametrize("era", ERAS)
def test_an_untouched_file_is_the_same_object_of_bytes(era: str) -> None:
    patched = codemods.run(modeling_source(era), "static").code
    again = codemods.run(patched, "static")
    assert again.code == patched and not again.changed
    assert {o.status for o in again.outcomes} <= {Status.ALREADY, Status.ABSENT}


@pytest.mark.parametrize(
    "data",
    [
        b"def broken(:\n",
        b"\xff\xfe\x00",
        b"x = 1\0",
        b"# -*- coding: nonsense -*-\n",
        "\ufeff\ufeffx".encode(),
    ],
)
def test_what_is_not_python_is_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(SourceError) as caught:
        codemods.run(data, "static")
    assert str(caught.value)


def test_syntax_errors_name_their_line() -> None:
    with pytest.raises(SourceError) as caught:
        read(b"x = 1\ny = (\n")
    assert caught.value.line == 2


def test_two_statements_on_a_line_decline() -> None:
    """A statement that shares its line cannot be taken out alone: nothing is written, and it says why."""
    text = modeling_source("sdpa").replace("import math\n", "import math; import warnings\n", 1)
    flag = next(line for line in text.splitlines() if line.startswith("SUPPORT_TORCH2"))
    result = codemods.run(text.replace(flag, flag + "; OTHER = 1"), "static")
    assert not result.changed
    assert any("shares its line" in o.reason for o in result.declined)


def test_failure_inside_an_edit_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from codemods.framework import runner

    def explode(*_: object) -> str:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(runner, "_edited", explode)
    source = modeling_source("sdpa").encode()
    result = codemods.run(source, "static")
    assert result.code == source and not result.changed
    assert result.failed and all("out of luck" in o.reason for o in result.failed)
