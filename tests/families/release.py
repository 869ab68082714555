"""One family in one release of transformers: run in a process of its own, prints what differs as JSON.

``python release.py FOLDER KIND``: FOLDER is an unpacked wheel, KIND a model_type. The release's own checks of
the packages around it are left out: a model's forward needs none of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock


def unpacked(version: str, folder: Path) -> Path:
    """*folder*, with the release *version* in it: its wheel is downloaded once, without dependencies."""
    if not (folder / "transformers").is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, f"transformers=={version}", "-d", str(folder)], check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()
    return folder


def use(folder: str) -> None:
    """Have ``import transformers`` find the release in *folder*."""
    sys.path.insert(0, folder)
    checks: Any = types.ModuleType("transformers.dependency_versions_check")
    checks.dep_version_check = lambda *_: None
    sys.modules[checks.__name__] = checks
    sys.modules.setdefault("httpx", mock.MagicMock())


def main(folder: str, kind: str) -> dict[str, Any]:
    """The largest difference between a patched and an unpatched layer, and the verification's report."""
    use(folder)
    import transformers

    from qwen_surgery.verification.session import Request, verify
    from tests.families.tiny import make

    with TemporaryDirectory() as scratch:
        path = make(Path(scratch) / "model", kind, **({"head_dim": 32} if kind == "qwen3" else {}))
        report = verify(Request(path, levels=("source",), seq_length=24))
        return {
            "release": transformers.__version__,
            "layer": layer_difference(path),
            "passed": report.passed,
            "worst": max(
                check.values.get("max_abs", 0.0) for level in report.levels for check in level.checks
            ),
        }


def layer_difference(path: Path) -> float:
    """By how much the outputs of a patched layer differ from the unpatched one's, in prefill and decode."""
    import torch

    from qwen_surgery.checkout import Checkout
    from qwen_surgery.exporting.model_code import ModelCode
    from qwen_surgery.patching.sources import Sources

    sources = Sources.of(Checkout.open(path), seq_length=24)
    assert sources.patched[sources.modeling] != sources.reference[sources.modeling]
    codes = [ModelCode.load(files, sources.modeling) for files in (sources.reference, sources.patched)]
    layers = [code.layer() for code in codes]
    layers[1].load_state_dict(layers[0].state_dict())
    cos, sin = codes[0].tables(layers[0], 24)
    drivers = [code.driver(layer) for code, layer in zip(codes, layers, strict=True)]
    worst = 0.0
    for length, history in ((24, None), (1, tuple(torch.randn(1, 24, 2, 32) for _ in range(2)))):
        states, total = torch.randn(1, length, 128), length + (0 if history is None else 24)
        positions = (torch.arange(length, dtype=torch.int32)[None], cos, sin)
        mask = torch.zeros(1, 1, length, total)
        with torch.no_grad():
            one, other = (
                driver.run(layer, states, positions, mask, history)
                for driver, layer in zip(drivers, layers, strict=True)
            )
        worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)))
    return worst


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    print(json.dumps(main(*sys.argv[1:])))
