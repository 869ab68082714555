"""``dynamic-ntk``: switch off a change of the rotary base that no exported length reaches."""

from __future__ import annotations

from collections.abc import Iterator

from codemods.config.base import ConfigContext, ConfigEdit, Decision, switch_off_within_trained
from codemods.config.text import ConfigText
from codemods.framework.base import Example, Status

KEY = "use_dynamic_ntk"


class DynamicNtk(ConfigEdit):
    """Switch dynamic NTK off for lengths at which it does nothing.

    Why
        Dynamic NTK raises the rotary base when a prompt is longer than seq_length. With seq_length set to the
        export length it would be taken relative to the wrong length. Up to the trained length the unpatched
        model's factor is exactly 1: off is exact.

    Declines
        - the export length is above the trained length and NTK is on: the base then depends on each prompt's
          length, which the decode net's inputs do not carry
    """

    name = "dynamic-ntk"
    examples = (
        Example(
            "within the trained length",
            '{"seq_length": 2048, "use_dynamic_ntk": true}',
            '{"seq_length": 2048, "use_dynamic_ntk": false}',
            Status.APPLIED,
        ),
        Example("off", '{"seq_length": 2048, "use_dynamic_ntk": false}', None, Status.ALREADY),
        Example(
            "beyond the trained length", '{"seq_length": 256, "use_dynamic_ntk": true}', None, Status.DECLINED
        ),
    )

    def decide(self, config: ConfigText, context: ConfigContext) -> Iterator[Decision]:
        needed = (
            "the rotary base then depends on the prompt's length, which the decode net's inputs do not carry"
        )
        yield switch_off_within_trained(config, KEY, context, needed)
