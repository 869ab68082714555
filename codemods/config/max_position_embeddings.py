"""``max-position-embeddings``: no table longer than the export length."""

from __future__ import annotations

from collections.abc import Iterator

from codemods.config.base import ConfigContext, ConfigEdit, Decision, set_to
from codemods.config.text import ConfigText
from codemods.framework.base import Example, Status

KEY = "max_position_embeddings"


class MaxPositionEmbeddings(ConfigEdit):
    """Set max_position_embeddings to the export length.

    Why
        Early revisions allocate a square causal mask of this size, in the model or in every layer.
    """

    name = "max-position-embeddings"
    examples = (
        Example(
            "a trained length",
            '{"max_position_embeddings": 8192}',
            '{"max_position_embeddings": 512}',
            Status.APPLIED,
        ),
        Example("the export length", '{"max_position_embeddings": 512}', None, Status.ALREADY),
    )

    def decide(self, config: ConfigText, context: ConfigContext) -> Iterator[Decision]:
        was = config.get(KEY, "not given")
        yield set_to(config, KEY, context.seq_length, f"the export length; was {was}")
