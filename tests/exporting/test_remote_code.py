"""A checkout's Python runs as a private package, whatever transformers is or is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qwen_surgery.errors import Refused
from qwen_surgery.exporting import remote_code
from qwen_surgery.exporting.manifest import Manifest
from tests.exporting.conftest import Tiny


def test_every_load_is_a_package_of_its_own() -> None:
    sources = {"a.py": b"from .b import items\nitems.append(1)\n", "b.py": b"items = []\n"}
    first, second = remote_code.load(sources, "a"), remote_code.load(sources, "a")
    assert first.items == second.items == [1]
    assert first.__name__ != second.__name__


def test_names_that_transformers_no_longer_has_are_importable_and_unusable() -> None:
    source = (
        b"from transformers.utils.model_parallel_utils import assert_device_map\n"
        b"from transformers.utils import add_start_docstrings, logging\n"
        b"from transformers import GoneForGood\n"
        b"@add_start_docstrings('x')\n"
        b"def kept(): return 7\n"
        b"class Derived(GoneForGood): pass\n"
    )
    module = remote_code.load({"m.py": source}, "m")
    assert module.kept() == 7
    with pytest.raises(
        NotImplementedError, match=r"transformers\.GoneForGood is not in the installed packages"
    ):
        module.Derived()
    import transformers

    assert not hasattr(transformers, "GoneForGood")


def test_code_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(Refused, match=r"m\.py cannot be imported: ModuleNotFoundError: .*no_such_package"):
        remote_code.load({"m.py": b"import no_such_package\n"}, "m")
    with pytest.raises(Refused, match=r"the checkout has no m\.py"):
        remote_code.load({}, "m")


def test_an_export_needs_no_transformers(tiny: Tiny, exported: Path, tmp_path: Path) -> None:
    """With a transformers that cannot be imported the same nets come out."""
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "from qwen_surgery.cli import main; main(sys.argv[1:])\n"
    )
    arguments = ["export", str(tiny.path), "--onnx-path", str(tmp_path / "onnx"), "--seq-length", "24"]
    command = [sys.executable, "-c", program, *arguments, "--trust-remote-code"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Manifest.load(tmp_path / "onnx").templates == Manifest.load(exported).templates


def test_a_fork_whose_layers_use_transformers_gets_the_installed_one(
    own_checkout: Path, tmp_path: Path
) -> None:
    modeling = own_checkout / "modeling_qwen.py"
    text = modeling.read_text()
    assert "F.silu(" in text
    text = text.replace("F.silu(", "ACT2FN['silu'](")
    modeling.write_text(
        text.replace("import torch\n", "import torch\nfrom transformers.activations import ACT2FN\n", 1)
    )
    tiny = Tiny.open(own_checkout)
    manifest = tiny.export(tmp_path / "onnx", wanted=["block_0"])
    manifest.check(tmp_path / "onnx")
    assert [net.name for net in manifest.nets] == ["block_0"]
