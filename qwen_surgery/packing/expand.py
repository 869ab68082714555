"""Write one bmodel of many nets, packing weights on the way, as ``model_tool --combine`` would have left it.

Region for region the order is that of the tool: the kernel module first, then net by net the coefficients,
the instructions and the dynamic IR, equal regions once. Only one tensor is in memory at a time.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qwen_surgery.errors import Refused
from qwen_surgery.files import replacing
from qwen_surgery.packing import formats
from qwen_surgery.packing.check_code import CheckCode
from qwen_surgery.packing.container import (
    Bmodel,
    Region,
    RegionWriter,
    head_size,
    regions,
    write_at,
    write_head,
)
from qwen_surgery.packing.plans import Given, PackPlan, Quantise, Tensors, pack

_CHUNK = 1 << 22
#: called with (net's name, weights packed so far, weights to pack in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Piece:
    """One net of the bmodel to write.

    ``source`` is a bmodel that holds a net of this kind, called ``net`` there ('' for the only one): its
    instructions and constants are taken over. With ``pack`` the weights are packed from ``tensors`` (slot ->
    TensorRef) by ``plan``; without, the source's own weights are copied: the source was compiled from them.
    ``plan`` and ``tensors`` may be given without ``pack`` too: the side file then records them for a refit.
    ``given`` has the integers of those weights (by slot) that are chosen already; ``quantise``
    chooses the others.
    """

    name: str
    source: Path
    net: str = ""
    plan: PackPlan | None = None
    tensors: Tensors | None = None
    pack: bool = False
    given: Given = field(default_factory=dict)
    quantise: Quantise = formats.quantise


@dataclass(frozen=True)
class WrittenBmodel:
    """What was written: the file, its size in bytes, and how many weights were packed."""

    path: Path
    size: int
    packed: int


class _Sources:
    """The bmodels that pieces come from, each opened once."""

    def __init__(self) -> None:
        self._open: dict[Path, Bmodel] = {}

    def __getitem__(self, path: Path) -> Bmodel:
        if path not in self._open:
            self._open[path] = Bmodel(path)
        return self._open[path]

    def close(self) -> None:
        for bmodel in self._open.values():
            bmodel.close()


def _coefficients(parameter: dict[str, Any]) -> dict[str, int] | None:
    binary = parameter.get("coeff_mem", {}).get("binary_coeff")
    return binary if binary and binary["size"] else None


class _Repeats(Exception):
    """Two packed sections turned out to have equal bytes."""


class _Job:
    """One run of :func:`write`: holds the open files and what has been packed already.

    A packed section is hashed while the next one is packed. That one of them repeats another, which is stored
    once then, is known too late for its place: *hash_first* waits for every hash before going on.
    """

    def __init__(
        self,
        file: BinaryIO,
        base: int,
        sources: _Sources,
        pool: ThreadPoolExecutor,
        paged: bool,
        hash_first: bool,
    ) -> None:
        self._file = file
        self._sources = sources
        self._pool = pool
        self._hash_first = hash_first
        self._regions = RegionWriter(file, base, paged=paged)
        self._packed: dict[str, tuple[Region, Future[bytes]]] = {}
        self._check_codes: list[tuple[dict[str, Any], Future[bytes]]] = []
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        self._done = 0

    @property
    def size(self) -> int:
        return self._regions.end

    @property
    def packed(self) -> int:
        return self._done

    def copy(self, source: Bmodel, binary: dict[str, int]) -> None:
        binary["start"] = self._regions.add(source, Region.of(binary)).start

    def net(self, piece: Piece, parameters: list[dict[str, Any]]) -> None:
        """Write the regions of *piece* and put their places into *parameters*."""
        source = self._sources[piece.source]
        for parameter in parameters:
            coefficients = _coefficients(parameter) if piece.pack else None
            for binary in regions(parameter, "NetParameter"):
                if binary is coefficients:
                    region, digest = self._pack(piece, source, Region.of(binary))
                    binary["start"] = region.start
                    self._check_codes.append((parameter["coeff_mem"], digest))
                else:
                    self.copy(source, binary)

    def _pack(self, piece: Piece, source: Bmodel, old: Region) -> tuple[Region, Future[bytes]]:
        plan, tensors = piece.plan, piece.tensors
        if plan is None or tensors is None or plan.size != old.size:
            raise Refused(f"net {piece.name}: its pack plan does not belong to {piece.source}")
        key = _weights_key(piece, plan, tensors, source, old)
        if key not in self._packed:  # block_cache_i has the same section as block_i
            region = self._regions.next_region(old.size)
            position = self._regions.offset(region)

            def sink(offset: int, data: np.ndarray) -> None:
                write_at(self._file, np.ascontiguousarray(data).data, position + offset)

            for offset, size in plan.rest():
                for chunk in source.chunks(Region(old.start + offset, size)):
                    write_at(self._file, chunk, position + offset)
                    offset += len(chunk)
            pack(plan, tensors, sink, self._pool, piece.given, piece.quantise)
            self._done += plan.weights
            digest = self._pool.submit(_digest, self._file, position, old.size)
            if self._hash_first:
                region = self._regions.settle(region, digest.result())
            else:
                self._regions.keep(region)
            self._packed[key] = region, digest
            self._flush()
        return self._packed[key]

    def _flush(self) -> None:
        """Have what is written go to the disk beside the packing, not all of it at the end."""
        if self._flushing is None or self._flushing.done():
            self._flushing = self._flusher.submit(os.fdatasync, self._file.fileno())

    def finish(self) -> None:
        """Put the check codes into their places. Raises :class:`_Repeats` unless ``hash_first``."""
        for memory, digest in self._check_codes:
            memory["check_code"] = list(digest.result())
        kept = [(region.size, digest.result()) for region, digest in self._packed.values()]
        if not self._hash_first and self._regions.repeats(kept):
            raise _Repeats
        self._regions.finish()

    def close(self) -> None:
        self._flusher.shutdown()


def _weights_key(piece: Piece, plan: PackPlan, tensors: Tensors, source: Bmodel, old: Region) -> str:
    """Equal for two nets that are packed from the same tensors in the same way over the same constants."""
    rest = hashlib.sha256()
    for offset, size in plan.rest():
        for chunk in source.chunks(Region(old.start + offset, size)):
            rest.update(chunk)
    return _tensors_key(plan, tensors, piece) + rest.hexdigest()


def _tensors_key(plan: PackPlan, tensors: Tensors, piece: Piece) -> str:
    refs = [(slot, str(t.file), t.offset, t.dtype, list(t.shape)) for slot, t in sorted(tensors.items())]
    given = sorted((slot, one.name) for slot, one in piece.given.items())
    return json.dumps(
        [plan.to_json(), refs, given, f"{piece.quantise.__module__}.{piece.quantise.__qualname__}"]
    )


def _distinct_weights(pieces: Sequence[Piece]) -> int:
    """How many weights there are to pack, those that two nets share counted once."""
    return sum(
        {
            _tensors_key(p.plan, p.tensors, p): p.plan.weights
            for p in pieces
            if p.pack and p.plan and p.tensors
        }.values()
    )


def _digest(file: BinaryIO, position: int, size: int) -> bytes:
    digest = CheckCode(size)
    while size:
        chunk = os.pread(file.fileno(), min(size, _CHUNK), position)
        if not chunk:  # a region that ends in padding never written: the file is shorter, the rest is zeros
            chunk = bytes(min(size, _CHUNK))
        digest.update(chunk)
        position, size = position + len(chunk), size - len(chunk)
    return digest.digest()


def _model(pieces: Sequence[Piece], sources: _Sources) -> dict[str, Any]:
    """The root table of the new bmodel, its regions still those of the sources."""
    first = sources[pieces[0].source].model
    model = {key: copy.deepcopy(value) for key, value in first.items() if key != "net"}
    model["net"] = []
    for piece in pieces:
        source = sources[piece.source]
        if source.model["chip"] != first["chip"] or source.model["version"] != first["version"]:
            raise Refused(
                f"{piece.source} was made for another chip or by another TPU-MLIR than {pieces[0].source}"
            )
        net = copy.deepcopy(source.net(piece.net))
        model["net"].append({**net, "name": piece.name})
    parameters = [parameter for net in model["net"] for parameter in net["parameter"]]
    model["neuron_size"] = max(parameter["ctx_size"] for parameter in parameters)
    model["device_num"] = max(sources[piece.source].model["device_num"] for piece in pieces)
    return model


def _mentions_name(parameter: dict[str, Any], source: Bmodel, name: str) -> bool:
    """Whether a small region of the net spells *name*: then other layers' regions would differ."""
    coefficients = _coefficients(parameter)
    return any(
        binary is not coefficients and name.encode() in source.read(Region.of(binary))
        for binary in regions(parameter, "NetParameter")
    )


