"""Qwen v1 modeling code is told by its content."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import codemods
from codemods import Era
from golden.eras import ERAS, modeling_source


@pytest.mark.parametrize("era", ERAS)
def test_each_era_is_recognised_before_and_after_patching(era: str) -> None:
    """Also: the checkouts of golden and the program call an era by the same name."""
    source = modeling_source(era)
    assert codemods.identify(source) is Era(era)
    assert codemods.identify(codemods.run(source, "static").code) is not None
    assert not codemods.refusal(source)


def test_every_era_of_upstream_has_its_checkout() -> None:
    assert list(ERAS) == [era.value for era in Era if era is not Era.DERIVED]


def test_other_models_are_refused_with_a_reason() -> None:
    """transformers is at hand: none of its modeling files is Qwen v1, whatever their names are."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin
    models = Path(spec.origin).parent / "models"
    for name in ("gpt2", "qwen2", "llama", "bloom", "gptj"):
        data = (models / name / f"modeling_{name}.py").read_bytes()
        assert codemods.identify(data) is None, name
        assert "not Qwen v1" in codemods.refusal(data), name


@pytest.mark.parametrize("part", ["RMSNorm", "c_attn", "w1"])
def test_a_file_without_one_of_the_marks_is_refused(part: str) -> None:
    text = modeling_source("sdpa").replace(part, "other")
    assert codemods.identify(text) is None
    assert codemods.refusal(text)
