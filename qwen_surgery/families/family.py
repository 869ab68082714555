"""What a family of models is: everything that differs from one to another, in one place each.

A family is one module of this package that defines one subclass of :class:`Family`; nothing outside names a
family. What is here is true of every family this program can take: decoder layers of pre-norm attention and
a gated MLP, an embedding, a final norm and an output layer.
"""

from __future__ import annotations

import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codemods.config.facts import CONFIG, SIZES, ModelFacts, configuration_file
from codemods.config.text import ConfigError, read
from codemods.framework.recipes import BUILTIN, Recipe, UnknownRecipe, load
from qwen_surgery.errors import Refused
from qwen_surgery.nets import Geometry, Net, NetKind

if TYPE_CHECKING:
    import types

    import torch
    from torch import nn

Shapes = dict[str, tuple[int, ...]]
#: Our names of the weights outside the layers, the same in every family.
TABLE, NORM, HEAD = "wte.weight", "ln_f.weight", "lm_head.weight"


@dataclass(frozen=True)
class Anatomy:
    """What the parts of a whole model are called, in its code and so in its checkpoints.

    ``body`` is the attribute of the model that holds ``table`` (the embedding), ``layers`` and ``norm``;
    ``head`` is the output layer, beside the body.
    """

    body: str
    table: str
    layers: str
    norm: str
    head: str = "lm_head"

    @property
    def table_tensor(self) -> str:
        return f"{self.body}.{self.table}.weight"

    @property
    def head_tensor(self) -> str:
        return f"{self.head}.weight"

    def layer(self, i: int) -> str:
        """What the names of layer *i*'s tensors begin with."""
        return f"{self.body}.{self.layers}.{i}."

    @property
    def every_layer(self) -> str:
        """What the names of all layers' tensors begin with."""
        return f"{self.body}.{self.layers}."

    def tensor(self, net: Net, slot: str, *, tied: bool) -> str:
        """The checkpoint's name of the weight in *slot* of *net*. With *tied* the head is the table."""
        if net.layer is not None:
            return self.layer(net.layer) + slot
        if slot == HEAD:
            return self.table_tensor if tied else self.head_tensor
        return self.table_tensor if slot == TABLE else f"{self.body}.{self.norm}.weight"


