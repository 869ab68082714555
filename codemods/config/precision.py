"""``precision``: bf16, and only bf16."""

from __future__ import annotations

from collections.abc import Iterator

from codemods.config.base import ConfigContext, ConfigEdit, Decision, set_to
from codemods.config.text import ConfigText
from codemods.framework.base import Example, Status


class Precision(ConfigEdit):
    """Say bf16, so that no revision picks a precision by looking at the machine.

    Why
        With no flag set, upstream chooses bf16, fp16 or fp32 by the GPU it finds, and with two set it refuses
        to load. bf16 is what the checkpoints and the nets' inputs and outputs are.
    """

    name = "precision"
    examples = (
        Example(
            "chosen by machine",
            '{"bf16": false, "fp16": false, "fp32": false}',
            '{"bf16": true, "fp16": false, "fp32": false}',
            Status.APPLIED,
        ),
        Example(
            "another one chosen",
            '{"bf16": false, "fp16": true}',
            '{"bf16": true, "fp16": false}',
            Status.APPLIED,
        ),
        Example("bf16 already", '{"bf16": true}', None, Status.ALREADY),
    )

    def decide(self, config: ConfigText, context: ConfigContext) -> Iterator[Decision]:
        yield set_to(config, "bf16", True, "the checkpoint's precision, whatever machine exports it")
        for key in ("fp16", "fp32"):
            if config.get(key):
                yield Decision(key, Status.APPLIED, "upstream refuses more than one precision flag", False)
