"""What a modeling file computes: a tiny model in float32, a padded prompt and decode steps through its cache.

The reference is the file as it is, called as Hugging Face callers do: a mask of ones and zeros, or none. A
patched file is called the way the exported nets are: every layer is handed one finite additive mask, causal
and padded, and returns the new keys and values alone, which the caller keeps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import CodeType, ModuleType
from typing import Any

import torch

from golden.eras.sources import python_files

PACKAGE = "soundness_checkout"
#: What the nets are given where a position is hidden; upstream's own is the lowest number of the dtype.
HIDDEN = -10000.0
#: Larger than float32's rounding in a model of this size, far smaller than any mask's effect.
LIMIT = 2e-4

#: The model's sizes. Prompts of 9 are longer than the trained length of 6: LogN and dynamic NTK act.
SETTINGS: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 8,
    "seq_length": 6,
    "max_position_embeddings": 24,
    "use_flash_attn": False,
    "fp32": True,
}


class NotViable(Exception):
    """The file does not import, does not run, or gives no finite number that means something."""


@dataclass(frozen=True)
class Talk:
    """A prompt of *length* tokens for each sequence, *pads* of them hidden on the left, then *steps* more."""

    length: int
    pads: tuple[int, ...]
    steps: int
    masked: bool  #: whether the caller gives a mask at all
    float_softmax: bool = False  #: whether the layers that can take their softmax in float32 do


TALKS = (
    Talk(length=9, pads=(0, 3), steps=3, masked=True),
    Talk(length=5, pads=(0,), steps=2, masked=False),
    Talk(length=8, pads=(0,), steps=1, masked=True, float_softmax=True),
)


def compute(
    text: str,
    *,
    layered: bool,
    padded: bool = True,
    others: Mapping[str, str] | None = None,
    nudged: int = 0,
) -> list[torch.Tensor]:
    """Logits and new keys and values at every real position, talk after talk, from one model.

    *layered* hands each layer the nets' mask; otherwise the file's own code makes it. *padded* hides the
    padding in that mask (files that never add the caller's mask do not hide it). *others* are the checkout's
    other Python files, an era's own by default. With *nudged*, each weight is off by about one rounding step
    of its dtype, up or down as that number says. Raises NotViable.
    """
    with _package(others or _own_files()), torch.no_grad():
        try:
            _module("modeling_qwen", text)
            model = _model(nudged)
            found = [tensor for talk in TALKS for tensor in _held(model, talk, layered, padded)]
        except Exception as error:
            raise NotViable(f"{type(error).__name__}: {error}") from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found):
        raise NotViable("not finite")
    return found


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest difference of two results; infinite where they have not even the same shape."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def movement(text: str, reference: list[torch.Tensor], others: Mapping[str, str] | None) -> float:
    """How far *reference*, computed from *text* unpatched, moves where weights are off by a rounding step;
    infinite where it moves to what is no number any more."""
    try:
        moved = [compute(text, layered=False, others=others, nudged=n) for n in (1, 2)]
    except NotViable:
        return float("inf")
    return max(difference(reference, found) for found in moved)


@cache
def _own_files() -> Mapping[str, str]:
    return python_files("sdpa")


@contextmanager
def _package(files: Mapping[str, str]) -> Iterator[ModuleType]:
    package = ModuleType(PACKAGE)
    package.__path__ = []
    sys.modules[PACKAGE] = package
    try:
        for name in ("configuration_qwen", "qwen_generation_utils"):
            _module(name, files.get(f"{name}.py", ""))
        yield package
    finally:
        for name in [n for n in sys.modules if n == PACKAGE or n.startswith(f"{PACKAGE}.")]:
            del sys.modules[name]


def _module(name: str, text: str) -> ModuleType:
    full = f"{PACKAGE}.{name}"
    module = ModuleType(full)
    module.__package__ = PACKAGE
    module.__file__ = f"{name}.py"
    sys.modules[full] = module
    code = compile(text, f"{name}.py", "exec", dont_inherit=True) if full in _MUTATED else _code(name, text)
    exec(code, module.__dict__)
    return module


_MUTATED = {f"{PACKAGE}.modeling_qwen"}


@cache
def _code(name: str, text: str) -> CodeType:
    """The files beside the mutated one are the same every time."""
    return compile(text, f"{name}.py", "exec", dont_inherit=True)


def _model(nudged: int) -> Any:
    config_class = sys.modules[f"{PACKAGE}.configuration_qwen"].QWenConfig
    module = sys.modules[f"{PACKAGE}.modeling_qwen"]
    model = module.QWenLMHeadModel(config_class(**SETTINGS)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator)
        gain = 1.0 if "ln_" in name else 0.0
        parameter.copy_(gain + values * (0.2 if gain or "bias" in name else 1.8 / parameter.shape[-1] ** 0.5))
    if nudged:
        generator.manual_seed(nudged)
        for _, parameter in sorted(model.named_parameters()):
            signs = torch.randint(2, parameter.shape, generator=generator) * 2 - 1
            parameter.mul_(1 + signs * torch.finfo(parameter.dtype).eps)
    return model


def _held(model: Any, talk: Talk, layered: bool, padded: bool) -> list[torch.Tensor]:
    """One talk: what the model gives at the positions that are no padding."""
    generator = torch.Generator().manual_seed(talk.length)
    tokens = torch.randint(61, (len(talk.pads), talk.length + talk.steps), generator=generator)
    seen = torch.ones_like(tokens)
    for row, pads in enumerate(talk.pads):
        seen[row, :pads] = 0
    found: list[torch.Tensor] = []
    past: Any = None
    for layer in model.transformer.h:
        if getattr(layer.attn, "softmax_in_fp32", None) is not None:
            layer.attn.softmax_in_fp32 = talk.float_softmax
    for start, stop in [(0, talk.length), *((n, n + 1) for n in range(talk.length, tokens.shape[1]))]:
        shown = seen if padded else torch.ones_like(seen)
        with _handed(model, _additive(shown, start, stop) if layered else None):
            given = seen[:, :stop].clone() if talk.masked else None
            out = model(
                tokens[:, start:stop],
                past_key_values=past,
                attention_mask=given,
                use_cache=True,
                return_dict=True,
            )
        real = seen[:, start:stop].bool()
        found.append(out.logits[real])
        past = _grown(past, out.past_key_values, stop - start, layered)
        found += [half[:, start:stop][real] for layer in past for half in layer]
    return found


def _additive(seen: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """[batch, 1, new, all]: zero where a query may look, HIDDEN elsewhere."""
    queries, keys = torch.arange(start, stop)[:, None], torch.arange(stop)[None, :]
    allowed = (keys <= queries)[None, None] & seen[:, None, None, :stop].bool()
    return torch.where(allowed, 0.0, HIDDEN)


@contextmanager
def _handed(model: Any, mask: torch.Tensor | None) -> Iterator[None]:
    """Every layer gets its own copy of *mask* in place of what the model would hand it."""

    def replace(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        assert mask is not None
        return args, {**kwargs, "attention_mask": mask.clone()}

    layers = model.transformer.h if mask is not None else ()
    hooks = [layer.register_forward_pre_hook(replace, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _grown(past: Any, given: Any, new: int, layered: bool) -> Any:
    """The cache for the next step; an edited layer gives its new units alone, which go behind the others."""
    if not layered or past is None:
        return tuple(tuple(half.clone() for half in layer) for layer in given)
    return tuple(
        tuple(
            torch.cat((old, unit), dim=1) if unit.shape[1] == new else unit.clone()
            for old, unit in zip(before, layer, strict=True)
        )
        for before, layer in zip(past, given, strict=True)
    )
