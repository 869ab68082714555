"""Runs a checkout's twins: the unpatched whole model against the nets, as this program drives them."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_surgery.errors import Refused, SurgeryError
from qwen_surgery.nets import Geometry
from qwen_surgery.twin.branches import Watch
from qwen_surgery.twin.comparing import Parting, Recorder, parting
from qwen_surgery.twin.sizes import TwinSizes, resize, twins
from qwen_surgery.twin.twin_nets import TwinNets
from qwen_surgery.twin.whole import Trail, WholeTwin
from qwen_surgery.verification.runtime import Runtime

if TYPE_CHECKING:
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.weights import TensorRef

#: The largest difference of any number, relative to the largest number of its array (at least 1).
LIMIT = 1e-5


@dataclass
class TwinReport:
    """What the twins showed.

    ``worst`` is the largest relative difference, ``passes`` how many passes of the model were compared,
    ``not_entered`` the branches of the model's code that no twin ran; ``installed`` is whether the code had
    the installed transformers; ``seconds`` is the wall clock.
    """

    twins: tuple[TwinSizes, ...]
    installed: bool
    worst: float = 0.0
    passes: int = 0
    seconds: float = 0.0
    not_entered: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "transformers": self.installed,
            "twins": [sizes.to_json() for sizes in self.twins],
            "limit": LIMIT,
            "worst": self.worst,
            "passes": self.passes,
            "seconds": round(self.seconds, 2),
            "branches_not_entered": self.not_entered,
        }


def check_twin(sources: Sources, checkpoint: Mapping[str, TensorRef], real: Geometry) -> TwinReport:
    """Compare every twin of the checkout with its nets; raises Refused where they differ.

    *checkpoint* are the real checkpoint's tensors; only their names are used. Runs the checkout's code:
    callers have asked for trust. The code runs without transformers first, of which a forward needs nearly
    nothing; what fails then is tried with the installed one, and that is the real reason.
    """
    started = time.monotonic()
    report = _check_somehow(sources, checkpoint, real)
    report.seconds = time.monotonic() - started
    return report


def _check_somehow(sources: Sources, checkpoint: Mapping[str, TensorRef], real: Geometry) -> TwinReport:
    if sources.family.home:
        return _check(sources, checkpoint, real, installed=True)
    try:
        return _check(sources, checkpoint, real, installed=False)
    except Exception as error:
        if importlib.util.find_spec("transformers") is None:
            raise
        try:
            return _check(sources, checkpoint, real, installed=True)
        except SurgeryError as reason:
            raise reason from error


def prove(sources: Sources, checkpoint: Mapping[str, TensorRef], real: Geometry) -> dict[str, Any]:
    """:func:`check_twin` as an export's proof: its report as plain JSON."""
    return check_twin(sources, checkpoint, real).to_json()


def skipped(*_: Any) -> dict[str, Any]:
    """In place of :func:`prove` where the user wants none: what the manifest then says."""
    return {"skipped": "--no-twin"}


def _check(
    sources: Sources, checkpoint: Mapping[str, TensorRef], real: Geometry, *, installed: bool
) -> TwinReport:
    report = TwinReport(twins(real, sources.facts), installed)
    tied = sources.facts.tied and sources.family.anatomy.head_tensor not in checkpoint
    watched: list[list[str]] = []
    for sizes in report.twins:
        try:
            with _one_thread():
                watched.append(_run(resize(sources, real, sizes), sizes, checkpoint, tied, report))
        except SurgeryError:
            raise
        except Exception as error:
            raise _broken(sources.modeling, sizes, error) from error
    report.not_entered = [text for text in watched[0] if all(text in other for other in watched)]
    return report


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, torch uses one thread: a twin's matrices are too small to be shared out."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(
    small: Sources, sizes: TwinSizes, checkpoint: Mapping[str, TensorRef], tied: bool, report: TwinReport
) -> list[str]:
    """Hold every conversation with one twin; the branches of its code that did not run."""
    whole = WholeTwin(small, checkpoint, tied=tied, installed=report.installed)
    nets = Recorder(TwinNets(small, whole.index, sizes.geometry, installed=report.installed))
    watch = Watch(whole.code.module)
    for prompt, steps in _conversations(sizes):
        trails = _talk(whole, Runtime(nets, sizes.geometry), prompt, steps, watch)
        for label, trail, choices in trails:
            found, worst = parting(trail, nets, sizes.geometry.layers, decode="decode" in label, limit=LIMIT)
            if found is not None:
                raise _parted(small.modeling, sizes, label, found)
            if choices[0] != choices[1]:
                odd = Parting("greedy_head", np.inf, f"tokens {choices[0]} and {choices[1]}")
                raise _parted(small.modeling, sizes, label, odd)
            report.worst, report.passes = max(report.worst, worst), report.passes + 1
    return watch.not_entered()


def _conversations(sizes: TwinSizes) -> Iterator[tuple[list[int], int]]:
    """(prompt, decode steps): ragged lengths; first, middle and last slots are written and read."""
    s = sizes.geometry.seq_length
    plan = (
        [(s // 2 + 1, 1), (s - 1, 1)]
        if sizes.name == "long"
        else [(1, s - 1), (s // 3 + 1, 2), (s - 1, 1), (s, 0)]
    )
    for length, steps in plan:
        generator = np.random.default_rng(length)
        prompt = [int(t) for t in generator.integers(0, sizes.geometry.vocab, max(1, length))]
        yield prompt, min(steps, s - len(prompt))


def _talk(
    whole: WholeTwin, run: Runtime, prompt: Sequence[int], steps: int, watch: Watch
) -> Iterator[tuple[str, Trail, tuple[int, int]]]:
    """(label, what the model did, (its next token, the nets' next token)) of each pass.

    The nets read the model's tokens.
    """
    with watch.watching():
        trail = whole.prefill(prompt)
    logits, label = run.prefill(prompt), f"prefill of {len(prompt)} tokens"
    for step in range(steps + 1):
        assert trail.logits is not None
        token = int(np.argmax(trail.logits))
        yield label, trail, (token, run.greedy(logits))
        if step == steps:
            return
        with watch.watching():
            trail = whole.decode(token)
        logits, label = run.decode(token), f"decode at position {len(prompt) + step}"


def _parted(modeling: str, sizes: TwinSizes, label: str, found: Parting) -> Refused:
    size = "" if not np.isfinite(found.difference) else f" (by {found.difference:.1e}, limit {LIMIT:.0e})"
    return Refused(
        f"{modeling}: the nets do not compute what the unpatched model computes: they part at {found.place}, "
        f"in the {label} of the {sizes.name} twin{size}",
        hint=f"look at {found.look}; --no-twin exports without this proof",
    )


def _broken(modeling: str, sizes: TwinSizes, error: Exception) -> Refused:
    return Refused(
        f"{modeling}: the unpatched model does not run at the {sizes.name} twin's sizes: "
        f"{type(error).__name__}: {error}",
        hint="--debug shows where; --no-twin exports without this proof",
    )
