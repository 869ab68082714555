"""torch modules of every kind of net, with the contract's inputs and outputs, from a checkout's classes.

Never the whole model: a block is one layer of the patched code, a head is a norm and a matrix. All
are fp32. Weights are named by *slots* (a parameter's name inside the net, such as ``ln_f.weight``).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from qwen_surgery.errors import Refused
from qwen_surgery.exporting.model_code import ModelCode
from qwen_surgery.families.family import HEAD, TABLE, LayerDriver
from qwen_surgery.nets import MIN_TOKENS_TO_KEEP, TOP_K, Geometry, NetKind

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What a candidate dropped by top-p scores before the last softmax.
_DROPPED = -1000.0


@dataclass
class NetModule:
    """One kind of net as torch code.

    ``module(*inputs)`` takes the contract's inputs and returns its outputs in order. ``slots`` maps each
    weight's slot to the parameter that holds it; ``constants`` are tables that the graph carries.
    """

    kind: NetKind
    module: nn.Module
    slots: dict[str, tuple[nn.Module, str]]
    constants: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Slot -> shape."""
        return {slot: tuple(getattr(owner, name).shape) for slot, (owner, name) in self.slots.items()}

    def load(self, values: Mapping[str, torch.Tensor]) -> nn.Module:
        """Put *values* (slot -> float32 tensor) in as the weights and return the module."""
        for slot, (owner, name) in self.slots.items():
            value = values[slot]
            if tuple(value.shape) != tuple(getattr(owner, name).shape):
                raise Refused(
                    f"weight {slot} has shape {list(value.shape)}, the code wants {list(self.shapes()[slot])}"
                )
            owner._parameters.pop(name, None)
            object.__setattr__(owner, name, value)
        return self.module


class ModuleFactory:
    """Builds the nets of one checkout.

    *patched* holds the classes that are traced; *reference* is the unpatched code, whose own rotary class
    fills the tables. Parameters are placeholders without memory until :meth:`NetModule.load`.
    """

    def __init__(self, patched: ModelCode, reference: ModelCode, geometry: Geometry) -> None:
        self._patched = patched
        self._geometry = geometry
        with weightless():
            layer = reference.layer()
        self._cos, self._sin = reference.tables(layer, geometry.seq_length)

    def build(self, kind: NetKind) -> NetModule:
        """The net of *kind*; raises Refused when the code does not fit the contract."""
        builders = {
            NetKind.EMBEDDING: self._embedding,
            NetKind.EMBEDDING_CACHE: self._embedding,
            NetKind.LM_HEAD: self._lm_head,
            NetKind.LM_HEAD_TOPK: self._lm_head,
            NetKind.GREEDY_HEAD: lambda kind: NetModule(kind, GreedyHead().eval(), {}),
            NetKind.PENALTY_SAMPLE_HEAD: lambda kind: NetModule(kind, PenaltySampleHead().eval(), {}),
            NetKind.SAMPLE_HEAD: lambda kind: NetModule(kind, SampleHead().eval(), {}),
            NetKind.BLOCK: self._block,
            NetKind.BLOCK_CACHE: self._block,
        }
        return builders[kind](kind)

    def _embedding(self, kind: NetKind) -> NetModule:
        with weightless():
            module = Embedding(self._geometry.vocab, self._geometry.hidden).eval()
        return NetModule(kind, module, {TABLE: (module.wte, "weight")})

    def _lm_head(self, kind: NetKind) -> NetModule:
        with weightless():
            norm = self._patched.norm()
            head = nn.Linear(self._geometry.hidden, self._geometry.vocab, bias=False)
        module = (LmHeadTopK if kind is NetKind.LM_HEAD_TOPK else LmHead)(norm, head).eval()
        slots = {f"ln_f.{name}": place for name, place in _slots(norm).items()}
        return NetModule(kind, module, {**slots, HEAD: (head, "weight")})

    def _block(self, kind: NetKind) -> NetModule:
        with weightless():
            layer = self._patched.layer()
        slots = _slots(layer)
        for module in layer.modules():
            # buffers stay inside the graph as constants, where they are used at all
            module._non_persistent_buffers_set.update(module._buffers)
        block_class = BlockCache if kind is NetKind.BLOCK_CACHE else Block
        net = block_class(layer, self._patched.driver(layer), self._cos, self._sin).eval()
        constants: dict[str, tuple[nn.Module, str]] = {
            "rotary/cos": (net, "rotary_cos"),
            "rotary/sin": (net, "rotary_sin"),
        }
        return NetModule(kind, net, slots, constants)


