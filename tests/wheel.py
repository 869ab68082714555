"""Builds the wheel, and runs the suite against it: ``python -m tests.wheel [pytest's arguments]``.

The tests run in a folder outside the source tree, on the wheel alone; the other packages are those of the
Python that runs this. What needs the repository's own files (``-m repository``) stays out.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("codemods", "golden", "graph_passes", "qwen_surgery")
_SOURCES = (*PACKAGES, "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
_BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def copy(names: Iterable[str], folder: Path) -> None:
    """Files and folders of the repository, as they are, into *folder*."""
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)


def build(folder: Path) -> Path:
    """The wheel of the source tree as it is, in *folder*; the tree itself gets no build folder."""
    with tempfile.TemporaryDirectory() as tree:
        copy(_SOURCES, Path(tree))
        command = [sys.executable, "-c", _BUILD, str(folder.absolute())]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


def environment(folder: Path, wheel: Path) -> Path:
    """A virtual environment in *folder* with *wheel* and nothing else; its site-packages."""
    venv.create(folder, with_pip=False, symlinks=True)
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--no-index"]
    subprocess.run([*install, "--quiet", "--no-deps", str(wheel)], check=True)
    return next(folder.glob("lib/python3*/site-packages"))


def lend(site: Path, requirements: Iterable[str]) -> None:
    """Link into *site* what *requirements* (names of packages) need in this Python, and no more."""
    for name in sorted(_closure(requirements)):
        for file in metadata.files(name) or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(str(file.locate())).parents[len(file.parts) - 1] / top)


def _closure(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        todo += requirements_of(metadata.requires(name) or ())
    return found


def requirements_of(lines: Iterable[str], extra: str = "") -> Iterator[str]:
    """The names in requirement lines that count on this Python, of the core or of *extra*."""
    from packaging.requirements import Requirement

    for line in lines:
        required = Requirement(line)
        of_extra = "extra" in str(required.marker or "")
        if of_extra == bool(extra) and (
            required.marker is None or required.marker.evaluate({"extra": extra})
        ):
            yield required.name


def main(arguments: list[str]) -> int:
    """Run the suite, or what *arguments* choose of it, against the wheel; pytest's exit code."""
    with tempfile.TemporaryDirectory(prefix="qwen-surgery-wheel-") as name:
        folder = Path(name)
        site = environment(folder / "venv", build(folder))
        # A .pth file in a folder that another .pth names is not read: the editable install stays out.
        (site / "lent.pth").write_text("".join(f"{path}\n" for path in sys.path if "site-packages" in path))
        tests = folder / "outside"
        tests.mkdir()
        copy(("tests", "pyproject.toml"), tests)
        python = folder / "venv/bin/python"
        where = [str(python), "-c", "import qwen_surgery; print(qwen_surgery.__file__)"]
        print(subprocess.run(where, cwd=tests, capture_output=True, text=True, check=True).stdout.strip())
        chosen = ["-m", "not slow and not repository", *arguments]
        return subprocess.run([str(python), "-m", "pytest", *chosen], cwd=tests, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
