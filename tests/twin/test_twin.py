"""The tiny twin: what the unpatched model does around its layers cannot pass an export unnoticed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from golden.eras import ERAS, make_checkout
from qwen_surgery.checkout import Checkout
from qwen_surgery.cli import main
from qwen_surgery.errors import Refused
from qwen_surgery.exporting.manifest import Manifest
from qwen_surgery.patching.sources import Sources
from qwen_surgery.twin.twin import LIMIT, TwinReport, check_twin
from qwen_surgery.weights import WeightIndex
from tests.twin.forks import FORKS, Fork, leave_unread

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin on its own: reading the source would decline most of these checkouts before there is one."""
    leave_unread(monkeypatch)


def checkout(path: Path, fork: Fork | None = None, **options: Any) -> Path:
    """A tiny checkout, of *fork* where one is given."""
    made = make_checkout(path, layers=fork.layers if fork else 3, hidden=32, vocab=320, **options)
    file = made / "modeling_qwen.py"
    text = file.read_text()
    for before, after in fork.edits if fork else ():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    file.write_text(text)
    return made


def twin(path: Path, seq_length: int = 16, recipe: str = "static") -> TwinReport:
    opened = Checkout.open(path)
    sources = Sources.of(opened, recipe, seq_length)
    return check_twin(sources, WeightIndex.open(path), opened.geometry(seq_length))


@pytest.mark.parametrize("fork", FORKS, ids=lambda fork: fork.name)
def test_no_fork_passes_unnoticed(fork: Fork, tmp_path: Path) -> None:
    """A fork that passes would be built, proven against itself, and talk otherwise than its own model."""
    with pytest.raises(Refused) as refused:
        twin(checkout(tmp_path / "fork", fork), fork.seq_length)
    assert fork.place in f"{refused.value} {refused.value.hint}"


@pytest.mark.parametrize("era", ERAS)
def test_every_era_agrees(era: str, tmp_path: Path) -> None:
    """A twin that refuses upstream's own code would stop every user."""
    report = twin(checkout(tmp_path / era, era=era), seq_length=48)
    assert report.worst <= LIMIT
    assert report.passes == 26, "22 of the short twin, 4 of the long one"


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights(tie: bool, tmp_path: Path) -> None:
    assert twin(checkout(tmp_path / "tied", tie=tie)).worst <= LIMIT


def test_logn_left_in_is_caught(tmp_path: Path) -> None:
    """The documented edits keep LogN: its factor is one in the model, and not in a net of S slots."""
    with pytest.raises(Refused, match="block_cache_0"):
        twin(checkout(tmp_path / "logn"), recipe="documented")


def test_branches_that_did_not_run_are_listed(tmp_path: Path) -> None:
    """A length that the twin does not reach is not proven: its line must stand in the report."""
    unseen = Fork(
        "far", "", ((_DROP, _DROP + "        if kv_seq_len > 5000:\n            hidden_states *= 2\n"),)
    )
    path = checkout(tmp_path / "far", unseen)
    line = next(
        i for i, text in enumerate((path / "modeling_qwen.py").read_text().splitlines(), 1) if "*= 2" in text
    )
    assert f"line {line}: if kv_seq_len > 5000" in twin(path).not_entered


_DROP = "        hidden_states = self.drop(hidden_states)\n"


def test_a_model_that_does_not_run_is_refused(tmp_path: Path) -> None:
    broken = Fork("broken", "", ((_DROP, "        hidden_states = self.drop(hidden)\n"),))
    with pytest.raises(Refused, match=r"does not run at the short twin's sizes: .*Error"):
        twin(checkout(tmp_path / "broken", broken))


def test_a_parameter_without_weights_is_refused(tmp_path: Path) -> None:
    """Ordinary loading would leave it at a random value: no net could be right."""
    extra = Fork(
        "extra", "", ((_BUILT, "        self.gain = nn.Parameter(torch.ones(self.embed_dim))\n" + _BUILT),)
    )
    with pytest.raises(Refused, match=r"parameter transformer.gain that is not in the checkpoint"):
        twin(checkout(tmp_path / "extra", extra))


_BUILT = "        self.ln_f = RMSNorm(self.embed_dim, eps=config.layer_norm_epsilon)\n"


def run_export(capsys: pytest.CaptureFixture[str], path: Path, out: Path, *options: str) -> tuple[int, str]:
    command = ["export", str(path), "--onnx-path", str(out), "--seq-length", "16", "--trust-remote-code"]
    with pytest.raises(SystemExit) as ended:
        main([*command, *options])
    said = capsys.readouterr()
    return int(ended.value.code or 0), " ".join((said.out + said.err).split())


def test_export_refuses_a_fork_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkout(tmp_path / "fork", FORKS[0])
    code, said = run_export(capsys, path, tmp_path / "nets")
    assert code == 3
    assert "after lm_head" in said
    assert not (tmp_path / "nets").exists()


def test_no_twin_is_a_choice_that_the_manifest_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkout(tmp_path / "fork", FORKS[0])
    code, said = run_export(capsys, path, tmp_path / "nets", "--no-twin")
    assert code == 0
    assert "no proof" in said
    assert Manifest.load(tmp_path / "nets").twin == {"skipped": "--no-twin"}


def test_the_manifest_holds_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run_export(capsys, checkout(tmp_path / "plain"), tmp_path / "nets", "-v")
    assert code == 0
    found = json.loads((tmp_path / "nets" / "manifest.json").read_text())["twin"]
    assert found["worst"] <= found["limit"]
    assert found["passes"] == 22
    assert any("output_attentions" in line for line in found["branches_not_entered"])
    assert all(line in said for line in found["branches_not_entered"])
