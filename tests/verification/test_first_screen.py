"""The first words of the page: right about what was compared, the verdict and the figures."""

from __future__ import annotations

from qwen_surgery.verification.first_screen import Figure, FirstScreen, first_screen
from qwen_surgery.verification.results import AnswerPair, Check, LevelResult, Report


def _block(layer: int, cosine: float, *missed: str) -> Check:
    return Check(f"block_{layer}", layer, "prefill 5", "hidden_states", {"cosine": cosine}, missed)


def _greedy(agreement: float) -> Check:
    return Check("end-to-end", None, "greedy 5+8", "tokens", {"agreement": agreement}, ())


def _text(kl: float) -> Check:
    return Check("end-to-end", None, "text", "logits", {"kl": kl, "perplexity": 1.5}, ())


def _of(*levels: LevelResult) -> FirstScreen:
    return first_screen(Report("checkout", 64, "static", list(levels)))


def test_a_build_with_questions_and_a_text() -> None:
    pairs = [AnswerPair("?", (1,), (1,), "a", "a"), AnswerPair("!", (1,), (2,), "a", "b")]
    source = LevelResult("source", "fp32", "torch", [_block(0, 1.0)])
    chip = LevelResult("chip", "int4", "BM1684X", [_block(0, 0.9912), _block(1, 0.9889), _greedy(0.89)])
    chip.checks.append(_text(0.0017))
    chip.answers = pairs
    found = _of(source, chip)
    unpatched = "with the unpatched upstream model in float32"
    assert found.compared == (
        f"the patched PyTorch code (fp32 torch) {unpatched}",
        f"the compiled bmodel on the emulated chip (int4 BM1684X) {unpatched}",
    )
    assert found.verdict == "Everything that was compared agrees within its tolerance."
    assert [figure.value for figure in found.figures] == ["1 of 2", "89%", "0.9889"]


def test_figures_are_the_worst_of_the_last_level_s_runs() -> None:
    chips = [
        LevelResult("chip", mode, "BM1684X", [_block(0, cosine), _text(kl)])
        for mode, cosine, kl in (("bf16", 0.99997, 4e-5), ("int8", 0.9999, 7e-5))
    ]
    found = _of(LevelResult("source", "fp32", "torch", [_block(0, 0.5)]), *chips)
    assert "(bf16 BM1684X, int8 BM1684X)" in found.compared[1]
    assert [figure.value for figure in found.figures] == ["0.99990", "7.0e-05", "5 of 5"]


def test_the_demos_are_compared_with_the_same_nets_and_give_no_figures() -> None:
    """Their logits are equal by construction: 100 % there says nothing of the model."""
    chip = LevelResult("chip", "int4", "BM1684X", [_block(0, 0.99), _greedy(0.89)])
    runtime = LevelResult("runtime", "int4", "bmruntime", [_greedy(1.0)])
    found = _of(chip, runtime)
    assert found.compared[1].endswith("(int4 bmruntime) with the same bmodel's nets run one by one")
    assert [figure.value for figure in found.figures] == ["89%", "0.9900", "3 of 3"]
    (only,) = _of(runtime).figures
    assert only.value == "1 of 1"


def test_a_miss_is_named_by_its_first_level_and_nets() -> None:
    good = LevelResult("source", "fp32", "torch", [_block(0, 1.0)])
    bad = LevelResult("onnx", "fp32", "raw", [_block(0, 1.0), _block(3, 0.4, "cosine is below 0.99")])
    worse = LevelResult("chip", "int4", "BM1684X", [_block(0, 0.1, "cosine is below 0.9")])
    found = _of(good, bad, worse)
    assert found.verdict.endswith("the first level that misses a tolerance is onnx fp32 raw, at block.")
    assert found.figures[-1] == Figure("2 of 4", "checks are within their tolerance")


def test_what_compared_nothing_does_not_read_as_agreement() -> None:
    assert _of(LevelResult("chip", "int4", "BM1684X")).verdict == "Level chip int4 BM1684X compared nothing."
    assert first_screen(Report("checkout", 64, "static", [])).verdict == "Nothing was compared."
