"""``logn-attention``: switch off a factor that is one at every exported position."""

from __future__ import annotations

from collections.abc import Iterator

from codemods.config.base import ConfigContext, ConfigEdit, Decision, switch_off_within_trained
from codemods.config.text import ConfigText
from codemods.framework.base import Example, Status

KEY = "use_logn_attn"


class LognAttention(ConfigEdit):
    """Switch LogN attention off for lengths at which it does nothing.

    Why
        LogN multiplies the query by log(position) / log(seq_length) beyond seq_length. The decode net's key
        is always S + 1 long, so with seq_length set to S it would scale every decode query by
        log(S + 1) / log(S). Up to the trained length the unpatched model's factor is exactly 1: off is exact.

    Declines
        - the export length is above the trained length and LogN is on: the factor is needed there
    """

    name = "logn-attention"
    examples = (
        Example(
            "within the trained length",
            '{"seq_length": 2048, "use_logn_attn": true}',
            '{"seq_length": 2048, "use_logn_attn": false}',
            Status.APPLIED,
        ),
        Example("off", '{"seq_length": 2048, "use_logn_attn": false}', None, Status.ALREADY),
        Example(
            "beyond the trained length", '{"seq_length": 256, "use_logn_attn": true}', None, Status.DECLINED
        ),
    )

    def decide(self, config: ConfigText, context: ConfigContext) -> Iterator[Decision]:
        needed = "LogN scales the query there by its position, which the nets' attention does not see"
        yield switch_off_within_trained(config, KEY, context, needed)
