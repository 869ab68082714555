"""``manifest.json`` of an exported folder: what it was made from, and a hash of every part.

``compile`` and ``verify`` load it through :meth:`Manifest.load` and refuse folders whose parts do not match.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qwen_surgery.errors import Refused
from qwen_surgery.nets import Geometry, NetKind
from qwen_surgery.parsing import build, inner_path, is_plain_name, parsing, read_json, sizes, whole
from qwen_surgery.weights import QuantisedRef, Release, TensorRef
from qwen_surgery.weights.quantised import joined, release_of

FILE_NAME = "manifest.json"
FORMAT = 3
#: Bytes; a model of 72B has 160 nets with about twenty weights each, some 500 KB in all.
_LARGEST = 64 << 20


@dataclass(frozen=True)
class NetEntry:
    """One net: ``file`` relative to the folder, its SHA-256, and slot -> place of its checkpoint tensor.

    The places are in the folder's ``weights/`` (relative in the JSON, absolute once loaded), or in the
    checkout where the weights are inline.
    """

    name: str
    kind: NetKind
    layer: int | None
    file: str
    sha256: str
    weights: dict[str, TensorRef]


@dataclass(frozen=True)
class Manifest:
    """What an exported folder holds.

    ``sources`` are SHA-256 of the unpatched (``reference``) and patched files; ``weights`` says the mode and,
    per shard, its size and a fingerprint (names, dtypes, shapes and a sample of each tensor's bytes);
    ``passes`` are the graph passes that ran, in order (empty for a plain export); ``config`` is the unpatched
    config.json with its silent keys written out; ``twin`` is what the tiny twin showed, or why there is none.
    """

    checkout: str
    recipe: str
    trained_length: int
    geometry: Geometry
    sources: dict[str, dict[str, str]]
    weights: dict[str, Any]
    templates: dict[str, dict[str, str]]
    nets: tuple[NetEntry, ...]
    tools: dict[str, str]
    constants: dict[str, str] = field(default_factory=dict)
    passes: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    twin: dict[str, Any] = field(default_factory=dict)

    @property
    def seq_length(self) -> int:
        return self.geometry.seq_length

    @property
    def release(self) -> Release | None:
        """How the checkpoint is quantised; None where it is not."""
        return release_of(ref for net in self.nets for ref in net.weights.values())

    def net(self, name: str) -> NetEntry:
        """The entry of net *name*; raises Refused when it was not exported."""
        for entry in self.nets:
            if entry.name == name:
                return entry
        raise Refused(f"net {name} is not in this export")

    def template_file(self, kind: NetKind) -> str:
        """Path of the template of *kind*, relative to the folder."""
        return self.templates[kind.value]["file"]

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read *folder*/manifest.json; raises Refused when it is missing, damaged or of another format."""
        path = Path(folder) / FILE_NAME
        data = read_json(path, "damaged", limit=_LARGEST)
        if data is None:
            raise Refused(
                f"{folder}: not an exported folder (no {FILE_NAME})", hint="make one with qwen-surgery export"
            )
        with parsing(path):
            if data["format"] != FORMAT:
                raise Refused(
                    f"{path}: format {data['format']!r:.100} is not the format {FORMAT} of this version"
                )
            return cls._from_json(data, Path(folder).absolute())

    @classmethod
    def _from_json(cls, data: dict[str, Any], folder: Path) -> Manifest:
        nets = [
            {**net, "weights": {slot: _ref_from_json(ref, folder) for slot, ref in net["weights"].items()}}
            for net in data["nets"]
        ]
        said = {name: value for name, value in data.items() if name not in ("format", "seq_length")}
        manifest = build(cls, {**said, "nets": nets})
        for name in (*(net.file for net in manifest.nets), *manifest.constants):
            inner_path(name)
        for entry in manifest.templates.values():
            inner_path(entry["file"])
            entry["sha256"]
        return manifest

    def to_json(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "format": FORMAT,
            "checkout": self.checkout,
            "recipe": self.recipe,
            "seq_length": self.seq_length,
            "trained_length": self.trained_length,
            "geometry": asdict(self.geometry),
            "sources": self.sources,
            "config": self.config,
            "twin": self.twin,
            "weights": self.weights,
            "templates": self.templates,
            "constants": self.constants,
            "passes": list(self.passes),
            "tools": self.tools,
            "nets": [
                {
                    "name": net.name,
                    "kind": net.kind.value,
                    "layer": net.layer,
                    "file": net.file,
                    "sha256": net.sha256,
                    "weights": {slot: _ref_to_json(ref) for slot, ref in net.weights.items()},
                }
                for net in self.nets
            ],
        }

    def write(self, folder: Path) -> None:
        """Write it into *folder*."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        (folder / FILE_NAME).write_text(text, encoding="utf-8")

    def check(self, folder: str | Path) -> None:
        """Raise Refused, naming the file, when a net, template, table or shard is not what the manifest says.

        Nets, templates and tables are hashed; of a shard the size and the fingerprint are compared.
        """
        folder = Path(folder)
        parts = {net.file: net.sha256 for net in self.nets}
        parts |= {entry["file"]: entry["sha256"] for entry in self.templates.values()}
        parts |= self.constants
        for name, expected in parts.items():
            _refuse_unless(folder / name, sha256_file, expected)
        shards: dict[Path, list[TensorRef]] = {}
        for net in self.nets:
            for part in (part for ref in net.weights.values() for part in ref.parts):
                shards.setdefault(part.file, []).append(part)
        for file, refs in shards.items():
            with parsing(folder / FILE_NAME):
                expected = self.weights["files"][file.name]["fingerprint"]
            _refuse_unless(file, partial(fingerprint, refs=refs), expected)


def _refuse_unless(path: Path, digest: Any, expected: str) -> None:
    if not path.is_file():
        raise Refused(f"{path} is missing", hint="export again")
    if digest(path) != expected:
        raise Refused(f"{path} is not the file that manifest.json describes", hint="export again")


_PARTS = ("codes", "zeros", "scales")


def _ref_to_json(ref: TensorRef) -> dict[str, Any]:
    if isinstance(ref, QuantisedRef):
        parts = {part: _ref_to_json(getattr(ref, part)) for part in _PARTS}
        return {"tensor": ref.name, "release": asdict(ref.release), **parts}
    return {
        "tensor": ref.name,
        "file": str(ref.file),
        "offset": ref.offset,
        "nbytes": ref.nbytes,
        "dtype": ref.dtype,
        "shape": list(ref.shape),
    }


def _ref_from_json(data: dict[str, Any], folder: Path) -> TensorRef:
    if "release" in data:
        codes, zeros, scales = (_ref_from_json(data[part], folder) for part in _PARTS)
        return joined(str(data["tensor"]), codes, zeros, scales, build(Release, data["release"]))
    if not isinstance(data["file"], str) or not data["file"].startswith("/"):
        inner_path(data["file"])
    elif not all(part in ("", "..") or is_plain_name(part) for part in data["file"].split("/")):
        raise ValueError(f"{data['file']!r:.100} is no file of weights")
    return TensorRef(
        str(data["tensor"]),
        folder / data["file"],
        whole(data["offset"]),
        whole(data["nbytes"]),
        str(data["dtype"]),
        sizes(data["shape"]),
    )


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(file: Path, refs: list[TensorRef]) -> str:
    """A hash of what *file* holds for *refs*: names, dtypes, shapes, places, and up to 4096 bytes of each.

    Cheap at any size (a 72B checkpoint: a few hundred small reads), and different for another fine-tune.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        for ref in sorted(set(refs), key=lambda r: (r.offset, r.name)):
            digest.update(repr((ref.name, ref.dtype, ref.shape, ref.offset, ref.nbytes)).encode())
            # a place far behind the end cannot even be sought
            stream.seek(min(size, ref.offset + max(0, ref.nbytes // 2 - 2048)))
            digest.update(stream.read(min(4096, ref.nbytes)))
    return digest.hexdigest()
