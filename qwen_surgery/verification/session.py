"""A whole verification: opens what is to be compared, runs the levels one after the other."""

from __future__ import annotations

import importlib.metadata
import resource
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from golden import tolerances
from golden.speaking.model import TEXT
from qwen_surgery.errors import Refused, Usage
from qwen_surgery.exporting.remote_code import require_trust
from qwen_surgery.nets import NetKind, sampler_of
from qwen_surgery.runtime.host import Sampling
from qwen_surgery.verification import duration, language
from qwen_surgery.verification.cases import (
    CaseMaker,
    NetCase,
    Selection,
    default_lengths,
    longest_prompt,
    make_prompts,
)
from qwen_surgery.verification.engines import (
    KEEP_BYTES,
    Engine,
    OrtEngine,
    TorchEngine,
    has_fused_head,
)
from qwen_surgery.verification.levels import (
    SAMPLED_STEPS,
    check_contract,
    check_end_to_end,
    check_nets,
    timed,
)
from qwen_surgery.verification.reference import ReferenceModel
from qwen_surgery.verification.results import Check, LevelResult, Report

if TYPE_CHECKING:
    from qwen_surgery.checkout import Checkout
    from qwen_surgery.nets import Geometry
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.tokenizer import Tokenizer
    from qwen_surgery.weights import WeightIndex

LEVELS = ("source", "onnx", "mlir", "chip", "runtime")
MODES = ("bf16", "f16", "int8", "int4")
_DEFAULT_STEPS = 8
#: Cases are kept for the next level up to this many bytes.
KEEP_CASES = 1 << 30


@dataclass(frozen=True)
class Request:
    """What the user asked for. Empty ``levels`` means every level whose parts were given; ``runtime`` is the
    profile whose demos the level ``runtime`` follows, None: all that can read the bmodel. ``sample`` is for
    a few layers of a big model: what lies between them does not run, so that their inputs are not the whole
    model's, and one net at a time is in memory.
    """

    checkout: Path
    onnx: tuple[Path, ...] = ()
    bmodels: tuple[Path, ...] = ()
    levels: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    nets: tuple[str, ...] = ()
    steps: int = _DEFAULT_STEPS
    prompt_lengths: tuple[int, ...] = ()
    seq_length: int | None = None
    recipe: str | None = None
    mode: str | None = None
    seed: int = 0
    toolchain: str | None = None
    trust_remote_code: bool = False
    questions: tuple[str, ...] = ()
    text: str = ""
    text_tokens: int = 256
    runtime: str | None = None
    sample: bool = False

    @property
    def hold(self) -> int:
        """Bytes of weights that the reference, and an engine, may hold beyond what is running."""
        return 0 if self.sample else KEEP_BYTES

    def chosen(self) -> tuple[str, ...]:
        """The levels to run, in order; raises Usage when a level lacks its part."""
        levels = self.levels or tuple(
            level
            for level, given in (
                ("source", True),
                ("onnx", bool(self.onnx)),
                ("chip", bool(self.bmodels)),
            )
            if given
        )
        for level in levels:
            if level not in LEVELS:
                raise Usage(f"there is no level {level}", hint=f"levels are {', '.join(LEVELS)}")
            if level in ("onnx", "mlir") and not self.onnx:
                raise Usage(f"level {level} needs an exported folder", hint="give --onnx DIR")
            if level in ("chip", "runtime") and not self.bmodels:
                raise Usage(f"level {level} needs a bmodel", hint="give --bmodel FILE")
        return tuple(level for level in LEVELS if level in levels)


