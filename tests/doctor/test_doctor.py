"""``doctor``, and what it shares with ``build --dry-run`` and ``patch``."""

from __future__ import annotations

import collections
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from golden.eras import make_checkout
from golden.releases import Scheme, quantise_checkout
from qwen_surgery.building import resources
from qwen_surgery.cli import main
from tests.families.tiny import make


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    def remarks(self, part: str) -> dict[str, dict[str, str]]:
        """Those of one part of the JSON, by what they are about."""
        return {remark["what"]: remark for remark in json.loads(self.out)[part]}

    def failing(self) -> set[str]:
        data = json.loads(self.out)
        parts = (data[part] for part in ("machine", "build") if part in data)
        return {remark["what"] for part in parts for remark in part if remark["health"] == "FAIL"}


Call = Callable[..., Said]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command line, in this process and in the test's folder."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Said:
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        said = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Said(stop.value.code, said.out, said.err)

    return run


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "Qwen-tiny")


def _edit(checkout: Path, **values: Any) -> None:
    config = json.loads((checkout / "config.json").read_text())
    (checkout / "config.json").write_text(json.dumps(config | values))


def _without_toolchain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("QWEN_SURGERY_TOOLCHAIN", "TPUC_ROOT", "QWEN_SURGERY_PYTHON310"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QWEN_SURGERY_HOME", str(tmp_path / "home"))


def _free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let every disk have *count* bytes free."""
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, count))


@pytest.mark.tpu
def test_a_good_machine_and_a_good_checkout(call: Call, checkout: Path) -> None:
    done = call("doctor", checkout, "--seq-length", 128)
    assert done.code == 0, done.out
    assert "FAIL" not in done.out
    for row in (
        "TPU-MLIR     1.30.2",
        "era sdpa: 2 layers, hidden 128",
        "BF16, not quantised",
        "none declined",
    ):
        assert row in done.out
    assert max(len(line) for line in done.out.splitlines() if "/" not in line) <= 80


@pytest.mark.tpu
def test_it_tells_the_plan_that_build_would_run(call: Call, checkout: Path) -> None:
    """Two ways to reckon would soon differ."""
    flags = ("--seq-length", 128, "--mode", "int8", "--out", "out", "--json")
    told = call("doctor", checkout, *flags)
    assert json.loads(told.out)["plan"] == json.loads(call("build", checkout, *flags, "--dry-run").out)
    assert told.remarks("build")["disk"]["health"] == "ok"
    assert not Path("out").exists()


@pytest.mark.tpu
def test_too_little_disk(call: Call, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _free(monkeypatch, 50 << 20)
    done = call("doctor", checkout, "--seq-length", 128, "--json")
    assert done.code == 3 and done.failing() == {"disk"}
    remark = done.remarks("build")["disk"]
    assert "has 52 MB free" in remark["found"] and "--out on a disk with" in remark["mend"]


@pytest.mark.tpu
def test_too_little_memory_names_the_stage(
    call: Call, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "free_memory", lambda: 1100 << 20)
    done = call("doctor", checkout, "--seq-length", 128, "--json")
    assert done.code == 3 and done.failing() == {"export", "verify"}
    assert "export needs 1.5 GB of memory" in done.remarks("build")["export"]["found"]


def test_no_tpu_mlir(call: Call, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a build takes is told all the same: it decides whether to install."""
    _without_toolchain(monkeypatch, tmp_path)
    done = call("doctor", checkout, "--seq-length", 128, "--json")
    assert done.code == 3 and "TPU-MLIR" in done.failing()
    assert "qwen-surgery toolchain install" in done.remarks("machine")["TPU-MLIR"]["mend"]
    assert done.remarks("build")["disk"]["health"] == "ok"


def test_no_python_310(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_toolchain(monkeypatch, tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("PYENV_ROOT", "UV_PYTHON_INSTALL_DIR", "XDG_DATA_HOME", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    done = call("doctor", "--json")
    assert done.code == 3
    assert done.failing() == {"TPU-MLIR", "Python 3.10"}
    assert "uv python install 3.10" in done.remarks("machine")["Python 3.10"]["mend"]


@pytest.mark.tpu
def test_no_compiler_is_worth_a_note_and_no_failure(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    done = call("doctor", "--json")
    assert done.code == 0
    remark = done.remarks("machine")["C compiler"]
    assert remark["health"] == "note" and "apt-get install gcc" in remark["mend"]


def test_too_little_disk_for_tpu_mlir(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_toolchain(monkeypatch, tmp_path)
    _free(monkeypatch, 1 << 30)
    done = call("doctor", "--json")
    assert "its disk" in done.failing()
    assert "QWEN_SURGERY_HOME" in done.remarks("machine")["its disk"]["mend"]


def test_a_package_that_is_not_there(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_surgery import extras

    monkeypatch.setitem(extras.EXTRAS, "compile", ("no_such_package",))
    done = call("doctor", "--json")
    assert done.code == 3 and "packages" in done.failing()
    remark = done.remarks("machine")["packages"]
    assert "no_such_package" in remark["found"]
    assert "install 'qwen-surgery[export,compile,verify]'" in remark["mend"]


@pytest.mark.parametrize(
    ("what", "values", "found"),
    [
        ("model", {"model_type": "llama"}, "says model_type llama"),
        ("model", {"hidden_size": 0}, "hidden_size"),
        ("weights", {"quantization_config": {"quant_method": "awq"}}, "AWQ"),
        ("weights", {"num_hidden_layers": 3}, "transformer.h.2"),
    ],
)
def test_what_is_wrong_with_a_checkout(
    call: Call, checkout: Path, what: str, values: dict[str, Any], found: str
) -> None:
    _edit(checkout, **values)
    done = call("doctor", checkout, "--seq-length", 128, "--json")
    assert done.code == 3
    remark = done.remarks("build")[what]
    assert remark["health"] == "FAIL" and found in remark["found"], remark


def test_a_release_is_told_by_either_of_its_files(call: Call, checkout: Path) -> None:
    """Older releases say it in a file of its own, and doctor called their weights not quantised."""
    quantise_checkout(checkout, Scheme(4, 64))
    config = json.loads((checkout / "config.json").read_text())
    said = config.pop("quantization_config")
    (checkout / "config.json").write_text(json.dumps(config))
    (checkout / "quantize_config.json").write_text(json.dumps(said))
    remark = call("doctor", checkout, "--seq-length", 128, "--json").remarks("build")["weights"]
    assert remark["health"] == "ok" and "GPTQ, 4 bits, groups of 64" in remark["found"]


def test_a_window_is_a_family_s_and_not_any_config_s(call: Call, tmp_path: Path, checkout: Path) -> None:
    """Qwen v1's code reads no window: a build that is exact must not be called wrong."""
    slides = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    found = {}
    for path in (make(tmp_path / "qwen2", "qwen2"), checkout):
        _edit(path, **slides)
        done = call("doctor", path, "--seq-length", 128, "--json")
        found[path.name] = done.remarks("build")["window"]
    assert found["qwen2"]["health"] == "FAIL" and "sees 64 tokens" in found["qwen2"]["found"]
    assert found["qwen2"]["mend"] == "use --seq-length 63"
    assert found[checkout.name]["health"] == "ok"


def test_a_length_beyond_the_trained_one(call: Call, checkout: Path) -> None:
    done = call("doctor", checkout, "--seq-length", 4096, "--json")
    assert done.code == 3 and done.failing() & {"edits", "weights"}
    assert "2048" in "".join(remark["found"] for remark in done.remarks("build").values())


def test_an_option_that_cannot_be(call: Call, checkout: Path) -> None:
    done = call("doctor", checkout, "--seq-length", 128, "--mode", "f16", "--runtime", "llm-tpu", "--json")
    assert done.code == 3
    assert "use --runtime sophon-demo" in done.remarks("build")["options"]["mend"]


def _drop_weights(checkout: Path) -> None:
    for shard in checkout.glob("*.safetensors"):
        shard.unlink()


@pytest.mark.tpu
def test_without_weights_all_else_is_told(call: Call, checkout: Path) -> None:
    _drop_weights(checkout)
    done = call("doctor", checkout, "--seq-length", 128, "--json")
    assert done.code == 3 and done.failing() == {"weights"}
    assert "qwen-surgery fetch" in done.remarks("build")["weights"]["mend"]
    assert done.remarks("build")["time"]["health"] == "ok"


def test_a_dry_run_needs_no_weights_no_tpu_mlir_and_no_trust(
    call: Call, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs nothing; what it cannot tell, it says."""
    _without_toolchain(monkeypatch, tmp_path)
    _drop_weights(checkout)
    flags = ("build", checkout, "--seq-length", 128, "--out", "out", "--dry-run")
    done = call(*flags)
    assert done.code == 0, done.err
    assert "deploy:block_0" in done.out
    assert "TPU-MLIR is not installed; planned as for 1.30.2" in done.err
    assert "whether they fit cannot be told" in done.err
    notes = json.loads(call(*flags, "--json").out)["notes"]
    assert len(notes) == 2 and not Path("out").exists()


@pytest.mark.tpu
def test_a_plan_without_weights_is_that_of_a_first_build(call: Call, checkout: Path) -> None:
    flags = ("build", checkout, "--seq-length", 128, "--out", "out", "--dry-run", "--json")
    whole = json.loads(call(*flags).out)
    _drop_weights(checkout)
    assert json.loads(call(*flags).out) | {"notes": []} == whole


@pytest.mark.parametrize("damage", ["no weights", "quantised", "cut"])
def test_patch_says_when_build_will_refuse(call: Call, checkout: Path, damage: str) -> None:
    """Patching works on such a checkout; whoever wants a bmodel should hear now that there will be none."""
    if damage == "no weights":
        _drop_weights(checkout)
    elif damage == "quantised":
        _edit(checkout, quantization_config={"quant_method": "awq"})
    else:
        shard = min(checkout.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-10])
    done = call("patch", checkout, "--seq-length", 128)
    assert done.code == 0
    assert len([line for line in done.err.splitlines() if line.startswith("build will refuse")]) == 1
    again = call("patch", checkout, "--seq-length", 128, "--json")
    assert any("build will refuse" in note for note in json.loads(again.out)["notes"])


def test_patch_says_nothing_of_a_build_that_will_work(call: Call, checkout: Path) -> None:
    assert "build" not in call("patch", checkout, "--seq-length", 128).err
