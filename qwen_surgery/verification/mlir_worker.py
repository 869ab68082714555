"""Runs Top-dialect files: lives in TPU-MLIR's Python, knows nothing of qwen_surgery.

One JSON request per line on stdin, ``{"mlir": file, "input": npz, "output": npz}``; the inputs are the arrays
``arr_0``, ``arr_1``, ... in the order of the graph's inputs, and so are the outputs. One JSON reply per line.
"""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any


def run(module: Any, request: dict[str, str]) -> None:
    import numpy as np

    with np.load(request["input"]) as arrays:
        inputs = [arrays[f"arr_{i}"] for i in range(len(arrays.files))]
    if len(inputs) != len(module.input_names):
        raise ValueError(f"{len(inputs)} inputs were given, {len(module.input_names)} are wanted")
    for name, array in zip(module.input_names, inputs, strict=True):
        module.set_tensor(name, array.astype(np.float32), array.shape)
    module.invoke(True)
    tensors = module.get_all_tensor()
    np.savez(request["output"], *(tensors[name] for name in module.output_names))


def main() -> None:
    ctypes.CDLL(None).prctl(1, 9)  # die with the parent
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the interpreter's C++ code prints to stdout
    import pymlir

    pymlir.set_mem_mode("value_mem")
    module, loaded = None, None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["mlir"] != loaded:
                module = None
                module = pymlir.module()
                os.chdir(Path(request["mlir"]).parent)  # weights are found beside the file
                module.load(request["mlir"])
                loaded = request["mlir"]
            run(module, request)
            reply = {}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
