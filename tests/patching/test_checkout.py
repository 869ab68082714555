"""A checkout opens when its content is Qwen v1, and every other input gets one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from golden.eras import ERAS
from qwen_surgery.checkout import Checkout
from qwen_surgery.errors import Refused
from qwen_surgery.patching import write
from qwen_surgery.patching.sources import Sources
from tests.patching.conftest import Result, snapshot

Edit = Callable[[Path], object]


def _config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    file.write_text(json.dumps(config))


BAD: dict[str, tuple[Edit, str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "has no config.json"),
    "config is not JSON": (lambda p: (p / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "no JSON object"),
    "experts": (lambda p: _config(p, model_type="qwen2_moe"), "model_type qwen2_moe, not qwen"),
    "llama": (lambda p: _config(p, model_type="llama"), "model_type llama, not qwen"),
    "no model type": (lambda p: _config(p, model_type=None, architectures=None), "has no model_type"),
    "no modeling file": (lambda p: (p / "modeling_qwen.py").unlink(), "modeling_qwen.py is missing"),
    "syntax error": (lambda p: (p / "modeling_qwen.py").write_text("x = 1\ndef f(:\n"), "line 2"),
    "NUL bytes": (lambda p: (p / "modeling_qwen.py").write_bytes(b"x = 1\0"), "modeling_qwen.py"),
    "not UTF-8": (lambda p: (p / "modeling_qwen.py").write_bytes(b"x = '\xff\xfe'\n"), "modeling_qwen.py"),
    "another model": (lambda p: (p / "modeling_qwen.py").write_text("class A:\n    pass\n"), "not Qwen v1"),
    "empty file": (lambda p: (p / "modeling_qwen.py").write_text(""), "not Qwen v1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkout_is_one_line_exit_3_and_nothing_written(
    case: str, checkout: Path, cli: Callable[..., Result]
) -> None:
    spoil, said = BAD[case]
    spoil(checkout)
    before = snapshot(checkout)
    for command in (["patch"], ["patch", "--check"], ["patch", "--diff"]):
        result = cli(*command, checkout)
        assert result.code == 3
        assert said in result.err
        assert result.err.count("\n") == 1, "a person reads one line"
        assert result.out == ""
    assert snapshot(checkout) == before


def test_a_file_or_nothing_instead_of_a_directory(checkout: Path, cli: Callable[..., Result]) -> None:
    for path, said in ((checkout / "config.json", "not a directory"), (checkout / "none", "no such")):
        result = cli("patch", path)
        assert result.code == 3
        assert said in result.err


def test_modeling_file_is_found_by_content_whatever_its_name(checkout: Path) -> None:
    _config(checkout, auto_map=None)
    (checkout / "modeling_qwen.py").rename(checkout / "backbone.py")
    assert Checkout.open(checkout).modeling_file.name == "backbone.py"
    shutil.copy(checkout / "backbone.py", checkout / "other.py")
    with pytest.raises(Refused, match="several modeling files"):
        Checkout.open(checkout)


def test_auto_map_names_the_modeling_file_even_with_a_repository_before_it(checkout: Path) -> None:
    (checkout / "modeling_qwen.py").rename(checkout / "modeling_mine.py")
    _config(checkout, auto_map={"AutoModelForCausalLM": "Someone/Model--modeling_mine.QWenLMHeadModel"})
    assert Checkout.open(checkout).modeling_file.name == "modeling_mine.py"


def test_auto_map_cannot_lead_out_of_the_checkout(checkout: Path) -> None:
    (checkout.parent / "evil.py").write_bytes((checkout / "modeling_qwen.py").read_bytes())
    _config(checkout, auto_map={"AutoModelForCausalLM": "../evil.QWenLMHeadModel"})
    assert Checkout.open(checkout).modeling_file == checkout / "modeling_qwen.py"


def test_geometry_reads_new_and_old_names_alike(checkout: Path) -> None:
    new = Checkout.open(checkout).geometry(256)
    assert (new.layers, new.hidden, new.heads, new.head_dim, new.vocab) == (1, 16, 2, 8, 512)
    assert (new.intermediate, new.seq_length) == (64, 256)
    _config(
        checkout,
        num_hidden_layers=None,
        hidden_size=None,
        num_attention_heads=None,
        intermediate_size=None,
        vocab_size=None,
        n_layer=1,
        n_embd=16,
        n_head=2,
        ffn_hidden_size=64,
        padded_vocab_size=512,
    )
    assert Checkout.open(checkout).geometry(256) == new


@pytest.mark.parametrize("value", [None, 0, -1, "16", 2.5, True])
def test_geometry_refuses_a_missing_or_senseless_size(value: Any, checkout: Path) -> None:
    _config(checkout, hidden_size=value)
    with pytest.raises(Refused, match="hidden_size / n_embd"):
        Checkout.open(checkout).geometry(256)


@pytest.mark.parametrize("era", ERAS)
def test_sources_are_the_same_before_and_after_patching_in_place(era: str, make: Callable[..., Path]) -> None:
    path = make(era)
    before = snapshot(path)
    fresh = Sources.of(Checkout.open(path), "static", 512)
    assert snapshot(path) == before, "sources never writes"
    assert fresh.receipt is None
    assert fresh.reference["modeling_qwen.py"] == before["modeling_qwen.py"][0]
    assert fresh.patched["modeling_qwen.py"] != fresh.reference["modeling_qwen.py"]
    write.patch(path, "static", 512)
    again = Sources.of(Checkout.open(path), "static", 512)
    assert again.receipt is not None
    assert (again.reference, again.patched) == (fresh.reference, fresh.patched)
    assert again.outcomes == fresh.outcomes
    assert set(fresh.reference) >= {"config.json", "configuration_qwen.py", "modeling_qwen.py"}


def test_sources_of_a_patched_checkout_can_be_asked_for_another_length(checkout: Path) -> None:
    wanted = Sources.of(Checkout.open(checkout), "static", 256).patched
    write.patch(checkout, "static", 512)
    assert Sources.of(Checkout.open(checkout), "static", 256).patched == wanted
