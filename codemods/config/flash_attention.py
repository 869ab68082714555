"""``flash-attention``: keep FlashAttention out of the exported path."""

from __future__ import annotations

from collections.abc import Iterator

from codemods.config.base import ConfigContext, ConfigEdit, Decision, set_to
from codemods.config.text import ConfigText
from codemods.framework.base import Example, Status

KEY = "use_flash_attn"


class FlashAttention(ConfigEdit):
    """Switch FlashAttention off.

    Why
        Where the flash-attn package is installed, upstream's FlashAttention path takes over. It cannot be
        traced, and in early revisions it ignores attention_mask. The plain path computes the same attention.
    """

    name = "flash-attention"
    examples = (
        Example(
            "left to upstream", '{"use_flash_attn": "auto"}', '{"use_flash_attn": false}', Status.APPLIED
        ),
        Example("off", '{"use_flash_attn": false}', None, Status.ALREADY),
    )

    def decide(self, config: ConfigText, context: ConfigContext) -> Iterator[Decision]:
        was = config.get(KEY, "not given")
        yield set_to(
            config, KEY, False, f"only the plain attention path can be traced; was {str(was).lower()}"
        )
