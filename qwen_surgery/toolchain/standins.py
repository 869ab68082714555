"""Modules that stand in for packages TPU-MLIR imports but does not use here.

``plotly`` draws comparison plots, ``cv2`` reads images, ``torch`` is imported for one numpy -> tensor ->
numpy hop on graphs with custom ops, ``onnxruntime_extensions`` registers those ops (stereo matching,
state-space models) and pulls in transformers. Installing the real ones costs about 2.4 GB on disk. Each
stand-in raises a clear error when anything else of the package is asked for; ``toolchain install --full``
installs the real packages.
"""

from __future__ import annotations

from pathlib import Path

_REFUSE = """

def __getattr__(name):
    raise AttributeError(
        f"{__name__}.{name} is not here: this TPU-MLIR environment is lean, {__name__.split('.')[0]} is a "
        "stand-in; `qwen-surgery toolchain install --full` installs the real package"
    )
"""

_TORCH = '''"""Stand-in for torch: what TPU-MLIR's OnnxOpt asks of it, a tensor with its array."""
import numpy

__version__ = "0+qwen-surgery.standin"


class Tensor:
    def __init__(self, data):
        self._array = numpy.array(data)

    def numpy(self):
        return self._array


def tensor(data):
    return Tensor(data)
'''

_PLOTLY_SUBPLOTS = """

def make_subplots(*args, **kwargs):
    raise RuntimeError("plots need the real plotly: `qwen-surgery toolchain install --full`")
"""

_EXTENSIONS = '''"""Stand-in for onnxruntime_extensions: a custom op can be declared, not run."""


class PyOp:
    dt_float, dt_int32, dt_int64, dt_string, dt_bool, dt_double = 1, 6, 7, 8, 9, 11


def onnx_op(*args, **kwargs):
    return lambda function: function


class PyOrtFunction:
    @classmethod
    def from_model(cls, *args, **kwargs):
        raise RuntimeError("custom ops need `qwen-surgery toolchain install --full`")
'''

_FILES: dict[str, dict[str, str]] = {
    "torch": {"torch/__init__.py": _TORCH + _REFUSE},
    "plotly": {
        "plotly/__init__.py": '"""Stand-in for plotly."""\n' + _REFUSE,
        "plotly/graph_objects.py": '"""Stand-in for plotly.graph_objects."""\n' + _REFUSE,
        "plotly/subplots.py": '"""Stand-in for plotly.subplots."""\n' + _PLOTLY_SUBPLOTS + _REFUSE,
    },
    "onnxruntime_extensions": {"onnxruntime_extensions.py": _EXTENSIONS + _REFUSE},
    "cv2": {"cv2.py": '"""Stand-in for OpenCV."""\n' + _REFUSE},
}


def write(site_packages: Path, names: tuple[str, ...]) -> None:
    """Write the stand-ins *names* into *site_packages* (of an environment that lacks the real packages)."""
    for name in names:
        for path, text in _FILES[name].items():
            file = site_packages / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