def _check_renamed(pieces: Sequence[Piece], sources: _Sources) -> None:
    checked: set[tuple[Path, str]] = set()
    for piece in pieces:
        source = sources[piece.source]
        net = source.net(piece.net)
        if net["name"] == piece.name or (piece.source, net["name"]) in checked:
            continue
        checked.add((piece.source, net["name"]))
        if _mentions_name(net["parameter"][0], source, net["name"]):
            raise Refused(
                f"{piece.source}: the instructions of {net['name']} hold its name; it cannot stand for others"
            )


def _needed(model: dict[str, Any]) -> int:
    """An upper bound of the binary section: every net's regions in full."""
    return sum(binary["size"] + 4096 for binary in regions(model))


def write(
    output: Path,
    pieces: Sequence[Piece],
    *,
    created: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    before_replace: Callable[[Path], None] | None = None,
) -> WrittenBmodel:
    """Write *pieces*, in their order, as one bmodel at *output* (replaced whole, or not at all).

    *created* is the creation time to state, in C's ``ctime`` form with its newline; by default that of the
    first piece's source, so that the same input gives the same file. *workers* threads pack (default: all
    cores). *progress* is called after every packed net, *before_replace* with the finished temporary file
    before it becomes *output*. Raises Refused for sources or weights that do not fit, ToolFailed when the
    disk fails.
    """
    if not pieces:
        raise Refused("there is no net to write")
    sources = _Sources()
    try:
        _check_renamed(pieces, sources)
        model = _model(pieces, sources)
        if created is not None:
            model["time"] = created
        threads = workers or len(os.sched_getaffinity(0))
        with replacing(output, _needed(model), before_replace) as file, ThreadPoolExecutor(threads) as pool:
            try:
                return _write(
                    file, output, pieces, copy.deepcopy(model), sources, pool, progress, hash_first=False
                )
            except _Repeats:
                return _write(file, output, pieces, model, sources, pool, progress, hash_first=True)
    finally:
        sources.close()


def _write(
    file: BinaryIO,
    output: Path,
    pieces: Sequence[Piece],
    model: dict[str, Any],
    sources: _Sources,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
    *,
    hash_first: bool,
) -> WrittenBmodel:
    file.truncate(0)
    first = sources[pieces[0].source]
    base = head_size(model, paged=first.paged)
    total = _distinct_weights(pieces)
    job = _Job(file, base, sources, pool, first.paged, hash_first)
    try:
        if "kernel_module" in model:
            job.copy(first, model["kernel_module"]["binary"])
        for piece, net in zip(pieces, model["net"], strict=True):
            before = job.packed
            job.net(piece, net["parameter"])
            if progress is not None and job.packed > before:
                progress(piece.name, job.packed, total)
        job.finish()
    finally:
        job.close()
    write_head(file, model, base, job.size)
    return WrittenBmodel(output, base + job.size, job.packed)
