"""The verify command as a user meets it: exit codes, JSON alone on stdout, refusals in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_surgery.cli import main
from qwen_surgery.verification import session
from qwen_surgery.verification.cases import CaseMaker, Selection
from qwen_surgery.verification.reference import ReferenceModel
from qwen_surgery.verification.session import Request, verify
from tests.twin.forks import FORKS, leave_unread
from tests.twin.test_twin import checkout as fork_checkout
from tests.verification.conftest import SEQ_LENGTH, Bench

TRUST = "--trust-remote-code"


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    out = capsys.readouterr()
    code = stop.value.code
    assert isinstance(code, int)
    return code, out.out, out.err


def test_a_clean_chain_passes(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "verify", bench.path, "--onnx", bench.folder, "--steps", 4, "--json", TRUST)
    report = json.loads(out)
    assert code == 0 and report["passed"] and report["seq_length"] == SEQ_LENGTH
    assert [level["level"] for level in report["levels"]] == ["source", "onnx"]
    for level in report["levels"]:
        nets = {check["net"] for check in level["checks"]}
        assert {
            "embedding",
            "block_0",
            "block_cache_1",
            "lm_head",
            "penalty_sample_head",
            "end-to-end",
        } <= nets
        assert level["greedy_tokens"]["reference"] == level["greedy_tokens"]["candidate"]
        assert len(level["greedy_tokens"]["reference"]) == 5


def test_tokens_stand_one_under_the_other(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """A reader must see at a glance whether the rewritten model says what the unpatched one says."""
    code, out, _ = run(capsys, "verify", bench.path, "--onnx", bench.folder, "--steps", 3, TRUST)
    lines = out.splitlines()
    start = lines.index("greedy tokens")
    rows = {line.split("  ")[1].strip(): line.split()[-4:] for line in lines[start + 1 :] if line.strip()}
    assert code == 0
    assert set(rows) >= {"unpatched PyTorch", "patched PyTorch (fp32)"}
    assert len({tuple(tokens) for tokens in rows.values()}) == 1


def test_no_trust_no_run(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "verify", bench.path)
    assert code == 2 and not out and "--trust-remote-code" in err


def test_the_generic_demos_head_is_judged_wherever_it_is(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the patched code as in the export; and a head that the export has not is no net to ask for."""
    args = ("--seq-length", SEQ_LENGTH, "--generic", "--no-twin", "--onnx-path", tmp_path / "nets", TRUST)
    assert run(capsys, "export", bench.path, *args)[0] == 0
    asked = ("verify", bench.path, "--onnx", tmp_path / "nets", TRUST, "--json", "--nets")
    code, out, _ = run(capsys, *asked, "sample_head")
    assert code == 0
    found = [{check["net"] for check in level["checks"]} for level in json.loads(out)["levels"]]
    assert found == [{"sample_head"}, {"sample_head"}]
    for other in ("penalty_sample_head", "lm_head_topk"):
        code, _, err = run(capsys, *asked, other)
        assert code == 2 and f"there is no net {other}" in err