class LayerDriver(ABC):
    """Runs one layer of a family by the contract of :mod:`qwen_surgery.nets`."""

    @abstractmethod
    def run(
        self,
        layer: nn.Module,
        states: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        history: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states [1, L, H] and the L new units of K and V [1, L, n, d].

        *positions* are the position ids int32 [1, L] and the tables of cosines and sines that they point
        into, [S, d] each; *mask* is additive, *history* the units before, [1, S, n, d] each.
        """


@dataclass(frozen=True)
class LayerStep:
    """What one layer of a whole model gave: states [1, L, H], and all units of K and V, [1, P + L, n, d]."""

    states: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class Family(ABC):
    """One family. The class attributes are its facts, the methods what takes more than a fact.

    ``model_types`` and ``architectures`` are what config.json calls it, ``modeling`` is the usual name of its
    modeling file; ``releases`` are its models as their makers spell them. ``upstream`` are the keys of its
    configuration class with their defaults, ``trained`` the one for the trained length. ``compiled_in`` are
    the keys that become instructions or tables of a net: each family has a set of its own. ``ignored``
    matches tensors that no code reads.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    modeling: str
    releases: tuple[str, ...]
    upstream: Mapping[str, Any]
    trained: str
    anatomy: Anatomy
    compiled_in: tuple[str, ...]
    ignored: re.Pattern[str]
    #: Classes of the modeling file: the configuration, the whole model, a layer, the final norm.
    config_class: str
    model_class: str
    layer_class: str
    norm_class: str
    #: What config.json calls the sizes that :data:`SIZES` has no names for.
    widths: Mapping[str, tuple[str, ...]] = {}
    #: The package whose relative imports the modeling code has; '' where the code comes with each checkout.
    home: str = ""
    #: The built-in recipes that are for its code: the name that is asked for -> the recipe's own.
    recipes: Mapping[str, str]

    # What config.json and the files say.

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether *config* is of this family."""
        kind, named = config.get("model_type"), config.get("architectures")
        if kind is not None:
            return kind in self.model_types
        return isinstance(named, list) and any(name in self.architectures for name in named)

    def facts(self, files: Mapping[str, bytes]) -> ModelFacts:
        """What config.json among *files* means; raises ConfigError when it makes no sense."""
        config = read(files[CONFIG]).values()
        return self.facts_of(config, files.get(configuration_file(config)))

    def facts_of(self, config: Mapping[str, Any], source: bytes | None = None) -> ModelFacts:
        """The same of a config.json already read; *source* is its own configuration class."""
        return ModelFacts.from_config(config, source, self.upstream, self.trained)

    def geometry(self, facts: ModelFacts, seq_length: int) -> Geometry:
        """The sizes of the model for an export length; raises ConfigError when config.json lacks one."""
        sizes = {size: whole(facts.size(size), " / ".join(names)) for size, names in SIZES.items()}
        return Geometry(seq_length=seq_length, **sizes, **self.further_sizes(facts, sizes))

    def recipe(self, name: str) -> Recipe:
        """The recipe *name*, as it is for this family.

        Raises UnknownRecipe for one that nobody provides and for one that edits other families' code.
        """
        if name in BUILTIN and name not in self.recipes:
            raise UnknownRecipe(
                f"recipe {name} is not for {self.title}; it takes {' and '.join(self.recipes)}"
            )
        return load(self.recipes.get(name, name))

    @abstractmethod
    def further_sizes(self, facts: ModelFacts, sizes: Mapping[str, int]) -> dict[str, int]:
        """``head_dim``, and whatever of :class:`Geometry` does not follow from *sizes*."""

    def window(self, facts: ModelFacts, geometry: Geometry) -> int | None:
        """How many tokens attention sees in a layer that sees the fewest; None where all see all before them.

        Raises ConfigError when it is no whole number.
        """
        return None

    @abstractmethod
    def refuse(self, facts: ModelFacts, geometry: Geometry) -> None:
        """Raise Refused, in one line, for a model or a length at which static nets cannot be exact."""

    @abstractmethod
    def layer_shapes(self, geometry: Geometry, facts: ModelFacts) -> Shapes:
        """Slot -> shape of every weight of a layer."""

    def weight_shapes(self, kind: NetKind, geometry: Geometry, facts: ModelFacts) -> Shapes:
        """Slot -> shape of every weight of a net of *kind*.

        Known without running any model's code, so that weights are validated first; the code must agree.
        """
        hidden, vocab = geometry.hidden, geometry.vocab
        if kind in (NetKind.EMBEDDING, NetKind.EMBEDDING_CACHE):
            return {TABLE: (vocab, hidden)}
        if kind in (NetKind.LM_HEAD, NetKind.LM_HEAD_TOPK):
            return {NORM: (hidden,), HEAD: (vocab, hidden)}
        return self.layer_shapes(geometry, facts) if kind.per_layer else {}

    def compiled_facts(self, facts: ModelFacts) -> dict[str, Any]:
        """What a refit cannot change of a model."""
        return {**{name: facts[name] for name in self.compiled_in}, "trained_length": facts.trained_length}

    def owns_code(self, code: bytes) -> bool:
        """Whether *code* is this family's modeling code, judged by its content. Raises SourceError."""
        return self.may_be_modeling(code) and bool(self.era(code))

    def installed_code(self) -> Path | None:
        """The family's modeling file where an installed package has it. Nothing is imported."""
        if not self.home:
            return None
        top, *inside = self.home.split(".")
        spec = importlib.util.find_spec(top)
        if spec is None or spec.origin is None:
            return None
        file = Path(spec.origin).parent.joinpath(*inside, self.modeling)
        return file if file.is_file() else None

    @abstractmethod
    def era(self, code: bytes) -> str:
        """The stage of its history that *code* is of, '' for other code. Raises SourceError."""

    @abstractmethod
    def may_be_modeling(self, code: bytes) -> bool:
        """A quick look that spares parsing what cannot be this family's modeling code."""

    # What its code does, once it runs. These take torch.

    @abstractmethod
    def config(self, module: types.ModuleType, values: Mapping[str, Any]) -> Any:
        """The configuration object of *values*, set to fp32 on the CPU and plain attention."""

    @abstractmethod
    def layer(self, module: types.ModuleType, config: Any) -> nn.Module:
        """One layer, as the code builds it, in evaluation mode."""

    @abstractmethod
    def norm(self, module: types.ModuleType, config: Any) -> nn.Module:
        """The final norm."""

    @abstractmethod
    def tables(
        self, module: types.ModuleType, config: Any, layer: nn.Module, seq_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions 0..S-1 as the code's own class has them, float32 [S, d] each."""

    @abstractmethod
    def driver(self, module: types.ModuleType, config: Any, layer: nn.Module) -> LayerDriver:
        """What runs *layer*; raises Refused when it fits no known contract."""

    @abstractmethod
    def whole_step(self, run: nn.Module, ids: torch.Tensor, past: Any) -> tuple[Any, Any]:
        """Run a whole model, or its body, on new ids [1, L]: its result, and the cache to go on with."""

    @abstractmethod
    def units(
        self, output: Any, given: Mapping[str, Any], i: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """All units of K and V, [1, P + L, n, d] each, that layer *i* of a whole model left behind, in its
        *output* or in the keywords it was *given*; None where it left none."""

    def layer_step(self, output: Any, given: Mapping[str, Any], i: int) -> LayerStep:
        """What layer *i* of a whole model gave; raises Refused when it gave no keys and values."""
        units = self.units(output, given, i)
        if units is None:
            raise Refused(f"layer {i} of the model gives no keys and values")
        return LayerStep(states_of(output), *units)


def states_of(output: Any) -> torch.Tensor:
    """The hidden states in what a layer of a whole model gave."""
    states: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return states


def whole(value: Any, key: str) -> int:
    """*value* when it is a positive whole number; raises ConfigError, naming config.json's *key*."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key} must be a positive whole number, found {value!r:.100}")
    return value


def class_of(module: types.ModuleType, name: str) -> Any:
    """The class *name* of a modeling file; raises Refused when it has none."""
    found = getattr(module, name, None)
    if not isinstance(found, type):
        raise Refused(f"{module.__name__.rpartition('.')[2]}.py has no class {name}")
    return found
