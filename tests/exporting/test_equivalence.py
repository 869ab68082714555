"""What is exported computes what the unpatched model computes; else an exported model talks garbage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from golden.eras import ERAS
from qwen_surgery.exporting.placement import WeightMode
from qwen_surgery.nets import MIN_TOKENS_TO_KEEP, TOP_K, NetKind
from qwen_surgery.runtime.host import decode_mask, padded, prefill_mask, prefill_positions
from qwen_surgery.verification.engines import OrtEngine
from qwen_surgery.verification.reference import ReferenceModel
from qwen_surgery.weights import WeightIndex
from tests.exporting.conftest import LENGTH, Tiny, small_checkout

TOLERANCE = 1e-4


def assert_nets_equal(tiny: Tiny, folder: Path, prompt: int, steps: int) -> None:
    """Feed every net of *folder* the unpatched model's inputs, a prefill of *prompt* tokens, then decode."""
    engine = OrtEngine(folder, threads=1)
    reference = ReferenceModel(tiny.sources.reference, tiny.index, modeling=tiny.sources.modeling)
    tokens = [int(t) for t in np.random.default_rng(prompt).integers(0, 500, prompt + steps)]
    geometry = tiny.geometry
    unit = (geometry.heads, geometry.head_dim)

    step = reference.prefill(tokens[:prompt])
    (hidden,) = engine.run("embedding", [padded(tokens[:prompt], LENGTH)])
    close(hidden[0, :prompt], step.block_inputs[0])
    for layer in range(geometry.layers):
        states = np.zeros((1, LENGTH, geometry.hidden), np.float32)
        states[0, :prompt] = step.block_inputs[layer]
        inputs = [states, prefill_positions(prompt, LENGTH), prefill_mask(prompt, LENGTH)]
        hidden, key, value = engine.run(f"block_{layer}", inputs)
        close(hidden[0, :prompt], step.block_outputs[layer])
        close(key[0, :prompt], step.keys[layer])
        close(value[0, :prompt], step.values[layer])
    assert step.last_hidden is not None
    close(engine.run("lm_head", [step.last_hidden[None]])[0][0], step.logits)

    for length in range(prompt + 1, prompt + steps + 1):
        step = reference.decode(tokens[length - 1])
        (hidden,) = engine.run("embedding_cache", [np.array([[tokens[length - 1]]], np.int32)])
        close(hidden[0], step.block_inputs[0])
        for layer in range(geometry.layers):
            # Slots behind the past hold rubbish, as they do on the chip: the mask alone must hide them.
            history = np.full((2, 1, LENGTH, *unit), 7.0, np.float32)
            history[0, 0, : length - 1] = step.past_keys[layer]
            history[1, 0, : length - 1] = step.past_values[layer]
            position = np.array([[length - 1]], np.int32)
            inputs = [step.block_inputs[layer][None], position, decode_mask(length, LENGTH), *history]
            hidden, key, value = engine.run(f"block_cache_{layer}", inputs)
            close(hidden[0], step.block_outputs[layer])
            close(key[0], step.keys[layer])
            close(value[0], step.values[layer])


def close(actual: np.ndarray, expected: np.ndarray | None) -> None:
    assert expected is not None
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("era", ERAS)
def test_every_era_equals_its_unpatched_model_up_to_the_export_length(era: str, tmp_path: Path) -> None:
    """The trained length equals the export length, where LogN and dynamic NTK are about to begin."""
    tiny = Tiny.open(small_checkout(tmp_path / "checkout", era=era, trained_length=LENGTH))
    tiny.export(tmp_path / "onnx")
    assert_nets_equal(tiny, tmp_path / "onnx", prompt=5, steps=LENGTH - 5)


@pytest.mark.parametrize("prompt", [1, LENGTH - 1, LENGTH])
def test_prompts_of_one_token_and_of_the_whole_length(tiny: Tiny, exported: Path, prompt: int) -> None:
    assert_nets_equal(tiny, exported, prompt=prompt, steps=min(1, LENGTH - prompt))


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_weights_of_other_dtypes_and_tied_embeddings(dtype: str, tmp_path: Path) -> None:
    tiny = Tiny.open(small_checkout(tmp_path / "checkout", weight_dtype=dtype, tie=True, shards=1))
    tiny.export(tmp_path / "onnx", mode=WeightMode.COPY)
    assert_nets_equal(tiny, tmp_path / "onnx", prompt=4, steps=2)


