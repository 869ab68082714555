"""What a hub says a repository holds, and which of it a checkout needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qwen_surgery.errors import Refused
from qwen_surgery.parsing import is_plain_name, parsing
from qwen_surgery.weights.index import LAYOUTS

#: Everything but weights that some command reads: config, tokenizer, Python, and a quantiser's settings.
_CODE = (
    "config.json", "generation_config.json", "quantize_config.json", "quant_config.json", "*.py",
    "*.tiktoken", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_PIECE = 8 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as the hub describes it. ``sha256`` is that of its content, where the hub knows
    it; else ``blob`` is git's own sha1 of it."""

    name: str
    size: int
    sha256: str | None = None
    blob: str | None = None

    def fault(self, path: Path) -> str:
        """What is wrong with *path* as a copy of this file; empty when nothing is."""
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != self.size:
            return f"has {size:,} bytes, not {self.size:,}"
        if self.sha256 is not None:
            return "" if _digest(path, hashlib.sha256()) == self.sha256 else "has another sha256"
        if self.blob is not None:
            digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
            return "" if _digest(path, digest) == self.blob else "has another git hash"
        return ""


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return str(digest.hexdigest())


@dataclass(frozen=True)
class Listing:
    """The files at the top of *repo* at *revision* (a commit, where the hub names one), by name."""

    repo: str
    revision: str
    files: Mapping[str, RemoteFile]

    @classmethod
    def of(cls, repo: str, revision: str, files: Iterable[RemoteFile]) -> Listing:
        """Of all *files*, those at the top. Names that lead elsewhere are left out: nothing needs them."""
        return cls(repo, revision, {file.name: file for file in files if is_plain_name(file.name)})

    def code(self) -> tuple[RemoteFile, ...]:
        """All that is needed but the weights. Refused when that is no model."""
        if "config.json" not in self.files:
            raise Refused(f"{self.repo} at {self.revision} has no config.json: it is no model's repository")
        index = self.index_name
        return tuple(
            file
            for name, file in sorted(self.files.items())
            if name == index or any(fnmatchcase(name, pattern) for pattern in _CODE)
        )

    @property
    def index_name(self) -> str | None:
        """The file that names the shards, of the format that a checkout's reader prefers."""
        for index, single, _ in LAYOUTS:
            if index in self.files:
                return index
            if single in self.files:
                return None
        return None

    def weights(self, index: Any) -> tuple[RemoteFile, ...]:
        """The weights of one format, whole or the shards that *index* (the content of :attr:`index_name`)
        names. Refused when there are none or a shard is not there."""
        if self.index_name is None:
            return (self._single(),)
        with parsing(f"{self.repo}: {self.index_name}", "not a weight index"):
            shards = sorted({str(shard) for shard in index["weight_map"].values()})
        absent = [shard for shard in shards if shard not in self.files]
        if absent:
            raise Refused(
                f"{self.repo} at {self.revision} is not whole: it has no {absent[0]:.100}, which "
                f"{self.index_name} names",
                hint="choose another --revision, or --code-only for what needs no weights",
            )
        return tuple(self.files[shard] for shard in shards)

    def _single(self) -> RemoteFile:
        for _, single, _ in LAYOUTS:
            if single in self.files:
                return self.files[single]
        wanted = " or ".join(single for _, single, _ in LAYOUTS)
        raise Refused(
            f"{self.repo} at {self.revision} holds no {wanted}, whole or in shards",
            hint="--code-only fetches what needs no weights",
        )
