"""What the chip makes of cleaned nets: the same numbers, in no more cycles than recorded, from one set of
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from golden import cycles
from graph_passes.framework import recipe, registry
from graph_passes.mlir.fused_attention import LONG
from qwen_surgery.compiling.options import CompileOptions
from qwen_surgery.exporting.template import Template
from qwen_surgery.measuring import accuracy
from qwen_surgery.measuring.prediction import (
    NetPrediction,
    compile_template,
    random_weights,
    templates_of,
)
from qwen_surgery.nets import NetKind
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.toolchain.emulator import ChipEngine
from tests.graph_passes.conftest import SEQ_LENGTH

pytestmark = pytest.mark.tpu

Templates = Callable[[str], dict[NetKind, Template]]
MODES = ("bf16", "int8", "int4")
KINDS = (NetKind.BLOCK, NetKind.BLOCK_CACHE)
#: How many tokens the prompt has; the rest of the slots is padding.
LENGTH = 40


@pytest.fixture(scope="module")
def compiled(
    templates: Templates, toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[NetKind, str, bool], tuple[Path, NetPrediction]]:
    """A layer's net at the tiny geometry, cleaned or as exported, compiled once per run."""
    made: dict[tuple[NetKind, str, bool], tuple[Path, NetPrediction]] = {}

    def of(kind: NetKind, mode: str, cleaned: bool) -> tuple[Path, NetPrediction]:
        key = (kind, mode, cleaned)
        if key not in made:
            made[key] = compile_template(
                templates("sdpa")[kind],
                recipe.without(()) if cleaned else None,
                CompileOptions(mode=mode).resolved(),
                toolchain,
                tmp_path_factory.mktemp(f"{kind.value}-{mode}"),
            )
        return made[key]

    return of


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_cleaned_nets_are_as_exact_as_exported_ones(
    compiled: Callable[[NetKind, str, bool], tuple[Path, NetPrediction]],
    templates: Templates,
    toolchain: Toolchain,
    kind: NetKind,
    mode: str,
) -> None:
    """On the emulator, against float32: passes on the Top dialect have no other proof than this."""
    template = templates("sdpa")[kind]
    inputs = accuracy.inputs_of(template, LENGTH, seed=3)
    wanted = accuracy.reference(template, random_weights(template), inputs)
    got = {}
    for cleaned in (False, True):
        with ChipEngine(compiled(kind, mode, cleaned)[0], toolchain) as chip:
            outputs = chip.run(kind.value, inputs)
        got[cleaned] = accuracy.cosines(kind, wanted, outputs, LENGTH)
    for exported_one, cleaned_one in zip(got[False], got[True], strict=True):
        assert cleaned_one >= exported_one - 2e-6
        assert cleaned_one > {"bf16": 0.9999, "int8": 0.999, "int4": 0.98}[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_net_needs_more_cycles_than_recorded(
    compiled: Callable[[NetKind, str, bool], tuple[Path, NetPrediction]],
    toolchain: Toolchain,
    kind: NetKind,
    mode: str,
) -> None:
    """TPU-MLIR's prediction is exact arithmetic: more than 1 % over the record is a pass that got worse."""
    record = cycles.load()["tiny", kind.value, SEQ_LENGTH, mode, toolchain.version]
    assert not cycles.worse(record, compiled(kind, mode, True)[1].cycles)


def test_block_and_block_cache_share_one_set_of_weights(
    compiled: Callable[[NetKind, str, bool], tuple[Path, NetPrediction]], toolchain: Toolchain, tmp_path: Path
) -> None:
    """A pass that packs weights differently for prefill and decode would double the model's memory."""
    files = [compiled(kind, "int4", True)[0] for kind in KINDS]
    args = ["--combine", *map(str, files), "-o", str(tmp_path / "both.bmodel")]
    toolchain.run("model_tool", args, tmp_path, tmp_path / "log", net="both")
    combined = (tmp_path / "both.bmodel").stat().st_size
    assert combined < 1.1 * max(f.stat().st_size for f in files)


@pytest.mark.parametrize(("model_type", "mode"), [("qwen2", "bf16"), ("qwen2", "int4"), ("qwen3", "bf16")])
def test_fused_attention_is_as_exact_as_its_parts(
    model_type: str, mode: str, toolchain: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a length that the emulator runs in seconds. Wrong: a head that reads another group's keys, another
    scale, a mask that is left out.
    """
    sizes = cycles.LayerSizes(256, 4, 512, 768, model_type, kv_heads=2, head_dim=64)
    template = templates_of(sizes, SEQ_LENGTH, [NetKind.BLOCK], tmp_path / "checkout")[NetKind.BLOCK]
    inputs = accuracy.inputs_of(template, LENGTH, seed=3)
    wanted = accuracy.reference(template, random_weights(template), inputs)
    (fused,) = registry.select(registry.mlir_passes(), ["fused-attention"])
    found = {}
    for length in (SEQ_LENGTH + 1, SEQ_LENGTH):
        monkeypatch.setattr(fused, "from_length", length)
        options = CompileOptions(mode=mode).resolved()
        work = tmp_path / str(length)
        bmodel, made = compile_template(template, recipe.without(()), options, toolchain, work)
        with ChipEngine(bmodel, toolchain) as chip:
            outputs = chip.run(NetKind.BLOCK.value, inputs)
        found[length] = made.top_ops, accuracy.cosines(NetKind.BLOCK, wanted, outputs, LENGTH)
    (parts, apart), (one, together) = found.values()
    assert one < parts, "the pass found nothing"
    for exact, cosine in zip(apart, together, strict=True):
        assert cosine >= exact - 2e-6
        assert cosine > {"bf16": 0.9999, "int4": 0.98}[mode]


@pytest.mark.slow
def test_a_prompt_so_long_that_its_attention_is_fused(toolchain: Toolchain, tmp_path: Path) -> None:
    """Minutes: the emulator multiplies for each pair of 7,168 tokens."""
    sizes = cycles.LayerSizes(128, 2, 256, 768, "qwen2", kv_heads=1, head_dim=64)
    template = templates_of(sizes, LONG, [NetKind.BLOCK], tmp_path / "checkout")[NetKind.BLOCK]
    inputs = accuracy.inputs_of(template, LONG - 7, seed=3)
    wanted = accuracy.reference(template, random_weights(template), inputs)
    options = CompileOptions(mode="bf16").resolved()
    bmodel, _ = compile_template(template, recipe.without(()), options, toolchain, tmp_path / "work")
    text = next((tmp_path / "work").glob("*_final.mlir")).read_text()
    assert "tpu.FAttention" in text
    with ChipEngine(bmodel, toolchain) as chip:
        outputs = chip.run(NetKind.BLOCK.value, inputs)
    assert min(accuracy.cosines(NetKind.BLOCK, wanted, outputs, LONG - 7)) > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_tpu_mlir_1_6_takes_cleaned_nets(
    templates: Templates, kind: NetKind, mode: str, tmp_path: Path
) -> None:
    """The version that the vendor's guide pins compiles what the passes that it can take leave, and its own
    emulator computes what it computes from the graph as exported.
    """
    found = [chain for chain in Toolchain.installed() if chain.version == "1.6"]
    if not found:
        pytest.skip("TPU-MLIR 1.6 is not installed: qwen-surgery toolchain install --version 1.6")
    template, old = templates("sdpa")[kind], found[0]
    inputs = accuracy.inputs_of(template, LENGTH, seed=3)
    wanted = accuracy.reference(template, random_weights(template), inputs)
    options = CompileOptions(mode=mode, addr_mode="basic").resolved()
    reached = []
    for name, passes in (("raw", None), ("cleaned", recipe.without(registry.unfit(old.version)))):
        bmodel, _ = compile_template(template, passes, options, old, tmp_path / name)
        with ChipEngine(bmodel, old) as chip:
            reached.append(accuracy.cosines(kind, wanted, chip.run(kind.value, inputs), LENGTH))
    for raw, cleaned in zip(*reached, strict=True):
        assert cleaned >= raw - 2e-6 and cleaned > 0.98


SLOW = [r for r in cycles.load().values() if r.geometry != "tiny"]


@pytest.mark.slow
@pytest.mark.parametrize("record", SLOW, ids=lambda r: f"{r.geometry}-{r.kind}-{r.seq_length}-{r.mode}")
def test_real_geometry_needs_no_more_cycles_than_recorded(
    record: cycles.Record, toolchain: Toolchain, tmp_path: Path
) -> None:
    sizes, kind = cycles.GEOMETRIES[record.geometry], NetKind(record.kind)
    template = templates_of(sizes, record.seq_length, [kind], tmp_path / "checkout")[kind]
    options = CompileOptions(mode=record.mode).resolved()
    _, found = compile_template(template, recipe.without(()), options, toolchain, tmp_path / "work")
    assert not cycles.worse(record, found.cycles)