def test_weights_in_torch_files(tmp_path: Path) -> None:
    """The same tensors in two ``pytorch_model-*.bin`` files, bound in place."""
    path = small_checkout(tmp_path / "checkout")
    tensors = {name: torch.from_numpy(ref.read()).bfloat16() for name, ref in WeightIndex.open(path).items()}
    for file in path.glob("*.safetensors*"):
        file.unlink()
    half = list(tensors)[: len(tensors) // 2]
    shards = {"pytorch_model-1.bin": half, "pytorch_model-2.bin": [n for n in tensors if n not in half]}
    for shard, names in shards.items():
        torch.save({name: tensors[name] for name in names}, path / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tiny = Tiny.open(path)
    tiny.export(tmp_path / "onnx")
    assert_nets_equal(tiny, tmp_path / "onnx", prompt=4, steps=2)


def test_a_length_above_the_trained_one_is_exact_where_nothing_depends_on_it(tmp_path: Path) -> None:
    path = small_checkout(tmp_path / "checkout", trained_length=8, logn=False, dynamic_ntk=False)
    tiny = Tiny.open(path)
    tiny.export(tmp_path / "onnx")
    assert_nets_equal(tiny, tmp_path / "onnx", prompt=6, steps=LENGTH - 6)


def test_greedy_head_and_multi_device_head_give_the_best_token(
    tiny: Tiny, exported: Path, tmp_path: Path
) -> None:
    logits = np.random.default_rng(0).standard_normal((1, tiny.geometry.vocab), dtype=np.float32)
    (token,) = OrtEngine(exported, threads=1).run("greedy_head", [logits])
    assert token.dtype == np.int32
    assert token.tolist() == [[int(logits.argmax())]]

    tiny.export(tmp_path / "multi", multi_device=True)
    engine = OrtEngine(tmp_path / "multi", threads=1)
    assert "greedy_head" not in engine.nets
    states = np.random.default_rng(1).standard_normal((1, 1, tiny.geometry.hidden), dtype=np.float32)
    (token,) = engine.run("lm_head", [states])
    (expected,) = OrtEngine(exported, threads=1).run("lm_head", [states[0]])
    assert token.reshape(-1).tolist() == [int(expected.argmax())]


@pytest.mark.parametrize(
    ("top_p", "temperature", "penalty"), [(0.8, 0.9, 1.1), (0.01, 1.0, 1.0), (1.0, 2.0, 0.8)]
)
def test_sampling_head_against_plain_arithmetic(
    tiny: Tiny, exported: Path, top_p: float, temperature: float, penalty: float
) -> None:
    generator = np.random.default_rng(3)
    logits = 4 * generator.standard_normal((1, tiny.geometry.vocab), dtype=np.float32)
    seen = generator.integers(0, tiny.geometry.vocab, (1, LENGTH)).astype(np.int32)
    scalars = [np.array([x], np.float32) for x in (top_p, temperature, penalty)]
    probabilities, tokens = OrtEngine(exported, threads=1).run(
        "penalty_sample_head", [logits, seen, *scalars]
    )

    changed = logits[0].astype(np.float64)
    for token in set(seen[0].tolist()):
        changed[token] *= penalty if changed[token] < 0 else 1 / penalty
    best = np.argsort(-changed, kind="stable")[:TOP_K]
    scores = changed[best] / temperature
    cumulative = np.cumsum(np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum())
    kept = (cumulative < top_p) | (np.arange(TOP_K) < MIN_TOKENS_TO_KEEP)
    weights = np.where(kept, np.exp(scores - scores.max()), 0)
    assert tokens[0].tolist() == best.tolist()
    np.testing.assert_allclose(probabilities[0], weights / weights.sum(), atol=1e-5)


@pytest.fixture(scope="module")
def generic(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> OrtEngine:
    """The generic demos' sampling head."""
    folder = tmp_path_factory.mktemp("generic") / "onnx"
    tiny.export(folder, sampler=NetKind.SAMPLE_HEAD, wanted=["sample_head"])
    return OrtEngine(folder, threads=1)


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature", "penalty"),
    [
        (1, 0.8, 0.7, 1.05),
        (3, 0.99, 1.0, 2.0),
        (20, 0.8, 0.7, 1.05),
        (20, 0.95, 0.004, 1.3),
        (50, 1.0, 5.0, 0.8),
    ],
)
def test_a_sampling_head_that_is_told_its_candidates_against_plain_arithmetic(
    tiny: Tiny, generic: OrtEngine, top_k: int, top_p: float, temperature: float, penalty: float
) -> None:
    """The demo reads the first top_k entries and draws by their shares: the list must be as if it ended
    there, also where scores over the temperature are below anything that marks a dropped one.
    """
    generator = np.random.default_rng(top_k)
    logits = 4 * generator.standard_normal((1, tiny.geometry.vocab), dtype=np.float32) - 20
    seen = np.argsort(-logits[0])[: 2 * LENGTH : 2].astype(np.int32)[None]
    knobs = [np.array([x], np.float32) for x in (penalty, temperature)]
    rest = [np.array([top_k], np.int32), np.array([top_p], np.float32)]
    probabilities, tokens = generic.run("sample_head", [logits, seen, *knobs, *rest])

    changed = logits[0].copy()
    for token in seen[0].tolist():
        changed[token] = changed[token] * np.float32(penalty if changed[token] < 0 else 1 / penalty)
    best = np.argsort(-changed, kind="stable")[:TOP_K]
    scores = (changed[best[:top_k]] - changed[best[0]]).astype(np.float64) / temperature
    shares = np.exp(scores) / np.exp(scores).sum()
    kept = np.where((np.cumsum(shares) < top_p) | (np.arange(top_k) < MIN_TOKENS_TO_KEEP), shares, 0)
    assert tokens[0].tolist() == best.tolist()
    np.testing.assert_allclose(probabilities[0, :top_k], kept / kept.sum(), atol=1e-5)
    assert not probabilities[0, top_k:].any()
