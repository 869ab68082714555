"""What a config edit is: a decision per key, made from the config as it came and the export length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from codemods.config.facts import ModelFacts
from codemods.config.text import ConfigText
from codemods.framework.base import Documented, Status


@dataclass(frozen=True)
class ConfigContext:
    """The export length in tokens, and what the unpatched config.json means."""

    seq_length: int
    facts: ModelFacts


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


def switch_off_within_trained(config: ConfigText, key: str, context: ConfigContext, needed: str) -> Decision:
    """Set *key* to false, or decline where it acts: it is on and the export goes beyond the trained length.

    *needed* ends the sentence "the export length is above the trained length: ...".
    """
    trained = context.facts.trained_length
    if config.get(key, context.facts[key]) and context.seq_length > trained:
        reason = f"the export length {context.seq_length} is above the trained length {trained}: {needed}"
        return Decision(key, Status.DECLINED, reason)
    return set_to(config, key, False, f"its factor is 1 up to the trained length {trained}")
