"""Finding Python 3.10 and TPU-MLIR wherever they are, and saying clearly when they are not."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_surgery.errors import ToolFailed, Usage
from qwen_surgery.toolchain import install, python310
from qwen_surgery.toolchain.environment import RECORD, Toolchain, home, toolchains_dir
from qwen_surgery.toolchain.pins import BUNDLED_GLIBC, PINS


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake_python(path: Path, version: str = "3 10") -> Path:
    """Something that answers like a Python of *version*."""
    return script(path, f"echo {version}\n")


@pytest.mark.parametrize(
    ("place", "variables"),
    [
        ("bin/python3.10", {"PATH": "{root}/bin"}),
        (".pyenv/versions/3.10.13/bin/python3.10", {}),
        ("elsewhere/versions/3.10.1/bin/python3.10", {"PYENV_ROOT": "{root}/elsewhere"}),
        (".local/share/uv/python/cpython-3.10.14-linux-x86_64-gnu/bin/python3.10", {}),
        ("uvs/cpython-3.10.14-linux/bin/python3.10", {"UV_PYTHON_INSTALL_DIR": "{root}/uvs"}),
        ("miniforge3/envs/old/bin/python3.10", {}),
        ("c/bin/python3.10", {"CONDA_PREFIX": "{root}/c"}),
    ],
)
def test_python_is_found_in_every_place(tmp_path: Path, place: str, variables: dict[str, str]) -> None:
    python = fake_python(tmp_path / place)
    env = {"HOME": str(tmp_path), "PATH": "/nowhere"}
    env |= {name: value.format(root=tmp_path) for name, value in variables.items()}
    assert python310.find(env) == python


def test_another_pythons_name_does_not_fool_it(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin/python3.10", "3 11")
    right = fake_python(tmp_path / ".pyenv/versions/3.10.2/bin/python3.10")
    assert python310.find({"HOME": str(tmp_path), "PATH": str(tmp_path / "bin")}) == right


def test_a_pyenv_shim_is_passed_over(tmp_path: Path) -> None:
    fake_python(tmp_path / "shims/python3.10")
    right = fake_python(tmp_path / ".pyenv/versions/3.10.2/bin/python3.10")
    assert python310.find({"HOME": str(tmp_path), "PATH": str(tmp_path / "shims")}) == right


def test_no_python_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python310, "candidates", lambda env: iter(()))
    with pytest.raises(ToolFailed, match=r"needs Python 3\.10 and none was found") as caught:
        python310.find({"HOME": str(tmp_path)})
    assert "QWEN_SURGERY_PYTHON310" in caught.value.hint
    with pytest.raises(ToolFailed, match=r"is not a working Python 3\.10"):
        python310.find({"QWEN_SURGERY_PYTHON310": str(tmp_path / "nothing")})


def environment(folder: Path, version: str = "1.30.2") -> Path:
    """A folder that looks like an environment with TPU-MLIR."""
    packages = folder / "lib/python3.10/site-packages"
    (packages / "tpu_mlir/python/tools").mkdir(parents=True)
    (packages / f"tpu_mlir-{version}.dist-info").mkdir()
    fake_python(folder / "bin/python")
    return folder


def record(folder: Path, version: str) -> None:
    data = {"version": version, "kind": "lean", "root": "lib/python3.10/site-packages/tpu_mlir"}
    (folder / RECORD).write_text(json.dumps(data))


def test_versions_lie_side_by_side_and_the_default_wins(tmp_path: Path) -> None:
    env = {"QWEN_SURGERY_HOME": str(tmp_path)}
    for version in ("1.6", "1.30.2"):
        record(environment(toolchains_dir(env) / version, version), version)
    assert [chain.version for chain in Toolchain.installed(env)] == ["1.6", "1.30.2"]
    assert Toolchain.find(environ=env).version == "1.30.2"
    assert Toolchain.find("1.6", env).version == "1.6"
    with pytest.raises(ToolFailed, match=r"TPU-MLIR 1\.9 is not installed") as caught:
        Toolchain.find("1.9", env)
    assert "toolchain install --version 1.9" in caught.value.hint


def test_a_half_install_is_never_taken_as_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_SURGERY_HOME", str(tmp_path))
    environment(toolchains_dir() / "1.30.2")
    with pytest.raises(ToolFailed, match="TPU-MLIR is not installed"):
        Toolchain.find()
    (finding,) = [found for found in install.doctor() if found.what == "half install"]
    assert not finding.ok
    (toolchains_dir() / "1.30.2" / RECORD).write_text('{"version": "1.30')
    assert Toolchain.installed() == []


def test_a_failing_pip_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The venv is made, pip fails: exit with pip's last words, and the next run starts over."""
    monkeypatch.setenv("QWEN_SURGERY_HOME", str(tmp_path))
    text = (
        'if [ "$1" = -I ]; then echo 3 10; exit 0; fi\n'
        'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit 0; fi\n'
        'echo "ERROR: No space left on device"; exit 1\n'
    )
    monkeypatch.setenv("QWEN_SURGERY_PYTHON310", str(script(tmp_path / "python3.10", text)))
    with pytest.raises(ToolFailed, match="pip failed") as caught:
        install.install(say=lambda text: None)
    assert "No space left on device" in caught.value.log_tail
    assert Toolchain.installed() == []


