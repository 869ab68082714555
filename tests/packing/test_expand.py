"""One compiled layer, packed into all: the same file as compiling every layer and combining with TPU-MLIR's
tool.

If these fail, `build` without `--no-pack` gives another bmodel than the documented flow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_surgery.packing import Unproven, prove, write
from qwen_surgery.packing.container import Bmodel, Region, regions
from tests.packing.conftest import NETS, Bench, created

pytestmark = pytest.mark.tpu


@pytest.mark.parametrize("mode", ["int4", "int8", "bf16", "f16"])
def test_packed_file_equals_compiling_every_layer_byte_for_byte(
    mode: str, bench: Callable[..., Bench], tmp_path: Path
) -> None:
    made = bench(mode)
    truth = made.combined(tmp_path / "combined.bmodel")
    packed = write(tmp_path / "packed.bmodel", made.pieces(), created=created(truth)).path
    assert packed.read_bytes() == truth.read_bytes()


def test_two_writes_of_the_same_pieces_are_equal_whatever_the_threads(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    pieces = [replace(piece, pack=True) for piece in bench("int4").pieces()]
    one = write(tmp_path / "one.bmodel", pieces, workers=1).path
    four = write(tmp_path / "four.bmodel", pieces, workers=4).path
    assert one.read_bytes() == four.read_bytes()


def _without_dynamic_ir(path: Path) -> list[tuple[str, list[bytes], list[int]]]:
    """Per net: its regions but the dynamic IR, and the IR's size."""
    result = []
    with Bmodel(path) as bmodel:
        for net in bmodel.nets:
            parameter = net["parameter"][0]
            ir = parameter.get("binary_ir")
            rest = [bmodel.read(Region.of(b)) for b in regions(parameter, "NetParameter") if b is not ir]
            result.append((net["name"], rest, [ir["size"] if ir else 0]))
    return result


def test_dynamic_nets_differ_in_the_compilers_own_uninitialised_bytes_only(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    """model_deploy --dynamic leaves stray memory in the dynamic IR: two compiles of one net differ there
    too."""
    made = bench("int4", "bm1684x", "--dynamic")
    nets = ("block_0", "block_cache_0", "block_1", "block_cache_1")
    truth = made.combined(tmp_path / "combined.bmodel", nets)
    packed = write(tmp_path / "packed.bmodel", made.pieces(nets), created=created(truth)).path
    assert _without_dynamic_ir(packed) == _without_dynamic_ir(truth)


@pytest.mark.parametrize("chip", ["bm1688", "cv186x"])
def test_other_chips_are_packed_as_they_compile(
    chip: str, bench: Callable[..., Bench], tmp_path: Path
) -> None:
    """They have 32 lanes instead of 64."""
    made = bench("int4", chip)
    nets = ("block_0", "block_1")
    truth = made.combined(tmp_path / "combined.bmodel", nets)
    packed = write(tmp_path / "packed.bmodel", made.pieces(nets), created=created(truth)).path
    assert packed.read_bytes() == truth.read_bytes()


def test_weights_other_than_the_compiled_ones_prove_nothing(bench: Callable[..., Bench]) -> None:
    made, model = bench("int4"), bench("int4").model
    with pytest.raises(Unproven, match="come from no weight"):
        prove(made.compiled("block_0"), model.template("block_0"), model.entry("block_1").weights)


def test_two_equal_weights_are_not_guessed_apart(bench: Callable[..., Bench]) -> None:
    """With ln_1 == ln_2 nobody could tell which of the two a compiled array is, so nothing is proven."""
    made, model = bench("int4"), bench("int4").model
    weights = dict(model.entry("block_0").weights)
    weights["ln_2.weight"] = replace(weights["ln_1.weight"], name="copy")
    with pytest.raises(Unproven, match="two explanations"):
        prove(made.compiled("block_0"), model.template("block_0"), weights)


def test_the_embedding_is_stored_once(bench: Callable[..., Bench], tmp_path: Path) -> None:
    pieces = bench("int4").pieces(NETS)
    with Bmodel(write(tmp_path / "m.bmodel", pieces).path) as bmodel:
        starts = {
            net["name"]: net["parameter"][0]["coeff_mem"]["binary_coeff"]["start"] for net in bmodel.nets
        }
    assert starts["embedding"] == starts["embedding_cache"]
    assert starts["block_1"] == starts["block_cache_1"] != starts["block_0"]
