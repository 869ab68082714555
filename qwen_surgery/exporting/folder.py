"""Which folders an export may take the place of."""

from __future__ import annotations

from pathlib import Path

from qwen_surgery.errors import Refused
from qwen_surgery.exporting.manifest import FILE_NAME


def refuse_foreign(folder: Path) -> None:
    """Raise Refused when *folder* exists and is neither empty nor an earlier export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise Refused(f"{folder} is a file")
    if any(folder.iterdir()) and not (folder / FILE_NAME).is_file():
        raise Refused(
            f"{folder} holds other files and no export",
            hint="choose an empty or a new folder: it would be replaced",
        )
