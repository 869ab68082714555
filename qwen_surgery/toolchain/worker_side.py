"""The worker's half of ``worker.py``: runs in TPU-MLIR's Python, knows nothing of qwen_surgery.

    worker_side.py PIPE emulator BMODEL      nets of a compiled model on the chip emulator
    worker_side.py PIPE top-dialect          nets in TPU-MLIR's Top dialect, in its own interpreter
    worker_side.py PIPE device BMODEL FLAGS  the vendor's bmruntime, call by call (``device_side.py``)

Messages on stdin and a private copy of stdout; ``worker.py`` describes them.
"""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Any


def read_frame(stream: Any) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        return None
    (size,) = struct.unpack("<Q", head)
    data = stream.read(size)
    return data if len(data) == size else None


def write_frame(stream: Any, data: bytes) -> None:
    stream.write(struct.pack("<Q", len(data)))
    stream.write(data)


def describe(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.data.shape), "dtype": tensor.dtype}


class Emulator:
    """An open bmodel; nets are opened on first use and kept."""

    def __init__(self, path: str) -> None:
        import pyruntime_bm

        self.model = pyruntime_bm.Model(path)
        self.names = list(self.model.networks)
        self.open_nets: dict[str, Any] = {}

    def net(self, name: str) -> Any:
        if name not in self.open_nets:
            self.open_nets[name] = self.model.Net(name)
        return self.open_nets[name]

    def answer(self, request: dict[str, Any], arrays: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        if request["op"] == "nets":
            return {"nets": self.names}, []
        net = self.net(request["net"])
        if request["op"] == "describe":
            return {
                "inputs": [describe(t) for t in net.inputs],
                "outputs": [describe(t) for t in net.outputs],
            }, []
        if len(arrays) != len(net.inputs):
            raise ValueError(f"{request['net']} takes {len(net.inputs)} inputs, {len(arrays)} were given")
        for tensor, array in zip(net.inputs, arrays, strict=True):
            if array.size != tensor.data.size:
                raise ValueError(f"{tensor.name} has {tensor.data.size} elements, {array.size} were given")
            tensor.data[:] = to_chip(array, tensor.dtype).reshape(tensor.data.shape)
        net.forward()
        return {}, [from_chip(tensor.data, tensor.dtype) for tensor in net.outputs]


class TopDialect:
    """TPU-MLIR's interpreter, with the latest file open. Inputs and outputs go in the graph's order."""

    def __init__(self) -> None:
        import pymlir

        self.pymlir = pymlir
        pymlir.set_mem_mode("value_mem")
        self.module: Any = None
        self.loaded = ""

    def open(self, file: str) -> None:
        if file == self.loaded:
            return
        self.module, self.loaded = None, ""
        os.chdir(Path(file).parent)  # weights are found beside the file
        module = self.pymlir.module()
        module.load(file)
        self.module, self.loaded = module, file

    def answer(self, request: dict[str, Any], arrays: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        import numpy as np

        self.open(request["mlir"])
        names = self.module.input_names
        if len(arrays) != len(names):
            raise ValueError(f"{len(arrays)} inputs were given, {len(names)} are wanted")
        for name, array in zip(names, arrays, strict=True):
            self.module.set_tensor(name, array.astype(np.float32), array.shape)
        self.module.invoke(True)
        tensors = self.module.get_all_tensor()
        return {}, [tensors[name] for name in self.module.output_names]


def to_chip(array: Any, dtype: str) -> Any:
    """*array* in the chip's own type; bf16 is its bits as uint16, rounded to the nearest even."""
    import numpy as np

    if dtype == "bf16":
        bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
        rounded = (
            (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        ).astype(np.uint16)
        rounded[np.isnan(array)] = 0x7FC0
        return rounded
    return array.astype({"f32": np.float32, "f16": np.float16, "i32": np.int32}[dtype])


def from_chip(data: Any, dtype: str) -> Any:
    """A copy of the chip's *data* as float32 or int32."""
    import numpy as np

    if dtype == "bf16":
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.astype(np.int32 if dtype == "i32" else np.float32)


def device(*arguments: str) -> Any:
    """The session that ``device_side.py`` has; libbmrt is loaded for it alone."""
    from device_side import Bmruntime  # type: ignore[import-not-found]  # beside this file, in the worker's path

    return Bmruntime(*arguments)


def serve(session: Any, requests: Any, replies: Any) -> None:
    import numpy as np

    while True:
        head = read_frame(requests)
        if head is None:
            return
        request = json.loads(head)
        frames = [read_frame(requests) for _ in range(request.get("arrays", 0))]
        try:
            arrays = [np.load(io.BytesIO(frame), allow_pickle=False) for frame in frames]
            reply, outputs = session.answer(request, arrays)
        except Exception as error:
            reply, outputs = {"error": f"{type(error).__name__}: {error}"}, []
        write_frame(replies, json.dumps({**reply, "arrays": len(outputs)}).encode())
        for output in outputs:
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(output), allow_pickle=False)
            write_frame(replies, buffer.getvalue())
        replies.flush()


def die_with(liveness: int) -> None:
    """Have this process killed when the other end of the pipe *liveness* closes, also in the middle of a
    forward that takes minutes (it holds the interpreter's lock, so no thread of ours could see to it)."""
    worker = os.getpid()
    if os.fork():
        os.close(liveness)
        return
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    while os.read(liveness, 4096):
        pass
    if os.getppid() == worker:
        os.kill(worker, signal.SIGKILL)
    os._exit(0)


def main() -> None:
    liveness, kind, *arguments = sys.argv[1:]
    die_with(int(liveness))
    # TPU-MLIR's C code prints to stdout: keep the real one for replies, give it stderr.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sessions: dict[str, Any] = {"emulator": Emulator, "top-dialect": TopDialect, "device": device}
    session = sessions[kind](*arguments)
    write_frame(replies, b'{"ready": true, "arrays": 0}')
    replies.flush()
    serve(session, sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
