"""Rotary embedding as one operation."""

from __future__ import annotations

import ast

from graph_passes.framework.base import MlirPass
from graph_passes.mlir.text import Module, Op


class TopRope(MlirPass):
    name = "top-rope"
    summary = "makes one top.Rope of the seven operations of a half-split rotary embedding"
    why = (
        "the chip has a rotary kernel that keeps everything in local memory; no ONNX form of the half-split "
        "kind reaches it (1.8B prefill, S=4096: 51.7 ms against 54.3 ms)"
    )
    precondition = "x*cos + Concat(-x[half:], x[:half])*sin, all steps 1, nobody else reads the parts"
    not_for = ("1.6",)
    undivided = True

    def rewrite(self, module: Module) -> list[str]:
        sites = []
        for op in [o for o in module.ops if o.name == "top.Add"]:
            found = _match(module, op)
            if found is None:
                continue
            x, cos, sin, types = found
            op.name = "top.Rope"
            op.operands, op.input_types = [x, sin, cos], types
            op.attrs = {"rope_mode": '"contiguous_halves"'}
            op.changed()
            sites.append(module.location_name(op) or op.result)
        if sites:
            module.drop_dead()
        return sites


def _match(module: Module, add: Op) -> tuple[str, str, str, list[str]] | None:
    """(x, cos, sin, their types with sin second) of the rotary embedding that *add* ends."""
    if len(add.operands) != 2 or _rectifies(add):
        return None
    for i in (0, 1):
        cos_product, sin_product = (module.producer(add.operands[j]) for j in (i, 1 - i))
        if not _is_product(cos_product) or not _is_product(sin_product):
            continue
        assert cos_product is not None and sin_product is not None
        for r in (0, 1):
            rotated = module.producer(sin_product.operands[r])
            for c in (0, 1):
                x = cos_product.operands[c]
                if rotated is None or not _rotates(module, rotated, x, cos_product.input_types[c]):
                    continue
                types = [
                    cos_product.input_types[c],
                    sin_product.input_types[1 - r],
                    cos_product.input_types[1 - c],
                ]
                return x, cos_product.operands[1 - c], sin_product.operands[1 - r], types
    return None


def _is_product(op: Op | None) -> bool:
    return op is not None and op.name == "top.Mul" and len(op.operands) == 2 and not _rectifies(op)


def _rectifies(op: Op) -> bool:
    return op.attrs.get("do_relu", "false") != "false"


def _rotates(module: Module, concat: Op, x: str, x_type: str) -> bool:
    """Whether *concat* is Concat(-x[half:], x[:half]) along the last axis."""
    shape = concat.shape()
    if concat.name != "top.Concat" or len(concat.operands) != 2 or concat.output_type != x_type:
        return False
    if int(concat.attrs["axis"].split(":")[0]) % len(shape) != len(shape) - 1:
        return False
    negative, lower = (module.producer(o) for o in concat.operands)
    if negative is None or negative.name != "top.MulConst" or _rectifies(negative):
        return False
    if float(negative.attrs["const_val"].split(":")[0]) != -1.0:
        return False
    half = shape[-1] // 2
    upper = module.producer(negative.operands[0])
    return _takes(upper, x, shape, half) and _takes(lower, x, shape, 0)


def _takes(op: Op | None, x: str, shape: tuple[int, ...], start: int) -> bool:
    """Whether *op* slices half of *x*'s last axis from *start* on."""
    if op is None or op.name != "top.Slice" or op.operands[0] != x:
        return False
    if op.shape() != (*shape[:-1], shape[-1] // 2):
        return False
    offsets, steps = ast.literal_eval(op.attrs["offset"]), ast.literal_eval(op.attrs["steps"])
    return offsets == [0] * (len(shape) - 1) + [start] and steps == [1] * len(shape)
