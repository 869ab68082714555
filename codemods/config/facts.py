"""What config.json means: the one place that knows a key's older names and the value of a silent key.

A key that config.json does not mention has the default of the checkout's own configuration class, read as
source and never executed; where that cannot be read, the default of upstream's class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from codemods.analysis import configuration
from codemods.analysis.model_parts import ModelSizes
from codemods.analysis.source import SourceError
from codemods.config.text import ConfigError

CONFIG = "config.json"
#: The defaults of upstream's configuration_qwen.py. (Its class has no ``seq_length``: the first release's.)
UPSTREAM: dict[str, Any] = {
    "seq_length": 8192,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "no_bias": True,
    "tie_word_embeddings": False,
}
#: Keys that only the oldest releases have, with their class's defaults.
_OLDEST: dict[str, Any] = {"pos_emb": "rotary"}
#: Size of the model -> the config.json names it went by, the newest first. The oldest are GPT-2's.
SIZES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "intermediate": ("intermediate_size", "ffn_hidden_size"),
    "vocab": ("vocab_size", "padded_vocab_size"),
}


@dataclass(frozen=True)
class ModelFacts:
    """The meaning of one config.json: what it gives, and the ``defaults`` of keys it does not mention.

    ``upstream`` are the keys that upstream's own configuration class knows, with its defaults; ``trained`` is
    the one that holds the length the model was trained for.
    """

    given: Mapping[str, Any]
    defaults: Mapping[str, Any]
    upstream: Mapping[str, Any] = field(default_factory=lambda: UPSTREAM)
    trained: str = "seq_length"

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        configuration_source: bytes | str | None = None,
        upstream: Mapping[str, Any] = UPSTREAM,
        trained: str = "seq_length",
    ) -> ModelFacts:
        """The facts of *config*, with silent keys as the class in *configuration_source* has them, else as
        *upstream* says.

        Raises :class:`ConfigError` for a trained length that is no number of tokens.
        """
        facts = cls(config, {**upstream, **_own_defaults(configuration_source)}, upstream, trained)
        tokens = facts[trained]
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise ConfigError(f"{trained} is {tokens!r}, not a number of tokens")
        return facts

    def __getitem__(self, key: str) -> Any:
        """The value of *key* for the model, given or not."""
        return self.given[key] if key in self.given else self.defaults[key]

    def get(self, key: str) -> Any:
        """The value of *key* for the model; None where neither config.json nor a class gives one."""
        return self.given.get(key, self.defaults.get(key))

    @property
    def trained_length(self) -> int:
        """Tokens up to which nothing acts that depends on a prompt's length (NTK, LogN)."""
        return int(self[self.trained])

    @property
    def dynamic_ntk(self) -> bool:
        return bool(self["use_dynamic_ntk"])

    @property
    def logn_attention(self) -> bool:
        return bool(self["use_logn_attn"])

    @property
    def tied(self) -> bool:
        """Whether the config lets the output layer share the embedding's tensor."""
        return bool(self["tie_word_embeddings"])

    def size(self, name: str) -> Any:
        """The size *name* (a key of :data:`SIZES`) that config.json gives; None where it gives none."""
        return next((self.given[key] for key in SIZES[name] if self.given.get(key) is not None), None)

    def for_reading(self, seq_length: int | None = None) -> ModelSizes:
        """What reading a model's forward needs to know, for an export of *seq_length* tokens (None: for every
        length up to the trained one). A size stands under each of its names."""
        sizes = {key: self.size(name) for name, keys in SIZES.items() for key in keys}
        known = {key: value for key, value in sizes.items() if value is not None}
        config = {**_OLDEST, **self.defaults, **known, **self.given}
        return ModelSizes(config, self.trained_length if seq_length is None else seq_length)

    def written_out(self) -> dict[str, Any]:
        """config.json with the silent keys of ``upstream`` said aloud: it needs no class to be read."""
        return {**self.given, **{key: self[key] for key in self.upstream if key not in self.given}}


def configuration_file(config: Mapping[str, Any]) -> str:
    """The file of the configuration class, as ``auto_map`` names it."""
    mapping = config.get("auto_map")
    named = mapping.get("AutoConfig") if isinstance(mapping, dict) else None
    if isinstance(named, str) and "." in named:
        return named.rpartition("--")[2].partition(".")[0] + ".py"
    return "configuration_qwen.py"


def _own_defaults(source: bytes | str | None) -> dict[str, Any]:
    if source is None:
        return {}
    try:
        return configuration.defaults(source)
    except SourceError:
        return {}
