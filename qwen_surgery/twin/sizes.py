"""How small a twin is: the real number of layers and as much of config.json as costs nothing, narrow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from codemods.config.facts import SIZES
from qwen_surgery.nets import Geometry

if TYPE_CHECKING:
    from codemods.config.facts import ModelFacts
    from qwen_surgery.patching.sources import Sources

#: A short twin has every head of the model and is read at every position.
SHORT_LENGTH = 16
#: A long twin has the real export length, up to this many tokens, and two heads.
LONGEST = 1024
VOCAB = 512
#: No table of positions in a twin is larger than this: early revisions build a square mask in every layer.
_MAX_POSITIONS = 2048

# The sizes in config.json that a twin changes, each under all names that it went by.
_WIDTHS = {size: SIZES[size] for size in ("hidden", "heads", "intermediate", "vocab")}
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx")


@dataclass(frozen=True)
class TwinSizes:
    """One twin. ``trained`` (tokens) is written for every length of its unpatched config; None keeps them."""

    name: str
    geometry: Geometry
    trained: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self.geometry), "trained_length": self.trained}


def twins(real: Geometry, facts: ModelFacts) -> tuple[TwinSizes, ...]:
    """The twins of a model of *real* sizes and unpatched *facts*: a short one, and a long one if S is.

    Every layer of the model is in both, since code may act on a layer's index. The short one's lengths are
    scaled down so that its export length is its trained length: one step beyond, LogN and dynamic NTK would
    act. The long one keeps config.json's lengths.
    """
    head_dim = 4 if real.heads > 16 else 8
    if facts.get("rotary_pct") not in (None, 1.0):
        head_dim = 32
    if real.seq_length <= SHORT_LENGTH:
        return (TwinSizes("short", _narrow(real, real.heads, real.kv_heads, head_dim, real.seq_length)),)
    shared = 1 if real.kv_heads < real.heads else 2
    scaled = max(1, min(SHORT_LENGTH, SHORT_LENGTH * facts.trained_length // real.seq_length))
    return (
        TwinSizes("short", _narrow(real, real.heads, real.kv_heads, head_dim, SHORT_LENGTH), scaled),
        TwinSizes("long", _narrow(real, 2, shared, max(8, head_dim), min(real.seq_length, LONGEST))),
    )


def _narrow(real: Geometry, heads: int, kv_heads: int, head_dim: int, seq_length: int) -> Geometry:
    hidden = heads * head_dim
    return Geometry(
        layers=real.layers,
        hidden=hidden,
        heads=heads,
        head_dim=head_dim,
        vocab=min(real.vocab, VOCAB),
        intermediate=2 * hidden,
        seq_length=seq_length,
        kv_heads=kv_heads,
        mlp_width=2 * hidden * real.mlp_width // real.intermediate,
    )


def resize(sources: Sources, real: Geometry, twin: TwinSizes) -> Sources:
    """*sources* with the twin's sizes in both config.json; all else in them stays."""

    trained, widths = sources.family.trained, {**_WIDTHS, **sources.family.widths}

    def config(files: Mapping[str, bytes], *, patched: bool) -> dict[str, bytes]:
        found = json.loads(files["config.json"].decode("utf-8-sig"))
        for field, names in widths.items():
            given = [name for name in names if name in found] or names[:1]
            found |= dict.fromkeys(given, getattr(twin.geometry, field))
        found.setdefault(trained, sources.facts.trained_length)
        lengths = dict.fromkeys((trained, *_LENGTHS))
        for name in [name for name in lengths if isinstance(found.get(name), int)]:
            found[name] = _length(found[name], real, twin, trained=name == trained, patched=patched)
        return {**files, "config.json": json.dumps(found).encode()}

    return replace(
        sources,
        reference=config(sources.reference, patched=False),
        patched=config(sources.patched, patched=True),
        seq_length=twin.geometry.seq_length,
    )


def _length(value: int, real: Geometry, twin: TwinSizes, *, trained: bool, patched: bool) -> int:
    if patched and value == real.seq_length:
        return twin.geometry.seq_length
    if twin.trained is not None:
        return twin.trained if trained else max(twin.trained, twin.geometry.seq_length)
    return value if trained else min(value, _MAX_POSITIONS)
