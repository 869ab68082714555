"""A family is one file: found by what config.json says, and named nowhere else in the program."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from golden.eras import modeling_source
from qwen_surgery import families
from qwen_surgery.errors import Refused
from qwen_surgery.nets import Geometry, NetKind

ROOT = Path(__file__).resolve().parents[2] / "qwen_surgery"


def test_a_model_of_no_family_is_refused_with_what_is_known_of_it() -> None:
    with pytest.raises(Refused, match="says model_type qwen2_moe, not qwen") as caught:
        families.of({"model_type": "qwen2_moe"})
    assert "MoE" in caught.value.hint
    with pytest.raises(Refused, match="has no model_type"):
        families.of({"architectures": ["GPT2LMHeadModel"]})


def test_code_is_known_by_its_content() -> None:
    family = families.of_code(modeling_source("sdpa").encode())
    assert family is families.of({"model_type": "qwen"}) and family is not None
    assert families.of_code(b"class A:\n    c_attn = 1\n") is None


def test_the_class_is_the_one_that_auto_map_names() -> None:
    """Another file's defaults would give a model the wrong trained length."""
    source = """class QWenConfig(PretrainedConfig):
    def __init__(self, seq_length={}, **kwargs):
        super().__init__(**kwargs)
"""
    named = {"model_type": "qwen", "auto_map": {"AutoConfig": "Someone/Model--mine.MyConfig"}}
    silent = {"model_type": "qwen"}
    sources = {"mine.py": source.format(64).encode(), "configuration_qwen.py": source.format(32).encode()}
    for config, length in ((named, 64), (silent, 32)):
        files = {"config.json": json.dumps(config).encode(), **sources}
        assert families.of(config).facts(files).trained_length == length


def test_no_two_families_claim_one_model_or_one_side_file() -> None:
    """Side files tell a family by its keys: two equal sets would mix two families up."""
    for one, other in combinations(families.all_families(), 2):
        assert not set(one.model_types) & set(other.model_types)
        assert set(one.compiled_in) != set(other.compiled_in)


def test_every_weight_of_a_net_has_a_shape_and_a_name_of_its_own() -> None:
    geometry = Geometry(2, 64, 4, 16, 320, 256, 32)
    for family in families.all_families():
        facts = family.facts_of({"model_type": family.model_types[0]})
        layer = family.weight_shapes(NetKind.BLOCK, geometry, facts)
        assert layer and all(min(shape) > 0 for shape in layer.values())
        assert family.anatomy.layer(1) != family.anatomy.layer(0)


@pytest.mark.parametrize("family", families.all_families(), ids=lambda family: family.name)
def test_nothing_outside_names_a_family(family: families.Family) -> None:
    """A class or a tensor of one family named elsewhere would be wrong for the next."""
    names = (family.model_class, family.layer_class, family.config_class, family.anatomy.every_layer)
    for path in ROOT.rglob("*.py"):
        if path.parent.name == "families":
            continue
        text = path.read_text(encoding="utf-8").replace("modeling_qwen.QWenLMHeadModel", "")
        assert [name for name in names if name in text] == [], path