@dataclass
class _Opened:
    """Everything the levels share."""

    request: Request
    sources: Sources
    index: WeightIndex
    geometry: Geometry
    #: The head to sample by of what is verified.
    sampler: NetKind
    selection: Selection
    reference: ReferenceModel
    limits: dict[tuple[str, str], dict[str, tolerances.Limit]]
    progress: Callable[[str], None]
    _kept: list[NetCase] = field(default_factory=list)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkout's, read as data."""
        from qwen_surgery.tokenizer import Tokenizer

        return Tokenizer.open(self.request.checkout)

    @cached_property
    def questions(self) -> list[language.Question]:
        """The questions with the unpatched model's answers."""
        self.progress("reference: answers")
        return language.ask_reference(
            self.reference, self.tokenizer, self.request.questions, self.geometry.seq_length
        )

    @cached_property
    def readings(self) -> list[language.Reading]:
        """The text as the unpatched model reads it."""
        self.progress("reference: text")
        tokens = self.tokenizer.encode(self.request.text)
        return language.read_reference(
            self.reference, tokens, self.geometry.seq_length, self.request.text_tokens
        )

    def cases(self) -> Iterable[NetCase]:
        """Every case; made once, or, where all together take much memory, again for each level."""
        maker = CaseMaker(self.reference, self.geometry, self.selection)
        if maker.bytes > KEEP_CASES:
            return maker.cases()
        if not self._kept:
            self.progress("reference: the unpatched model")
            self._kept = list(maker.cases())
        return self._kept

    @property
    def whole(self) -> bool:
        """Whether every layer and net is verified, which the end-to-end checks need."""
        return self.request.layers is None and not self.request.nets

    def limits_for(self, level: str, mode: str) -> dict[str, tolerances.Limit]:
        try:
            return self.limits[level, mode]
        except KeyError:
            raise Usage(f"no tolerances are known for level {level} in mode {mode}") from None


