"""A layer's attention in the form that TPU-MLIR splits over several devices."""

from __future__ import annotations

from graph_passes.framework.base import MlirPass
from graph_passes.mlir.fused_attention import FusedAttention
from graph_passes.mlir.text import Module, Op


class SplitAttention(MlirPass):
    name = "split-attention"
    summary = (
        "writes an attention's products in the order queries, keys, values; makes one top.FAttention of a "
        "prompt's where heads share keys and values"
    )
    why = (
        "TPU-MLIR takes a norm's readers for queries, keys and values by their order, and fails an assertion "
        "where it finds another; a prompt's attention whose keys are repeated it leaves on the first device "
        "while it splits what follows, which no demo can run"
    )
    precondition = (
        "three products of one norm, of which the net returns one as keys and one as values, whose other "
        "operands come before all of them and whose readers behind"
    )
    not_for = ("1.6",)
    optional = True

    def rewrite(self, module: Module) -> list[str]:
        return [*FusedAttention(from_length=1).rewrite(module), *_in_order(module)]


def _in_order(module: Module) -> list[str]:
    products = _products(module)
    if products is None:
        return []
    places = sorted(module.ops.index(op) for op in products)
    earlier = {op.result for op in module.ops[: places[0]]}
    if any(operand not in earlier for op in products for operand in op.operands):
        return []
    made = {op.result for op in products}
    if any(made & set(op.operands) for op in module.ops[places[0] : places[2]]):
        return []
    if [module.ops[place] for place in places] == list(products):
        return []
    for place, op in zip(places, products, strict=True):
        module.ops[place] = op
    return [module.location_name(products[0]) or products[0].result]


def _products(module: Module) -> tuple[Op, Op, Op] | None:
    """The products of queries, keys and values; None where the net is no layer's, or has others."""
    returned = module.returned()
    if len(returned) != 3:
        return None
    keys, values = (_product(module, value) for value in returned[1:])
    if keys is None or values is None or keys is values or keys.operands[0] != values.operands[0]:
        return None
    readers = [op for op in module.ops if keys.operands[0] in op.operands]
    queries = [op for op in readers if op is not keys and op is not values]
    if len(readers) != 3 or len(queries) != 1 or queries[0].name != "top.MatMul":
        return None
    return queries[0], keys, values


def _product(module: Module, value: str) -> Op | None:
    """The product of a weight that *value* comes from, by way of its first operands."""
    op = module.producer(value)
    while op is not None and op.name != "top.MatMul":
        op = module.producer(op.operands[0]) if op.operands else None
    return op