def test_an_unknown_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_SURGERY_HOME", str(tmp_path))
    with pytest.raises(Usage, match=r"1\.2\.3 is not a version") as caught:
        install.install("1.2.3")
    assert all(version in caught.value.hint for version in PINS)
    with pytest.raises(Usage, match="not installed"):
        install.remove("1.6")


def test_an_existing_environment_can_be_used_instead(tmp_path: Path) -> None:
    folder = environment(tmp_path / "mine", "1.28")
    env = {"QWEN_SURGERY_HOME": str(tmp_path / "home"), "QWEN_SURGERY_TOOLCHAIN": str(folder)}
    chain = Toolchain.find(environ=env)
    assert (chain.version, chain.python) == ("1.28", folder / "bin/python")
    with pytest.raises(ToolFailed, match=r"1\.6 was asked for"):
        Toolchain.find("1.6", env)
    with pytest.raises(ToolFailed, match=r"not a Python 3\.10 environment"):
        Toolchain.find(environ={**env, "QWEN_SURGERY_TOOLCHAIN": str(tmp_path)})


def test_a_sourced_envsetup_is_used_when_nothing_is_installed(tmp_path: Path) -> None:
    root = tmp_path / "release"
    script(root / "python/tools/model_transform.py", "")
    python = fake_python(tmp_path / "bin/python3")
    env = {
        "QWEN_SURGERY_HOME": str(tmp_path / "home"),
        "TPUC_ROOT": str(root),
        "PATH": str(python.parent),
        "LD_LIBRARY_PATH": "/its/own/libraries",
        "PYTHONPATH": "/its/own/modules",
    }
    chain = Toolchain.find(environ=env)
    assert (chain.root, chain.python, chain.origin) == (root, python, "envsetup.sh")
    assert chain.environ()["LD_LIBRARY_PATH"].endswith("/its/own/libraries")
    with pytest.raises(ToolFailed, match=r"holds no python/tools/model_transform\.py"):
        Toolchain.find(environ={**env, "TPUC_ROOT": str(tmp_path)})


def test_exactly_three_files_of_the_bundled_c_library_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "lib/third_party"
    folder.mkdir(parents=True)
    for name in (*BUNDLED_GLIBC, "libstdc++.so.6"):
        (folder / name).touch()
    monkeypatch.setattr(install, "host_glibc", lambda: (2, 35))
    assert install.move_glibc_aside(tmp_path) == [], "the same version does no harm"
    monkeypatch.setattr(install, "host_glibc", lambda: (2, 36))
    assert install.move_glibc_aside(tmp_path) == list(BUNDLED_GLIBC)
    assert [path.name for path in folder.iterdir()] == ["libstdc++.so.6"]
    assert sorted(path.name for path in (tmp_path / "lib/aside").iterdir()) == sorted(BUNDLED_GLIBC)


def test_the_install_root_follows_xdg(tmp_path: Path) -> None:
    assert home({"XDG_CACHE_HOME": "/c", "HOME": "/h"}) == Path("/c/qwen-surgery")
    assert home({"HOME": "/h"}) == Path("/h/.cache/qwen-surgery")
    assert home({"QWEN_SURGERY_HOME": str(tmp_path), "XDG_CACHE_HOME": "/c"}) == tmp_path


def test_the_command_says_what_to_do_when_nothing_is_installed(tmp_path: Path) -> None:
    env = {**os.environ, "QWEN_SURGERY_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    env.pop("QWEN_SURGERY_TOOLCHAIN", None)
    done = subprocess.run(
        [sys.executable, "-m", "qwen_surgery", "toolchain", "doctor", "--json"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    findings = {row["what"]: row for row in json.loads(done.stdout)}
    assert not findings["TPU-MLIR"]["ok"]
    assert "qwen-surgery toolchain install" in findings["TPU-MLIR"]["text"]
