"""Fetch a checkout: choose, say what it takes, let the hub's client transfer, check every byte.

Nothing that lies in the folder is overwritten, and nothing that arrived is run: Python is read as text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_surgery.checkout import Checkout
from qwen_surgery.errors import Refused, ToolFailed
from qwen_surgery.fetching.hubs import Hub
from qwen_surgery.fetching.listing import Listing, RemoteFile
from qwen_surgery.files import free_disk, locked, require_disk
from qwen_surgery.parsing import read_json

Say = Callable[[str], None]


@dataclass
class Fetched:
    """A checkout that is whole: where it came from, its files, and which of them were transferred now."""

    repo: str
    revision: str
    folder: Path
    files: list[RemoteFile] = field(default_factory=list)
    transferred: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "repository": self.repo,
            "revision": self.revision,
            "folder": str(self.folder),
            "files": {file.name: file.size for file in self.files},
            "transferred": self.transferred,
        }


def fetch(
    hub: Hub,
    repo: str,
    folder: Path,
    *,
    revision: str | None = None,
    code_only: bool = False,
    say: Say = lambda text: None,
) -> Fetched:
    """Get what this program needs of *repo* into *folder*.

    Raises Refused for a repository that cannot be used, and for a file in *folder* that is another than the
    repository's; ToolFailed when the disk is too small, the transfer fails, or what came is not what the hub
    says it holds (that file is then removed).
    """
    listing = hub.listing(repo, revision)
    done = Fetched(repo, listing.revision, folder)
    say(f"{repo}, revision {listing.revision}, into {folder}")
    code = listing.code()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        hub.sweep(folder)
        _take(hub, listing, code, "code, config and tokenizer", done, say)
        Checkout.open(folder)  # before gigabytes of a model that is none of ours
        if not code_only:
            index = listing.index_name
            content = None if index is None else read_json(folder / index, "not a weight index")
            _take(hub, listing, listing.weights(content), "weights", done, say)
    return done


def _take(
    hub: Hub, listing: Listing, files: Sequence[RemoteFile], what: str, done: Fetched, say: Say
) -> None:
    """Get those of *files* that are not in the folder yet."""
    folder = done.folder
    there = [file for file in files if (folder / file.name).exists()]
    wanted = [file for file in files if file not in there]
    say(f"{what}: {_counted(files)}; {len(there)} there, {_counted(wanted)} to get")
    for file in there:
        if fault := file.fault(folder / file.name):
            raise Refused(
                f"{folder / file.name} {fault}: it is not {listing.repo}'s, and nothing is overwritten",
                hint="choose another folder, or `qwen-surgery restore` a patched checkout first",
            )
    if wanted:
        _transfer(hub, listing, wanted, folder, say)
    done.files += files
    done.transferred += [file.name for file in wanted]


def _transfer(hub: Hub, listing: Listing, wanted: Sequence[RemoteFile], folder: Path, say: Say) -> None:
    for file in wanted:
        say(f"  {file.name}  {file.size:,} bytes")
    needed = max(0, sum(file.size for file in wanted) - _begun(folder))
    require_disk(folder, needed, listing.repo)
    say(f"  {free_disk(folder) / 1e9:,.1f} GB of disk are free")
    hub.download(listing, [file.name for file in wanted], folder)
    for file in wanted:
        if fault := file.fault(folder / file.name):
            (folder / file.name).unlink(missing_ok=True)
            raise ToolFailed(
                f"{file.name} as it came {fault} of the hub's listing; it was removed",
                hint="run the same command again; if it stays so, try another --endpoint or --from",
            )
    say(f"  checked: {len(wanted)} files have the sizes and hashes that the hub lists")


def _counted(files: Sequence[RemoteFile]) -> str:
    size = sum(file.size for file in files)
    return f"{len(files)} file{'' if len(files) == 1 else 's'}, {size / 1e6:,.1f} MB"


def _begun(folder: Path) -> int:
    """Bytes on disk of what an earlier run began and the client will go on with."""
    parts = [*folder.glob("*.incomplete"), *(folder / ".cache/huggingface").rglob("*.incomplete")]
    return sum(512 * path.stat().st_blocks for path in parts)
