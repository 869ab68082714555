"""The one place that calls the codemods: a checkout's files in, edited files and outcomes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from codemods.analysis.source import SourceError
from codemods.config.facts import CONFIG, ModelFacts
from codemods.config.text import read
from codemods.framework.base import Outcome, Status
from qwen_surgery import families
from qwen_surgery.errors import Refused, Usage
from qwen_surgery.families.family import Family

#: The recipes that ship with the program.
RECIPES = ("static", "documented")

__all__ = ["RECIPES", "Edited", "SourceError", "apply", "blocks", "era", "outcomes"]


def blocks(outcome: Outcome) -> bool:
    """Whether *outcome* forbids writing: failed, or required and declined without being asked to."""
    if outcome.status is Status.FAILED:
        return True
    return outcome.status is Status.DECLINED and outcome.required and not outcome.suppressed


@dataclass(frozen=True)
class Edited:
    """What a recipe makes of a checkout's files. Both maps hold the modeling file, then config.json."""

    files: dict[str, bytes]
    outcomes: dict[str, tuple[Outcome, ...]]
    notes: tuple[str, ...] = ()

    def blocking(self) -> tuple[tuple[str, Outcome], ...]:
        """The (file, outcome) pairs that forbid writing: a required edit declined, or an edit failed."""
        return tuple((name, o) for name, found in self.outcomes.items() for o in found if blocks(o))


def apply(
    modeling: str,
    files: Mapping[str, bytes],
    recipe: str,
    seq_length: int,
    skip: Sequence[str] = (),
    unpatched_config: bytes | None = None,
) -> Edited:
    """Run *recipe* on the file named *modeling* and on config.json, both in *files*; writes nothing.

    A family may have a recipe of its own for a name.

    *unpatched_config* is upstream's config.json when the one in *files* may be patched already: it says what
    the model is. Raises Refused when config.json cannot be edited.
    """
    import codemods
    import codemods.config
    from codemods.framework import registry

    source_skip = [name for name in skip if name in registry.names()]
    try:
        known = {**files, CONFIG: unpatched_config or files[CONFIG]}
        family = families.of(read(known[CONFIG]).values())
        facts, chosen = family.facts(known), family.recipe(recipe)
        config = codemods.config.run(files[CONFIG], chosen, seq_length, facts=facts, skip=skip)
        # An export beyond the trained length is declined by config.json's edits, with the plain reason.
        refused = any(blocks(one) for one in config.outcomes)
        sizes = facts.for_reading(min(seq_length, facts.trained_length) if refused else seq_length)
        source = codemods.run(files[modeling], chosen, skip=source_skip, sizes=sizes)
    except codemods.config.ConfigError as error:
        raise Refused(f"{CONFIG}: {error}") from None
    notes = tuple(
        f"{modeling}:{unused.line}: the comment skip[{unused.codemod}] suppresses nothing"
        for unused in source.unused_suppressions
    )
    return Edited(
        {modeling: source.code, CONFIG: config.text},
        {modeling: tuple(source.outcomes), CONFIG: tuple(config.outcomes)},
        notes,
    )


def outcomes(data: bytes, config: bytes | None, recipe: str, seq_length: int) -> tuple[Outcome, ...]:
    """The outcomes of *recipe* on one modeling file, and on the config.json beside it where there is one.

    A recipe that is not for the file's family has one outcome, declined.
    """
    import codemods
    import codemods.config
    from codemods.framework.recipes import UnknownRecipe

    family = families.of_code(data)
    assert family is not None
    try:
        chosen = family.recipe(recipe)
    except UnknownRecipe as error:
        return (Outcome("recipe", Status.DECLINED, str(error.args[0])),)
    if config is None:
        return tuple(codemods.run(data, chosen).outcomes)
    try:
        facts = family.facts_of(read(config).values())
        edited = codemods.config.run(config, chosen, seq_length, facts=facts).outcomes
        sizes = facts.for_reading(seq_length)
    except codemods.config.ConfigError as error:
        broken = Outcome("config:parse", Status.FAILED, str(error), where=CONFIG)
        return (*codemods.run(data, chosen).outcomes, broken)
    return (*codemods.run(data, chosen, sizes=sizes).outcomes, *edited)


def era(data: bytes) -> str:
    """The era of *data*, by its structure; '' when it is no known family's modeling code.

    Raises SourceError, which knows the line, when *data* does not parse.
    """
    family = families.of_code(data)
    return "" if family is None else family.era(data)


def warm() -> None:
    """Import everything that a run needs, before processes are forked."""
    from codemods.framework import registry

    for name in registry.names():
        registry.get(name)


def check_names(recipe: str, skip: Sequence[str], family: Family | None = None) -> None:
    """Raise Usage for a recipe that nobody provides or that is not *family*'s, and for a skip not in it."""
    from codemods.framework import recipes

    try:
        chosen = family.recipe(recipe) if family else recipes.load(recipe)
    except LookupError as error:
        raise Usage(str(error.args[0])) from None
    for name in skip:
        if name not in chosen.codemods and name not in _config_names(chosen.config):
            known = (*chosen.codemods, *chosen.config)
            raise Usage(f"--skip: recipe {recipe} has no edit {name!r}", hint=f"it has {', '.join(known)}")


def _config_names(edits: Sequence[str]) -> set[str]:
    return {label for name in edits for label in (name, *config_labels(name))}


def config_labels(name: str) -> tuple[str, ...]:
    """The ``config:<key>`` names under which the outcomes of the config edit called *name* appear."""
    import codemods.config
    from codemods.config.base import ConfigContext

    decisions = codemods.config.get(name).decide(read(b"{}"), ConfigContext(512, ModelFacts.from_config({})))
    return tuple(f"config:{decision.key}" for decision in decisions)
