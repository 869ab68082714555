"""What the model does around its layers is read from its source: known, never taken here, or declined."""

from __future__ import annotations

import pytest

from codemods.config.facts import ModelFacts
from codemods.framework.base import Outcome, Status
from codemods.framework.registry import get
from codemods.framework.runner import run_rules
from golden.eras import ERAS, modeling_source
from tests.twin.forks import FORKS, Fork

#: What only running tells: a call of the layers' own class from outside, and what generation hands in.
UNREAD = {"a late layer acts on its index", "generation forgets"}
_DROP = "        hidden_states = self.drop(hidden_states)\n        presents"
_STATES = "            hidden_states, *rest = block(\n"


def read(text: str, seq_length: int = 512, **config: object) -> list[Outcome]:
    """The outcomes on *text* of a model of 24 layers that was trained at 8,192 tokens."""
    facts = ModelFacts.from_config({"num_hidden_layers": 24, "hidden_size": 2048, **config})
    result = run_rules(text.encode(), [get("model-forward")], sizes=facts.for_reading(seq_length))
    assert not result.changed and not result.failed
    return list(result.outcomes)


def declined(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.status is Status.DECLINED]


def edited(*edits: tuple[str, str], era: str = "sdpa") -> str:
    text = modeling_source(era)
    for before, after in edits:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


def before_layers(*lines: str) -> str:
    """A model that does *lines* between its embedding and its layers."""
    return edited((_DROP, "".join(f"        {line}\n" for line in lines) + _DROP))


@pytest.mark.parametrize("seq_length", [16, 512, 8192])
@pytest.mark.parametrize("era", ERAS)
def test_upstream_s_own_forms_are_known(era: str, seq_length: int) -> None:
    """A reading that declines upstream's own code would stop every user."""
    found = read(modeling_source(era), seq_length)
    assert not declined(found)
    assert {outcome.where for outcome in found} >= {"QWenModel.forward", "QWenLMHeadModel.forward"}


@pytest.mark.parametrize("fork", FORKS, ids=lambda fork: fork.name)
def test_forks_are_declined_with_their_line(fork: Fork) -> None:
    """What a fork does besides is named without running it; the twin has the two that only running shows."""
    found = declined(read(edited(*fork.edits), fork.seq_length, num_hidden_layers=fork.layers))
    assert bool(found) == (fork.name not in UNREAD)
    assert all(outcome.line and outcome.reason for outcome in found)


SIZED = {
    "kv_seq_len > 500": ({}, True),
    "kv_seq_len > 512": ({}, False),
    "kv_seq_len >= 512": ({}, True),
    "self.config.num_hidden_layers > 20": ({}, True),
    "self.config.num_hidden_layers > 24": ({}, False),
    "self.config.hidden_size > 4096": ({}, False),
    "self.embed_dim == 2048": ({}, True),
    "self.config.scale_from < kv_seq_len": ({"scale_from": 4096}, False),
    "self.config.scale_from + 0 < kv_seq_len": ({"scale_from": 256}, True),
    "new_length == 1 and kv_seq_len > 600": ({}, False),
    "self.seq_length < 4096": ({}, False),
}


@pytest.mark.parametrize("test", SIZED)
def test_a_branch_on_sizes_is_judged_at_the_real_ones(test: str) -> None:
    """The twin is tiny: what starts at 4,000 tokens, or at 5,120 wide, it cannot see."""
    config, taken = SIZED[test]
    found = read(before_layers(f"if {test}:", "    hidden_states = hidden_states * 2.0"), **config)
    assert bool(declined(found)) == taken
    never = [outcome for outcome in found if f"`{test}`" in outcome.reason and outcome not in declined(found)]
    assert bool(never) == (not taken), "a branch that is not taken is listed"
    assert all("never taken at these sizes" in outcome.reason and outcome.line for outcome in never)


def test_an_unknown_threshold_is_declined() -> None:
    found = declined(read(before_layers("if kv_seq_len > self.config.unheard_of:", "    hidden_states *= 2")))
    assert found and "self.config.unheard_of" in found[0].reason


@pytest.mark.parametrize(("layer", "taken"), [(20, True), (23, True), (24, False)])
def test_a_layer_s_index_is_judged_by_how_many_there_are(layer: int, taken: bool) -> None:
    loop = "for block, layer_past in zip(self.h, past_key_values)"
    own = f"            if i == {layer}:\n                hidden_states = hidden_states * 1.5\n"
    numbered = edited(
        (loop, "for i, (block, layer_past) in enumerate(zip(self.h, past_key_values))"),
        (_STATES, own + _STATES),
    )
    assert bool(declined(read(numbered))) == taken


HARMLESS = (
    "logger.warning('a long prompt: %d', kv_seq_len)",
    "mean = hidden_states.mean().item()",
    "hidden_states = hidden_states.to(self.ln_f.weight.device).contiguous()",
    "hidden_states = hidden_states + 0",
    "self.seen = kv_seq_len",
    "if self.training:\n            hidden_states = hidden_states * 2.0",
    "count = len(self.h)",
)


@pytest.mark.parametrize("line", HARMLESS)
def test_what_does_not_come_back_is_free(line: str) -> None:
    """Ordinary forks log, measure and move tensors about: none of that changes a number."""
    assert not declined(read(before_layers(line)))


HARMFUL = (
    "hidden_states[:, 0] = 0.0",
    "hidden_states.mul_(2.0)",
    "hidden_states *= 1.5",
    "hidden_states = hidden_states.flip(1)",
    "hidden_states = self.wte.weight[input_ids] * 2.0",
    "same = hidden_states; same[:, 0] = 0.0",
    "while kv_seq_len > 100:\n            hidden_states = hidden_states / 2\n            break",
    "try:\n            hidden_states = self.adapter(hidden_states)\n        except AttributeError:\n"
    "            pass",
    "hidden_states = hidden_states if (input_ids > 5).all() else hidden_states * 2.0",
    "hidden_states = (lambda x: x + 1)(hidden_states)",
    "def more(x):\n            return x * 2\n        hidden_states = more(hidden_states)",
    "hidden_states = self.scale(hidden_states)",
    "steer(hidden_states)",
)


@pytest.mark.parametrize("line", HARMFUL)
def test_what_comes_back_changed_is_declined(line: str) -> None:
    assert declined(read(before_layers(line)))


def test_a_method_of_the_model_is_read_too() -> None:
    """What moves into a helper is the same as before, and what hides there is found."""
    for more, taken in (("", False), (" * 2", True)):
        helper = f"    def lift(self, x):\n        return x.contiguous(){more}\n\n"
        text = before_layers("hidden_states = self.lift(hidden_states)")
        text = text.replace("    def get_ntk_alpha(", helper + "    def get_ntk_alpha(")
        assert bool(declined(read(text))) == taken


def test_beyond_the_trained_length_the_base_changes() -> None:
    """Dynamic NTK acts there: no net has it."""
    found = declined(read(modeling_source("sdpa"), 16384))
    assert any("rotary base" in outcome.reason for outcome in found)
    assert not declined(read(modeling_source("sdpa"), 16384, use_dynamic_ntk=False))


def test_a_comment_takes_the_responsibility() -> None:
    text = before_layers("# qwen-surgery: skip[model-forward]", "hidden_states = hidden_states * 2.0")
    found = declined(read(text))
    assert found and all(outcome.suppressed for outcome in found)
