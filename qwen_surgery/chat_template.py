"""The chat format that a checkpoint brings along: a Jinja template beside its tokenizer.

It is data of others' making and runs in Jinja's sandbox. What people typed never passes through it: it lays
out marks, and the texts take their places afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qwen_surgery import parsing
from qwen_surgery.errors import Refused
from qwen_surgery.files import read_regular

#: The template in a file of its own, as newer releases of transformers write it, and where it was before.
FILE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
_LARGEST = 1 << 20
#: Around a turn's number: letters of a range that is for private use.
_MARK = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True)
class ChatTemplate:
    """A template's *text*, where it was found, and the names of special tokens (``eos_token``, ...) that it
    may use."""

    text: str
    where: Path
    names: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path) -> ChatTemplate | None:
        """The template in *folder*, None when there is none. Raises Refused for one that is no text."""
        settings = parsing.read_json(folder / SETTINGS, "not JSON")
        said = settings if isinstance(settings, dict) else {}
        names = {name: _content(value) for name, value in said.items() if name.endswith("_token")}
        alone = read_regular(folder / FILE, _LARGEST, follow=True)
        if alone is not None:
            with parsing.parsing(folder / FILE, "no text"):
                return cls(alone.decode(), folder / FILE, names)
        found = said.get("chat_template")
        if isinstance(found, list):  # several by name, as tools have one of their own
            found = next((one.get("template") for one in found if _is_default(one)), None)
        if found is not None and not isinstance(found, str):
            raise Refused(f"{folder / SETTINGS}: chat_template is no text")
        return None if found is None else cls(found, folder / SETTINGS, names)

    def lay_out(self, turns: Sequence[tuple[str, str]]) -> list[tuple[str, bool]]:
        """A conversation up to where the assistant speaks, in pieces: a text, and whether it is that of one
        of *turns* (role, text) or the template's.

        Raises Refused when the template does not render, or leaves out, changes or reorders what was said.
        """
        marked = [{"role": role, "content": f"\ue000{i}\ue001"} for i, (role, _) in enumerate(turns)]
        own, *rest = _MARK.split(self._render(marked))
        numbers, others = rest[::2], rest[1::2]
        if numbers != [str(i) for i in range(len(turns))]:
            raise Refused(
                f"{self.where}: its chat template does not give every turn of a conversation its place, once",
                hint="leave --system out if you gave it",
            )
        pieces = [(own, False)]
        for (_, text), after in zip(turns, others, strict=True):
            pieces += [(text, True), (after, False)]
        return pieces

    def _render(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        made = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        made.globals["raise_exception"] = _refuse
        try:
            return made.from_string(self.text).render(
                messages=messages, add_generation_prompt=True, **self.names
            )
        except (TemplateError, MemoryError, *parsing.DATA_ERRORS) as error:
            raise Refused(f"{self.where}: its chat template does not render ({error!s:.200})") from None


def _is_default(one: Any) -> bool:
    return isinstance(one, Mapping) and one.get("name") == "default"


def _content(token: Any) -> str:
    """The text of a special token, which is there as it is or as an object with more about it."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else ""


def _refuse(message: object) -> NoReturn:
    """What templates call when a conversation is not one they can lay out."""
    raise ValueError(str(message))
