"""What a config edit is: a decision per key, made from the config as it came and the export length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from codemods.config.text import ConfigText
from codemods.framework.base import Documented, Status

#: ``seq_length`` where config.json does not say: the default of upstream's configuration_qwen.py.
DEFAULT_SEQ_LENGTH = 8192


@dataclass(frozen=True)
class ConfigContext:
    """Two lengths in tokens: of the export, and of training (upstream's own ``seq_length``)."""

    seq_length: int
    trained: int


@dataclass(frozen=True)
class Decision:
    """What should become of one key. ``value`` counts only when ``status`` is applied."""

    key: str
    status: Status
    reason: str
    value: Any = None


class ConfigEdit(Documented):
    """Base class of a config edit. Outcomes are named ``config:<key>``; the examples export 512 tokens."""

    def decide(self, config: ConfigText, context: ConfigContext) -> Iterable[Decision]:
        """One decision per key this edit is about."""
        raise NotImplementedError


def set_to(config: ConfigText, key: str, value: Any, reason: str) -> Decision:
    """``applied`` or ``already``, whichever makes ``key`` be ``value``."""
    present = config.members.get(key)
    if present is not None and type(present.value) is type(value) and present.value == value:
        return Decision(key, Status.ALREADY, f"is {present.value!r}".lower())
    return Decision(key, Status.APPLIED, reason, value)
