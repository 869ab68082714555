"""Refit: another fine-tune's weights in an existing bmodel.

If these fail, a refitted model computes something else than a model built from that fine-tune, or a wrong
checkpoint or a damaged file goes unnoticed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from golden.eras import make_checkout
from qwen_surgery.checkout import Checkout
from qwen_surgery.cli import main
from qwen_surgery.errors import Refused
from qwen_surgery.packing import WrittenBmodel, sidefile, write
from qwen_surgery.packing.container import Bmodel, Region
from qwen_surgery.packing.refit import refit
from qwen_surgery.weights import WeightIndex
from tests.packing.conftest import LAYERS, VOCAB, Bench, Model, created

pytestmark = pytest.mark.tpu


def _build(bench: Bench, out: Path, time: str | None = None) -> WrittenBmodel:
    """A bmodel with its side file, as a build leaves it."""
    pieces = bench.pieces()
    written = write(out, pieces, created=time)
    sidefile.describe(out, pieces, bench.model.manifest.geometry, bench.model.config()).save(out)
    return written


def _refit(bmodel: Path, model: Model, out: Path) -> None:
    refit(bmodel, Checkout.open(model.checkout), model.index, out)


@pytest.fixture
def built(bench: Callable[..., Bench], tmp_path: Path) -> Path:
    return _build(bench("int4"), tmp_path / "first.bmodel").path


@pytest.mark.parametrize("mode", ["int4", "bf16"])
def test_refit_gives_the_bytes_of_a_build_and_back_again(
    mode: str, bench: Callable[..., Bench], tmp_path: Path
) -> None:
    first, second = bench(mode), bench(mode, seed=1)
    source = _build(first, tmp_path / "first.bmodel").path
    truth = second.combined(tmp_path / "second.bmodel")
    other, back = tmp_path / "other.bmodel", tmp_path / "back.bmodel"
    _refit(source, second.model, other)
    _refit(other, first.model, back)
    assert back.read_bytes() == source.read_bytes()
    assert _weights(other) == _weights(truth)
    assert _weights(other) != _weights(source)


def _weights(path: Path) -> list[tuple[str, bytes, bytes]]:
    """Per net: its coefficients and their check code."""
    result = []
    with Bmodel(path) as bmodel:
        for net in bmodel.nets:
            memory = net["parameter"][0]["coeff_mem"]
            data = bmodel.read(Region.of(memory["binary_coeff"]))
            result.append((net["name"], data, bytes(memory["check_code"])))
    return result


def test_the_emulated_chip_computes_the_new_weights(
    bench: Callable[..., Bench], built: Path, tmp_path: Path, toolchain: object
) -> None:
    from qwen_surgery.toolchain import Toolchain
    from qwen_surgery.toolchain.emulator import ChipEngine

    assert isinstance(toolchain, Toolchain)
    second = bench("int4", seed=1)
    refitted, truth = tmp_path / "other.bmodel", second.combined(tmp_path / "truth.bmodel")
    _refit(built, second.model, refitted)
    rng = np.random.default_rng(0)
    feeds = [
        rng.standard_normal((1, 1, 128)).astype(np.float32),
        np.array([[5]], np.int32),
        np.zeros((1, 1, 1, 33), np.float32),
        rng.standard_normal((1, 32, 2, 64)).astype(np.float32),
        rng.standard_normal((1, 32, 2, 64)).astype(np.float32),
    ]
    results = {}
    for path in (built, refitted, truth):
        with ChipEngine(path, toolchain) as chip:
            results[path] = chip.run("block_cache_1", feeds)
    for have, want in zip(results[refitted], results[truth], strict=True):
        np.testing.assert_array_equal(have, want)
    assert not np.allclose(results[refitted][0], results[built][0], atol=1e-2)


def test_refit_in_place_by_command_without_tpu_mlir(
    bench: Callable[..., Bench],
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = tmp_path / "expected.bmodel"
    second = bench("int4", seed=1).model
    _refit(built, second, expected)
    for name in ("QWEN_SURGERY_TOOLCHAIN", "TPUC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QWEN_SURGERY_HOME", str(tmp_path / "no-toolchain-here"))
    with pytest.raises(SystemExit) as stop:
        main(["refit", str(built), str(second.checkout), "--json"])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["size"] == built.stat().st_size
    assert built.read_bytes() == expected.read_bytes()
    assert sidefile.load(built).heads == (sidefile.head_digest(built),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": LAYERS + 1}, "layers 2 / 3"),
        ({"hidden": 256, "heads": 4}, "hidden 128 / 256"),
        ({"vocab": VOCAB + 64}, "vocab"),
        ({"rotary_base": 5000.0}, "rotary_emb_base"),
    ],
)
def test_another_model_is_refused_and_nothing_is_written(
    change: dict[str, object], message: str, built: Path, tmp_path: Path
) -> None:
    sizes: dict[str, object] = {"layers": LAYERS, "hidden": 128, "heads": 2, "vocab": VOCAB, **change}
    era = "sdpa" if "rotary_base" in change else "bias-buffer"
    other = make_checkout(tmp_path / "other", era=era, **sizes)  # type: ignore[arg-type]
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(Refused, match=message):
        refit(built, Checkout.open(other), WeightIndex.open(other), tmp_path / "out.bmodel")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_side_file_of_another_bmodel_is_refused(
    bench: Callable[..., Bench], built: Path, tmp_path: Path
) -> None:
    other = _build(bench("int4"), tmp_path / "other.bmodel", time="Thu Jan  1 00:00:00 1970\n").path
    shutil.copy(sidefile.path_for(other), sidefile.path_for(built))
    with pytest.raises(Refused, match="belongs to another bmodel"):
        _refit(built, bench("int4").model, tmp_path / "out.bmodel")


def test_a_missing_side_file_says_what_writes_it(bench: Callable[..., Bench], built: Path) -> None:
    sidefile.path_for(built).unlink()
    with pytest.raises(Refused, match="has no side file") as refused:
        _refit(built, bench("int4").model, built)
    assert "build" in refused.value.hint


def test_damaged_weights_are_noticed(bench: Callable[..., Bench], built: Path, tmp_path: Path) -> None:
    with Bmodel(built) as bmodel:
        region = bmodel.net("block_1")["parameter"][0]["coeff_mem"]["binary_coeff"]
        position = bmodel.base + region["start"] + region["size"] // 2
    data = bytearray(built.read_bytes())
    data[position] ^= 1
    built.write_bytes(data)
    with pytest.raises(Refused, match="weights of block_1 are damaged"):
        _refit(built, bench("int4").model, tmp_path / "out.bmodel")


def test_a_truncated_shard_leaves_the_old_file(
    models: Callable[[int], Model], built: Path, tmp_path: Path
) -> None:
    checkout = tmp_path / "short"
    shutil.copytree(models(1).checkout, checkout)
    index = WeightIndex.open(checkout)
    before = built.read_bytes()
    shard = max(index.files, key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-4096])
    with pytest.raises(Refused, match="ends"):
        refit(built, Checkout.open(checkout), index, built)
    assert built.read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_creation_time_is_kept(bench: Callable[..., Bench], built: Path, tmp_path: Path) -> None:
    """Otherwise refitting back could never give the first file's bytes."""
    _refit(built, bench("int4", seed=1).model, tmp_path / "out.bmodel")
    assert created(tmp_path / "out.bmodel") == created(built)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_around_the_replacement_parts_no_bmodel_from_its_side_file(
    moment: str, bench: Callable[..., Bench], built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place: old bmodel or new one, its side file belongs to it, so the next refit works."""
    first, second = bench("int4").model, bench("int4", seed=1).model
    before, replace = built.read_bytes(), Path.replace

    def killed(self: Path, target: Path) -> Path:
        if Path(target) != built:
            return replace(self, target)
        if moment == "after":
            replace(self, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", killed)
        _refit(built, second, built)
    assert (built.read_bytes() == before) == (moment == "before")
    _refit(built, first, built)
    assert built.read_bytes() == before
