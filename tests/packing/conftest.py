"""Small checkouts, exported and compiled with the real TPU-MLIR, once per test run.

Compiled nets are kept in a folder that the workers of pytest-xdist share; a lock per net keeps two workers
from compiling the same one.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
import pytest

from golden.eras import make_checkout
from qwen_surgery.checkout import Checkout
from qwen_surgery.exporting.export import export
from qwen_surgery.exporting.manifest import Manifest, NetEntry
from qwen_surgery.nets import NetKind
from qwen_surgery.packing import Compiled, PackPlan, Piece, prove
from qwen_surgery.packing.container import Bmodel
from qwen_surgery.patching.sources import Sources
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.weights import WeightIndex

LAYERS, SEQ_LENGTH, VOCAB = 2, 32, 320
#: The documented flags of each mode; embeddings are always BF16.
QUANTIZE = {"bf16": ["BF16"], "f16": ["F16"], "int8": ["W8BF16"], "int4": ["W4BF16", "--q_group_size", "64"]}
NETS = ("embedding", "embedding_cache", "lm_head", "block_0", "block_cache_0", "block_1", "block_cache_1")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder of this test run, the same for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "packing"
    folder.mkdir(exist_ok=True)
    return folder


def _make_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """*folder*, filled by *make* unless this test run has filled it already."""
    with _locked(folder.with_name(folder.name + ".lock")):
        done = folder.with_name(folder.name + ".done")
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            done.touch()
    return folder


@dataclass(frozen=True)
class Model:
    """A checkout and its exported nets."""

    checkout: Path
    nets: Path

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest.load(self.nets)

    @cached_property
    def index(self) -> WeightIndex:
        return WeightIndex.open(self.checkout)

    def entry(self, net: str) -> NetEntry:
        return self.manifest.net(net)

    def template(self, net: str) -> onnx.ModelProto:
        return onnx.load(str(self.nets / self.manifest.template_file(self.entry(net).kind)))

    def config(self) -> dict[str, object]:
        return Checkout.open(self.checkout).config


def _export(checkout: Path, folder: Path) -> None:
    opened = Checkout.open(checkout)
    sources = Sources.of(opened, seq_length=SEQ_LENGTH)
    index = WeightIndex.open(checkout)
    export(sources, index, opened.geometry(SEQ_LENGTH), folder, trust_remote_code=True)


@pytest.fixture(scope="session")
def models(shared: Path) -> Callable[[int], Model]:
    """``models(seed)``: a two-layer model with the weights of that seed; the geometry is always the same."""

    def model(seed: int) -> Model:
        def make(folder: Path) -> None:
            make_checkout(
                folder / "checkout",
                era="bias-buffer",
                layers=LAYERS,
                hidden=128,
                heads=2,
                vocab=VOCAB,
                seed=seed,
            )
            _export(folder / "checkout", folder / "onnx")

        folder = _make_once(shared / f"model-{seed}", make)
        return Model(folder / "checkout", folder / "onnx")

    return model


@dataclass(frozen=True)
class Setup:
    """How nets are compiled: what ``--mode`` and ``--target`` mean to model_deploy, and further flags."""

    mode: str = "int4"
    chip: str = "bm1684x"
    extra: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return "-".join((self.mode, self.chip, *(flag.strip("-") for flag in self.extra)))

    def flags(self, kind: NetKind) -> list[str]:
        table = kind in (NetKind.EMBEDDING, NetKind.EMBEDDING_CACHE)
        quantize = QUANTIZE["bf16" if table else self.mode]
        flags = ["--quantize", *quantize, "--quant_input", "--chip", self.chip]
        flags += [] if kind is NetKind.LM_HEAD else ["--quant_output"]
        flags += ["--addr_mode", "io_alone"] if kind is NetKind.BLOCK_CACHE else []
        return flags + (list(self.extra) if kind.per_layer else [])


@dataclass(frozen=True)
class Bench:
    """Compiles nets of one model in one way, and packs them."""

    model: Model
    setup: Setup
    folder: Path
    toolchain: Toolchain

    def compiled(self, net: str) -> Compiled:
        """*net* as TPU-MLIR compiles it with the reference's own commands."""
        setup = Setup("bf16", self.setup.chip) if net.startswith("embedding") else self.setup
        name = f"{self.model.checkout.parent.name}-{setup.label}-{net}"
        folder = _make_once(self.folder / name, lambda work: self._compile(net, work))
        return Compiled(folder / f"{net}.bmodel", next(folder.glob("*_final.mlir")))

    def _compile(self, net: str, work: Path) -> None:
        work.mkdir()
        source = self.model.nets / self.model.entry(net).file
        transform = ["--model_name", net, "--model_def", str(source), "--mlir", f"{net}.mlir"]
        self.toolchain.run("model_transform", transform, work, work / "transform.log")
        flags = self.setup.flags(self.model.entry(net).kind)
        deploy = ["--mlir", f"{net}.mlir", *flags, "--model", f"{net}.bmodel"]
        self.toolchain.run("model_deploy", deploy, work, work / "deploy.log")

    def plan(self, net: str) -> PackPlan:
        return prove(self.compiled(net), self.model.template(net), self.model.entry(net).weights)

    def pieces(self, nets: Sequence[str] = NETS) -> list[Piece]:
        """*nets*, all but those of layer 0 packed where they are per layer."""
        plans = {net: self.plan(net) for net in {_first(net) for net in nets}}
        return [
            Piece(
                net,
                self.compiled(_first(net)).bmodel,
                plan=plans[_first(net)],
                tensors=self.model.entry(net).weights,
                pack=net != _first(net),
            )
            for net in nets
        ]

    def combined(self, out: Path, nets: Sequence[str] = NETS) -> Path:
        """*nets*, each compiled, joined by TPU-MLIR's own tool."""
        parts = [str(self.compiled(net).bmodel) for net in nets]
        self.toolchain.run(
            "model_tool", ["--combine", *parts, "-o", str(out)], out.parent, out.parent / "combine.log"
        )
        return out


def _first(net: str) -> str:
    """The net of layer 0 (or the only one) that *net*'s instructions come from."""
    return net[: net.rindex("_")] + "_0" if net.startswith("block") else net


def created(path: Path) -> str:
    """The creation time that a bmodel states."""
    with Bmodel(path) as bmodel:
        return str(bmodel.model["time"])


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    return Toolchain.find()


@pytest.fixture(scope="session")
def bench(models: Callable[[int], Model], shared: Path, toolchain: Toolchain) -> Callable[..., Bench]:
    """``bench(mode, chip, *extra, seed=0)``: a :class:`Bench`."""

    def make(mode: str = "int4", chip: str = "bm1684x", *extra: str, seed: int = 0) -> Bench:
        return Bench(models(seed), Setup(mode, chip, extra), shared, toolchain)

    return make