def _slots(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    return {
        f"{prefix}.{name}" if prefix else name: (owner, name)
        for prefix, owner in module.named_modules()
        for name in owner._parameters
        if owner._parameters[name] is not None
    }


@contextmanager
def weightless() -> Iterator[None]:
    """Inside, every parameter that a module registers takes one element of memory, whatever its shape.

    A parameter is replaced as soon as it is registered (its uninitialised memory was never touched): by a
    meta tensor while the constructor may still initialise it, at the end by one zero expanded to the shape.
    """
    made: list[tuple[nn.Module, str]] = []
    register_parameter = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: Any) -> None:
        if param is not None:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
            made.append((self, name))
        register_parameter(self, name, param)

    # Random values for weights that are not there: torch would import its compiler to make them on meta.
    skipped = [(nn.Linear, "reset_parameters"), (nn.Embedding, "reset_parameters")]
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(nn.Module, "register_parameter", register))
        for owner, method in skipped:
            patches.enter_context(mock.patch.object(owner, method, lambda self: None))
        yield
    for module, name in made:
        shape = getattr(module, name).shape
        module._parameters[name] = nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)


class Embedding(nn.Module):
    """input_ids int32 [1, L] -> float32 [1, L, H]."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, hidden)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(input_ids, self.wte.weight)


class LmHead(nn.Module):
    """Final norm and vocabulary product: hidden_states [1, H] -> m_logits [1, V]."""

    def __init__(self, norm: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.ln_f = norm
        self.lm_head = head

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.ln_f(hidden_states))


class LmHeadTopK(LmHead):
    """LmHead with the best token inside: hidden_states [1, 1, H] -> token int32 [1, 1, 1]."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.topk(super().forward(hidden_states), 1)[1].int()


class GreedyHead(nn.Module):
    """m_logits [1, V] -> the best token, int32 [1, 1]."""

    def forward(self, m_logits: torch.Tensor) -> torch.Tensor:
        return torch.topk(m_logits, 1)[1].int()


def _best(
    m_logits: torch.Tensor, input_ids: torch.Tensor, penalty: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best 50 scores [1, 50] and their tokens, once those of *input_ids* are penalised."""
    ids = input_ids.long()
    seen = torch.gather(m_logits, 1, ids)
    seen = torch.where(seen < 0, seen * penalty, seen / penalty)
    return torch.topk(m_logits.scatter(1, ids, seen), TOP_K)


class PenaltySampleHead(nn.Module):
    """The candidates to sample from: probs float32 [1, 50] and their tokens int32 [1, 50].

    Logits of tokens in ``input_ids`` are divided by ``penalty`` when positive and multiplied by it when
    negative; the best 50 are divided by ``temperature``; those behind the cumulative probability ``top_p``
    are dropped, but never one of the best 5. This is what the vendor's runtimes expect of the net.
    """

    head_start: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        head_start = torch.zeros(1, TOP_K)
        head_start[:, :MIN_TOKENS_TO_KEEP] = 2.0  # more than any cumulative probability
        self.register_buffer("head_start", head_start, persistent=False)

    def forward(
        self,
        m_logits: torch.Tensor,
        input_ids: torch.Tensor,
        top_p: torch.Tensor,
        temperature: torch.Tensor,
        penalty: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        best, tokens = _best(m_logits, input_ids, penalty)
        best = best / temperature
        # One comparison with a limit per place: TPU-MLIR has no Or with a constant.
        kept = best.softmax(dim=1).cumsum(dim=1) < top_p + self.head_start
        kept_best = torch.where(kept, best, torch.full_like(best, _DROPPED))
        return kept_best.softmax(dim=1), tokens.int()


class SampleHead(PenaltySampleHead):
    """The same for the vendor's generic demos, which also say how many candidates they read: ``top_k``,
    int32 [1], from 1 to 50. Those behind it get no share before the cumulative probability is taken, so the
    first ``top_k`` entries are what would come out of a list of that length.
    """

    rank: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rank", torch.arange(TOP_K, dtype=torch.float32)[None], persistent=False)

    def forward(  # type: ignore[override]
        self,
        m_logits: torch.Tensor,
        input_ids: torch.Tensor,
        penalty: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        best, tokens = _best(m_logits, input_ids, penalty)
        # Below the best one: so what is dropped scores next to nothing at any temperature.
        best = (best - best[:, :1]) / temperature
        dropped = torch.full_like(best, _DROPPED)
        best = torch.where(self.rank < top_k.float(), best, dropped)
        kept = best.softmax(dim=1).cumsum(dim=1) < top_p + self.head_start
        return torch.where(kept, best, dropped).softmax(dim=1), tokens.int()


class Block(nn.Module):
    """One layer, prefill: see the contract in :mod:`qwen_surgery.nets`.

    All tensors are float32 but ``position_ids`` (int32 [1, L]); the mask is additive.
    """

    def __init__(self, layer: nn.Module, driver: LayerDriver, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().__init__()
        self.layer = layer
        self._driver = driver
        self.rotary_cos = cos
        self.rotary_sin = sin

    def forward(
        self, input_states: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._run(input_states, position_ids, attention_mask, None)

    def _run(
        self,
        input_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        history: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        positions = (position_ids, self.rotary_cos, self.rotary_sin)
        return self._driver.run(self.layer, input_states, positions, attention_mask, history)


class BlockCache(Block):
    """One layer, decode: one token against S slots of history."""

    def forward(  # type: ignore[override]
        self,
        input_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        history_k: torch.Tensor,
        history_v: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._run(input_states, position_ids, attention_mask, (history_k, history_v))
