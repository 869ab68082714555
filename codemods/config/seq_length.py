"""``seq-length``: the export length."""

from __future__ import annotations

from collections.abc import Iterator

from codemods.config.base import ConfigContext, ConfigEdit, Decision, set_to
from codemods.config.text import ConfigText
from codemods.framework.base import Example, Status


class SeqLength(ConfigEdit):
    """Set seq_length to the export length.

    Why
        The exported nets have one static length; everything that reads the config must agree on it.
    """

    name = "seq-length"
    examples = (
        Example("a trained length", '{"seq_length": 2048}', '{"seq_length": 512}', Status.APPLIED),
        Example("the export length", '{"seq_length": 512}', None, Status.ALREADY),
    )

    def decide(self, config: ConfigText, context: ConfigContext) -> Iterator[Decision]:
        was = config.get("seq_length", "not given")
        yield set_to(config, "seq_length", context.seq_length, f"the export length; was {was}")
