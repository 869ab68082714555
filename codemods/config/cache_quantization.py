"""``cache-quantization``: refuse to change what a quantised cache computes."""

from __future__ import annotations

from collections.abc import Iterator

from codemods.config.base import ConfigContext, ConfigEdit, Decision
from codemods.config.text import ConfigText
from codemods.framework.base import Example, Status

KEY = "use_cache_quantization"


class CacheQuantization(ConfigEdit):
    """Decline a quantised key/value cache.

    Why
        The nets pass keys and values as bf16 tensors. A model that quantises its cache to 8 bits computes
        something else; switching the quantisation off silently would not reproduce it.

    Declines
        - use_cache_quantization is true
    """

    name = "cache-quantization"
    examples = (
        Example("not quantised", '{"use_cache_quantization": false}', None, Status.ALREADY),
        Example("not mentioned", '{"bf16": true}', None, Status.ABSENT),
        Example("quantised", '{"use_cache_quantization": true}', None, Status.DECLINED),
    )

    def decide(self, config: ConfigText, context: ConfigContext) -> Iterator[Decision]:
        by_default = context.facts.defaults.get(KEY, False)
        if KEY not in config.members and not by_default:
            yield Decision(KEY, Status.ABSENT, "the cache is not quantised")
        elif config.get(KEY, by_default):
            reason = (
                "the nets carry keys and values unquantised; set it to false to export the unquantised model"
            )
            yield Decision(KEY, Status.DECLINED, reason)
        else:
            yield Decision(KEY, Status.ALREADY, "is false")
