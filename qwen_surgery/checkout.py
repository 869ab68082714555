"""A checkout: a Hugging Face model directory of a model this program can take, opened, never executed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codemods.analysis.source import SourceError
from codemods.config.facts import CONFIG, ModelFacts
from codemods.config.text import ConfigError
from qwen_surgery import families, nets
from qwen_surgery.errors import Refused, Usage
from qwen_surgery.families.family import Family
from qwen_surgery.parsing import is_plain_name, read_json

DEFAULT_RECIPE = "static"
DEFAULT_SEQ_LENGTH = 512


@dataclass(frozen=True)
class Checkout:
    """An opened checkout. ``config`` and ``era`` are of the files on disk now (patched or not).

    ``modeling_file`` lies in the checkout, or elsewhere where the checkout comes without code (see ``lent``).
    """

    path: Path
    config: dict[str, Any]
    family: Family
    modeling_file: Path
    era: str

    @classmethod
    def open(cls, path: Path | str, modeling: Path | None = None) -> Checkout:
        """Open and check the directory *path*; Refused (one line) when it is no model of a known family.

        The modeling file is the one that config.json's ``auto_map`` names, else the one of the family's
        name, else the only Python file whose content is the family's. Its content decides, never its name.
        Where the checkout has none, it is *modeling*, else the installed package's of which it is a part.
        """
        root = Path(path)
        config = _read_config(root)
        family = families.of(config, root / CONFIG)
        if modeling is not None and not family.home:
            raise Usage(
                f"--modeling is for models without code of their own; {family.title} comes with its own"
            )
        found = _find_modeling(root, config, family, modeling)
        if modeling is not None and found != modeling:
            raise Usage(
                f"--modeling is for a checkout without code, {found} is there",
                hint="`qwen-surgery restore` takes a patched copy away",
            )
        return cls(root, config, family, found, _era_of(found, family))

    @property
    def lent(self) -> bool:
        """Whether the modeling file is not the checkout's own: it is read where it lies, never written to."""
        return self.modeling_file.parent != self.path

    @property
    def modeling(self) -> str:
        """The name of the modeling file in the checkout, or the one that it would have there."""
        return self.family.modeling if self.lent else self.modeling_file.name

    @property
    def python_files(self) -> tuple[Path, ...]:
        """Every Python file at the top of the checkout, sorted by name."""
        return tuple(sorted(p for p in self.path.glob("*.py") if p.is_file()))

    def read_files(self) -> dict[str, bytes]:
        """config.json and every Python file as they are on disk now, by name: lent or its own."""
        if self.lent:
            return {CONFIG: (self.path / CONFIG).read_bytes(), self.modeling: self.modeling_file.read_bytes()}
        return {p.name: p.read_bytes() for p in (self.path / CONFIG, *self.python_files)}

    @property
    def facts(self) -> ModelFacts:
        """What config.json means, as it is on disk now; Refused when it makes no sense."""
        try:
            return self.family.facts(self.read_files())
        except ConfigError as error:
            raise Refused(f"{self.path / CONFIG}: {error}") from None

    def geometry(self, seq_length: int) -> nets.Geometry:
        """The sizes of the model for an export length of *seq_length*; Refused when config.json lacks one."""
        if seq_length < 1:
            raise Usage(f"the export length must be at least 1, not {seq_length}")
        try:
            return self.family.geometry(self.facts, seq_length)
        except ConfigError as error:
            raise Refused(f"{self.path / CONFIG}: {error}") from None


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
    return config


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


def _find_modeling(root: Path, config: dict[str, Any], family: Family, lent: Path | None) -> Path:
    mapped = _mapped_name(config)
    for name in (mapped, family.modeling):
        if is_plain_name(name) and (root / name).is_file():
            return root / name
    fitting = [p for p in sorted(root.glob("*.py")) if p.is_file() and _is_modeling(p.read_bytes(), family)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(p.name for p in fitting)
        raise Refused(f"{root} has several modeling files ({names}) and config.json's auto_map names none")
    lent = lent or family.installed_code()
    if lent is not None:
        return lent
    missing = f"{root} has no modeling file ({mapped or family.modeling} is missing)"
    if family.home:
        raise Refused(
            f"{missing} and no {family.home} is installed",
            hint="pip install 'qwen-surgery[verify]' brings transformers",
        )
    raise Refused(missing, hint="download the model's Python files too; they are beside config.json upstream")


def _is_modeling(data: bytes, family: Family) -> bool:
    """Whether *data* is *family*'s modeling code, by content. Text that does not parse is not."""
    try:
        return family.owns_code(data)
    except SourceError:
        return False


def _era_of(path: Path, family: Family) -> str:
    try:
        era = family.era(path.read_bytes())
    except SourceError as error:
        raise Refused(f"{path}: {error}") from None
    if not era:
        raise Refused(
            f"{path} is not {family.title} modeling code (judged by its content)",
            hint=f"this program edits the {family.modeling} of that family and of derived models",
        )
    return era
