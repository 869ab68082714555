"""The nets of a bmodel: names, order, inputs and outputs, as the vendor's demos count them.

Consumers find tensors by index and layers by counting nets, so this file is a contract. Letters: S is the
sequence length, H the hidden size, n the number of heads of keys and values, d the head dimension, V the
vocabulary size.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from enum import Enum

#: What a closed mask position holds. -10000 as bfloat16 has the bits 0xC61C (it reads back as -9984).
MASK_VALUE = -10000.0
#: Candidates the sampling head keeps, and how many of them top-p may never drop (vendor's demo).
TOP_K = 50
MIN_TOKENS_TO_KEEP = 5


class NetKind(str, Enum):
    """One kind of net; every layer's nets of a kind share one graph and differ in weights only."""

    EMBEDDING = "embedding"
    EMBEDDING_CACHE = "embedding_cache"
    LM_HEAD = "lm_head"
    LM_HEAD_TOPK = "lm_head_topk"
    GREEDY_HEAD = "greedy_head"
    PENALTY_SAMPLE_HEAD = "penalty_sample_head"
    SAMPLE_HEAD = "sample_head"
    BLOCK = "block"
    BLOCK_CACHE = "block_cache"

    @property
    def chooses(self) -> bool:
        """Whether it is a head that chooses a token: no weights of the checkpoint in it."""
        return self is NetKind.GREEDY_HEAD or self.samples

    @property
    def samples(self) -> bool:
        """Whether it gives candidates to draw from: one per vendor's demo, and a bmodel holds one of them."""
        return self in (NetKind.PENALTY_SAMPLE_HEAD, NetKind.SAMPLE_HEAD)

    @property
    def per_layer(self) -> bool:
        return self in (NetKind.BLOCK, NetKind.BLOCK_CACHE)


@dataclass(frozen=True)
class Tensor:
    """An input or output of a net: ``dtype`` is ``float`` (bf16 on the chip where quantised), or ``int``."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float"


@dataclass(frozen=True)
class Geometry:
    """The sizes that fix every net's shapes. The last two follow from the others where they are 0."""

    layers: int
    hidden: int
    heads: int
    head_dim: int
    vocab: int
    intermediate: int  # config.json's number
    seq_length: int  # the export length S
    kv_heads: int = 0  # heads of keys and values; as many as of queries
    mlp_width: int = 0  # of the gated MLP; half of intermediate, which in Qwen v1 counts w1 and w2 together

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "mlp_width", self.mlp_width or self.intermediate // 2)


@dataclass(frozen=True)
class Net:
    """One compiled unit. ``layer`` is None for nets that exist once."""

    name: str
    kind: NetKind
    layer: int | None = None


def inputs(kind: NetKind, g: Geometry) -> tuple[Tensor, ...]:
    """Inputs of *kind*, in order."""
    s, h, n, d, v = g.seq_length, g.hidden, g.kv_heads, g.head_dim, g.vocab
    table: dict[NetKind, tuple[Tensor, ...]] = {
        NetKind.EMBEDDING: (Tensor("input_ids", (1, s), "int"),),
        NetKind.EMBEDDING_CACHE: (Tensor("input_ids", (1, 1), "int"),),
        NetKind.LM_HEAD: (Tensor("hidden_states", (1, h)),),
        NetKind.LM_HEAD_TOPK: (Tensor("hidden_states", (1, 1, h)),),
        NetKind.GREEDY_HEAD: (Tensor("m_logits", (1, v)),),
        NetKind.PENALTY_SAMPLE_HEAD: (
            Tensor("m_logits", (1, v)),
            Tensor("input_ids", (1, s), "int"),
            Tensor("top_p", (1,)),
            Tensor("temperature", (1,)),
            Tensor("penalty", (1,)),
        ),
        NetKind.SAMPLE_HEAD: (
            Tensor("m_logits", (1, v)),
            Tensor("input_ids", (1, s), "int"),  # launched with as many as the penalty looks back on
            Tensor("penalty", (1,)),
            Tensor("temperature", (1,)),
            Tensor("top_k", (1,), "int"),
            Tensor("top_p", (1,)),
        ),
        NetKind.BLOCK: (
            Tensor("input_states", (1, s, h)),
            Tensor("position_ids", (1, s), "int"),
            Tensor("attention_mask", (1, 1, s, s)),
        ),
        NetKind.BLOCK_CACHE: (
            Tensor("input_states", (1, 1, h)),
            Tensor("position_ids", (1, 1), "int"),
            Tensor("attention_mask", (1, 1, 1, s + 1)),
            Tensor("history_k", (1, s, n, d)),
            Tensor("history_v", (1, s, n, d)),
        ),
    }
    return table[kind]


def outputs(kind: NetKind, g: Geometry) -> tuple[Tensor, ...]:
    """Outputs of *kind*, in order."""
    s, h, n, d, v = g.seq_length, g.hidden, g.kv_heads, g.head_dim, g.vocab
    table: dict[NetKind, tuple[Tensor, ...]] = {
        NetKind.EMBEDDING: (Tensor("embedding_states", (1, s, h)),),
        NetKind.EMBEDDING_CACHE: (Tensor("embedding_states", (1, 1, h)),),
        NetKind.LM_HEAD: (Tensor("m_logits", (1, v)),),
        NetKind.LM_HEAD_TOPK: (Tensor("token", (1, 1, 1), "int"),),
        NetKind.GREEDY_HEAD: (Tensor("token", (1, 1), "int"),),
        NetKind.PENALTY_SAMPLE_HEAD: (Tensor("probs", (1, TOP_K)), Tensor("token", (1, TOP_K), "int")),
        NetKind.SAMPLE_HEAD: (Tensor("probs", (1, TOP_K)), Tensor("token", (1, TOP_K), "int")),
        NetKind.BLOCK: (
            Tensor("hidden_states", (1, s, h)),
            Tensor("past_k", (1, s, n, d)),
            Tensor("past_v", (1, s, n, d)),
        ),
        NetKind.BLOCK_CACHE: (
            Tensor("hidden_states", (1, 1, h)),
            Tensor("past_k", (1, 1, n, d)),
            Tensor("past_v", (1, 1, n, d)),
        ),
    }
    return table[kind]


def nets(
    layers: int,
    *,
    heads: bool = True,
    multi_device: bool = False,
    sampler: NetKind = NetKind.PENALTY_SAMPLE_HEAD,
) -> tuple[Net, ...]:
    """Every net of a bmodel in its order.

    ``heads`` adds greedy_head and the head to sample by, *sampler* (not every chip has them);
    ``multi_device`` takes the lm_head with the top-1 inside, under the name ``lm_head``, and no heads.
    """
    head_kind = NetKind.LM_HEAD_TOPK if multi_device else NetKind.LM_HEAD
    result = [
        Net("embedding", NetKind.EMBEDDING),
        Net("embedding_cache", NetKind.EMBEDDING_CACHE),
        Net("lm_head", head_kind),
    ]
    if heads and not multi_device:
        result += [Net(kind.value, kind) for kind in (NetKind.GREEDY_HEAD, sampler)]
    for i in range(layers):
        result += [Net(f"block_{i}", NetKind.BLOCK, i), Net(f"block_cache_{i}", NetKind.BLOCK_CACHE, i)]
    return tuple(result)


def sampler_of(names: Container[str]) -> NetKind:
    """Which head to sample by a file with the nets *names* has; Qwen v1's where it has none."""
    return NetKind.SAMPLE_HEAD if NetKind.SAMPLE_HEAD.value in names else NetKind.PENALTY_SAMPLE_HEAD
