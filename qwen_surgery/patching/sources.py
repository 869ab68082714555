"""A checkout's files without and with the edits of a recipe, made in memory: what an export starts from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from codemods.config.facts import CONFIG, ModelFacts
from codemods.config.text import read
from codemods.framework.base import Outcome
from codemods.framework.recipes import UnknownRecipe
from qwen_surgery import families
from qwen_surgery.checkout import DEFAULT_RECIPE, DEFAULT_SEQ_LENGTH, Checkout
from qwen_surgery.errors import Refused, Usage
from qwen_surgery.families.family import Family
from qwen_surgery.patching import plan, write
from qwen_surgery.patching.receipt import Receipt


@dataclass(frozen=True)
class Sources:
    """A checkout's Python and config files, by name, without and with the edits; nothing here was written.

    ``reference`` is the unpatched upstream text (from the receipt's originals when the checkout is patched in
    place), ``patched`` the same files with *recipe* applied for *seq_length*. ``outcomes`` are all sites of
    all files. ``modeling`` is the name of the modeling file, ``lent`` says that it is an installed package's.
    """

    modeling: str
    reference: dict[str, bytes]
    patched: dict[str, bytes]
    recipe: str
    seq_length: int
    outcomes: tuple[Outcome, ...]
    receipt: Receipt | None
    lent: bool = False

    @classmethod
    def of(
        cls, checkout: Checkout, recipe: str = DEFAULT_RECIPE, seq_length: int = DEFAULT_SEQ_LENGTH
    ) -> Sources:
        """The files without and with *recipe*, patched in memory; Refused when an edit is declined."""
        if write.pending(checkout.path):
            raise Refused(
                f"an interrupted patch or restore of {checkout.path} waits to be finished",
                hint="run `qwen-surgery patch` or `qwen-surgery restore` on it first",
            )
        try:
            made = plan.make(checkout, recipe, seq_length)
        except UnknownRecipe as error:
            raise Usage(str(error)) from error
        plan.refuse_declined(made)
        return cls.made(made)

    @classmethod
    def made(cls, made: plan.Patch) -> Sources:
        """The files of a patch that is not written."""
        return cls(
            modeling=made.checkout.modeling,
            reference=made.reference,
            patched=made.result,
            recipe=made.recipe,
            seq_length=made.seq_length,
            outcomes=tuple(o for found in made.outcomes.values() for o in found),
            receipt=made.receipt,
            lent=made.checkout.lent,
        )

    @cached_property
    def family(self) -> Family:
        """The family that the unpatched config.json is of."""
        return families.of(read(self.reference[CONFIG]).values())

    @cached_property
    def facts(self) -> ModelFacts:
        """What the unpatched config.json means."""
        return self.family.facts(self.reference)
