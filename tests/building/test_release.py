"""A quantised release to a bmodel: its own integers on the chip, and the chip near the release's own values.

If these fail, a GPTQ checkpoint is rounded a second time, or the chip computes another model than it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden.eras import make_checkout
from golden.releases import Rounded, Scheme
from qwen_surgery.packing.container import Bmodel, Region
from tests.building.test_build import cli
from tests.releases import quantised

pytestmark = pytest.mark.tpu

TRUST = ("--trust-remote-code", "--json")
COSINE = 0.9999


def _checkout(folder: Path, scheme: Scheme | None, seed: int = 0) -> dict[str, Rounded]:
    """Two layers in *folder*, quantised by *scheme*; the integers of their matrices by name."""
    make_checkout(folder, layers=2, hidden=128, heads=2, vocab=320, seed=seed)
    return {} if scheme is None else quantised(folder, scheme)


@dataclass(frozen=True)
class Built:
    """A build of a release."""

    checkout: Path
    bmodel: Path
    scheme: Scheme
    integers: dict[str, Rounded]


def _build(folder: Path, scheme: Scheme) -> Built:
    integers = _checkout(folder / "release", scheme)
    flags = ("--seq-length", 32, "--verify", "contract", "--no-twin", "--name", "tiny")
    out = json.loads(cli("build", folder / "release", "--out", folder / "out", *flags, *TRUST).stdout)
    assert out["unpacked"] == {}
    assert f"{scheme.bits} bits" in out["integers"]
    assert "as the checkpoint has them (GPTQ" in out["integers"]
    return Built(folder / "release", Path(out["bmodels"][0]), scheme, integers)


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return _build(tmp_path_factory.mktemp("int4"), Scheme(4, 128))


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return _build(tmp_path_factory.mktemp("int8"), Scheme(8, 128, symmetric=False))


def _weights(bmodel: Path, net: str) -> bytes:
    with Bmodel(bmodel) as opened:
        memory = opened.net(net)["parameter"][0]["coeff_mem"]["binary_coeff"]
        return opened.read(Region.of(memory))


def _rows(one: Rounded, bits: int) -> list[bytes]:
    """Each row's codes as the chip stores them, two of 4 bits to a byte."""
    codes = one.codes.astype(np.uint8)
    return [row.tobytes() for row in (codes[:, ::2] | codes[:, 1::2] << 4 if bits == 4 else codes)]


def _missing(bmodel: Path, integers: dict[str, Rounded], bits: int) -> tuple[int, int]:
    """(rows of the layers' matrices that are not in the bmodel's nets of that layer, rows in all).

    Looked for as bytes, without the packing plan."""
    missing = total = 0
    for name, one in integers.items():
        layer = name.split(".")[2]
        for net in (f"block_{layer}", f"block_cache_{layer}"):
            section = _weights(bmodel, net)
            found = [row in section for row in _rows(one, bits)]
            missing, total = missing + found.count(False), total + len(found)
    return missing, total


def _worst_cosines(built: Built) -> dict[str, float]:
    """By kind of net, the smallest cosine of the emulated chip's blocks to the dequantised reference."""
    wanted = ("--level", "chip", "--nets", "block,block_cache")
    said = cli("verify", built.checkout, "--bmodel", built.bmodel, *wanted, *TRUST, check=False).stdout
    (level,) = json.loads(said)["levels"]
    worst: dict[str, float] = {}
    for check in level["checks"]:
        if "cosine" in check["values"]:
            kind = check["net"].rstrip("0123456789_")
            worst[kind] = min(worst.get(kind, 1.0), check["values"]["cosine"])
    return worst


@pytest.mark.parametrize("mode", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_releases_integers_are_in_the_bmodel_and_the_chip_computes_them(
    mode: str, request: pytest.FixtureRequest
) -> None:
    built: Built = request.getfixturevalue(mode)
    missing, total = _missing(built.bmodel, built.integers, built.scheme.bits)
    assert (missing, total) == (0, 2 * 2 * (3 * 128 + 128 + 256 + 256 + 128))
    worst = _worst_cosines(built)
    assert set(worst) == {"block", "block_cache"}
    assert min(worst.values()) >= COSINE


def test_a_rounded_model_does_not_hold_those_integers(int4: Built, tmp_path: Path) -> None:
    """So the search for them would notice: the same values packed by the compiler's own rounding."""
    _checkout(tmp_path / "plain", None)
    out = tmp_path / "rounded.bmodel"
    cli("refit", int4.bmodel, tmp_path / "plain", "--out", out)
    said = cli("inspect", out).stdout
    assert "integers: lm_head 8 bits, groups of 64; block 4 bits, groups of 128; chosen by rtn\n" in said
    missing, total = _missing(out, int4.integers, 4)
    assert missing > total / 2
    back = tmp_path / "back.bmodel"
    cli("refit", out, int4.checkout, "--out", back)
    assert back.read_bytes() == int4.bmodel.read_bytes()


def _conflict(*args: object) -> subprocess.CompletedProcess[str]:
    return cli(*args, "--trust-remote-code", check=False)


def test_options_that_would_round_again_are_usage_errors(int4: Built, tmp_path: Path) -> None:
    for option, said in (
        (("--mode", "int8"), "--mode int8 does not go with this checkpoint"),
        (("--no-pack",), "--no-pack does not go with this checkpoint"),
        (("--prove", 1), "--prove does not go with this checkpoint"),
    ):
        done = _conflict("build", int4.checkout, "--out", tmp_path / "out", *option)
        assert done.returncode == 2
        assert said in done.stderr
    done = _conflict(
        "build", int4.checkout, "--out", tmp_path / "out", "--num-device", 2, "--runtime", "sophon-demo"
    )
    assert done.returncode == 3
    assert "cannot be kept on several chips" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_release_of_other_bits_is_no_refit(int4: Built, tmp_path: Path) -> None:
    _checkout(tmp_path / "other", Scheme(8, 128))
    before = int4.bmodel.read_bytes()
    done = cli("refit", int4.bmodel, tmp_path / "other", check=False)
    assert done.returncode == 3
    assert "they have 8 bits, the net stores 4" in done.stderr
    assert int4.bmodel.read_bytes() == before


def test_patch_says_what_a_build_will_do_with_the_weights(int4: Built, tmp_path: Path) -> None:
    shutil.copytree(int4.checkout, tmp_path / "release")
    done = cli("patch", tmp_path / "release", "--check", check=False)
    assert "quantised (GPTQ, 4 bits, groups of 128): build keeps the integers as they are" in done.stderr
    config = tmp_path / "release/config.json"
    said: dict[str, Any] = json.loads(config.read_text())
    said["quantization_config"]["desc_act"] = True
    config.write_text(json.dumps(said))
    assert "its weights cannot be exported: " in cli("patch", config.parent, "--check", check=False).stderr
