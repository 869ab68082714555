"""A checkout: a Hugging Face model directory of a Qwen v1 model, opened and checked, never executed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_surgery import nets
from qwen_surgery.errors import Refused, Usage
from qwen_surgery.files import read_regular

if TYPE_CHECKING:
    from codemods.base import Outcome
    from qwen_surgery.patching.receipt import Receipt

CONFIG = "config.json"
LARGEST_CONFIG = 16 << 20  # bytes; real ones have about a thousand
DEFAULT_NAME = "modeling_qwen.py"
DEFAULT_RECIPE = "static"
DEFAULT_SEQ_LENGTH = 512

# Why a related model is not for this program: said instead of a bare refusal.
_OTHER_TYPES = {
    "qwen2": "Qwen2 code is part of transformers; TPU-MLIR's llm_convert.py takes such a model as it is",
    "qwen2_moe": "Qwen MoE code is part of transformers and has another layer structure",
    "qwen3": "Qwen3 code is part of transformers; TPU-MLIR's llm_convert.py takes such a model as it is",
}

# Geometry field -> the config.json names it went by, the newest first. Early releases used GPT-2's names.
_NAMES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "intermediate": ("intermediate_size", "ffn_hidden_size"),
    "vocab": ("vocab_size", "padded_vocab_size"),
}


@dataclass(frozen=True)
class Sources:
    """A checkout's Python and config files, by name, without and with the edits; nothing here was written.

    ``reference`` is the unpatched upstream text (from the receipt's originals when the checkout is patched in
    place), ``patched`` the same files with *recipe* applied for *seq_length*. ``outcomes`` are all sites of
    all files. ``modeling`` is the name of the modeling file.
    """

    modeling: str
    reference: dict[str, bytes]
    patched: dict[str, bytes]
    recipe: str
    seq_length: int
    outcomes: tuple[Outcome, ...]
    receipt: Receipt | None


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

    def geometry(self, seq_length: int) -> nets.Geometry:
        """The sizes of the model for an export length of *seq_length*; Refused when config.json lacks one."""
        if seq_length < 1:
            raise Usage(f"the export length must be at least 1, not {seq_length}")
        sizes = {name: self._size(*names) for name, names in _NAMES.items()}
        hidden, heads = sizes["hidden"], sizes["heads"]
        if "kv_channels" not in self.config and hidden % heads:
            raise Refused(f"{self.path / CONFIG}: hidden size {hidden} is not a multiple of {heads} heads")
        head_dim = self._size("kv_channels") if "kv_channels" in self.config else hidden // heads
        return nets.Geometry(head_dim=head_dim, seq_length=seq_length, **sizes)

    def _size(self, *names: str) -> int:
        value = next((self.config[name] for name in names if self.config.get(name) is not None), None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise Refused(
                f"{self.path / CONFIG}: {' / '.join(names)} must be a positive whole number, found {value!r}"
            )
        return value

    def sources(self, recipe: str = DEFAULT_RECIPE, seq_length: int = DEFAULT_SEQ_LENGTH) -> Sources:
        """The files without and with *recipe*, patched in memory; Refused when an edit is declined."""
        from codemods.recipes import UnknownRecipe
        from qwen_surgery.patching import plan, write

        if write.pending(self.path):
            raise Refused(
                f"an interrupted patch or restore of {self.path} waits to be finished",
                hint="run `qwen-surgery patch` or `qwen-surgery restore` on it first",
            )
        try:
            made = plan.make(self, recipe, seq_length)
        except UnknownRecipe as error:
            raise Usage(str(error)) from error
        plan.refuse_declined(made)
        return Sources(
            modeling=self.modeling_file.name,
            reference=made.reference,
            patched=made.result,
            recipe=recipe,
            seq_length=seq_length,
            outcomes=tuple(o for found in made.outcomes.values() for o in found),
            receipt=made.receipt,
        )


def _read_config(root: Path) -> dict[str, Any]:
    if not root.exists():
        raise Refused(f"{root}: no such directory")
    if not root.is_dir():
        raise Refused(f"{root} is not a directory", hint="give the directory that holds config.json")
    path = root / CONFIG
    text = read_regular(path, LARGEST_CONFIG, follow=True)
    if text is None:
        raise Refused(f"{root} has no {CONFIG}", hint="a checkout is a Hugging Face model directory")
    try:
        config = json.loads(text.decode("utf-8-sig"))
    except ValueError as error:
        raise Refused(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise Refused(f"{path} holds no JSON object")
    _check_type(path, config)
    return config


def _check_type(path: Path, config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    architectures = config.get("architectures") or []
    if kind == "qwen" or (kind is None and "QWenLMHeadModel" in architectures):
        return
    said = f"says model_type {kind}" if kind is not None else "has no model_type"
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
        if name and Path(name).name == name and (root / name).is_file():
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
    from qwen_surgery.patching import edits

    try:
        return edits.may_be_modeling(data) and bool(edits.era(data))
    except edits.SourceError:
        return False


def _era_of(path: Path) -> str:
    from qwen_surgery.patching import edits

    try:
        era = edits.era(path.read_bytes())
    except edits.SourceError as error:
        raise Refused(f"{path}: {error}") from None
    if not era:
        raise Refused(
            f"{path} is not Qwen v1 modeling code (judged by its content)",
            hint="this program edits the modeling_qwen.py of Qwen-1.8B/7B/14B/72B and derived models",
        )
    return era
