"""A checkout: a Hugging Face model directory of a Qwen v1 model, opened and checked, never executed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codemods.analysis.identity import identify, may_be_modeling
from codemods.analysis.source import SourceError
from codemods.config.facts import CONFIG, SIZES, ModelFacts
from codemods.config.text import ConfigError
from qwen_surgery import nets
from qwen_surgery.errors import Refused, Usage
from qwen_surgery.parsing import is_plain_name, read_json

DEFAULT_NAME = "modeling_qwen.py"
DEFAULT_RECIPE = "static"
DEFAULT_SEQ_LENGTH = 512

# Why a related model is not for this program: said instead of a bare refusal.
_OTHER_TYPES = {
    "qwen2": "Qwen2 code is part of transformers; TPU-MLIR's llm_convert.py takes such a model as it is",
    "qwen2_moe": "Qwen MoE code is part of transformers and has another layer structure",
    "qwen3": "Qwen3 code is part of transformers; TPU-MLIR's llm_convert.py takes such a model as it is",
}


@dataclass(frozen=True)
class Checkout:
    """An opened checkout. ``config`` and ``era`` are of the files on disk now (patched or not)."""

    path: Path
    config: dict[str, Any]
    modeling_file: Path
    era: str

    @classmethod
    def open(cls, path: Path | str) -> Checkout:
        """Open and check the directory *path*; Refused (one line) when it is not a Qwen v1 checkout.

        The modeling file is the one that config.json's ``auto_map`` names, else ``modeling_qwen.py``, else
        the only Python file whose content is Qwen v1 modeling code. Its content decides, never its name.
        """
        root = Path(path)
        config = _read_config(root)
        modeling = _find_modeling(root, config)
        return cls(root, config, modeling, _era_of(modeling))

    @property
    def python_files(self) -> tuple[Path, ...]:
        """Every Python file at the top of the checkout, sorted by name."""
        return tuple(sorted(p for p in self.path.glob("*.py") if p.is_file()))

    def read_files(self) -> dict[str, bytes]:
        """config.json and every Python file as they are on disk now, by name."""
        return {p.name: p.read_bytes() for p in (self.path / CONFIG, *self.python_files)}

    @property
    def facts(self) -> ModelFacts:
        """What config.json means, as it is on disk now; Refused when it makes no sense."""
        try:
            return ModelFacts.from_files(self.read_files())
        except ConfigError as error:
            raise Refused(f"{self.path / CONFIG}: {error}") from None

    def geometry(self, seq_length: int) -> nets.Geometry:
        """The sizes of the model for an export length of *seq_length*; Refused when config.json lacks one."""
        if seq_length < 1:
            raise Usage(f"the export length must be at least 1, not {seq_length}")
        facts = self.facts
        sizes = {name: self._size(facts.size(name), " / ".join(names)) for name, names in SIZES.items()}
        hidden, heads = sizes["hidden"], sizes["heads"]
        head_dim = facts.get("kv_channels")
        if head_dim is None and hidden % heads:
            raise Refused(f"{self.path / CONFIG}: hidden size {hidden} is not a multiple of {heads} heads")
        head_dim = hidden // heads if head_dim is None else self._size(head_dim, "kv_channels")
        return nets.Geometry(head_dim=head_dim, seq_length=seq_length, **sizes)

    def _size(self, value: Any, key: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            where = self.path / CONFIG
            raise Refused(f"{where}: {key} must be a positive whole number, found {value!r:.100}")
        return value


def _read_config(root: Path) -> dict[str, Any]:
    if not root.exists():
        raise Refused(f"{root}: no such directory")
    if not root.is_dir():
        raise Refused(f"{root} is not a directory", hint="give the directory that holds config.json")
    path = root / CONFIG
    config = read_json(path, "not valid JSON")
    if config is None:
        raise Refused(f"{root} has no {CONFIG}", hint="a checkout is a Hugging Face model directory")
    if not isinstance(config, dict):
        raise Refused(f"{path} holds no JSON object")
    _check_type(path, config)
    return config


def _check_type(path: Path, config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and "QWenLMHeadModel" in architectures
    if kind == "qwen" or (kind is None and named):
        return
    said = f"says model_type {kind!s:.100}" if kind is not None else "has no model_type"
    raise Refused(f"{path} {said}, not qwen (Qwen v1)", hint=_OTHER_TYPES.get(str(kind), ""))


def _mapped_name(config: dict[str, Any]) -> str | None:
    """The modeling file that ``auto_map`` names, e.g. ``repo--modeling_qwen.QWenLMHeadModel``."""
    mapping = config.get("auto_map")
    if not isinstance(mapping, dict):
        return None
    for key in ("AutoModelForCausalLM", "AutoModel"):
        value = mapping.get(key)
        if isinstance(value, str) and "." in value:
            return value.rpartition("--")[2].partition(".")[0] + ".py"
    return None


def _find_modeling(root: Path, config: dict[str, Any]) -> Path:
    mapped = _mapped_name(config)
    for name in (mapped, DEFAULT_NAME):
        if is_plain_name(name) and (root / name).is_file():
            return root / name
    fitting = [p for p in sorted(root.glob("*.py")) if p.is_file() and is_modeling(p.read_bytes())]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(p.name for p in fitting)
        raise Refused(f"{root} has several modeling files ({names}) and config.json's auto_map names none")
    raise Refused(
        f"{root} has no modeling file ({mapped or DEFAULT_NAME} is missing)",
        hint="download the model's Python files too; they are beside config.json upstream",
    )


def is_modeling(data: bytes) -> bool:
    """Whether *data* is Qwen v1 modeling code, by content. Text that does not parse is not."""
    try:
        return may_be_modeling(data) and identify(data) is not None
    except SourceError:
        return False


def _era_of(path: Path) -> str:
    try:
        era = identify(path.read_bytes())
    except SourceError as error:
        raise Refused(f"{path}: {error}") from None
    if era is None:
        raise Refused(
            f"{path} is not Qwen v1 modeling code (judged by its content)",
            hint="this program edits the modeling_qwen.py of Qwen-1.8B/7B/14B/72B and derived models",
        )
    return era.value
