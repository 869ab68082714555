"""Compile options: the reference scripts' flags for every combination that works, one clear refusal for the
rest.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_surgery.compiling.one import refuse_unsupported
from qwen_surgery.compiling.options import (
    CompileOptions,
    deploy_flags,
    needed_passes,
    refuse_for_runtime,
    refuse_uncleaned,
)
from qwen_surgery.errors import Refused, Usage
from qwen_surgery.exporting.cleaning import chosen_passes
from qwen_surgery.nets import Geometry, NetKind
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.weights import Release

QWEN_7B = Geometry(32, 4096, 32, 128, 151936, 22016, 512)


def flags(kind: NetKind, cores: int = 1, **options: object) -> str:
    resolved = CompileOptions(**options).resolved(QWEN_7B)  # type: ignore[arg-type]
    return " ".join(deploy_flags(kind, resolved, cores))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (NetKind.BLOCK, {"mode": "int8"}, "--quantize W8BF16 --quant_input --quant_output --chip bm1684x"),
        (
            NetKind.BLOCK_CACHE,
            {"mode": "int4"},
            "--quantize W4BF16 --q_group_size 64 --quant_input --quant_output --chip bm1684x "
            "--addr_mode io_alone",
        ),
        (
            NetKind.BLOCK_CACHE,
            {"mode": "bf16", "addr_mode": "basic", "dynamic": True},
            "--quantize BF16 --quant_input --quant_output --chip bm1684x",
        ),
        (
            NetKind.BLOCK,
            {"mode": "bf16", "dynamic": True},
            "--quantize BF16 --quant_input --quant_output --chip bm1684x --dynamic",
        ),
        (
            NetKind.LM_HEAD,
            {"mode": "int8"},
            "--quantize W8BF16 --quant_input --chip bm1684x --addr_mode io_alone",
        ),
        (
            NetKind.LM_HEAD,
            {"mode": "int4", "lm_head_mode": "bf16", "addr_mode": "basic"},
            "--quantize BF16 --quant_input --chip bm1684x",
        ),
        (
            NetKind.EMBEDDING,
            {"mode": "int4", "dynamic": True},
            "--quantize BF16 --quant_input --quant_output --chip bm1684x --dynamic --addr_mode io_alone",
        ),
        (
            NetKind.EMBEDDING_CACHE,
            {"mode": "f16"},
            "--quantize F16 --quant_input --quant_output --chip bm1684x --addr_mode io_alone",
        ),
        (NetKind.GREEDY_HEAD, {"mode": "int4"}, "--chip bm1684x --addr_mode io_alone"),
        (NetKind.PENALTY_SAMPLE_HEAD, {"mode": "bf16"}, "--chip bm1684x --addr_mode io_alone"),
        (NetKind.SAMPLE_HEAD, {"mode": "bf16"}, "--chip bm1684x --dynamic --addr_mode io_alone"),
        (
            NetKind.BLOCK,
            {"mode": "int8", "q_group_size": 128},
            "--quantize W8BF16 --q_group_size 128 --quant_input --quant_output --chip bm1684x",
        ),
        (
            NetKind.BLOCK,
            {"mode": "int4", "q_group_size": 32, "symmetric": True},
            "--quantize W4BF16 --q_group_size 32 --q_symmetric --quant_input --quant_output --chip bm1684x",
        ),
        (
            NetKind.LM_HEAD_TOPK,
            {"mode": "int4", "lm_head_mode": "int8", "num_device": 8},
            "--quantize W8BF16 --quant_input --chip bm1684x --num_device 8 --addr_mode io_alone",
        ),
    ],
)
def test_flags_are_those_of_the_reference_scripts_with_addresses_apart(
    kind: NetKind, options: dict[str, object], expected: str
) -> None:
    assert flags(kind, **options) == expected


def test_two_cores_are_bm1688s() -> None:
    assert "--num_core 2" in flags(NetKind.BLOCK, 2, target="bm1688")
    assert CompileOptions(target="bm1688").resolved(QWEN_7B).cores == (1, 2)
    assert CompileOptions(target="bm1688", num_core=2).resolved(QWEN_7B).cores == (2,)
    assert CompileOptions(target="cv186x").resolved(QWEN_7B).cores == (1,)


@pytest.mark.parametrize(
    ("options", "names", "count"),
    [
        ({}, ["embedding", "embedding_cache", "lm_head", "greedy_head", "penalty_sample_head"], 5),
        (
            {"runtime": "llm-tpu-generic"},
            ["embedding", "embedding_cache", "lm_head", "greedy_head", "sample_head"],
            5,
        ),
        ({"target": "bm1688"}, ["embedding", "embedding_cache", "lm_head"], 3),
        ({"num_device": 2}, ["embedding", "embedding_cache", "lm_head"], 3),
        ({"runtime": "sophon-demo-2024.1"}, ["embedding", "embedding_cache", "lm_head"], 2),
    ],
)
def test_a_runtime_counts_the_right_number_of_layers(
    options: dict[str, object], names: list[str], count: int
) -> None:
    resolved = CompileOptions(**options).resolved(QWEN_7B)  # type: ignore[arg-type]
    nets = [net.name for net in resolved.nets(32)]
    assert nets[: len(names)] == names
    assert nets[len(names) : len(names) + 2] == ["block_0", "block_cache_0"]
    assert (len(nets) - count) // 2 == 32, "the demo would look for another number of layers"


def test_the_oldest_runtime_gets_a_token_from_its_lm_head() -> None:
    resolved = CompileOptions(runtime="sophon-demo-2024.1").resolved(QWEN_7B)
    assert resolved.nets(1)[2].kind is NetKind.LM_HEAD_TOPK


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({}, "BM1684X/qwen_int4_seq512_1dev.bmodel"),
        (
            {"mode": "int8", "dynamic": True, "runtime": "sophon-demo"},
            "BM1684X/qwen_int8_seq512_1dev_dyn.bmodel",
        ),
        (
            {"mode": "bf16", "num_device": 2, "runtime": "sophon-demo"},
            "BM1684X/qwen_bf16_seq512_2dev.bmodel",
        ),
        ({"target": "bm1688", "mode": "f16"}, "BM1688/qwen_f16_seq512_bm1688_1dev.bmodel"),
        ({"target": "cv186x", "name": "q"}, "CV186X/q_int4_seq512_cv186x_1dev.bmodel"),
    ],
)
def test_names_are_those_of_the_reference_scripts(options: dict[str, object], path: str) -> None:
    resolved = CompileOptions(**options).resolved(QWEN_7B)  # type: ignore[arg-type]
    assert resolved.file_name(512) == Path(path)
    if resolved.target == "bm1688":
        assert resolved.file_name(512, 2).name.endswith("_1dev_2core.bmodel")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "llm-tpu", "target": "bm1688"}, "runs on bm1684x, not on bm1688"),
        ({"runtime": "llm-tpu", "mode": "f16"}, "cannot run --mode f16"),
        ({"runtime": "llm-tpu-generic", "num_device": 2}, "is for sampling"),
        ({"runtime": "llm-tpu-generic", "target": "bm1688"}, "runs on bm1684x, not on bm1688"),
        ({"runtime": "sophon-demo-2024.1", "dynamic": True}, "--dynamic has no use"),
        ({"target": "bm1688", "dynamic": True}, "--dynamic is not supported on bm1688"),
        ({"target": "cv186x", "num_device": 2}, "--num-device 2 needs bm1684x"),
        ({"num_device": 3}, "over 2, 4, 6 or 8 devices"),
        ({"num_device": 2, "dynamic": True, "runtime": "sophon-demo"}, "--dynamic does not go with"),
        ({"num_device": 2, "mode": "int8"}, "--mode int8 does not go with --num-device"),
        ({"num_device": 2, "runtime": "sophon-demo-2024.1"}, "its masks need a floor"),
        ({"num_core": 2}, "--num-core 2 needs bm1688"),
        ({"target": "cv186x", "num_core": 2}, "--num-core 2 needs bm1688"),
        ({"mode": "bf16", "q_group_size": 64}, "no effect on --mode bf16"),
        ({"mode": "int8", "q_group_size": 100}, "does not divide the hidden size of 4096"),
        ({"mode": "bf16", "symmetric": True}, "--symmetric has no effect"),
        ({"q_group_size": 100}, "does not divide the hidden size of 4096"),
        ({"q_group_size": 0}, "must be positive"),
        ({"mode": "bf16", "lm_head_mode": "int8"}, "lower precision"),
        ({"mode": "int4", "lm_head_mode": "f16"}, "does not go with"),
        ({"mode": "w8a8"}, "unknown"),
    ],
)
def test_impossible_combinations_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(Usage, match=re.escape(message)) as caught:
        CompileOptions(**options).resolved(QWEN_7B)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("options", [{"dynamic": True}, {"num_device": 2}])
def test_what_raw_graphs_cannot_carry_is_refused(options: dict[str, object]) -> None:
    resolved = CompileOptions(**options).resolved(QWEN_7B)  # type: ignore[arg-type]
    with pytest.raises(Usage, match="needs cleaned nets"):
        refuse_uncleaned(resolved, ("fold-constants",))
    refuse_uncleaned(resolved, ("fold-constants", "rotary", "free-length", "split-attention"))


def test_nets_that_cannot_be_split_are_not_compiled_for_several_devices() -> None:
    resolved = CompileOptions(num_device=2).resolved(QWEN_7B)
    refuse_uncleaned(resolved, chosen_passes(several=True))
    with pytest.raises(Usage, match="does not go with the pass joint-mlp"):
        refuse_uncleaned(resolved, (*chosen_passes(several=True), "joint-mlp"))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"hidden": 256, "mlp_width": 512}, "too small for --num-device: its MLP"),
        ({"vocab": 1000}, "too small for --num-device: its table of tokens"),
        ({"kv_heads": 2}, "does not divide the 2 heads of keys and values"),
        ({"kv_heads": 6}, "does not divide the 6 heads of keys and values"),
    ],
)
def test_a_model_that_tpu_mlir_would_split_in_part_is_refused(sizes: dict[str, int], said: str) -> None:
    with pytest.raises(Usage, match=said):
        CompileOptions(num_device=4).resolved(replace(QWEN_7B, **sizes))
    CompileOptions(num_device=4).resolved(replace(QWEN_7B, kv_heads=8))
    CompileOptions(num_device=6).resolved(replace(QWEN_7B, kv_heads=6))


def test_a_runtime_that_needs_a_pass_gets_no_net_without_it() -> None:
    resolved = CompileOptions(runtime="sophon-demo-2024.1").resolved(QWEN_7B)
    with pytest.raises(Usage, match="cleaned with the pass bounded-mask"):
        refuse_for_runtime(resolved, ("fold-constants", "rotary"))
    refuse_for_runtime(resolved, needed_passes(resolved))


def test_an_option_that_a_toolchain_lacks_is_refused_by_name(tmp_path: Path) -> None:
    tools = tmp_path / "python/tools"
    tools.mkdir(parents=True)
    (tools / "model_deploy.py").write_text('parser.add_argument("--num_device")\n')
    old = Toolchain(tmp_path / "python3", tmp_path, "1.6")
    with pytest.raises(Usage, match=r"TPU-MLIR 1\.6 has no --addr_mode") as caught:
        refuse_unsupported(CompileOptions().resolved(), old)
    assert "--addr-mode basic" in caught.value.hint
    refuse_unsupported(CompileOptions(addr_mode="basic").resolved(), old)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mode": "bf16"}, "--quantizer search has no effect"),
        ({"num_device": 2, "runtime": "sophon-demo"}, "--quantizer search is for one chip"),
        ({"quantizer": "best"}, "--quantizer best is unknown"),
        ({"quantizer": "gptq", "mode": "f16", "runtime": "sophon-demo"}, "--quantizer gptq has no effect"),
        (
            {"quantizer": "gptq", "num_device": 2, "runtime": "sophon-demo"},
            "--quantizer gptq is for one chip",
        ),
    ],
)
def test_a_quantizer_without_use_is_a_usage_error(given: dict[str, object], said: str) -> None:
    with pytest.raises(Usage, match=said):
        CompileOptions(**{"quantizer": "search", **given}).resolved(QWEN_7B)  # type: ignore[arg-type]
    CompileOptions(mode="int8", quantizer="search").resolved(QWEN_7B)


GPTQ4, GPTQ8 = Release("gptq", 4, 128, less_one=True), Release("gptq", 8, 128, less_one=True)


def test_a_quantised_checkpoint_decides_bits_and_groups_of_the_blocks() -> None:
    """Its lm_head has no integers of its own."""
    for release, mode, quantize in ((GPTQ4, "int4", "W4BF16"), (GPTQ8, "int8", "W8BF16")):
        options = CompileOptions(mode=mode).resolved(QWEN_7B, release)
        block = " ".join(deploy_flags(NetKind.BLOCK, options, 1))
        assert f"--quantize {quantize} --q_group_size 128 --quant_input" in block
        assert "--quantize W8BF16 --quant_input" in " ".join(deploy_flags(NetKind.LM_HEAD, options, 1))
    rows = CompileOptions(mode="int8").resolved(QWEN_7B, Release("gptq", 8, -1, less_one=True))
    assert "--q_group_size" not in deploy_flags(NetKind.BLOCK, rows, 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mode": "int8"}, "--mode int8 does not go with this checkpoint (GPTQ, 4 bits, groups of 128)"),
        ({"mode": "bf16"}, "--mode bf16 does not go with this checkpoint"),
        ({"q_group_size": 64}, "--q-group-size 64 does not go with this checkpoint"),
        ({"symmetric": True}, "--symmetric has no effect"),
        ({"quantizer": "gptq"}, "--quantizer gptq does not go with this checkpoint"),
    ],
)
def test_options_that_conflict_with_a_quantised_checkpoint_are_usage_errors(
    given: dict[str, object], said: str
) -> None:
    with pytest.raises(Usage, match=re.escape(said)):
        CompileOptions(**given).resolved(QWEN_7B, GPTQ4)  # type: ignore[arg-type]
    CompileOptions(q_group_size=128).resolved(QWEN_7B, GPTQ4)


def test_several_chips_would_cut_a_quantised_checkpoints_groups() -> None:
    with pytest.raises(Refused, match="cannot be kept on several chips"):
        CompileOptions(num_device=2, runtime="sophon-demo").resolved(QWEN_7B, GPTQ4)