def verify(
    request: Request,
    progress: Callable[[str], None] = lambda what: None,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run the levels of *request*. *progress* gets what runs now, *say* what a person should know before.

    Raises Usage or Refused for parts that cannot be compared at all (no trust, another model's export, an
    impossible selection); everything else ends up as a check in the report.
    """
    from qwen_surgery.checkout import Checkout

    checkout = Checkout.open(request.checkout)
    require_trust(request.trust_remote_code, "verify", lent=checkout.lent)
    levels = request.chosen()
    parts, folders = _open(checkout, request, levels, progress)
    if parts.reference.streamed and not request.sample:
        say(_announced(parts, levels, len(folders)))
    report = Report(str(request.checkout), parts.geometry.seq_length, parts.sources.recipe)
    if "source" in levels:
        report.levels.append(_source_level(parts))
    for folder in folders if "onnx" in levels else ():
        report.levels.append(_level(parts, "onnx", "fp32", _folder_name(folder), folder))
    if "mlir" in levels:
        report.levels.append(_mlir_level(parts, folders[-1]))
    for bmodel in request.bmodels if "chip" in levels else ():
        report.levels.append(_chip_level(parts, bmodel))
    for bmodel in request.bmodels if "runtime" in levels else ():
        report.levels.append(_runtime_level(parts, bmodel))
    # Linux counts in KiB; children are the emulator and TPU-MLIR's tools.
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    report.peak_rss = max(usage) * 1024
    report.versions = versions()
    return report


def _open(
    checkout: Checkout, request: Request, levels: Sequence[str], progress: Callable[[str], None]
) -> tuple[_Opened, list[OrtEngine]]:
    from qwen_surgery.patching.sources import Sources
    from qwen_surgery.weights import WeightIndex

    folders = [OrtEngine(folder, keep_bytes=request.hold) for folder in request.onnx]
    bmodels = request.bmodels if {"chip", "runtime"} & set(levels) else ()
    if bmodels or "mlir" in levels:
        _ready_for_chips(request, bmodels)
    for bmodel in bmodels if "runtime" in levels else ():
        _refuse_several(bmodel)
    seq_length = _seq_length(request, folders, bmodels)
    recipe = request.recipe or next((f.manifest.recipe for f in folders), "static")
    sources = Sources.of(checkout, recipe=recipe, seq_length=seq_length)
    for folder in folders:
        _refuse_other_model(folder, sources)
    geometry = checkout.geometry(seq_length)
    index = WeightIndex.open(request.checkout)
    lengths = request.prompt_lengths or default_lengths(seq_length)
    selection = Selection(lengths, request.layers, request.nets, request.seed, request.sample)
    sampler = _sampler(folders, request.bmodels)
    selection.net_names(geometry, sampler=sampler)
    reference = ReferenceModel(
        sources.reference,
        index,
        modeling=sources.modeling,
        layers=sorted({0, *selection.layer_list(geometry)}),
        kept=selection.kept(geometry),
        whole_model_bytes=request.hold,
    )
    limits = tolerances.load()
    opened = _Opened(request, sources, index, geometry, sampler, selection, reference, limits, progress)
    return opened, folders


def _announced(parts: _Opened, levels: Sequence[str], folders: int) -> str:
    """What a model that does not fit in memory costs, without questions, texts and the emulator."""
    request, length = parts.request, parts.geometry.seq_length
    engines = ("source" in levels) + ("onnx" in levels) * folders
    told = engines + ("chip" in levels) * len(request.bmodels)
    made = told if CaseMaker(parts.reference, parts.geometry, parts.selection).bytes > KEEP_CASES else 1
    nets = list(duration.net_passes(parts.selection.lengths, length))
    talk: list[int] = []
    if parts.whole and request.steps:
        talk = duration.end_to_end_passes(
            len(_end_to_end_prompt(parts)), request.steps, min(request.steps, SAMPLED_STEPS)
        )
    reference = [*nets * made, *talk * told]
    own = [length if tokens > 1 else 1 for tokens in [*nets, *talk] * engines]
    found = duration.seconds(parts.reference.weights, [*reference, *own])
    return (
        f"the unpatched model runs with one layer in memory at a time: {len(reference)} passes over "
        f"{parts.reference.weights / 1e9:.1f} billion weights; with the nets about {duration.in_words(found)}"
    )


def _ready_for_chips(request: Request, bmodels: Sequence[Path]) -> None:
    """Raise before anything runs when there is no toolchain, or a bmodel's mode is not known."""
    from qwen_surgery.toolchain.environment import Toolchain

    Toolchain.find(request.toolchain)
    for bmodel in bmodels:
        _mode_of(request, bmodel)


def _refuse_several(bmodel: Path) -> None:
    """Raise Usage for a bmodel for several devices."""
    from qwen_surgery.packing.cascade import devices_of, nets_of

    if devices_of(nets_of(bmodel)) > 1:
        raise Usage(
            f"{bmodel.name} is for several devices, and the vendor's runtime finds one emulated chip",
            hint="leave the level runtime out; the level chip runs what each device does",
        )


def _seq_length(request: Request, folders: Sequence[OrtEngine], bmodels: Sequence[Path]) -> int:
    """The export length that all parts agree on; 512 when nothing says one."""
    said: dict[str, int] = {str(folder.folder): folder.manifest.seq_length for folder in folders}
    if request.seq_length is not None:
        said["--seq-length"] = request.seq_length
    for bmodel in bmodels:
        length = _chip_seq_length(bmodel)
        if length is not None:
            said[str(bmodel)] = length
    if len(set(said.values())) > 1:
        raise Refused("export lengths differ: " + ", ".join(f"{who} has {s}" for who, s in said.items()))
    return next(iter(said.values()), 512)


def _sampler(folders: Sequence[OrtEngine], bmodels: Sequence[Path]) -> NetKind:
    """The head to sample by that an exported folder or a bmodel has. Raises Refused for what is no bmodel."""
    from qwen_surgery.packing.cascade import nets_of

    names = {name for folder in folders for name in folder.nets}
    names |= {net.name for bmodel in bmodels for net in nets_of(bmodel)}
    return sampler_of(names)


def _chip_seq_length(bmodel: Path) -> int | None:
    """The length of a bmodel's prefill embedding; None without one. Raises Refused when it is no bmodel."""
    from qwen_surgery.packing.cascade import nets_of

    found = [net for net in nets_of(bmodel) if net.name == "embedding"]
    return found[0].whole_tensors("input_tensor")[0].shape[-1] if found else None


def _refuse_other_model(folder: OrtEngine, sources: Sources) -> None:
    import hashlib

    recorded = folder.manifest.sources.get("reference", {})
    for name, digest in recorded.items():
        content = sources.reference.get(name)
        if content is None or hashlib.sha256(content).hexdigest() != digest:
            raise Refused(
                f"{folder.folder} was exported from another {name} than the checkout's",
                hint="export this checkout again",
            )


def _mode_of(request: Request, bmodel: Path) -> str:
    """The bmodel's mode: ``--mode``, else the part of its name that is one."""
    if request.mode and len(request.bmodels) > 1:
        raise Usage("--mode is for one bmodel", hint="several say their modes in their names")
    if request.mode:
        return request.mode
    found = [part for part in bmodel.stem.split("_") if part in MODES]
    if len(found) != 1:
        raise Usage(f"{bmodel.name} does not say its mode", hint=f"give --mode, one of {', '.join(MODES)}")
    return found[0]


def _folder_name(folder: OrtEngine) -> str:
    return "cleaned" if folder.manifest.passes else "raw"


def _level(
    parts: _Opened, level: str, mode: str, name: str, engine: Engine, bmodel: Path | None = None
) -> LevelResult:
    result = LevelResult(level, mode, name)
    limits = parts.limits_for(level, mode)
    # An export whose lm_head gives the token has no heads, as a bmodel of several kinds of runtime has none.
    heads = "greedy_head" in engine.nets or not (level == "chip" or has_fused_head(engine))

    def work() -> None:
        if bmodel is not None:
            result.checks += [
                *check_contract(engine, parts.geometry),
                _memory_check(bmodel, parts.request.runtime or None),
            ]
        wanted = parts.selection.net_names(parts.geometry, heads=heads, sampler=sampler_of(engine.nets))
        result.checks += check_nets(
            engine,
            parts.cases(),
            parts.geometry,
            limits,
            wanted,
            progress=lambda what: parts.progress(f"{level} {name}: {what}"),
        )
        if parts.whole and parts.request.steps:
            checks, result.texts = check_end_to_end(
                engine,
                parts.reference,
                parts.geometry,
                limits,
                _end_to_end_prompt(parts),
                parts.request.steps,
                Sampling(seed=parts.request.seed),
                progress=lambda what: parts.progress(f"{level} {name}: {what}"),
            )
            result.checks += checks
        if parts.whole:
            _speak(parts, result, engine, limits)

    return timed(result, work)


def _source_level(parts: _Opened) -> LevelResult:
    """The patched code in torch, whose weights go when it is done."""
    engine = TorchEngine(
        parts.sources, parts.index, parts.geometry, sampler=parts.sampler, keep_bytes=parts.request.hold
    )
    return _level(parts, "source", "fp32", "torch", engine)


def _speak(parts: _Opened, result: LevelResult, engine: Engine, limits: dict[str, tolerances.Limit]) -> None:
    """Questions and text, where they were given."""

    def say(what: str) -> None:
        parts.progress(f"{result.level} {result.name}: {what}")

    if parts.request.questions:
        checks, answers = language.check_answers(
            engine, parts.geometry, parts.tokenizer, limits, parts.questions, say
        )
        result.checks += checks
        result.answers += answers
    if parts.request.text:
        result.checks += language.check_text(engine, parts.geometry, limits, parts.readings, say)


def _end_to_end_prompt(parts: _Opened) -> list[int]:
    """The longest prompt that leaves room for the decode steps; a shortened one when none does.

    It is text where the checkout has its tokenizer: on random tokens a trained model sees nothing it knows,
    and its distribution, which is then compared, hangs on little.
    """
    prompts = make_prompts(parts.selection, parts.geometry)
    room = longest_prompt(parts.geometry.seq_length, parts.request.steps)
    fitting = [prompt for prompt in prompts if len(prompt) <= room]
    prompt = max(fitting, key=len) if fitting else prompts[0][:room]
    return _text_tokens(parts)[: len(prompt)] or prompt


def _text_tokens(parts: _Opened) -> list[int]:
    """Tokens of the text, else of one that comes with this program; none without a tokenizer that fits."""
    try:
        tokenizer = parts.tokenizer
    except Refused:
        return []
    if tokenizer.size > parts.geometry.vocab:
        return []
    return tokenizer.encode(parts.request.text or TEXT.read_text(encoding="utf-8"))


def _chip_level(parts: _Opened, bmodel: Path) -> LevelResult:
    """A bmodel on the emulator, which is open only for this level."""
    from qwen_surgery.runtime.several import open_chip
    from qwen_surgery.toolchain.environment import Toolchain

    mode = _mode_of(parts.request, bmodel)
    with open_chip(bmodel, Toolchain.find(parts.request.toolchain)) as chip:
        return _level(parts, "chip", mode, chip.chip, chip, bmodel)


def _memory_check(bmodel: Path, profile: str | None) -> Check:
    """Whether the demos (of *profile*) find every tensor as they left it, by what `inspect` sees."""
    from qwen_surgery.packing.report import inspect

    return Check("all nets", None, "contract", "memory", {}, inspect(bmodel, profile).contract)


def _runtime_level(parts: _Opened, bmodel: Path) -> LevelResult:
    """A bmodel in the vendor's own runtime, as each generation of demos drives it."""
    from qwen_surgery.toolchain.environment import Toolchain
    from qwen_surgery.verification.on_runtime import check_runtimes

    result = LevelResult("runtime", _mode_of(parts.request, bmodel), "bmruntime")

    def work() -> None:
        lengths = Selection(
            _runtime_lengths(parts.request, parts.geometry.seq_length), seed=parts.request.seed
        )
        prompts = make_prompts(lengths, parts.geometry)
        result.checks += check_runtimes(
            bmodel,
            Toolchain.find(parts.request.toolchain),
            parts.geometry,
            prompts,
            parts.request.steps,
            Sampling(seed=parts.request.seed),
            profile=parts.request.runtime,
            progress=lambda what: parts.progress(f"runtime: {what}"),
        )

    return timed(result, work)


def _runtime_lengths(request: Request, seq_length: int) -> tuple[int, ...]:
    """The prompts that were asked for, cut to leave room for the steps; else a short one, and one as long as
    it may be: what overlaps shows in a prompt's last rows.
    """
    room = longest_prompt(seq_length, request.steps)
    return tuple(
        sorted({min(length, room) for length in request.prompt_lengths or (seq_length // 3 + 1, room)})
    )


def _mlir_level(parts: _Opened, folder: OrtEngine) -> LevelResult:
    """TPU-MLIR's own Top-level inference against onnxruntime on the same inputs."""
    from qwen_surgery.toolchain.environment import Toolchain
    from qwen_surgery.verification.mlir import MlirEngine

    result = LevelResult("mlir", "fp32", _folder_name(folder))

    def work() -> None:
        toolchain = Toolchain.find(parts.request.toolchain)
        wanted = parts.selection.net_names(
            parts.geometry, heads=not has_fused_head(folder), sampler=sampler_of(folder.nets)
        )
        with MlirEngine(folder, toolchain, parts.geometry) as engine:
            result.checks += check_nets(
                engine,
                parts.cases(),
                parts.geometry,
                parts.limits_for("mlir", "fp32"),
                wanted,
                expected_by=folder,
                progress=lambda what: parts.progress(f"mlir: {what}"),
            )

    return timed(result, work)


def versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic is compared; absent ones are left out."""
    found = {}
    for name in ("torch", "transformers", "onnxruntime", "onnx", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
