"""The attention of a long prompt as one operation."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from graph_passes.framework.base import MlirPass
from graph_passes.mlir.text import Module, Op, tensor_type

#: From so many tokens on the fused kernel is the faster one: below, the products and the softmax side by side
#: keep what lies between them in local memory as well.
LONG = 7168
HEADS_FIRST, HEADS_FIRST_ACROSS = [0, 2, 1, 3], [0, 2, 3, 1]


@dataclass(frozen=True)
class _Attention:
    """What one attention reads, by value: queries [1, S, heads, d], keys and values [1, S, kv_heads, d], mask
    [1, 1, S, S]; its scale as MLIR writes a float."""

    read: tuple[str, str, str, str]
    scale: str


class FusedAttention(MlirPass):
    name = "fused-attention"
    summary = "makes one top.FAttention of a long prompt's attention where heads share keys and values"
    why = (
        "TPU-MLIR finds that form itself where every head has its own keys; repeated ones hide it, and the "
        "scores of a long prompt then go through slow memory (Qwen2.5-0.5B, S=8192: 65.1 ms against 86.6 ms)"
    )
    precondition = (
        f"softmax(q k^T * scale + mask) v of at least {LONG} tokens, keys and values repeated for groups of "
        "heads, nobody else reads the parts"
    )
    not_for = ("1.6",)

    def __init__(self, from_length: int = LONG) -> None:
        self.from_length = from_length

    def rewrite(self, module: Module) -> list[str]:
        sites = []
        for op in [o for o in module.ops if o.name == "top.Reshape"]:
            found = _match(module, op)
            if found is None:
                continue
            shapes = [module.shape_of(value) for value in found.read]
            if not _fit(shapes, op) or shapes[0][1] < self.from_length:
                continue
            _fuse(module, op, found, shapes)
            sites.append(module.location_name(op) or op.result)
        if sites:
            module.drop_dead()
        return sites


def _fuse(module: Module, op: Op, found: _Attention, shapes: list[tuple[int, ...]]) -> None:
    (_, length, heads, dim), (_, _, shared, _) = shapes[:2]
    none = next(o.result for o in module.ops if o.name == "top.None")
    op.name = "top.FAttention"
    op.operands = [*found.read, none]
    op.input_types = [*map(tensor_type, shapes), "none"]
    numbers = {"batch": 1, "q_head": heads, "kv_head": shared, "dim": dim, "mq": length, "mk": length}
    op.attrs = {
        "scale": found.scale,
        **{name: f"{value} : i64" for name, value in numbers.items()},
        "keep_dims": "false",
        "mask_size": "0 : si32",
    }
    op.changed()


def _match(module: Module, end: Op) -> _Attention | None:
    """The attention whose heads *end* lays side by side again."""
    readers = module.readers()

    def only(value: str, name: str) -> Op | None:
        """The operation of that name that makes *value*, if nobody else reads it."""
        op = module.producer(value)
        if op is None or op.name != name or readers[value] != 1 or op.attrs.get("do_relu") == "true":
            return None
        return op

    if not (back := only(end.operands[0], "top.Permute")) or not _orders(back, HEADS_FIRST):
        return None
    if not (mixed := only(back.operands[0], "top.MatMul")) or not _plain(module, mixed):
        return None
    if not (weights := only(mixed.operands[0], "top.Softmax")) or not _over_keys(weights):
        return None
    if not (masked := only(weights.operands[0], "top.Add")) or len(masked.operands) != 2:
        return None
    if not (scaled := only(masked.operands[0], "top.MulConst")):
        return None
    if not (scores := only(scaled.operands[0], "top.MatMul")) or not _plain(module, scores):
        return None
    queries = only(scores.operands[0], "top.Permute")
    across, down = only(scores.operands[1], "top.Permute"), only(mixed.operands[1], "top.Permute")
    if queries is None or across is None or down is None:
        return None
    if not (_orders(queries, HEADS_FIRST) and _orders(across, HEADS_FIRST_ACROSS)):
        return None
    if not _orders(down, HEADS_FIRST):
        return None
    keys, values = (_shared(module, each.operands[0]) for each in (across, down))
    if keys is None or values is None:
        return None
    read = (queries.operands[0], keys, values, masked.operands[1])
    return _Attention(read, scaled.attrs["const_val"])


def _orders(op: Op, order: list[int]) -> bool:
    return bool(ast.literal_eval(op.attrs["order"]) == order)


def _plain(module: Module, product: Op) -> bool:
    """Whether it is a product of two activations and nothing else."""
    bias = module.producer(product.operands[2]) if len(product.operands) == 3 else None
    turned = ("left_transpose", "right_transpose", "output_transpose", "hdim_is_batch")
    plain = all(product.attrs.get(name, "false") == "false" for name in turned)
    return bias is not None and bias.name == "top.None" and plain


def _over_keys(softmax: Op) -> bool:
    beta = float(softmax.attrs.get("beta", "1").split(":")[0])
    axis = int(softmax.attrs["axis"].split(":")[0])
    return axis == 3 and beta == 1.0 and softmax.attrs.get("log", "false") == "false"


def _shared(module: Module, repeated: str) -> str | None:
    """[1, S, kv_heads, d], of which *repeated* [1, S, heads, d] holds each head once for its whole group."""
    joined = module.producer(repeated)
    tile = module.producer(joined.operands[0]) if joined is not None else None
    if joined is None or joined.name != "top.Reshape" or tile is None or tile.name != "top.Tile":
        return None
    apart = module.producer(tile.operands[0])
    if apart is None or apart.name not in ("top.Unsqueeze", "top.Reshape"):
        return None
    times, shape, out = ast.literal_eval(tile.attrs["tile"]), apart.shape(), joined.shape()
    if len(shape) != 5 or shape[3] != 1 or len(times) != 5 or [*times[:3], times[4]] != [1, 1, 1, 1]:
        return None
    if out != (shape[0], shape[1], shape[2] * times[3], shape[4]):
        return None
    wanted = (shape[0], shape[1], shape[2], shape[4])
    source = apart.operands[0]
    if module.shape_of(source) == wanted:
        return source
    # Values come from the product without their heads: the net returns them as heads, from the same product.
    like = (o for o in module.ops if o.name == "top.Reshape" and o.operands[0] == source)
    return next((o.result for o in like if o.shape() == wanted), None)


def _fit(shapes: list[tuple[int, ...]], end: Op) -> bool:
    """Whether *shapes* say that the parts belong together: one prompt, each query before all keys."""
    queries, keys, values, mask = shapes
    if len(queries) != 4 or queries[0] != 1:
        return False
    _, length, heads, dim = queries
    return (
        keys == values == (1, length, keys[2], dim)
        and heads % keys[2] == 0
        and mask == (1, 1, length, length)
        and end.shape() == (1, length, heads * dim)
    )
