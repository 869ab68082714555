"""``refit --quantizer gptq``: integers by what a text shows, in a file of the same layout.

If these fail, the option is taken and changes nothing, what it writes is no refit any more, or a checkout's
code runs unasked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_surgery.checkout import Checkout
from qwen_surgery.cli import main
from qwen_surgery.packing import formats, sidefile, write
from qwen_surgery.packing.container import Bmodel, Region
from qwen_surgery.packing.formats import Quantisation
from qwen_surgery.patching.sources import Sources
from qwen_surgery.quantising import TEXT, calibration, chosen, layerwise
from qwen_surgery.tokenizer import Tokenizer
from qwen_surgery.weights.integers import Integers
from tests.packing.conftest import Bench, Model

os.environ.setdefault("OMP_NUM_THREADS", "1")  # idle threads of a tiny model take more than its work
GPTQ = ("--quantizer", "gptq", "--calibration-tokens", "512")


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def _written(made: Bench, file: Path) -> Path:
    write(file, made.pieces())
    sidefile.describe(file, made.pieces(), made.model.manifest.geometry, made.model.config()).save(file)
    return file


def _states(model: Model, most: int) -> np.ndarray:
    geometry = model.manifest.geometry
    text = TEXT.read_text(encoding="utf-8")
    tokens = calibration.windows(Tokenizer.open(model.checkout), text, geometry, most)
    return calibration.embedded(model.entry("embedding").weights["wte.weight"], tokens)


def _layers(model: Model) -> calibration.Layers:
    sources = Sources.of(Checkout.open(model.checkout), seq_length=32)
    return calibration.Layers(sources, model.manifest.geometry, 32)


def test_matrices_of_one_input_share_what_is_known_of_it(models: Callable[[int], Model]) -> None:
    model = models(0)
    weights = model.entry("block_0").weights
    matrices = [slot for slot, ref in weights.items() if len(ref.shape) == 2]
    floats = {slot: torch.from_numpy(ref.read()) for slot, ref in weights.items()}
    states = _states(model, 256)
    assert states.shape == (8, 32, 128)
    found = _layers(model).hessians(floats, states, matrices)
    assert {frozenset(slots) for slots in found} == {
        frozenset({"attn.c_attn.weight"}),
        frozenset({"attn.c_proj.weight"}),
        frozenset({"mlp.w1.weight", "mlp.w2.weight"}),
        frozenset({"mlp.c_proj.weight"}),
    }


def test_a_layer_of_chosen_integers_is_nearer_to_the_models_own(
    models: Callable[[int], Model], bench: Callable[..., Bench], tmp_path: Path
) -> None:
    """On windows that it was not chosen by."""
    model, form = models(0), Quantisation(4, 64, True, "BF16", 64)
    weights = model.entry("block_0").weights
    forms = {slot: form for slot, ref in weights.items() if len(ref.shape) == 2}
    states, layers = _states(model, 2048), _layers(model)
    read, others = states[:48], states[48:]
    floats = {slot: torch.from_numpy(ref.read()) for slot, ref in weights.items()}
    expected = layers.outputs(floats, others)

    def lost(integers: dict[str, Integers]) -> float:
        chosen.save(tmp_path / chosen.FILE, integers)
        refs = chosen.refs(tmp_path / chosen.FILE, weights)
        return float(np.square(layerwise.states_behind(layers, weights, refs, others) - expected).sum())

    rounded = {slot: formats.quantise(weights[slot].read(), form) for slot in forms}
    assert lost(layerwise.layer_integers(layers, weights, forms, read)) < 0.8 * lost(rounded)


@pytest.mark.slow
@pytest.mark.tpu
def test_refit_holds_the_integers_that_the_text_chose(bench: Callable[..., Bench], tmp_path: Path) -> None:
    made = bench("int4")
    first = _written(made, tmp_path / "first.bmodel")
    better, again, back = (tmp_path / f"{name}.bmodel" for name in ("better", "again", "back"))
    checkout = str(made.model.checkout)
    assert _run("refit", str(first), checkout, *GPTQ, "--trust-remote-code", "--out", str(better)) == 0
    assert better.stat().st_size == first.stat().st_size
    assert sidefile.load(better).notes["quantizer"] == "gptq"
    plan, model = made.plan("block_0"), made.model
    expected = layerwise.layer_integers(
        _layers(model), model.entry("block_0").weights, chosen.forms(plan), _states(model, 512)
    )
    for net in ("block_0", "block_cache_0"):
        section = _weights(better, net)
        for slot, one in expected.items():
            rows = [(row[::2] | row[1::2] << 4).tobytes() for row in one.codes]
            assert sum(row in section for row in rows) == len(rows), f"{net}: {slot}"
    assert _run("refit", str(better), checkout, "--calibration-tokens", "512", "--trust-remote-code",
                "--out", str(again)) == 0  # fmt: skip
    assert again.read_bytes() == better.read_bytes(), "a refit forgets how the integers were chosen"
    assert _run("refit", str(better), checkout, "--quantizer", "rtn", "--out", str(back)) == 0
    assert back.read_bytes() == first.read_bytes()
    assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} == {
        "first",
        "better",
        "again",
        "back",
    }


def _weights(bmodel: Path, net: str) -> bytes:
    with Bmodel(bmodel) as opened:
        return opened.read(Region.of(opened.net(net)["parameter"][0]["coeff_mem"]["binary_coeff"]))


@pytest.mark.tpu
def test_what_gptq_cannot_do_is_said_before_anything_is_written(
    bench: Callable[..., Bench], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = bench("int4")
    first, checkout = _written(made, tmp_path / "first.bmodel"), str(made.model.checkout)
    before = first.read_bytes()
    short, image = tmp_path / "short.txt", tmp_path / "image.txt"
    short.write_text("ten words")
    image.write_bytes(b"\xff\xd8\xff")
    trusted = (*GPTQ, "--trust-remote-code")
    for options, code, said in (
        (GPTQ, 2, "--quantizer gptq runs the Python files of the checkout"),
        (("--calibration", str(short)), 2, "--calibration has no effect on --quantizer rtn"),
        (("--calibration-tokens", "99", "--quantizer", "search"), 2, "has no effect on --quantizer search"),
        ((*trusted, "--calibration", str(short)), 3, "the calibration text has "),
        ((*trusted, "--calibration", str(image)), 3, "cannot be read as UTF-8"),
    ):
        assert _run("refit", str(first), checkout, *options) == code
        assert said in capsys.readouterr().err
    assert first.read_bytes() == before
