"""Nets that several devices share, put together from their parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_surgery.errors import Refused
from qwen_surgery.packing import report
from qwen_surgery.packing.cascade import apart, name_of, shape_of, whole_nets
from qwen_surgery.packing.container import Bmodel
from tests.fuzz import targets


def tensor(name: str, hidden: int, index: int = 0, shape: tuple[int, ...] = (1, 8)) -> dict[str, Any]:
    return {"name": name, "hidden": hidden, "index": index, "shape": [{"dim": list(shape)}]}


def part(name: str, device: int, step: int, given: list[Any], gives: list[Any]) -> dict[str, Any]:
    cascade = {"device_id": device, "step": step, "main_name": "block_0"}
    return {
        "name": name, "cascade": cascade, "parameter": [{"input_tensor": given, "output_tensor": gives}],
    }  # fmt: skip


def layer() -> list[dict[str, Any]]:
    """A layer on two devices: two steps, and a sum that both hand each other."""
    heads = (1, 8, 2, 4)
    first = [
        part(
            f"block_0_0_{d}", d, 0,
            # The second input comes first in the file, as TPU-MLIR may write them.
            [tensor(f"history_k_{d}", 3, 1, heads), tensor("input_states", 1, 0)],
            [tensor(f"past_k_{d}", 4, 1, heads), tensor(f"sum_{d}", 0)],
        )
        for d in (0, 1)
    ]  # fmt: skip
    second = [
        part(
            f"block_0_1_{d}", d, 1,
            [tensor("sum_0", 0), tensor("sum_1", 0), tensor("input_states", 1, 0)],
            [tensor(f"states_{d}", 4, 0)],
        )
        for d in (0, 1)
    ]  # fmt: skip
    return [*first, *second]


def test_a_demo_sees_one_net_device_by_device_in_the_order_of_its_tensors() -> None:
    (whole,) = whole_nets(layer())
    assert (whole.name, whole.devices, len(whole.parts)) == ("block_0", (0, 1), 4)
    given = [(p.device, name_of(p, t)) for p, t in whole.tensors("input_tensor")]
    assert given == [(0, "input_states"), (0, "history_k"), (1, "input_states"), (1, "history_k")], (
        "an input that two steps read is given once"
    )
    gives = [(p.device, name_of(p, t)) for p, t in whole.tensors("output_tensor")]
    assert gives == [(0, "states"), (0, "past_k"), (1, "states"), (1, "past_k")]


def test_nets_of_one_device_are_whole_as_they_are() -> None:
    plain = {"name": "lm_head", "parameter": [{"input_tensor": [tensor("x_0", 0)], "output_tensor": []}]}
    found = whole_nets([plain, *layer(), {"name": "empty"}])
    assert [whole.name for whole in found] == ["lm_head", "block_0"]
    ((one, given),) = found[0].tensors("input_tensor")
    assert (one.number, name_of(one, given), shape_of(given)) == (0, "x_0", (1, 8))


def test_parts_are_reported_as_the_net_that_a_demo_sees(tmp_path: Path) -> None:
    path = tmp_path / "two.bmodel"
    targets._bmodel(path, devices=2)
    found = report.inspect(path)
    assert (found.devices, found.layers) == (2, 1)
    assert [(net.name, net.devices) for net in found.nets] == [("block_cache_0", (0, 1)), ("lm_head", (0, 1))]
    assert [tensor.device for tensor in found.nets[1].inputs] == [0, 1]
    assert found.nets[0].weight_bytes == 64, "what one device holds of it"


def test_parts_can_be_written_as_nets_of_their_own(tmp_path: Path) -> None:
    path, out = tmp_path / "two.bmodel", tmp_path / "apart.bmodel"
    targets._bmodel(path, devices=2)
    with Bmodel(path) as opened:
        apart(opened, out)
        with Bmodel(out) as found:
            assert [net["name"] for net in found.nets] == [net["name"] for net in opened.nets]
            assert found.model["device_num"] == 1 and not any("cascade" in net for net in found.nets)
            assert found.size == opened.size
            assert found.nets[0]["parameter"] == opened.nets[0]["parameter"]


def test_more_parts_than_there_can_be_are_refused_at_once() -> None:
    """Nothing may look through all parts for each of them."""
    one = layer()[0]
    many = [one] * 8000
    spread = [{**one, "cascade": {**one["cascade"], "device_id": number}} for number in range(8000)]
    for nets in (many, spread):
        with pytest.raises(Refused, match="in 8,000 parts"):
            whole_nets(nets)
    plain = [{"name": "block_0", "parameter": one["parameter"]} for _ in range(8000)]
    assert len(whole_nets(plain)) == 8000


@pytest.mark.parametrize("name", ["device_id", "step"])
def test_numbers_that_no_file_has_cost_nothing(tmp_path: Path, name: str) -> None:
    nets = layer()
    for net in nets:
        net["cascade"][name] = (1 << 32) - 1
    (whole,) = whole_nets(nets)
    assert len(whole.devices) == (1 if name == "device_id" else 2)
