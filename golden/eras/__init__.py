"""Own-written Qwen v1 checkouts, one for each era of upstream's history (numpy and stdlib only)."""

from __future__ import annotations

from golden.eras.checkout import make_checkout
from golden.eras.sources import ERAS, modeling_source, python_files

__all__ = ["ERAS", "make_checkout", "modeling_source", "python_files"]
