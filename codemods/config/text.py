"""Edit one JSON object's members in place: indentation, key order, newlines, BOM and final newline stay.

Only the characters of a changed value are replaced; a new member goes after the last one, in its style.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass
from typing import Any

_SPACE = re.compile(r"[ \t\r\n]*")


class ConfigError(ValueError):
    """The text is not one JSON object. ``line`` is 1-based, or None."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True)
class Member:
    """One top-level member: where its key starts, where its value lies, and the value."""

    key_start: int
    start: int
    end: int
    value: Any


@dataclass(frozen=True)
class ConfigText:
    """A JSON object as text. Offsets are into ``text``; :meth:`encode` gives the file's bytes back."""

    text: str
    bom: bytes
    members: dict[str, Member]
    close: int  #: offset of the closing brace

    def get(self, key: str, default: Any = None) -> Any:
        member = self.members.get(key)
        return default if member is None else member.value

    def values(self) -> dict[str, Any]:
        """The object as plain values."""
        return {key: member.value for key, member in self.members.items()}

    def line(self, key: str) -> int | None:
        """The 1-based line of a member's key, or None when it is absent."""
        member = self.members.get(key)
        return None if member is None else self.text.count("\n", 0, member.key_start) + 1

    def with_value(self, key: str, value: Any) -> ConfigText:
        """The same text with one member set; every other character is kept."""
        new = json.dumps(value, ensure_ascii=False)
        member = self.members.get(key)
        if member is not None:
            return parse_text(self.text[: member.start] + new + self.text[member.end :], self.bom)
        if not self.members:
            at = self.text.index("{") + 1
            return parse_text(f"{self.text[:at]}{json.dumps(key)}: {new}{self.text[at:]}", self.bom)
        last = max(self.members.values(), key=lambda m: m.end)
        gap, colon = self._style(last)
        return parse_text(
            f"{self.text[: last.end]},{gap}{json.dumps(key)}{colon}{new}{self.text[last.end :]}", self.bom
        )

    def _style(self, last: Member) -> tuple[str, str]:
        """The white space before a key and the colon with its spacing, as the last member has them."""
        before = self.text[: last.key_start]
        gap = before[len(before.rstrip(" \t\r\n")) :]
        key_end = _key_end(self.text, last.key_start)
        return gap, self.text[key_end : last.start]

    def encode(self) -> bytes:
        return self.bom + self.text.encode()


def read(data: bytes) -> ConfigText:
    """Decode and scan ``data``. Raises :class:`ConfigError` when it is not one JSON object in UTF-8."""
    bom = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
    try:
        text = data[len(bom) :].decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text: {error}") from error
    return parse_text(text, bom)


def parse_text(text: str, bom: bytes = b"") -> ConfigText:
    """Find every top-level member of the JSON object ``text``.

    A key given twice is refused: tools disagree on it.
    """
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not JSON: {error.msg} (line {error.lineno})", error.lineno) from error
    except RecursionError as error:
        raise ConfigError("not JSON: nested too deep") from error
    except ValueError as error:  # a number of more digits than Python turns into one
        raise ConfigError(f"not JSON: {error}") from error
    if not isinstance(whole, dict):
        raise ConfigError("not a JSON object")
    decoder = json.JSONDecoder()
    members: dict[str, Member] = {}
    at = _skip(text, text.index("{") + 1)
    while text[at] != "}":
        key_start = at
        key, at = decoder.raw_decode(text, key_start)
        start = _skip(text, _skip(text, at) + 1)
        value, end = decoder.raw_decode(text, start)
        if key in members:
            line = text.count("\n", 0, key_start) + 1
            raise ConfigError(f"`{key}` is given twice (line {line})", line)
        members[key] = Member(key_start, start, end, value)
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return ConfigText(text, bom, members, at)


def _key_end(text: str, start: int) -> int:
    return json.JSONDecoder().raw_decode(text, start)[1]


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at
