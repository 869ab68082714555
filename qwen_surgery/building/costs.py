"""What a step takes, by the size of the nets: memory, disk and time, fitted to measured runs.

Measured with TPU-MLIR 1.30.2 on a 2-core machine (see ``benchmarks/build.py``). They only order tasks,
bound how many run side by side and feed the plan's figures; a wrong one costs time, never a wrong result.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.nets import Geometry, NetKind
from qwen_surgery.toolchain.preload import c_compiler

_MB = 1_000_000


@dataclass(frozen=True)
class Cost:
    """Bytes of memory, bytes left or used on disk, seconds."""

    memory: int
    disk: int
    seconds: float


def weights_of(kind: NetKind, g: Geometry) -> int:
    """Number of weights in a net of *kind*."""
    if kind.per_layer:
        projection = g.heads * g.head_dim
        return g.hidden * (4 * projection + 3 * (g.intermediate // 2) + 2) + 3 * projection
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
    group = 3.0 / (options.q_group_size or 64)
    per_weight = {"int4": 0.5 + group, "int8": 1.0, "bf16": 2.0, "f16": 2.0}[mode]
    activations = 2 * g.seq_length * g.seq_length if kind.per_layer else 0
    return int(weights_of(kind, g) * per_weight) + activations + 6 * _MB


def transform(kind: NetKind, g: Geometry, cleaned: bool) -> Cost:
    """``model_transform``: fp32 weights in memory several times over, and once on disk."""
    count = weights_of(kind, g)
    per_weight = 17 if cleaned else 42
    return Cost(
        250 * _MB + per_weight * count, 4 * count + 5 * _MB, 2.0 + count * (4e-8 if cleaned else 2.4e-7)
    )


def deploy(kind: NetKind, g: Geometry, options: CompileOptions) -> Cost:
    """``model_deploy``: lowered weights beside the bmodel while it runs."""
    count = weights_of(kind, g)
    lowered = packed_bytes(kind, g, options)
    return Cost(300 * _MB + 6 * count, 2 * lowered, 2.5 + count * 4.5e-8 + g.seq_length * 0.002)


def narrow(kind: NetKind, g: Geometry, options: CompileOptions, *, derived: bool) -> Cost:
    """A net of the vocabulary, compiled narrow and widened. TPU-MLIR copies its packed bytes several times
    over while it writes the bmodel; with a C compiler those copies take next to no memory
    (``sparse_copies.c``). *derived*: it is widened as its sibling was.
    """
    packed = packed_bytes(kind, g, options)
    copies = 1 if c_compiler() else 4
    widening = 0.0 if derived else 1.0 + packed * 6e-9
    return Cost(600 * _MB + copies * packed, 2 * packed, 2.0 + widening)


def prove(kind: NetKind, g: Geometry) -> Cost:
    """Finding and proving how a kind of net stores its weights."""
    count = weights_of(kind, g)
    return Cost(200 * _MB + 14 * count, 1 * _MB, 0.5 + count * 5e-8)


def assemble(g: Geometry, options: CompileOptions, packed_layers: int, total: int) -> Cost:
    """Writing the bmodel: *packed_layers* layers packed, *total* bytes in all."""
    count = packed_layers * weights_of(NetKind.BLOCK, g)
    return Cost(600 * _MB, total, 0.5 + count * 1.5e-8 + total / 1e9)
