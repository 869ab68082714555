"""Families whose code is part of transformers: what Qwen2, Qwen3 and those like them have in common.

Such a checkout holds no Python. Its layers are those of the installed transformers' own modeling file, which
is read and never written to. From release to release the layer takes its angles and its cache in another way;
:class:`DecoderDriver` finds out which by the layer's own arguments.
"""

from __future__ import annotations

import inspect
import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from codemods.analysis.decoder import stage
from codemods.config.facts import ModelFacts
from codemods.config.text import ConfigError
from qwen_surgery.errors import Refused
from qwen_surgery.families.family import Anatomy, Family, LayerDriver, Shapes, class_of, states_of, whole
from qwen_surgery.nets import Geometry

if TYPE_CHECKING:
    import types

    import torch
    from torch import nn

#: What releases call the layer's and the model's argument for the cache, the newest first.
_CACHES = ("cache", "past_key_values", "past_key_value")
#: Kinds of rotary scaling that give every position one angle, whatever the prompt's length.
_FIXED = ("default", "linear", "yarn", "llama3")
#: The same up to the trained length only.
_FIXED_WITHIN_TRAINED = ("dynamic",)
_WIDTHS = {"head_dim": ("head_dim",), "kv_heads": ("num_key_value_heads",)}
_RECIPES = {"static": "heads-last"}


