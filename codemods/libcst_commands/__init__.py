"""Lets LibCST's tool find a rule by the name it is imported by, without ``-x``.

``python -m libcst.tool codemod NAME`` imports NAME below each package listed in ``.libcst.codemod.yaml``.
This package looks for its submodules beside ``codemods``, so that
``codemods.disable_torch2.DisableTorch2Command`` is such a NAME.
"""

from __future__ import annotations

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2])]
