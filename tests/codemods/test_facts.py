"""What config.json means: given keys, silent keys by the checkout's own class, else by upstream's."""

from __future__ import annotations

from typing import Any

import pytest

from codemods.analysis.configuration import defaults
from codemods.config import ConfigError, ModelFacts, run

HEAD = "from transformers import PretrainedConfig\n"
WAYS = {
    "keywords": """
class QWenConfig(PretrainedConfig):
    def __init__(self, vocab_size=7, seq_length=64, *, use_dynamic_ntk=False, rotary_pct=-1.0, **kwargs):
        super().__init__(**kwargs)
""",
    "taken from the keywords": """
class QWenConfig(transformers.PretrainedConfig):
    def __init__(self, **kwargs):
        self.vocab_size = kwargs.pop("vocab_size", 7)
        self.seq_length = kwargs.get("seq_length", 64)
        self.use_dynamic_ntk = kwargs.pop("use_dynamic_ntk", False)
        self.rotary_pct = kwargs.pop("rotary_pct", -1.0)
        super().__init__(**kwargs)
""",
    "a table": """
TABLE = {"vocab_size": 7, "seq_length": 64, "use_dynamic_ntk": False, "rotary_pct": -1.0}
class QWenConfig(PretrainedConfig):
    def __init__(self, **settings):
        for name, value in TABLE.items():
            setattr(self, name, settings.pop(name, value))
        super().__init__(**settings)
""",
}


@pytest.mark.parametrize("way", WAYS)
def test_defaults_are_read_from_the_class_without_running_it(way: str) -> None:
    found = defaults(HEAD + "raise SystemExit('executed')\n" + WAYS[way])
    assert found == {"vocab_size": 7, "seq_length": 64, "use_dynamic_ntk": False, "rotary_pct": -1.0}


def test_other_classes_and_computed_values_say_nothing() -> None:
    assert defaults("class Other:\n    def __init__(self, seq_length=64): pass\n") == {}
    computed = (
        HEAD + "class A(PretrainedConfig):\n    def __init__(self, seq_length=2 * N, no_bias=False): pass\n"
    )
    assert defaults(computed) == {"no_bias": False}


def test_a_given_key_wins_over_the_class_and_the_class_over_upstream() -> None:
    source = HEAD + WAYS["keywords"]
    given = ModelFacts.from_config({"seq_length": 512, "use_dynamic_ntk": True}, source)
    assert (given.trained_length, given.dynamic_ntk, given.logn_attention) == (512, True, True)
    silent = ModelFacts.from_config({}, source)
    assert (silent.trained_length, silent.dynamic_ntk, silent.logn_attention) == (64, False, True)
    alone = ModelFacts.from_config({})
    assert (alone.trained_length, alone.dynamic_ntk, alone.logn_attention) == (8192, True, True)


@pytest.mark.parametrize("source", [None, b"", b"class (", b"\xff\xfe\x00"])
def test_a_class_that_cannot_be_read_leaves_upstreams_defaults(source: bytes | None) -> None:
    assert ModelFacts.from_config({}, source) == ModelFacts.from_config({})


def test_written_out_a_config_needs_no_class() -> None:
    facts = ModelFacts.from_config({"vocab_size": 9}, HEAD + WAYS["keywords"])
    alone = ModelFacts.from_config(facts.written_out())
    assert (alone.trained_length, alone.dynamic_ntk, alone["rotary_pct"]) == (64, False, -1.0)
    complete = {**facts.written_out(), "zeta": None}
    assert ModelFacts.from_config(complete).written_out() == complete


@pytest.mark.parametrize("value", [None, "long", 0, -1, 2.5, True])
def test_a_trained_length_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="not a number of tokens"):
        ModelFacts.from_config({"seq_length": value})


def test_config_edits_decide_by_the_facts_where_the_text_is_silent() -> None:
    """Where the class has NTK off, a longer export needs no NTK; a silent config alone has it on."""
    off = ModelFacts.from_config({"seq_length": 64}, HEAD + WAYS["keywords"])
    declined = {o.codemod for o in run('{"seq_length": 64}', "static", 128, facts=off).declined}
    assert declined == {"config:use_logn_attn"}
    alone = {o.codemod for o in run('{"seq_length": 64}', "static", 128).declined}
    assert alone == {"config:use_logn_attn", "config:use_dynamic_ntk"}
