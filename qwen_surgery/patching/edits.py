"""The one place that calls the codemods: a checkout's files in, edited files and outcomes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from codemods.base import Outcome, Status

CONFIG = "config.json"


@dataclass(frozen=True)
class Edited:
    """What a recipe makes of a checkout's files. Both maps hold the modeling file and config.json."""

    files: dict[str, bytes]
    outcomes: dict[str, tuple[Outcome, ...]]

    def blocking(self) -> tuple[tuple[str, Outcome], ...]:
        """The (file, outcome) pairs that forbid writing: a required edit declined, or an edit failed."""
        return tuple(
            (name, outcome)
            for name, found in self.outcomes.items()
            for outcome in found
            if outcome.status in (Status.DECLINED, Status.FAILED)
        )


def apply(
    modeling: str, files: Mapping[str, bytes], recipe: str, seq_length: int, skip: Sequence[str] = ()
) -> Edited:
    """Run *recipe* on the file named *modeling* and on config.json, both in *files*; writes nothing."""
    import codemods.config
    import codemods.recipes

    import codemods

    chosen = codemods.recipes.load(recipe)
    source = codemods.run(files[modeling], chosen, skip=tuple(skip))
    config = codemods.config.run(files[CONFIG], chosen, seq_length)
    return Edited(
        {modeling: source.code, CONFIG: config.text},
        {modeling: tuple(source.outcomes), CONFIG: tuple(config.outcomes)},
    )
