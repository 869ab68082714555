"""How a diff names its files so that ``git apply`` finds them."""

from __future__ import annotations

from pathlib import Path


def prefix(checkout: Path, cwd: Path) -> str:
    """What to put before a file's name in a diff of *checkout* made in the directory *cwd*: '' or ``dir/``.

    git apply reads the names of a plain unified diff as relative to the directory it runs in. That is *cwd*
    when *cwd* is the checkout or above it, up to the top of the git work tree; otherwise it can only be run
    in the checkout itself (``git -C CHECKOUT apply``).
    """
    checkout, cwd = checkout.resolve(), cwd.resolve()
    if not checkout.is_relative_to(cwd):
        return ""
    top = next((p for p in (checkout, *checkout.parents) if (p / ".git").exists()), None)
    if top is not None and not cwd.is_relative_to(top):
        return ""
    inside = checkout.relative_to(cwd).as_posix()
    return "" if inside == "." else inside + "/"
