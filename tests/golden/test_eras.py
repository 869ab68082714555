"""The own-written eras are real models: they run, decode through their cache, and agree with each other."""

from __future__ import annotations

import ast
import importlib
import json
import sys
import uuid
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from golden.eras import ERAS, make_checkout, modeling_source
from qwen_surgery.cli import main

PROMPT = [256, 17, 301, 88, 402, 17, 5, 300, 299]


def load_model(checkout: Path) -> torch.nn.Module:
    """Import a checkout's Python as a private package and fill its model from the shards, in float32."""
    name = f"era_{uuid.uuid4().hex}"
    package = ModuleType(name)
    package.__path__ = [str(checkout)]
    sys.modules[name] = package
    modeling = importlib.import_module(f"{name}.modeling_qwen")
    configuration = importlib.import_module(f"{name}.configuration_qwen")
    config = configuration.QWenConfig(**json.loads((checkout / "config.json").read_text()))
    model = modeling.QWenLMHeadModel(config)
    weights: dict[str, torch.Tensor] = {}
    for shard in sorted(checkout.glob("*.safetensors")):
        weights |= load_file(shard)
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    assert not unexpected and not missing
    return model.eval()


def run(model: torch.nn.Module, tokens: list[int], *, split: int | None = None) -> torch.Tensor:
    """Logits at every position; with *split* the tokens from there on go through the cache one by one."""
    with torch.no_grad():
        ids = torch.tensor([tokens])
        if split is None:
            return model(ids).logits[0]
        out = model(ids[:, :split], use_cache=True)
        rows = [out.logits[0]]
        for i in range(split, len(tokens)):
            out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0])
    return torch.cat(rows)


