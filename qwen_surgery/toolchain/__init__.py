"""The isolated TPU-MLIR environment: installing it, running its tools, its chip emulator."""

from qwen_surgery.toolchain.environment import Toolchain, ToolResult

__all__ = ["ToolResult", "Toolchain"]
