"""Nets of the vocabulary compiled narrow and extended: the bmodel must be the one that compiling them whole
gives, to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from golden.eras import make_checkout
from qwen_surgery.building import step_narrow
from qwen_surgery.cli import root

pytestmark = pytest.mark.tpu


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """One layer and 4,160 tokens, exported; True: for runtimes whose lm_head ends in top-1."""
    folder = tmp_path_factory.mktemp("narrow")
    make_checkout(folder / "Qwen-wide", layers=1, hidden=128, heads=2, vocab=4160, seed=3)
    for fused in (False, True):
        flags = ["--onnx-path", str(folder / f"onnx-{fused}"), "--seq-length", "32", "--trust-remote-code"]
        run("export", str(folder / "Qwen-wide"), *flags, *(["--multi-device"] if fused else []))
        recipe = folder / "recipe.toml"
        recipe.write_text(f"[passes]\nbounded-mask = {str(fused).lower()}\n")
        run("clean", str(folder / f"onnx-{fused}"), "--passes", str(recipe))
    return {fused: folder / f"onnx-{fused}" for fused in (False, True)}


def run(*args: str) -> str:
    """The command line, in this process; what it printed to stdout."""
    done = CliRunner().invoke(root, list(args), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def compiled(onnx: Path, out: Path, *flags: str) -> dict[str, Any]:
    return json.loads(run("compile", str(onnx), "--out", str(out), "--name", "t", *flags, "--json"))


def tasks(out: Path, kind: str) -> set[str]:
    """The nets that tasks of *kind* ran for: each leaves its log."""
    return {log.name.split(".")[1] for log in (out / ".build/logs").glob(f"{kind}.*.log")}


def log(out: Path, name: str) -> str:
    return (out / ".build/logs" / name).read_text()


@pytest.mark.parametrize(
    "flags",
    [
        ("--mode", "int4"),
        ("--mode", "int8", "--runtime", "sophon-demo-2024.1"),
        ("--mode", "bf16", "--target", "bm1688"),
    ],
    ids=lambda flags: "-".join(flag.strip("-") for flag in flags),
)
def test_extended_nets_equal_those_compiled_whole(
    exported: dict[bool, Path], tmp_path: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = exported["sophon-demo-2024.1" in flags]
    whole = compiled(onnx, tmp_path / "whole", *flags)
    assert not tasks(tmp_path / "whole", "narrow"), "too small to be worth it"
    monkeypatch.setattr(step_narrow, "WORTHWHILE", 0)
    if "int8" in flags:  # also on machines whose C compiler makes nothing of use
        (tmp_path / "cc").write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; echo cut > "$2"\n')
        (tmp_path / "cc").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
    wide = compiled(onnx, tmp_path / "wide", *flags)
    assert "extended on its own" not in log(tmp_path / "wide", "narrow.embedding_cache.log")
    assert tasks(tmp_path / "wide", "narrow") == {"embedding", "embedding_cache", "lm_head"}
    assert tasks(tmp_path / "whole", "prove") - tasks(tmp_path / "wide", "prove") == tasks(
        tmp_path / "wide", "narrow"
    )
    assert len(whole["bmodels"]) == len(wide["bmodels"]) == (2 if "bm1688" in flags else 1)
    for one, other in zip(whole["bmodels"], wide["bmodels"], strict=True):
        assert Path(one).read_bytes() == Path(other).read_bytes()


def test_a_net_that_cannot_be_narrowed_is_compiled_whole_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here because its vocabulary is shorter than a narrow one."""
    make_checkout(tmp_path / "Qwen-short", layers=1, hidden=128, heads=2, vocab=320, seed=3)
    flags = ["--onnx-path", str(tmp_path / "onnx"), "--seq-length", "32", "--trust-remote-code"]
    run("export", str(tmp_path / "Qwen-short"), *flags)
    monkeypatch.setattr(step_narrow, "WORTHWHILE", 0)
    done = CliRunner().invoke(
        root, ["compile", str(tmp_path / "onnx"), "--out", str(tmp_path / "out"), "--name", "t", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert "lm_head: compiled at its full size, which takes longer" in done.stderr
    assert json.loads(done.stdout)["bmodels"]