class DecoderFamily(Family):
    """A decoder of transformers: q, k and v projections, RMS norms and a gated MLP of three matrices.

    ``rotary_class`` is the modeling file's class of angles.
    """

    trained = "max_position_embeddings"
    anatomy = Anatomy(body="model", table="embed_tokens", layers="layers", norm="norm")
    ignored = re.compile(r"\.rotary_emb\.inv_freq$")
    widths = _WIDTHS
    recipes = _RECIPES
    rotary_class: str

    def further_sizes(self, facts: ModelFacts, sizes: Mapping[str, int]) -> dict[str, int]:
        heads, kv_heads = sizes["heads"], facts.get("num_key_value_heads") or sizes["heads"]
        if heads % whole(kv_heads, "num_key_value_heads"):
            raise ConfigError(f"{heads} heads are not a multiple of {kv_heads} heads of keys and values")
        return {
            "head_dim": self.head_dim(facts, sizes),
            "kv_heads": kv_heads,
            "mlp_width": sizes["intermediate"],
        }

    def head_dim(self, facts: ModelFacts, sizes: Mapping[str, int]) -> int:
        """Numbers in a head; raises ConfigError when config.json makes no whole number of them."""
        hidden, heads = sizes["hidden"], sizes["heads"]
        if hidden % heads:
            raise ConfigError(f"hidden size {hidden} is not a multiple of {heads} heads")
        return hidden // heads

    def compiled_facts(self, facts: ModelFacts) -> dict[str, Any]:
        known = {name: facts[name] for name in self.compiled_in if name != "rope"}
        return {**known, "rope": rope_of(facts.given), "trained_length": facts.trained_length}

    def window(self, facts: ModelFacts, geometry: Geometry) -> int | None:
        kinds = facts.given.get("layer_types")
        slides = facts["use_sliding_window"] or "sliding_attention" in (kinds or ())
        if not slides or not (kinds or geometry.layers > facts["max_window_layers"]):
            return None
        found = facts.given.get("sliding_window", 4096)
        return None if found is None else whole(found, "sliding_window")

    def refuse(self, facts: ModelFacts, geometry: Geometry) -> None:
        """A window of attention shorter than the export length closes keys that a net leaves open; angles
        that follow a prompt's length fit no table."""
        window = self.window(facts, geometry)
        if window is not None and window <= geometry.seq_length:
            raise Refused(
                f"config.json slides a window of {window} tokens over attention, and the export length is "
                f"{geometry.seq_length}: a net sees all of it",
                hint=f"use --seq-length {window - 1} or less",
            )
        rope = rope_of(facts.given)
        kind, trained = rope["rope_type"], facts.trained_length
        if kind in _FIXED_WITHIN_TRAINED and geometry.seq_length > trained:
            raise Refused(
                f"export length {geometry.seq_length} is above the trained length {trained} and the rotary "
                f"scaling is {kind}: its angles then depend on each prompt's length, which a static net "
                "cannot follow",
                hint=f"use --seq-length {trained} or less",
            )
        if kind not in (*_FIXED, *_FIXED_WITHIN_TRAINED):
            raise Refused(
                f"config.json asks for rotary scaling {kind!r:.100}, which is not known to give each "
                "position one angle",
                hint=f"known: {', '.join((*_FIXED, *_FIXED_WITHIN_TRAINED))}",
            )
        if facts["hidden_act"] not in ("silu", "swish"):
            raise Refused(f"config.json's hidden_act is {facts['hidden_act']!r:.100}, the nets take silu")

    @abstractmethod
    def biased(self, facts: ModelFacts) -> tuple[str, ...]:
        """The projections of attention that have a bias, among ``q k v o``."""

    def norms_of_heads(self, geometry: Geometry) -> Shapes:
        """Slot -> shape of the norms of single heads, where there are any."""
        return {}

    def layer_shapes(self, geometry: Geometry, facts: ModelFacts) -> Shapes:
        hidden, width = geometry.hidden, geometry.mlp_width
        queries, others = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
        rows = {"q": (queries, hidden), "k": (others, hidden), "v": (others, hidden), "o": (hidden, queries)}
        shapes: Shapes = {"input_layernorm.weight": (hidden,)}
        for name, shape in rows.items():
            shapes[f"self_attn.{name}_proj.weight"] = shape
            if name in self.biased(facts):
                shapes[f"self_attn.{name}_proj.bias"] = shape[:1]
        shapes |= self.norms_of_heads(geometry)
        return shapes | {
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (width, hidden),
            "mlp.up_proj.weight": (width, hidden),
            "mlp.down_proj.weight": (hidden, width),
        }

    def era(self, code: bytes) -> str:
        return stage(code, self.layer_class)

    def may_be_modeling(self, code: bytes) -> bool:
        return f"class {self.layer_class}(".encode() in code

    def config(self, module: types.ModuleType, values: Mapping[str, Any]) -> Any:
        config = class_of(module, self.config_class)(**values)
        meant, said = rope_of(vars(config)), rope_of(values)
        if any(meant.get(key) != value for key, value in said.items()):
            raise Refused(
                f"config.json says the rotary angles are {said}, the installed transformers makes them "
                f"{meant}",
                hint="install a transformers of the release that wrote this config.json, or a newer one",
            )
        if meant["rope_type"] != "default" and not hasattr(module, "ROPE_INIT_FUNCTIONS"):
            raise Refused(
                f"{self.modeling} of the installed transformers does not know rotary scaling "
                f"({meant['rope_type']}): it would leave it out silently",
                hint="install transformers 4.45 or newer",
            )
        config._attn_implementation = "eager"
        return config

    def layer(self, module: types.ModuleType, config: Any) -> nn.Module:
        return class_of(module, self.layer_class)(config, 0).eval()

    def norm(self, module: types.ModuleType, config: Any) -> nn.Module:
        return class_of(module, self.norm_class)(config.hidden_size, eps=config.rms_norm_eps).eval()

    def tables(
        self, module: types.ModuleType, config: Any, layer: nn.Module, seq_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attention: Any = layer.self_attn
        rotary = getattr(attention, "rotary_emb", None)
        if rotary is None:
            rotary = class_of(module, self.rotary_class)(config=config).eval()
        return tables(rotary, seq_length)

    def driver(self, module: types.ModuleType, config: Any, layer: nn.Module) -> LayerDriver:
        return DecoderDriver(layer)

    def whole_step(self, run: nn.Module, ids: torch.Tensor, past: Any) -> tuple[Any, Any]:
        name = _cache_argument(run)
        result = run(input_ids=ids, use_cache=True, return_dict=True, **{name: past})
        return result, result[name]

    def units(
        self, output: Any, given: Mapping[str, Any], i: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        return None if cache is None else _units(cache, i)


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What *config* says of its rotary angles, in one form for all releases' spellings.

    ``rope_theta`` is the base, ``rope_type`` the kind of scaling; the rest are the scaling's own parameters.
    Raises ConfigError when it makes no sense.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"rope_scaling is {given!r:.100}, not an object")
    rope = {key: value for key, value in given.items() if key != "type" and value is not None}
    rope.setdefault("rope_type", given.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    rope["rope_theta"] = float(rope["rope_theta"])
    return rope


def tables(rotary: nn.Module, seq_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions 0..S-1 from a release's own class, float32 [S, d] each."""
    import torch

    any_states = torch.zeros(1)
    with torch.no_grad():
        if "position_ids" in inspect.signature(rotary.forward).parameters:
            cos, sin = rotary(any_states, torch.arange(seq_length)[None])
        else:
            cos, sin = rotary(any_states, seq_len=seq_length)
    return cos.reshape(-1, cos.shape[-1])[:seq_length].float(), sin.reshape(-1, sin.shape[-1])[
        :seq_length
    ].float()


def _cache_argument(module: nn.Module) -> str:
    """What *module*'s forward calls its cache; raises Refused when it takes none."""
    names = inspect.signature(module.forward).parameters
    found = next((name for name in _CACHES if name in names), None)
    if found is None:
        raise Refused(
            f"{type(module).__name__} takes no cache under any of the names {', '.join(_CACHES)}",
            hint="please report the release",
        )
    return found


def _units(cache: Any, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All units of K and V that *cache*, one of transformers', holds for layer *i*: [1, P + L, n, d] each."""
    if hasattr(cache, "layers"):
        key, value = cache.layers[i].keys, cache.layers[i].values
    else:
        key, value = cache.key_cache[i], cache.value_cache[i]
    return key.transpose(1, 2), value.transpose(1, 2)


class NewUnits:
    """What a layer is given for a cache: it joins the history and keeps the new units, [1, L, n, d] each.

    A layer hands heads first, [1, n, L, d], and wants that back.
    """

    def __init__(self, history: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self._history = history
        self.new: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        self.new = (key.transpose(1, 2), value.transpose(1, 2))
        if self._history is None:
            return key, value
        joined = (torch.cat(pair, dim=1) for pair in zip(self._history, self.new, strict=True))
        key, value = (units.transpose(1, 2) for units in joined)
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        """Units in the history."""
        return 0 if self._history is None else int(self._history[0].shape[1])

    def get_usable_length(self, *_: Any) -> int:
        """The same, as releases before 4.45 ask for it."""
        return self.get_seq_length()


class _Rows:
    """Stands for a table of angles that a layer indexes by its position ids."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows

    def __getitem__(self, _ids: Any) -> torch.Tensor:
        return self._rows


class DecoderDriver(LayerDriver):
    """One decoder layer of any release.

    Angles are looked up in tables. Newer layers take them as an argument; in older ones attention asks its
    own ``rotary_emb`` for tables and picks the rows itself: that gets the rows.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._cache = _cache_argument(layer)
        self._pair = "position_embeddings" in inspect.signature(layer.forward).parameters
        self._current: Any = None
        if not self._pair:
            self._answer_inside(layer)

    def _answer_inside(self, layer: nn.Module) -> None:
        from torch import nn

        driver = self

        class Rows(nn.Module):
            def forward(self, *_args: Any, **_kwargs: Any) -> Any:
                return driver._current

        attention: Any = layer.self_attn
        attention.rotary_emb = Rows()

    def run(
        self,
        layer: nn.Module,
        states: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        history: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from torch.nn import functional

        ids, *angles = positions
        cos, sin = (functional.embedding(ids, table) for table in angles)
        self._current = (_Rows(cos), _Rows(sin))
        cache = NewUnits(history)
        given: dict[str, Any] = {"position_embeddings": (cos, sin)} if self._pair else {}
        given |= {self._cache: cache, "position_ids": ids, "attention_mask": mask, "use_cache": True}
        output = layer(states, **given)
        if cache.new is None:
            raise Refused(f"{type(layer).__name__} gives its cache no new units")
        return states_of(output), *cache.new
