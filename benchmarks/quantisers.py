"""What each quantiser loses: perplexity, KL and agreement with the unpatched small chat model of golden/.

    python benchmarks/quantisers.py [--calibration FILE] [--chip FOLDER --rows int4-g64,...] [--tokens N]

In torch every row of the table takes seconds: the patched nets in fp32 with the weights that the integers
stand for. With ``--chip`` the rows named are built instead, refitted by each quantiser and run on the
emulator, which takes minutes a row. The text is golden/speaking/heldout.txt, which neither training nor
calibration has; each window's first quarter is read and not scored, as ``verify --text`` does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from golden import tolerances
from golden.speaking.model import TEXT, make_chat_checkout
from qwen_surgery import quantising
from qwen_surgery.checkout import Checkout
from qwen_surgery.exporting.planning import bind
from qwen_surgery.nets import nets
from qwen_surgery.packing.formats import Quantisation
from qwen_surgery.patching.sources import Sources
from qwen_surgery.quantising import calibration, chosen, layerwise, search
from qwen_surgery.tokenizer import Tokenizer
from qwen_surgery.verification.engines import TorchEngine
from qwen_surgery.verification.language import Reading, check_text, read_reference
from qwen_surgery.verification.reference import ReferenceModel
from qwen_surgery.weights import TensorRef, WeightIndex
from qwen_surgery.weights.integers import Integers

S = 256
BLOCKS = {
    "int4-g64": Quantisation(4, 64, False, "BF16", 64),
    "int4-g128": Quantisation(4, 128, False, "BF16", 64),
    "int4-g64-symmetric": Quantisation(4, 64, True, "BF16", 64),
    "int8": Quantisation(8, 64, False, "BF16", 64),
}
#: A row's options of ``build``.
FLAGS = {
    "int4-g64": ("--mode", "int4"),
    "int4-g128": ("--mode", "int4", "--q-group-size", "128"),
    "int4-g64-symmetric": ("--mode", "int4", "--symmetric"),
    "int8": ("--mode", "int8"),
}
HEAD8 = Quantisation(8, 64, False, "BF16", 64)
FIELDS = ("perplexity", "kl", "agreement")


@dataclass(frozen=True)
class Instead(TensorRef):
    """A stored tensor that reads as other values."""

    values: np.ndarray | None = None

    def read(self) -> np.ndarray:
        assert self.values is not None
        return self.values


@dataclass
class Model:
    """The small chat model, and how the unpatched one reads the text."""

    path: Path
    sources: Sources
    index: Mapping[str, TensorRef]
    refs: dict[str, dict[str, TensorRef]]
    readings: list[Reading]
    calibration: str

    @classmethod
    def make(cls, path: Path, tokens: int, text: str) -> Model:
        make_chat_checkout(path)
        opened = Checkout.open(path)
        sources, index = Sources.of(opened, seq_length=S), WeightIndex.open(path)
        geometry = opened.geometry(S)
        _, refs = bind(sources, index, geometry, nets(geometry.layers))
        ids = Tokenizer.open(path).encode(TEXT.read_text(encoding="utf-8"))
        readings = read_reference(ReferenceModel(sources.reference, index), ids, S, tokens)
        return cls(path, sources, index, refs, readings, text)

    @property
    def geometry(self):  # type: ignore[no-untyped-def]
        return Checkout.open(self.path).geometry(S)

    def measure(self, integers: Mapping[str, Integers]) -> dict[str, float]:
        """The text read with the weights that *integers* (by tensor) stand for."""
        index = dict(self.index)
        for name, one in integers.items():
            ref = index[name]
            fields = {
                key: getattr(ref, key) for key in ("name", "file", "offset", "nbytes", "dtype", "shape")
            }
            index[name] = Instead(**fields, values=one.values())
        engine = TorchEngine(self.sources, index, self.geometry)
        limits = tolerances.load()["source", "fp32"]
        (check,) = check_text(engine, self.geometry, limits, self.readings)
        return check.values

    def integers(self, quantizer: str, form: Quantisation) -> Iterator[tuple[str, Integers]]:
        """(tensor, integers) of every matrix of the layers, and ``head4`` and ``head8``."""
        if quantizer == "gptq":
            yield from self._by_text(form)
            return
        choose = quantising.by_name(quantizer)

        def one(ref: TensorRef, form: Quantisation) -> Integers:
            found = choose(ref.read().copy(), form)
            return replace(found, scale=search.as_stored(found.scale, form))

        for ref in self._matrices():
            yield ref.name, one(ref, form)
        head = self.refs["lm_head"]["lm_head.weight"]
        yield "head4", one(head, form)
        yield "head8", one(head, HEAD8)

    def _matrices(self) -> Iterator[TensorRef]:
        for layer in range(self.geometry.layers):
            yield from (ref for ref in self.refs[f"block_{layer}"].values() if len(ref.shape) == 2)

    def _by_text(self, form: Quantisation) -> Iterator[tuple[str, Integers]]:
        tokenizer = Tokenizer.open(self.path)
        tokens = calibration.windows(tokenizer, self.calibration, self.geometry, quantising.TOKENS)
        layers = calibration.Layers(self.sources, self.geometry, tokens.shape[1])
        states = calibration.embedded(self.refs["embedding"]["wte.weight"], tokens)
        for layer in range(self.geometry.layers):
            weights = self.refs[f"block_{layer}"]
            forms = {slot: form for slot, ref in weights.items() if len(ref.shape) == 2}
            found = layerwise.layer_integers(layers, weights, forms, states)
            yield from ((weights[slot].name, one) for slot, one in found.items())
            with TemporaryDirectory() as folder:
                chosen.save(Path(folder) / chosen.FILE, found)
                kept = chosen.refs(Path(folder) / chosen.FILE, weights)
                states = layerwise.states_behind(layers, weights, kept, states)
        for name, head in (("head4", form), ("head8", HEAD8)):
            made = layerwise.head_integers(layers, self.refs["lm_head"], {"lm_head.weight": head}, states)
            yield name, made["lm_head.weight"]


def in_torch(model: Model) -> Iterator[tuple[str, ...]]:
    """Rows: blocks, lm_head, quantiser, figures."""
    for label, form in BLOCKS.items():
        for quantizer in ("rtn", "search", "gptq"):
            found = dict(model.integers(quantizer, form))
            heads = {"int4": found.pop("head4"), "int8": found.pop("head8"), "bf16": None}
            if form.bits == 8:
                del heads["int4"]
            for head, one in heads.items():
                tensor = {} if one is None else {model.refs["lm_head"]["lm_head.weight"].name: one}
                yield label, head, quantizer, *_figures(model.measure({**found, **tensor}))


def on_chip(model: Model, folder: Path, rows: list[str], tokens: int) -> Iterator[tuple[str, ...]]:
    """The same of bmodels on the emulator: *rows* are ``BLOCKS:HEAD``."""
    text = folder / "calibration.txt"
    folder.mkdir(parents=True, exist_ok=True)
    text.write_text(model.calibration, encoding="utf-8")
    trust = "--trust-remote-code"
    for row in rows:
        label, _, head = row.partition(":")
        out, name = folder / f"{label}-{head}", f"{label}-{head}"
        flags = (
            *FLAGS[label],
            "--lm-head-mode",
            head,
            "--seq-length",
            str(S),
            "--verify",
            "none",
            "--no-twin",
        )
        made = json.loads(_run("build", model.path, "--out", out, *flags, "--name", name, trust, "--json"))
        for quantizer in ("rtn", "search", "gptq"):
            more = ("--calibration", text, trust) if quantizer == "gptq" else ()
            refitted = folder / f"{label}-{head}-{quantizer}.bmodel"
            _run("refit", made["bmodels"][0], model.path, "--quantizer", quantizer, "--out", refitted, *more)
            mode = ("--mode", FLAGS[label][1], "--level", "chip", "--prompt-lengths", "8", "--steps", "1")
            said = _run(
                "verify", model.path, "--bmodel", refitted, *mode, "--text", TEXT, "--text-tokens", tokens,
                trust, "--json",
            )  # fmt: skip
            checks = json.loads(said)["levels"][0]["checks"]
            (values,) = (check["values"] for check in checks if check["label"] == "text")
            yield label, head, quantizer, *_figures(values)


def _figures(values: Mapping[str, float]) -> tuple[str, str, str]:
    more = values["perplexity"] / values["reference_perplexity"] - 1
    return f"{more:+.2%}", f"{values['kl']:.5f}", f"{values['agreement']:.1%}"


def _run(*arguments: object) -> str:
    command = [sys.executable, "-m", "qwen_surgery", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode > 1:  # 1: a tolerance was missed, which is for the table to show
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--calibration", type=Path, default=quantising.TEXT)
    parser.add_argument(
        "--tokens", type=int, default=1500, help="of the text, in torch; a quarter on the chip"
    )
    parser.add_argument("--chip", type=Path, help="a folder for bmodels: the rows on the emulated chip")
    parser.add_argument("--rows", default="int4-g64:int4,int4-g64:int8")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        text = given.calibration.read_text(encoding="utf-8")
        model = Model.make(Path(folder) / "Qwen-tiny-Chat", given.tokens, text)
        print("| blocks | lm_head | quantiser | perplexity | KL (nats) | best token equal |\n|" + "---|" * 6)
        rows = in_torch(model)
        if given.chip is not None:
            rows = on_chip(model, given.chip.absolute(), given.rows.split(","), given.tokens // 4)
        for row in rows:
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
