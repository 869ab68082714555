"""Where tensors lie in a checkpoint, and what is said when they do not."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_surgery.errors import Refused
from qwen_surgery.weights import WeightIndex
from tests.exporting.conftest import small_checkout

STATE = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.linspace(-1, 1, 10).to(torch.bfloat16),
    "c.weight": torch.linspace(-2, 2, 6).to(torch.float16).reshape(2, 3),
}


def rewrite_header(shard: Path, change: object) -> None:
    """Apply *change* to the JSON header of a safetensors file, keeping the data."""
    raw = shard.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)  # type: ignore[operator]
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.fixture
def torch_checkout(tmp_path: Path) -> Path:
    torch.save({**STATE, "tied": STATE["a.weight"]}, tmp_path / "pytorch_model.bin")
    return tmp_path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    small_checkout(tmp_path, shards=1)
    return tmp_path / "model.safetensors"


def test_torch_files_are_read_in_place_without_unpickling(torch_checkout: Path) -> None:
    index = WeightIndex.open(torch_checkout)
    for name, tensor in STATE.items():
        np.testing.assert_array_equal(index[name].read(), tensor.float().numpy())
    assert index["tied"].offset == index["a.weight"].offset


def test_a_view_into_a_larger_storage_is_found_at_its_offset(tmp_path: Path) -> None:
    whole = torch.arange(20, dtype=torch.float32).reshape(5, 4)
    torch.save({"part": whole[2:4]}, tmp_path / "pytorch_model.bin")
    np.testing.assert_array_equal(WeightIndex.open(tmp_path)["part"].read(), whole[2:4].numpy())


def test_a_transposed_tensor_is_refused_not_read_wrongly(tmp_path: Path) -> None:
    torch.save({"t.weight": torch.rand(3, 5).T}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Refused, match=r"pytorch_model.bin: tensor t.weight: stored with strides"):
        WeightIndex.open(tmp_path)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("pwned"),))  # type: ignore[return-value]


def test_code_in_a_pickle_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": STATE["a.weight"], "x": _Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Refused, match="which a state dict does not need"):
        WeightIndex.open(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_a_compressed_or_cut_torch_file_is_refused(torch_checkout: Path) -> None:
    file = torch_checkout / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Refused, match="not a zip archive: truncated"):
        WeightIndex.open(torch_checkout)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(Refused, match="its storage is compressed"):
        WeightIndex.open(torch_checkout)


def test_a_truncated_shard_names_the_first_tensor_that_is_cut(shard: Path) -> None:
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 1)
    with pytest.raises(Refused, match=r"model.safetensors: truncated: tensor lm_head.weight needs bytes"):
        WeightIndex.open(shard.parent)


@pytest.mark.parametrize("length", [0, 5, 100])
def test_a_shard_cut_inside_its_header(shard: Path, length: int) -> None:
    with shard.open("r+b") as stream:
        stream.truncate(length)
    with pytest.raises(Refused, match=r"model.safetensors: truncated"):
        WeightIndex.open(shard.parent)


def test_overlapping_tensors_are_named(shard: Path) -> None:
    def overlap(header: dict) -> None:
        begin, end = header["transformer.h.0.ln_1.weight"]["data_offsets"]
        header["transformer.h.0.ln_2.weight"]["data_offsets"] = [begin + 2, end + 2]

    rewrite_header(shard, overlap)
    with pytest.raises(Refused, match=r"tensors transformer.h.0.ln_1.weight and .* overlap"):
        WeightIndex.open(shard.parent)


def test_bytes_that_do_not_hold_the_shape(shard: Path) -> None:
    rewrite_header(shard, lambda header: header["transformer.ln_f.weight"].update(shape=[33]))
    with pytest.raises(Refused, match=r"tensor transformer.ln_f.weight: 64 bytes do not hold BF16"):
        WeightIndex.open(shard.parent)


def test_a_git_lfs_pointer_says_what_to_do(shard: Path) -> None:
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(Refused, match="git-lfs pointer") as caught:
        WeightIndex.open(shard.parent)
    assert caught.value.hint == "run git lfs pull"


def test_a_missing_shard_names_the_file_and_a_tensor(tmp_path: Path) -> None:
    small_checkout(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(Refused, match=r"model-00002-of-00003.safetensors: shard is missing .*transformer"):
        WeightIndex.open(tmp_path)


def test_an_index_that_promises_what_no_shard_has(tmp_path: Path) -> None:
    small_checkout(tmp_path, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["transformer.h.9.ln_1.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(Refused, match=r"tensor transformer.h.9.ln_1.weight: .* does not have it"):
        WeightIndex.open(tmp_path)