@pytest.mark.tpu
def test_the_compilers_reading_of_an_lm_head_that_gives_tokens(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such an export has no heads, so none may be asked for; the token itself is compared."""
    args = ("--seq-length", SEQ_LENGTH, "--multi-device", "--onnx-path", tmp_path / "nets", TRUST)
    assert run(capsys, "export", bench.path, *args)[0] == 0
    asked = ("--level", "mlir", "--layers", 0, "--prompt-lengths", 3, "--onnx", tmp_path / "nets")
    code, out, _ = run(capsys, "verify", bench.path, *asked, "--json", TRUST)
    (level,) = json.loads(out)["levels"]
    assert code == 0 and [check["net"] for check in level["checks"]].count("lm_head") == 2


def test_sampling_layers_and_nets(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--seq-length", SEQ_LENGTH, "--layers", "1", "--nets", "block,lm_head", "--json", TRUST)
    code, out, _ = run(capsys, "verify", bench.path, *args)
    (level,) = json.loads(out)["levels"]
    assert code == 0 and {check["net"] for check in level["checks"]} == {"block_1", "lm_head"}


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (("--layers", "7"), 2, "layer 7"),
        (("--nets", "blok"), 2, "blok"),
        (("--level", "onnx"), 2, "--onnx"),
        (("--level", "chip"), 2, "--bmodel"),
        (("--prompt-lengths", "99"), 2, "99"),
        (("--steps", "32"), 2, "steps"),
    ],
)
def test_impossible_requests(
    args: tuple[str, ...], code: int, word: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    found, out, err = run(capsys, "verify", bench.path, "--seq-length", SEQ_LENGTH, TRUST, *args)
    assert (found, out) == (code, "") and word in err


def test_another_models_export_is_refused(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    run(capsys, "demo-checkout", other, "--era", "late")
    code, _, err = run(capsys, "verify", other, "--onnx", bench.folder, TRUST)
    assert code == 3 and "exported from another" in err


def test_a_damaged_export_is_refused(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "nets"
    shutil.copytree(bench.folder, copy)
    net = copy / "block_0.onnx"
    net.write_bytes(net.read_bytes()[:-8] + b"\0" * 8)
    code, _, err = run(capsys, "verify", bench.path, "--onnx", copy, TRUST)
    assert code == 3 and "block_0.onnx" in err


def test_a_streamed_reference_gives_the_same_numbers(bench: Bench) -> None:
    """Models that do not fit in memory run layer by layer; the reference must not depend on that."""
    streamed = ReferenceModel(bench.sources.reference, bench.index, whole_model_bytes=0)
    assert streamed.streamed and not bench.reference.streamed
    prompt = [5, 300, 17]
    for one, other in ((bench.reference.prefill(prompt), streamed.prefill(prompt)),):
        assert one.logits is not None and other.logits is not None
        assert abs(one.logits - other.logits).max() < 1e-5
    one, other = bench.reference.decode(9), streamed.decode(9)
    for layer in (0, 1):
        assert abs(one.keys[layer] - other.keys[layer]).max() < 1e-5
        assert one.past_keys[layer].shape == (3, 2, 64)


def test_a_model_that_is_streamed_says_how_long_it_takes(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of silence look like a hang. Passes: 3 tokens and a step, once; 3 and 2 steps, twice."""
    monkeypatch.setattr(session, "KEEP_BYTES", 0)
    args = ("--level", "source", "--prompt-lengths", "3", "--steps", "2", "--seq-length", SEQ_LENGTH, TRUST)
    code, out, err = run(capsys, "verify", bench.path, *args)
    assert code == 0 and "8 passes over" in " ".join(err.split())
    assert "about 1 min" in " ".join(err.split()) and "passes over" not in out


def test_first_layers_alone_give_the_same_numbers(bench: Bench) -> None:
    """One layer of a large model is verified without the others and without the vocabulary's matrices."""
    cut = ReferenceModel(bench.sources.reference, bench.index, layers=[0], kept=[0])
    whole, short = bench.reference.prefill([5, 300, 17]), cut.prefill([5, 300, 17])
    assert short.logits is None and short.last_hidden is None and set(short.block_outputs) == {0}
    assert abs(whole.block_outputs[0] - short.block_outputs[0]).max() == 0
    whole, short = bench.reference.decode(9), cut.decode(9)
    assert abs(whole.block_outputs[0] - short.block_outputs[0]).max() == 0
    assert abs(whole.past_values[0] - short.past_values[0]).max() == 0


@pytest.mark.parametrize(
    ("layers", "names", "kept"),
    [
        ((0,), ("block", "block_cache"), (0,)),
        ((1,), ("block_1",), (0, 1)),
        ((0,), ("embedding",), (0,)),
        ((0,), ("block", "lm_head"), None),
        ((0,), (), None),
        (None, (), None),
    ],
)
def test_the_reference_is_as_deep_as_what_is_chosen(
    layers: tuple[int, ...] | None, names: tuple[str, ...], kept: tuple[int, ...] | None, bench: Bench
) -> None:
    assert Selection((3,), layers, names).kept(bench.geometry) == kept


def test_a_sample_runs_the_chosen_layers_alone(bench: Bench) -> None:
    """The last layer of a large model is verified with its own weights, and nothing between is read."""
    sampled = Selection((3,), (1,), ("block", "block_cache"), sample=True)
    assert sampled.kept(bench.geometry) == (1,)
    index = {name: ref for name, ref in bench.index.items() if not name.startswith("transformer.h.0.")}
    cut = ReferenceModel(bench.sources.reference, index, layers=[1], kept=[1], whole_model_bytes=0)
    names = [case.net for case in CaseMaker(cut, bench.geometry, sampled).cases()]
    assert names == ["block_1", "block_cache_1"]
    request = Request(
        bench.path, onnx=(bench.folder,), nets=("block", "block_cache"), layers=(1,), sample=True
    )
    report = verify(replace(request, trust_remote_code=True))
    assert report.passed and [level.level for level in report.levels] == ["source", "onnx"]
    assert {check.net for level in report.levels for check in level.checks} == {"block_1", "block_cache_1"}


def test_cases_that_take_much_memory_are_made_again_for_each_level(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same checks, whether all cases are kept or none."""
    request = Request(
        bench.path, onnx=(bench.folder,), nets=("block", "block_cache"), layers=(0,), trust_remote_code=True
    )
    kept = verify(request)
    monkeypatch.setattr(session, "KEEP_CASES", 0)
    again = verify(request)
    assert kept.passed and again.passed
    for one, other in zip(kept.levels, again.levels, strict=True):
        assert {check.phase for check in one.checks} == {"prefill", "decode"}
        assert one.checks == other.checks


@pytest.mark.parametrize(
    ("fork", "net"),
    [
        ("logits capped", "lm_head"),
        ("embeddings scaled", "embedding"),
        ("embeddings scaled behind dropout", "embedding"),
        ("layers changed after they were made", "block_1"),
    ],
)
def test_what_the_model_does_around_its_layers_is_in_the_reference(
    fork: str,
    net: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reference that fed the layers itself would agree with nets that lack the same step."""
    leave_unread(monkeypatch)
    path = fork_checkout(tmp_path / "fork", next(f for f in FORKS if f.name == fork))
    code, out, _ = run(capsys, "verify", path, "--seq-length", 16, "--trust-remote-code", "--json")
    assert code == 1
    (level,) = json.loads(out)["levels"]
    assert net in {check["net"] for check in level["checks"] if not check["passed"]}


def test_a_model_that_skips_a_layer_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_unread(monkeypatch)
    path = fork_checkout(tmp_path / "fork", next(f for f in FORKS if f.name == "a layer skipped"))
    code, _, err = run(capsys, "verify", path, "--seq-length", 16, "--trust-remote-code")
    assert code == 3
    assert "forward runs the layers 0, 1" in " ".join(err.split())
