"""The rooms keep their promises to each other: imports point one way, and light commands stay light."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.repository

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("qwen_surgery", "codemods", "graph_passes", "golden")
HEAVY = ("torch", "onnx", "transformers", "onnxruntime", "onnxsim", "onnx_graphsurgeon")
#: Every room of the house, from the ground up: a module imports from its own room and from those before it.
ROOMS = (
    "golden",
    "codemods.analysis",  # readers of Python source
    "codemods.framework",  # what runs, finds and documents rules
    "codemods.config",  # the edits of config.json
    "codemods.libcst_commands",
    "codemods.docs",
    "codemods",  # the rules, and the package's own functions
    "graph_passes.mlir.text",  # the reader of the Top dialect's text
    "graph_passes.framework",
    "graph_passes.lint",
    "graph_passes.mlir",  # the passes on that text
    "graph_passes",  # the passes on ONNX graphs, and the package's own functions
    "qwen_surgery",  # its __init__: the version
    "qwen_surgery.errors",
    "qwen_surgery.extras",  # which package belongs to which extra
    "qwen_surgery.console",
    "qwen_surgery.files",
    "qwen_surgery.parsing",
    "qwen_surgery.chips",
    "qwen_surgery.nets",
    "qwen_surgery.chat_template",
    "qwen_surgery.tokenizer",
    "qwen_surgery.weights",
    "qwen_surgery.toolchain",
    "qwen_surgery.families",
    "qwen_surgery.checkout",
    "qwen_surgery.fetching",
    "qwen_surgery.patching",
    "qwen_surgery.exporting",
    "qwen_surgery.compiling",
    "qwen_surgery.packing",
    "qwen_surgery.quantising",
    "qwen_surgery.runtime",  # the vendor's demos, call by call
    "qwen_surgery.packing.report",  # what a bmodel holds, and which demos can run it
    "qwen_surgery.vocabulary",
    "qwen_surgery.measuring",
    "qwen_surgery.verification",
    "qwen_surgery.twin",
    "qwen_surgery.chatting",
    "qwen_surgery.building",
    "qwen_surgery.doctor",
    "qwen_surgery.commands",
    "qwen_surgery.cli",
    "qwen_surgery.__main__",
)


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the packages by its dotted name, parsed."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
            path.read_text(encoding="utf-8")
        )
        for path in files
    }


def own_imports(module: str) -> set[str]:
    """The modules of the packages that *module* imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(name if name in modules() else node.module for name in names)
    return (found & set(modules())) - {module}


def room_of(module: str) -> str:
    """The room that *module* is in: the longest name of one that it begins with."""
    fitting = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    found = max(fitting, key=len)
    below = module.startswith("qwen_surgery.") and found == "qwen_surgery"
    assert not below, f"{module} is in no room of the table: give it a place in ROOMS"
    return found


def test_every_room_is_there_and_imports_point_down() -> None:
    """An import upwards is the first half of a circle, and makes the lower room useless without the upper."""
    assert set(ROOMS) == {room_of(module) for module in modules()}
    upwards = {
        (module, other)
        for module in modules()
        for other in own_imports(module)
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(module))
    }
    assert upwards == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_needs_itself(package: str) -> None:
    """A circle of imports breaks when another of its modules is imported first."""
    graph = {module: own_imports(module) for module in modules() if module.split(".")[0] == package}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("imports go round: " + " <- ".join(error.args[1]))


def test_a_class_name_means_one_thing() -> None:
    """Two classes of one name are mixed up by readers and by their editors' search."""
    places: dict[str, list[str]] = {}
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    several = {name: found for name, found in places.items() if len(found) > 1}
    assert several == {}


def _imported(module: str) -> set[str]:
    """The packages that *module* imports, ours and others."""
    found: set[str] = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def _imports_of(package: str, what: Iterable[str]) -> dict[str, set[str]]:
    """Module -> those of *what* that it imports, for the modules of *package* that import any."""
    return {
        module: hit
        for module in modules()
        if module.split(".")[0] == package and (hit := _imported(module) & set(what))
    }


@pytest.mark.parametrize("package", [package for package in PACKAGES if package != "qwen_surgery"])
def test_lower_packages_import_none_of_the_others(package: str) -> None:
    """Otherwise a codemod or a pass could not be used, tested or replaced without the whole program."""
    assert _imports_of(package, set(PACKAGES) - {package}) == {}


@pytest.mark.parametrize("package", ["codemods", "golden"])
def test_light_packages_know_no_torch_and_no_onnx(package: str) -> None:
    """Codemods know Python source only; golden makes checkouts and holds data, and the training script."""
    found = _imports_of(package, HEAVY)
    assert set(found) <= {"golden.speaking.train"}, found


def test_passes_know_no_torch_and_no_transformers() -> None:
    """A pass works on graphs without weights; torch there would mean it looks at something else."""
    assert _imports_of("graph_passes", {"torch", "transformers", "safetensors"}) == {}


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
        ("doctor",),
    ],
)
def test_light_commands_import_nothing_heavy(args: tuple[str, ...], tmp_path: Path) -> None:
    """Importing torch takes seconds: help and patching must answer at once."""
    if "CHECKOUT" in args:
        from golden.eras import make_checkout

        make_checkout(tmp_path / "checkout")
        args = tuple(str(tmp_path / "checkout") if arg == "CHECKOUT" else arg for arg in args)
    assert _heavy_modules_after(*args) == []
