"""Running TPU-MLIR's tools: a clean environment, one log per run, clear failures, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qwen_surgery.errors import Refused, ToolFailed, Usage
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.toolchain.emulator import ChipEngine
from qwen_surgery.toolchain.environment import run_guarded, stop_all
from qwen_surgery.toolchain.preload import compile_shared


def tool_root(tmp_path: Path, text: str) -> Toolchain:
    """A toolchain whose only tool, ``speak``, is the Python script *text*."""
    tools = tmp_path / "python/tools"
    tools.mkdir(parents=True)
    (tools / "speak.py").write_text(text)
    return Toolchain(Path(sys.executable), tmp_path, "0")


def test_a_failure_names_net_command_and_the_last_words(tmp_path: Path) -> None:
    chain = tool_root(tmp_path, "import sys\nfor i in range(99): print('line', i)\nsys.exit(3)\n")
    with pytest.raises(ToolFailed, match="block_7: speak failed with status 3") as caught:
        chain.run("speak", ["--chip", "bm1684x"], tmp_path, tmp_path / "logs/speak.log", net="block_7")
    assert "--chip bm1684x" in str(caught.value)
    assert caught.value.log_tail.splitlines()[-1] == "line 98"
    log = (tmp_path / "logs/speak.log").read_text()
    assert "speak.py --chip bm1684x" in log.splitlines()[1]
    assert "line 0" in log


def test_a_tool_sees_nothing_of_the_callers_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/poison")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/poison")
    monkeypatch.setenv("SECRET", "poison")
    chain = tool_root(tmp_path, "import os\nprint(dict(os.environ))\n")
    result = chain.run("speak", [], tmp_path, tmp_path / "log")
    assert "poison" not in (tmp_path / "log").read_text()
    assert result.seconds > 0
    assert result.peak_rss > 1_000_000


def test_a_missing_tool_is_not_a_traceback(tmp_path: Path) -> None:
    chain = Toolchain(tmp_path / "bin/python", tmp_path, "0")
    with pytest.raises(ToolFailed, match="missing") as caught:
        chain.run("model_tool", [], tmp_path, tmp_path / "log")
    assert "doctor" in caught.value.hint


def running(mark: str) -> list[str]:
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if mark in line and "ps -eo" not in line]


def wait_until_gone(mark: str) -> list[str]:
    deadline = time.monotonic() + 10
    while running(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    return running(mark)


def test_stopping_ends_the_tool_and_what_it_started(tmp_path: Path) -> None:
    mark = f"31{os.getpid()}.5"
    command = ["sh", "-c", f"sleep {mark} & sleep {mark}; wait"]

    def stop() -> None:
        deadline = time.monotonic() + 10
        while len(running(f"sleep {mark}")) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        stop_all()

    threading.Thread(target=stop).start()
    with (tmp_path / "out").open("wb") as stream:
        status, _ = run_guarded(command, tmp_path, os.environ, stream.fileno())
    assert status == -9
    assert wait_until_gone(f"sleep {mark}") == []


def test_a_tool_dies_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    mark = f"32{os.getpid()}.5"
    code = (
        "import os, pathlib\n"
        "from qwen_surgery.toolchain.environment import run_guarded\n"
        f"run_guarded(['sh', '-c', 'sleep {mark} & sleep {mark}; wait'], pathlib.Path('/'), os.environ, 2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 20
    while len(running(f"sleep {mark}")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running(f"sleep {mark}"), "the tool never started"
    process.kill()
    process.wait()
    assert wait_until_gone(f"sleep {mark}") == []


def test_a_tool_that_never_ends_is_stopped(tmp_path: Path) -> None:
    chain = tool_root(tmp_path, "import time\ntime.sleep(60)\n")
    with pytest.raises(ToolFailed, match="killed by signal 9") as caught:
        chain.run("speak", [], tmp_path, tmp_path / "log", timeout=0.5)
    assert "no end after" in caught.value.log_tail


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A compiled matrix product in bf16, and its matrix."""
    folder = tmp_path_factory.mktemp("product")
    matrix = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 32])],
        [numpy_helper.from_array(matrix, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    onnx.save(model, str(folder / "product.onnx"))
    chain = Toolchain.find()
    args = ["--model_name", "product", "--model_def", "product.onnx", "--do_onnx_sim=", "--mlir", "p.mlir"]
    chain.run("model_transform", args, folder, folder / "transform.log")
    args = [
        "--mlir",
        "p.mlir",
        "--quantize",
        "BF16",
        "--quant_input",
        "--chip",
        "bm1684x",
        "--model",
        "p.bmodel",
    ]
    chain.run("model_deploy", args, folder, folder / "deploy.log")
    return folder / "p.bmodel", matrix


@pytest.mark.tpu
def test_the_emulator_computes_what_numpy_does(product: tuple[Path, np.ndarray]) -> None:
    bmodel, matrix = product
    x = np.random.default_rng(1).standard_normal((1, 4, 64)).astype(np.float32)
    with ChipEngine(bmodel) as chip:
        assert (chip.chip, chip.nets) == ("BM1684X", ("product",))
        ((given,), (result,)) = chip.describe("product")
        assert (given.dtype, given.shape, result.dtype) == ("bf16", (1, 4, 64), "f32")
        first, second = chip.run("product", [x])[0], chip.run("product", [x * 2])[0]
    expected = x @ matrix
    np.testing.assert_allclose(first, expected, atol=0.05 * np.abs(expected).max())
    np.testing.assert_allclose(
        second, 2 * first, rtol=1e-6, err_msg="a second run sees the first one's input"
    )


@pytest.mark.tpu
def test_wrong_inputs_are_refused_and_the_engine_lives_on(product: tuple[Path, np.ndarray]) -> None:
    with ChipEngine(product[0]) as chip:
        with pytest.raises(Usage, match="no net block_9"):
            chip.run("block_9", [])
        with pytest.raises(Usage, match="takes 1 inputs, 0 were given"):
            chip.run("product", [])
        with pytest.raises(Usage, match="256 elements, 5 were given"):
            chip.run("product", [np.zeros(5, np.float32)])
        assert chip.run("product", [np.zeros((1, 4, 64), np.float32)])[0].shape == (1, 4, 32)


@pytest.mark.tpu
def test_waiting_threads_that_step_aside_change_no_bit(
    product: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(2).standard_normal((1, 4, 64)).astype(np.float32)
    with ChipEngine(product[0]) as chip:
        (quick,) = chip.run("product", [x])
    monkeypatch.setattr("shutil.which", lambda name: None)  # no C compiler: slow, but it runs
    with ChipEngine(product[0]) as chip:
        (slow,) = chip.run("product", [x])
    assert quick.tobytes() == slow.tobytes()


def test_c_code_that_does_not_compile_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "wrong.c"
    source.write_text("this is not C\n")
    assert compile_shared(source, tmp_path) is None


@pytest.mark.tpu
def test_a_dead_emulator_is_a_clear_error(product: tuple[Path, np.ndarray]) -> None:
    with ChipEngine(product[0]) as chip:
        chip._worker.process.kill()
        with pytest.raises(ToolFailed, match="chip emulator was killed by signal 9"):
            chip.run("product", [np.zeros((1, 4, 64), np.float32)])


@pytest.mark.tpu
def test_no_bmodel_is_a_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "no.bmodel"
    with pytest.raises(Refused, match="does not exist"):
        ChipEngine(file)
    file.write_bytes(b"not a bmodel" * 100)
    with pytest.raises(Refused, match="not a whole bmodel"):
        ChipEngine(file)
