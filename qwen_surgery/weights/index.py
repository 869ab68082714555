"""The weights of a checkout as a mapping from tensor name to its place on disk; reads headers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_surgery.errors import Refused
from qwen_surgery.parsing import is_plain_name, parsing, read_json
from qwen_surgery.weights.quantised import Release, gathered
from qwen_surgery.weights.refs import TensorRef
from qwen_surgery.weights.safetensors_header import read_header
from qwen_surgery.weights.torch_zip import read_torch_zip

#: Index, single file, reader; in the order of preference when a checkout holds several.
LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors", read_header),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", read_torch_zip),
)
_NO_INDEX = "not a weight index"
_FETCH = "`qwen-surgery fetch` brings what is missing and leaves what is there"


class NoWeights(Refused):
    """A checkout without its weights, or without some of them."""


class WeightIndex(Mapping[str, TensorRef]):
    """Tensor name -> :class:`TensorRef` over all shards of one checkout. ``files`` are the shards."""

    def __init__(self, path: Path, refs: dict[str, TensorRef], files: tuple[Path, ...]) -> None:
        self.path = path
        self.files = files
        self._refs = refs

    @classmethod
    def open(cls, path: str | Path) -> WeightIndex:
        """Read the shard headers under *path*.

        Raises Refused, naming the file and, where there is one, the tensor: no weights at all, a shard that
        the index names and that is not there, a git-lfs pointer, a damaged or truncated shard, overlapping
        tensors, a tensor that the index promises and its shard lacks, the same tensor in two shards, and
        quantised weights that cannot be kept (:mod:`.quantised`). Of those the order and the zeros are read.
        """
        path = Path(path).absolute()
        release = Release.of(path)
        for index_name, single_name, reader in LAYOUTS:
            index_file, single_file = path / index_name, path / single_name
            if index_file.is_file():
                refs, files = _read_sharded(index_file, reader)
            elif single_file.is_file():
                refs, files = reader(single_file), (single_file,)
            else:
                continue
            return cls(path, gathered(refs, release, path), files)
        raise NoWeights(
            f"{path}: no weights found",
            hint=f"expected model.safetensors or pytorch_model.bin, whole or with an index.json; {_FETCH}",
        )

    def __getitem__(self, name: str) -> TensorRef:
        try:
            return self._refs[name]
        except KeyError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    @property
    def total_bytes(self) -> int:
        """Bytes of all shard files."""
        return sum(file.stat().st_size for file in self.files)


def _read_sharded(index_file: Path, reader: Any) -> tuple[dict[str, TensorRef], tuple[Path, ...]]:
    index = read_json(index_file, _NO_INDEX)
    with parsing(index_file, _NO_INDEX):
        names = dict(index["weight_map"].items())
    for shard in names.values():
        if not is_plain_name(shard):
            raise Refused(f"{index_file}: shard {shard!r:.100} is not a plain file name")
    refs: dict[str, TensorRef] = {}
    files: list[Path] = []
    for shard in dict.fromkeys(names.values()):
        file = index_file.parent / shard
        if not file.is_file():
            first = next(tensor for tensor, where in names.items() if where == shard)
            raise NoWeights(
                f"{file}: shard is missing ({index_file.name} expects {first} in it)",
                hint=f"download the missing shard: {_FETCH}",
            )
        files.append(file)
        for name, ref in reader(file).items():
            if name in refs:
                raise Refused(f"tensor {name} is both in {refs[name].file.name} and in {file.name}")
            refs[name] = ref
    for tensor, shard in names.items():
        if tensor not in refs:
            raise Refused(f"tensor {tensor}: {index_file.name} expects it in {shard}, which does not have it")
        if refs[tensor].file.name != shard:
            raise Refused(
                f"tensor {tensor}: {index_file.name} expects it in {shard}, it is in {refs[tensor].file.name}"
            )
    return refs, tuple(files)
