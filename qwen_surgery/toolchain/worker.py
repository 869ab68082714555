"""A process of TPU-MLIR's Python that keeps a model open and answers requests about it.

TPU-MLIR's libraries are built for Python 3.10 and numpy 1.24, so they run in a process of the toolchain;
its half is ``worker_side.py``. Messages go over pipes, each a frame of 8 bytes length (little endian) and
that many bytes: a JSON document, then one ``.npy`` array a frame. No pickle is read or written.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_surgery.errors import ToolFailed
from qwen_surgery.toolchain.environment import LOG_TAIL_LINES, Toolchain
from qwen_surgery.toolchain.preload import compile_shared

if TYPE_CHECKING:
    import numpy as np

_SIDE = Path(__file__).with_name("worker_side.py")


class Worker:
    """One worker process: what ``worker_side.py ARGUMENTS`` serves, until :meth:`close`.

    *what* names it in errors (``the chip emulator``), *subject* what it works on. *libraries* are library
    file name -> file that the process must find before the toolchain's own of that name; *preload* is C code
    that goes in front of them all where this machine can compile it. ``folder`` is scratch space that goes
    with the worker. Raises ToolFailed, with its last words, when it dies.
    """

    def __init__(
        self,
        toolchain: Toolchain,
        arguments: Sequence[str],
        what: str,
        subject: str,
        libraries: Mapping[str, Path] | None = None,
        preload: Path | None = None,
    ) -> None:
        self._what, self._subject = what, subject
        self._scratch = tempfile.TemporaryDirectory(prefix="qwen-surgery-worker-")
        self.folder = Path(self._scratch.name)
        self._errors = (self.folder / "stderr").open("wb+")
        self._liveness: int | None = None
        self.process = self._start(toolchain, arguments, libraries or {}, preload)
        try:
            self._read()  # it says that it is ready
        except BaseException:
            self.close()
            raise

    def _start(
        self,
        toolchain: Toolchain,
        arguments: Sequence[str],
        libraries: Mapping[str, Path],
        preload: Path | None,
    ) -> subprocess.Popen[bytes]:
        env = toolchain.environ()
        for name, file in libraries.items():
            (self.folder / name).symlink_to(file)
        env["LD_LIBRARY_PATH"] = f"{self.folder}:{env['LD_LIBRARY_PATH']}"
        if preload is not None and (compiled := compile_shared(preload, self.folder)):
            env["LD_PRELOAD"] = str(compiled)
        # Nothing is ever written here; that it closes when this process ends, however it ends, ends the
        # worker.
        their_end, self._liveness = os.pipe()
        try:
            return subprocess.Popen(
                [str(toolchain.python), str(_SIDE), str(their_end), *arguments],
                cwd=self.folder, env=env, pass_fds=(their_end,),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            )  # fmt: skip
        finally:
            os.close(their_end)

    def ask(
        self, request: dict[str, Any], arrays: Sequence[np.ndarray] = ()
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Send one request; its answer and arrays. An answer with ``error`` is the worker's refusal."""
        import numpy as np

        stdin = self.process.stdin
        if stdin is None or stdin.closed:
            raise ToolFailed(f"{self._what} is closed")
        try:
            self._write(json.dumps({**request, "arrays": len(arrays)}).encode())
            for array in arrays:
                buffer = io.BytesIO()
                np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
                self._write(buffer.getbuffer())
            stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self._read()

    def _write(self, frame: bytes | memoryview) -> None:
        stdin = self.process.stdin
        assert stdin is not None
        stdin.write(struct.pack("<Q", len(frame)))
        stdin.write(frame)

    def _read(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        import numpy as np

        reply = json.loads(self._frame())
        arrays = [np.load(io.BytesIO(self._frame()), allow_pickle=False) for _ in range(reply["arrays"])]
        return reply, arrays

    def _frame(self) -> bytes:
        stdout = self.process.stdout
        assert stdout is not None
        head = stdout.read(8)
        data = stdout.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else b""
        if len(head) < 8 or len(data) < struct.unpack("<Q", head)[0]:
            raise self._died()
        return data

    def _died(self) -> ToolFailed:
        status = self.process.wait()
        self._errors.seek(0)
        tail = "\n".join(self._errors.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        signal = -status if status < 0 else None
        return ToolFailed(f"{self._what} {how} on {self._subject}", log_tail=tail, signal=signal)

    def close(self) -> None:
        """End the process and delete its scratch folder; safe to call twice."""
        if self._liveness is None:
            return
        os.close(self._liveness)
        self._liveness = None
        if self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self._errors.close()
        self._scratch.cleanup()
