"""A config.json that leaves keys to its class means what the class says, for every step that asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_surgery.checkout import Checkout
from qwen_surgery.errors import Refused
from qwen_surgery.families.qwen1 import Qwen1
from qwen_surgery.packing.refit import refuse_other_model
from qwen_surgery.packing.sidefile import SideFile
from qwen_surgery.patching.sources import Sources
from tests.exporting.conftest import LENGTH, Tiny, small_checkout

SWITCHES = ("use_dynamic_ntk", "use_logn_attn")
LONGER = LENGTH + 1

CLASS = """from transformers import PretrainedConfig

class QWenConfig(PretrainedConfig):
    model_type = "qwen"

    def __init__(self, {keywords}, **settings):
        super().__init__(**settings)
        {body}
"""


def silence(path: Path, *keys: str) -> None:
    """Take *keys* out of the checkout's config.json."""
    file = path / "config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in keys}
    file.write_text(json.dumps(kept, indent=2))


@pytest.fixture
def checkouts(tmp_path: Path) -> tuple[Path, Path]:
    """One model, trained at LENGTH, twice: the second config.json leaves the switches to its class."""
    told = small_checkout(tmp_path / "told", trained_length=LENGTH)
    silent = small_checkout(tmp_path / "silent", trained_length=LENGTH)
    silence(silent, *SWITCHES)
    return told, silent


def test_patch_declines_a_longer_export(checkouts: tuple[Path, Path]) -> None:
    for path in checkouts:
        with pytest.raises(Refused, match=f"{LONGER} is above the trained length {LENGTH}"):
            Sources.of(Checkout.open(path), "static", LONGER)


def test_export_refuses_a_longer_export(checkouts: tuple[Path, Path], tmp_path: Path) -> None:
    """The documented recipe does not look at the switches: it was exported, and K was off by 11.5."""
    for path in checkouts:
        tiny = Tiny.open(path, LONGER, "documented")
        with pytest.raises(Refused, match=f"export length {LONGER} is above the trained length {LENGTH}"):
            tiny.export(tmp_path / "onnx")


def test_the_manifest_says_what_the_config_left_out(checkouts: tuple[Path, Path], tmp_path: Path) -> None:
    told, silent = (Tiny.open(path).export(tmp_path / path.name / "onnx") for path in checkouts)
    assert silent.trained_length == told.trained_length == LENGTH
    assert silent.config == told.config


def test_side_file_and_refit_see_one_model(checkouts: tuple[Path, Path]) -> None:
    opened = [Checkout.open(path) for path in checkouts]
    facts = [Qwen1().compiled_facts(checkout.facts) for checkout in opened]
    assert facts[0] == facts[1] and facts[0]["use_logn_attn"] and facts[0]["trained_length"] == LENGTH
    side = SideFile((), opened[0].geometry(LENGTH), (), {}, facts[0])
    refuse_other_model(side, opened[1], Path("x.bmodel"))


def test_a_missing_length_is_that_of_the_class(tmp_path: Path) -> None:
    """The made-up checkouts' class says 2048, upstream's first release was trained at 8192."""
    path = small_checkout(tmp_path / "checkout", trained_length=LENGTH)
    silence(path, "seq_length")
    checkout = Checkout.open(path)
    facts = checkout.facts
    assert facts.trained_length == 2048
    checkout.family.refuse(facts, checkout.geometry(2048))
    with pytest.raises(Refused, match="2049 is above the trained length 2048"):
        checkout.family.refuse(facts, checkout.geometry(2049))
    (path / "configuration_qwen.py").unlink()
    assert Checkout.open(path).facts.trained_length == 8192


def test_a_missing_head_dimension_is_that_of_the_class(tmp_path: Path) -> None:
    path = small_checkout(tmp_path / "checkout")
    silence(path, "kv_channels")
    write_class(path, keywords="kv_channels=8", body="self.kv_channels = kv_channels")
    assert Checkout.open(path).geometry(LENGTH).head_dim == 8
    write_class(path, keywords="other=8", body="pass")
    assert Checkout.open(path).geometry(LENGTH).head_dim == 16


def write_class(path: Path, *, keywords: str, body: str) -> None:
    (path / "configuration_qwen.py").write_text(CLASS.format(keywords=keywords, body=body))


def test_a_class_that_does_otherwise_than_its_source_reads_is_refused(tmp_path: Path) -> None:
    """Only running it shows that: an export does, and compares."""
    path = small_checkout(tmp_path / "checkout", trained_length=LENGTH)
    silence(path, "use_logn_attn")
    text = (path / "configuration_qwen.py").read_text()
    end = "\n    @property\n    def use_logn_attn(self):\n        return len('') > 0\n"
    end += "\n    @use_logn_attn.setter\n    def use_logn_attn(self, value):\n        pass\n"
    (path / "configuration_qwen.py").write_text(text + end)
    with pytest.raises(Refused, match="say use_logn_attn is True; the class makes it False"):
        Tiny.open(path).export(tmp_path / "onnx")