@pytest.mark.parametrize("era", ERAS)
def test_decoding_through_the_cache_gives_the_prefill_logits(era: str, tmp_path: Path) -> None:
    model = load_model(make_checkout(tmp_path, era=era))
    whole, stepped = run(model, PROMPT), run(model, PROMPT, split=4)
    assert whole.shape == (len(PROMPT), 768)
    assert torch.isfinite(whole).all() and whole.std() > 0.1
    torch.testing.assert_close(stepped, whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("era", ERAS)
def test_a_later_token_never_changes_an_earlier_row(era: str, tmp_path: Path) -> None:
    model = load_model(make_checkout(tmp_path, era=era))
    changed = [*PROMPT[:-1], 42]
    before, after = run(model, PROMPT), run(model, changed)
    torch.testing.assert_close(before[:-1], after[:-1], atol=1e-5, rtol=0)
    assert (before[-1] - after[-1]).abs().max() > 0.1
    # and an earlier token does change a later row: attention is not idle
    earlier = run(model, [300, *PROMPT[1:]])
    assert (before[-1] - earlier[-1]).abs().max() > 0.01


def test_all_eras_agree_within_the_trained_length(tmp_path: Path) -> None:
    """Same weights, within the trained length: LogN and NTK are idle, so every era is one function."""
    logits = {era: run(load_model(make_checkout(tmp_path / era, era=era)), PROMPT, split=5) for era in ERAS}
    for era in ERAS:
        torch.testing.assert_close(logits[era], logits["sdpa"], atol=2e-5, rtol=0, msg=f"{era} differs")


def test_logn_and_ntk_act_past_the_trained_length(tmp_path: Path) -> None:
    tokens = PROMPT * 2
    acting = run(load_model(make_checkout(tmp_path / "a", trained_length=8)), tokens)
    idle = run(
        load_model(make_checkout(tmp_path / "b", trained_length=8, logn=False, dynamic_ntk=False)), tokens
    )
    only_logn = run(load_model(make_checkout(tmp_path / "c", trained_length=8, dynamic_ntk=False)), tokens)
    assert (acting - idle).abs().max() > 0.01
    assert (only_logn - idle).abs().max() > 0.01
    torch.testing.assert_close(only_logn[:8], idle[:8], atol=1e-5, rtol=0)


def test_later_eras_agree_past_the_trained_length_too(tmp_path: Path) -> None:
    """Eras with LogN and NTK differ only in when the stretch is applied, not in what it is."""
    tokens = PROMPT * 2
    eras = [era for era in ERAS if era != "bias-buffer"]
    logits = {
        era: run(load_model(make_checkout(tmp_path / era, era=era, trained_length=8)), tokens) for era in eras
    }
    for era in eras:
        torch.testing.assert_close(logits[era], logits["sdpa"], atol=2e-5, rtol=0, msg=f"{era} differs")


@pytest.mark.parametrize("era", ["kv-quant", "sdpa", "tril-forward", "late"])
def test_the_quantised_cache_runs_and_stays_close(era: str, tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path, era=era)
    exact = run(load_model(checkout), PROMPT, split=4)
    config = json.loads((checkout / "config.json").read_text()) | {"use_cache_quantization": True}
    (checkout / "config.json").write_text(json.dumps(config))
    rough = run(load_model(checkout), PROMPT, split=4)
    assert 0 < (rough - exact).abs().max() < 0.5


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    first, second, other = (
        {
            f.name: f.read_bytes()
            for f in make_checkout(tmp_path / name, era="late", seed=seed).iterdir()
            if f.is_file()
        }
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first == second
    assert {n for n in first if first[n] != other[n]} == {n for n in first if n.endswith(".safetensors")}


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_weights_are_on_the_bfloat16_grid_whatever_the_stored_type(dtype: str, tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path, weight_dtype=dtype, shards=3)
    index = json.loads((checkout / "model.safetensors.index.json").read_text())
    seen = 0
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(checkout / file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = shard.get_tensor(name)
                assert index["weight_map"][name] == file
                seen += tensor.nbytes
                big = tensor.float().abs() > 2e-3  # below this float16 itself has fewer bits than bfloat16
                assert torch.equal(tensor.float()[big], tensor.bfloat16().float()[big]), name
                if "ln_" in name:
                    assert tensor.float().std() > 0.05, f"{name}: an all-equal gain would be folded away"
    assert seen == index["metadata"]["total_size"]


def test_one_shard_tied_weights_and_sparse_files(tmp_path: Path) -> None:
    one = make_checkout(tmp_path / "one", shards=1, tie=True)
    assert [f.name for f in one.glob("*.safetensors*")] == ["model.safetensors"]
    assert "lm_head.weight" not in load_file(one / "model.safetensors")
    big = make_checkout(
        tmp_path / "big",
        layers=4,
        hidden=2048,
        heads=16,
        intermediate=11008,
        vocab=151936,
        shards=4,
        sparse=True,
    )
    used = sum(f.stat().st_blocks * 512 for f in big.glob("*.safetensors"))
    assert used < 2**20 < sum(f.stat().st_size for f in big.glob("*.safetensors")) // 1000
    assert len((big / "qwen.tiktoken").read_bytes().splitlines()) > 151000
    for size in (1, 2, 9, 19):
        made = make_checkout(tmp_path / f"s{size}", shards=size)
        assert len(list(made.glob("*.safetensors"))) == size


def test_the_tokenizer_reads_back_what_it_wrote(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path)
    name = f"era_{uuid.uuid4().hex}"
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [str(checkout)]  # type: ignore[attr-defined]
    tokenization = importlib.import_module(f"{name}.tokenization_qwen")
    tokenizer = tokenization.QWenTokenizer(checkout / "qwen.tiktoken")
    text = "the cat, 42: naïve 你好\n<|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[-1] == tokenizer.im_end_id < 768
    assert len(ids) < len(text.encode()), "merges are used"


def test_each_era_holds_the_construct_it_is_named_for() -> None:
    held = {
        "bias-buffer": ('"bias",', "rotary_emb(kv_seq_len)"),
        "registered-mask": ("rotary_pos_emb: Optional", "registered_causal_mask"),
        "registered-mask-list": ("rotary_pos_emb_list",),
        "kv-quant": ("quantize_cache_v",),
        "sdpa": ("SUPPORT_TORCH2", "_upcast_and_reordered_attn"),
        "tril-forward": ("torch.tril(",),
        "late": ("if causal_mask is not None:", "(size_temp ** 0.5)", "torch.tril("),
    }
    assert set(held) == set(ERAS)
    for era, texts in held.items():
        source = modeling_source(era)
        ast.parse(source)
        assert all(text in source for text in texts), era
    assert "torch.full(" not in modeling_source("late")
    assert "_upcast_and_reordered_attn" not in modeling_source("tril-forward")


def test_demo_checkout_command_refuses_a_folder_that_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(SystemExit) as stop:
        main(["demo-checkout", str(tmp_path)])
    assert stop.value.code == 3
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(SystemExit) as stop:
        main(["demo-checkout", str(tmp_path / "new"), "--era", "late", "--layers", "3"])
    assert stop.value.code == 2, "the trained model has two layers: more are only to be had at random"
    with pytest.raises(SystemExit) as stop:
        main(["demo-checkout", str(tmp_path / "new"), "--era", "late", "--layers", "3", "--random"])
    assert stop.value.code == 0
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and config["model_type"] == "qwen"
