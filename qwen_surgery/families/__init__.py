"""The families of models that this program can take: one module each, found by what config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from codemods.framework.discovery import defined, modules
from qwen_surgery.errors import Refused
from qwen_surgery.families.family import Family


@cache
def all_families() -> tuple[Family, ...]:
    """Every family of this package."""
    named = modules(__name__, __path__).values()
    found = (defined(module, Family) for module in named)  # type: ignore[type-abstract]
    return tuple(family for family in found if family is not None)


def of(config: Mapping[str, Any], where: object = "config.json") -> Family:
    """The family that *config* is of; raises Refused, in one line, for a model of none."""
    for family in all_families():
        if family.claims(config):
            return family
    kind = config.get("model_type")
    said = f"says model_type {kind!s:.100}" if kind is not None else "has no model_type"
    names = ", ".join(f"{name} ({family.title})" for family in all_families() for name in family.model_types)
    raise Refused(f"{where} {said}, not {names}", hint=_OTHERS.get(str(kind), ""))


def of_code(code: bytes) -> Family | None:
    """The family whose modeling code *code* is, judged by its content; raises SourceError."""
    for family in all_families():
        if family.owns_code(code):
            return family
    return None


def of_compiled_facts(config: Mapping[str, Any]) -> Family:
    """The family of a bmodel whose side file says *config*; raises ValueError when it says no family's."""
    for family in all_families():
        if set(config) == {*family.compiled_in, "trained_length"}:
            return family
    raise ValueError("it does not say what is compiled in")


#: Why a related model is not for this program: said beside a bare refusal.
_MOE = "MoE layers choose among experts, token by token, which a static net cannot do"
_OTHERS = {
    "qwen2_moe": _MOE,
    "qwen3_moe": _MOE,
    "qwen3_next": _MOE,
    "qwen2_vl": "models that see have another part in front, which this program does not build",
    "qwen2_5_vl": "models that see have another part in front, which this program does not build",
    "qwen3_vl": "models that see have another part in front, which this program does not build",
    "qwen2_audio": "models that hear have another part in front, which this program does not build",
    "qwen2_5_omni": "models that see and hear have other parts in front, which this program does not build",
}
