"""How large nets are: weights, and bytes once compiled. The steps' costs are made of these.

Costs were fitted to runs of TPU-MLIR 1.30.2 on a 2-core machine (``benchmarks/build.py``). They order tasks,
bound how many run side by side and feed the plan's figures: a wrong one costs time, and nothing else.
"""

from __future__ import annotations

from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.nets import Geometry, NetKind

MB = 1_000_000


def weights_of(kind: NetKind, g: Geometry) -> int:
    """Number of weights in a net of *kind*."""
    if kind.per_layer:
        queries, others = g.heads * g.head_dim, g.kv_heads * g.head_dim
        return g.hidden * (2 * (queries + others) + 3 * g.mlp_width + 2) + queries + 2 * others
    if kind.chooses:
        return 0
    return g.vocab * g.hidden + g.hidden


def packed_bytes(kind: NetKind, g: Geometry, options: CompileOptions) -> int:
    """Bytes of a compiled net of *kind*: its weights and a little more."""
    mode = options.mode
    if kind in (NetKind.LM_HEAD, NetKind.LM_HEAD_TOPK):
        mode = options.lm_head_mode or mode
    elif not kind.per_layer:
        mode = "bf16"
    group = 3.0 / options.q_group_size if options.q_group_size else 0.0
    per_weight = {"int4": 0.5 + group, "int8": 1.0 + group, "bf16": 2.0, "f16": 2.0}[mode]
    activations = 2 * g.seq_length * g.seq_length if kind.per_layer else 0
    return int(weights_of(kind, g) * per_weight) + activations + 6 * MB


def bmodel_bytes(g: Geometry, options: CompileOptions) -> int:
    """Bytes of the whole bmodel; a layer's two nets share their weights, and so do the two embeddings."""
    sizes = [
        packed_bytes(net.kind, g, options)
        for net in options.nets(g.layers)
        if net.kind not in (NetKind.BLOCK_CACHE, NetKind.EMBEDDING_CACHE)
    ]
    return sum(sizes) + 4 * MB * g.layers
