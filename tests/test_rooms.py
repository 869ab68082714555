"""The rooms keep their promises to each other: imports point one way, and light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("qwen_surgery", "codemods", "graph_passes", "golden")
HEAVY = ("torch", "onnx", "transformers", "onnxruntime", "onnxsim", "onnx_graphsurgeon")


def _imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "qwen_surgery"])
def test_lower_rooms_import_no_other_room(room: str) -> None:
    """Otherwise a codemod or a pass could not be used, tested or replaced without the whole program."""
    files = list((ROOT / room).rglob("*.py"))
    assert files
    others = set(ROOMS) - {room}
    wrong = {str(path.relative_to(ROOT)): hit for path in files if (hit := _imported(path) & others)}
    assert wrong == {}


@pytest.mark.parametrize("room", ["codemods", "golden"])
def test_light_rooms_know_no_torch_and_no_onnx(room: str) -> None:
    """Codemods know Python source only; golden makes checkouts and holds data."""
    wrong = {
        str(path.relative_to(ROOT)): hit
        for path in (ROOT / room).rglob("*.py")
        if (hit := _imported(path) & set(HEAVY))
    }
    assert wrong == {}


def test_passes_know_no_torch_and_no_transformers() -> None:
    """A pass works on graphs without weights; torch there would mean it looks at something else."""
    for path in (ROOT / "graph_passes").rglob("*.py"):
        assert not _imported(path) & {"torch", "transformers", "safetensors"}, path


def _heavy_modules_after(*args: str) -> list[str]:
    code = (
        "import sys\n"
        "from qwen_surgery.cli import main\n"
        "try:\n"
        f"    main({list(args)!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stderr.strip().splitlines()[-1])


@pytest.mark.parametrize(
    "args",
    [
        ("--help",),
        ("patch", "--help"),
        ("build", "--help"),
        ("explain", "early-present"),
        ("patch", "CHECKOUT", "--diff"),
        ("patch", "CHECKOUT"),
        ("survey", "CHECKOUT"),
        ("restore", "CHECKOUT"),
    ],
)
def test_light_commands_import_nothing_heavy(args: tuple[str, ...], tmp_path: Path) -> None:
    """Importing torch takes seconds: help and patching must answer at once."""
    if "CHECKOUT" in args:
        from golden.eras import make_checkout

        make_checkout(tmp_path / "checkout")
        args = tuple(str(tmp_path / "checkout") if arg == "CHECKOUT" else arg for arg in args)
    assert _heavy_modules_after(*args) == []
