"""What each TPU-MLIR version needs to run, as pip requirement lines.

``lean`` is what importing and running model_transform, model_deploy, model_tool and the emulator takes,
measured by recording ``sys.modules`` after each tool. Packages the wheel asks for but these tools only import
for image preprocessing, plots or other model families are replaced by stand-ins (:mod:`.standins`), which
say so when something touches them. ``full`` lets pip install everything the wheel declares, and a real torch.
"""

from __future__ import annotations

from dataclasses import dataclass

#: TPU-MLIR wheels exist for this Python only.
PYTHON = (3, 10)

#: C library files that TPU-MLIR bundles; on a host with a newer glibc they break every tool.
BUNDLED_GLIBC = ("libc.so.6", "libm.so.6", "libpthread.so.0")
#: The version of those bundled files.
BUNDLED_GLIBC_VERSION = (2, 35)

_COMMON = (
    "numpy==1.24.3",
    "protobuf==3.20.3",
    "onnxsim==0.4.17",
    "psutil==5.9.8",
    "filelock==3.13.1",
    "setuptools==69.5.1",
    "Pillow==10.0.0",
    "tqdm==4.65.0",
    "flatbuffers==23.5.26",
    "rich==13.7.1",
    "markdown-it-py==3.0.0",
    "mdurl==0.1.2",
    "Pygments==2.18.0",
    "typing_extensions==4.12.2",
    "packaging==24.1",
)


@dataclass(frozen=True)
class Pin:
    """One TPU-MLIR version: requirement lines for a lean and a full environment, and stand-ins."""

    version: str
    lean: tuple[str, ...]
    standins: tuple[str, ...]
    full: tuple[str, ...]
    full_no_deps: tuple[str, ...]


PINS: dict[str, Pin] = {
    "1.30.2": Pin(
        version="1.30.2",
        lean=(
            "tpu-mlir==1.30.2",
            "onnx==1.14.1",
            "onnxruntime==1.16.3",
            *_COMMON,
        ),
        standins=("torch", "plotly", "cv2", "onnxruntime_extensions"),
        full=(
            "tpu-mlir==1.30.2",
            "onnx==1.14.1",
            "onnxruntime==1.16.3",
            "onnxsim==0.4.17",
            "psutil",
            "setuptools<80",
        ),
        full_no_deps=("torch==1.12.1",),
    ),
    "1.6": Pin(
        version="1.6",
        lean=("tpu-mlir==1.6", "onnx==1.14.0", "onnxruntime==1.15.1", *_COMMON),
        standins=("plotly", "cv2"),
        full=("tpu-mlir==1.6", "onnx==1.14.0", "onnxruntime==1.15.1", "onnxsim==0.4.17", "setuptools<80"),
        full_no_deps=(),
    ),
}

DEFAULT_VERSION = "1.30.2"
