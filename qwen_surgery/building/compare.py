"""Compare one net of two bmodels, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_surgery.packing.container import Bmodel, Region, regions


def differences(left: Path, left_net: str, right: Path, right_net: str) -> list[str]:
    """What differs between net *left_net* of *left* and *right_net* of *right* ('' for the only one); empty
    when equal.

    Compared are every region's bytes (coefficients, instructions, dynamic IR) and every field of the
    description, but for where regions start and for the net's name. The dynamic IR of ``--dynamic`` nets may
    differ in a few bytes: model_deploy writes uninitialised memory there, other bytes in each run on one net.
    """
    with Bmodel(left) as a, Bmodel(right) as b:
        one, other = a.net(left_net), b.net(right_net)
        found = []
        pairs = list(zip(regions(one, "Net"), regions(other, "Net"), strict=False))
        if len(list(regions(one, "Net"))) != len(list(regions(other, "Net"))):
            return ["the numbers of regions differ"]
        for index, (x, y) in enumerate(pairs):
            if x["size"] != y["size"]:
                found.append(f"region {index} has {x['size']} and {y['size']} bytes")
            elif not _equal(a, x, b, y, stray=x is _dynamic_ir(one)):
                found.append(f"the {x['size']} bytes of region {index} differ")
        if _plain(one) != _plain(other):
            found.append("the descriptions of the net differ")
        return found


def _dynamic_ir(net: dict[str, Any]) -> dict[str, int] | None:
    binary: dict[str, int] | None = net["parameter"][0].get("binary_ir")
    return binary


def _equal(a: Bmodel, x: dict[str, int], b: Bmodel, y: dict[str, int], *, stray: bool) -> bool:
    """Whether two regions of one size hold the same bytes; with *stray* one byte in fifty may differ."""
    one, other = Region.of(x), Region.of(y)
    if a.sha256(one) == b.sha256(other):
        return True
    if not stray:
        return False
    return sum(p != q for p, q in zip(a.read(one), b.read(other), strict=True)) <= one.size // 50


def _plain(value: Any, key: str = "") -> Any:
    """*value* without the places of regions, the net's own name, and empty lists (combining drops those)."""
    if isinstance(value, dict):
        if set(value) == {"start", "size"}:
            return value["size"]
        kept = {k: v for k, v in value.items() if v != [] and not (k == "name" and "parameter" in value)}
        return {k: _plain(v, k) for k, v in kept.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
