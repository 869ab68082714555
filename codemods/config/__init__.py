"""config.json edits: decided per key, written without touching any other character."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from codemods.config.base import ConfigContext, ConfigEdit
from codemods.config.facts import ModelFacts
from codemods.config.text import ConfigError, read
from codemods.framework.base import Outcome, Status
from codemods.framework.discovery import defined, modules
from codemods.framework.recipes import Recipe
from codemods.framework.recipes import load as load_recipe

__all__ = ["ConfigError", "ConfigResult", "ModelFacts", "get", "names", "run"]

_MODULES = modules(__name__, __path__)


@dataclass(frozen=True)
class ConfigResult:
    """What a run did to one config.json. ``text`` is the input, byte for byte, unless :attr:`changed`."""

    text: bytes
    outcomes: tuple[Outcome, ...]
    changed: bool

    @property
    def declined(self) -> tuple[Outcome, ...]:
        return tuple(o for o in self.outcomes if o.status is Status.DECLINED and not o.suppressed)


def get(name: str) -> ConfigEdit:
    """The config edit called ``name``. Raises :class:`LookupError` for an unknown one."""
    edit = defined(_MODULES[name], ConfigEdit) if name in _MODULES else None
    if edit is None:
        raise LookupError(f"no config edit is called {name!r}; known: {', '.join(names())}")
    return edit


def names() -> list[str]:
    """Every config edit's name: those of the modules of this package that define one."""
    return [name for name, module in _MODULES.items() if defined(module, ConfigEdit) is not None]


def run(
    text: bytes | str,
    recipe: Recipe | str,
    seq_length: int,
    *,
    facts: ModelFacts | None = None,
    skip: Iterable[str] = (),
) -> ConfigResult:
    """Apply a recipe's config edits to one config.json.

    ``seq_length`` is the export length in tokens. ``facts`` are those of the unpatched config.json and its
    configuration class: give them when ``text`` may be patched already or leaves keys to that class.
    Otherwise they are read from ``text``, silent keys as upstream has them. Every edit decides on the config
    as it came. Raises :class:`ConfigError` when ``text`` is not one JSON object.
    """
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    data = text.encode() if isinstance(text, str) else text
    config = read(data)
    if facts is None:
        facts = ModelFacts.from_config(config.values())
    context = ConfigContext(seq_length, facts)
    skipped = set(skip)
    outcomes, edited = [], config
    for name in chosen.config:
        for decision in get(name).decide(config, context):
            key, line = decision.key, config.line(decision.key)
            label = f"config:{key}"
            status, reason, suppressed = decision.status, decision.reason, False
            if status in (Status.APPLIED, Status.DECLINED) and {name, label} & skipped:
                status, reason, suppressed = Status.DECLINED, "skipped on request", True
            if status is Status.APPLIED:
                edited = edited.with_value(key, decision.value)
            outcomes.append(Outcome(label, status, reason, line, line, "config.json", suppressed))
    return ConfigResult(edited.encode(), tuple(outcomes), edited is not config)
