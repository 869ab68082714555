"""What damaged files once did, each as the smallest file that did it.

If these fail, a file from outside ends in "a bug", in gigabytes or in a hang, not in one line with exit 3.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from golden import cycles, record, revisions, tolerances
from golden.eras import make_checkout, vocabulary
from qwen_surgery.building.graph import Store
from qwen_surgery.checkout import Checkout
from qwen_surgery.errors import Refused
from qwen_surgery.exporting.manifest import Manifest
from qwen_surgery.families.qwen1 import Qwen1
from qwen_surgery.packing import flat, report, sidefile
from qwen_surgery.packing.plans import PackPlan
from qwen_surgery.packing.schema import TABLES
from qwen_surgery.parsing import build
from qwen_surgery.tokenizer import Tokenizer
from qwen_surgery.weights import WeightIndex
from tests.fuzz import targets

DEEP = b"[" * 200_000


@pytest.mark.parametrize("architectures", ["7", "true", '{"QWenLMHeadModel": 1}', "1e999", "9" * 5000])
def test_a_config_with_something_else_than_a_list_of_architectures(
    architectures: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(f'{{"architectures": {architectures}}}')
    with pytest.raises(Refused, match=r"config\.json"):
        Checkout.open(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800", "../../modeling_qwen"])
def test_a_mapped_modeling_file_that_no_folder_can_hold(name: str, tmp_path: Path) -> None:
    config = {"model_type": "qwen", "auto_map": {"AutoModel": f"{name}.QWenModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="has no modeling file"):
        Checkout.open(tmp_path)


def test_a_config_nested_too_deep_or_with_a_number_too_long(tmp_path: Path) -> None:
    for text in (DEEP, b'{"model_type": "qwen", "a": ' + b"9" * 5000 + b"}"):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(Refused, match="not valid JSON"):
            Checkout.open(tmp_path)


@pytest.mark.parametrize(
    "shard", ["x" * 300, "a\0b", "\ud800", "..", "../a", "/etc/hostname", 7, None, ["a"], {}]
)
def test_a_shard_whose_name_no_folder_can_hold(shard: object, tmp_path: Path) -> None:
    index = {"weight_map": {"a": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Refused, match="not a plain file name"):
        WeightIndex.open(tmp_path)


def test_a_weight_index_nested_too_deep(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(DEEP)
    with pytest.raises(Refused, match="not a weight index"):
        WeightIndex.open(tmp_path)


def _header(folder: Path, text: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", {}),
        ("dtype", []),
        ("dtype", None),
        ("shape", [10**4000] * 300),  # their product takes minutes
        ("shape", "ab"),
        ("data_offsets", [0, 10**30]),
        ("data_offsets", [64, 0]),
        ("data_offsets", [0, 1, 2]),
    ],
)
def test_a_tensor_of_no_type_or_of_no_size(key: str, value: object, tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], key: value}
    _header(tmp_path, json.dumps({"a": entry}).encode())
    with pytest.raises(Refused, match="tensor a: damaged header entry"):
        WeightIndex.open(tmp_path)


def test_a_safetensors_header_nested_too_deep(tmp_path: Path) -> None:
    _header(tmp_path, DEEP)
    with pytest.raises(Refused, match="header is not JSON"):
        WeightIndex.open(tmp_path)


def _torch(folder: Path, data: bytes) -> None:
    (folder / "pytorch_model.bin").write_bytes(data)
    WeightIndex.open(folder)


def test_a_torch_file_as_written_is_read(tmp_path: Path) -> None:
    """Else the ones below are refused for another reason than they say."""
    _torch(tmp_path, targets.torch_archive(targets.pickled(targets.TORCH)))


def test_a_damaged_deflate_stream(tmp_path: Path) -> None:
    whole = targets.torch_archive(targets.pickled(targets.TORCH), zipfile.ZIP_DEFLATED)
    place = whole.index(b"data.pkl") + len(b"data.pkl")
    with pytest.raises(Refused, match="compressed"):
        _torch(tmp_path, whole[:place] + b"\xff" * 8 + whole[place + 8 :])


def test_an_archive_whose_entry_lies_before_the_file(tmp_path: Path) -> None:
    """A directory that is moved makes the zip reader count from a negative place."""
    whole = bytearray(targets.torch_archive(targets.pickled(targets.TORCH)))
    end = whole.rindex(b"PK\x05\x06")
    (start,) = struct.unpack_from("<I", whole, end + 16)
    struct.pack_into("<I", whole, end + 16, start + 1000)
    with pytest.raises(Refused, match=r"pytorch_model\.bin"):
        _torch(tmp_path, bytes(whole))


LAUGHS = (
    b"\x80\x02}("
    + b"X\x01\x00\x00\x00a"
    + b"q\x00h\x00\x86q\x01"
    + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(1, 60))
)


@pytest.mark.parametrize(
    "pickle",
    [
        b"\x80\x02}r\xff\xff\xff\x3f",  # a memo of 2**30 places
        b"\x80\x05\x96\x00\x00\x00\x00\x01\x00\x00\x00.",  # 4 GB of bytes
        LAUGHS + b"K\x01u.",  # a name whose hash takes 2**60 steps
        b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.",
        b"\x80\x02(" * 50_000 + b".",
    ],
    ids=["memo", "bytes", "laughs", "call", "marks"],
)
def test_a_pickle_that_asks_for_the_machine(pickle: bytes, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"data\.pkl|does not need"):
        _torch(tmp_path, targets.torch_archive(pickle))


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="compressed"):
        _torch(tmp_path, targets.torch_archive(b"\0" * (64 << 20), zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("nets", 0, "file"), "a\0b"),
        (("nets", 0, "file"), "../../etc/hostname"),
        (("nets", 0, "file"), "/etc/hostname"),
        (("nets", 0, "sha256"), 7),
        (("nets", 0, "layer"), "0"),
        (("nets", 0, "kind"), []),
        (("nets", 0, "weights", "w", "file"), "a\0b"),
        (("nets", 0, "weights", "w", "offset"), -4000),
        (("nets", 0, "weights", "w", "shape"), 3),
        (("geometry", "heads"), "2"),
        (("templates", "block"), {}),
        (("weights",), []),
        (("constants", "x" * 300), "0" * 64),
    ],
)
def test_a_manifest_with_a_value_of_another_kind(
    where: tuple[Any, ...], value: object, tmp_path: Path
) -> None:
    valid = targets._manifest(tmp_path)
    inner = valid
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    (tmp_path / "manifest.json").write_text(json.dumps(valid))
    with pytest.raises(Refused, match=r"manifest\.json: damaged"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", [b"7", b"[]", DEEP, b"null", b'"format"'])
def test_a_manifest_that_is_no_object(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(Refused, match=r"manifest\.json: damaged"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("placement", "key", "value"),
    [
        (1, "form", {"bits": 4, "group": 0, "symmetric": False, "scale": "BF16", "lanes": 1}),
        (1, "form", {"bits": 4, "group": 4, "symmetric": False, "scale": "BF16", "lanes": 3}),
        (1, "form", {"bits": 4, "group": 4, "symmetric": False, "scale": {}, "lanes": 1}),
        (0, "target", "F8"),
        (0, "offset", None),
        (0, "start", 5),
        (0, "stop", 10**30),
        (0, "shape", [4]),
        (0, "expression", 7),
        (0, "kind", {}),
    ],
)
def test_a_pack_plan_with_a_value_of_another_kind(placement: int, key: str, value: object) -> None:
    plan = targets._plan()
    plan["placements"][placement][key] = value
    with pytest.raises(Refused, match="a pack plan"):
        PackPlan.from_json(plan)


@pytest.fixture
def bmodel(tmp_path: Path) -> Path:
    path = tmp_path / "a.bmodel"
    targets._bmodel(path)
    return path


@pytest.mark.parametrize("milliseconds", [0, 0.0, -1, "1", None, float("nan"), float("inf"), 10**400])
def test_a_predicted_time_that_is_none(milliseconds: object, bmodel: Path) -> None:
    """Zero once divided by, and a text was added to a number."""
    kinds = {"block": 1.0, "block_cache": 1.0, "lm_head": milliseconds}
    side = {
        "format": 1,
        "heads": [sidefile.head_digest(bmodel)],
        "geometry": targets.GEOMETRY,
        "plans": [],
        "nets": {},
        "config": {**dict.fromkeys(Qwen1.compiled_in, True), "trained_length": 64},
        "predictions": {kind: {"cycles": 1, "milliseconds": ms} for kind, ms in kinds.items()},
        "notes": {},
    }
    sidefile.path_for(bmodel).write_text(json.dumps(side))
    assert "is damaged" in report.inspect(bmodel).refit or ": damaged" in report.inspect(bmodel).refit


def _repeating() -> bytes:
    """A flatbuffer of 16 KB whose one tensor names one shape, of 2000 numbers, 3000 times."""
    packer = flat._Packer()
    shape = packer.table("Shape", {"dim": [1 << 40] * 2000})

    def table(kind: str, **children: int) -> int:
        places = [children.get(field.name) for field in TABLES[kind]]
        return packer.table_of(kind, {}, places)

    tensor = table("Tensor", name=packer.string("x"), shape=packer.offsets([shape] * 3000))
    parameter = table("NetParameter", input_tensor=packer.offsets([tensor]), output_tensor=packer.offsets([]))
    net = flat._write_net(packer, {"name": "n"}, [parameter])
    model = {"type": "B", "version": "2.2", "time": "t", "chip": "c"}
    packer.builder.Finish(flat._write_model(packer, model, [net]))
    return bytes(packer.builder.Output())


def test_a_bmodel_that_describes_the_same_thing_without_end() -> None:
    """Some KB of it became gigabytes of Python values."""
    data = _repeating()
    assert len(data) < 40_000
    with pytest.raises(flat.Damaged, match="describes more than"):
        flat.read(data)


def test_a_bmodel_with_a_net_of_a_layer_that_cannot_be(tmp_path: Path) -> None:
    """Its contract was once compared with the nets of ten million layers, one by one."""
    path = tmp_path / "a.bmodel"
    targets._bmodel(path, other="block_99999999")
    (problem,) = report.inspect(path).contract
    assert "99999999" in problem


@pytest.mark.parametrize("extras", ['"x"', "1e999", "[]", "-1", "1000000000000", "null", "true"])
def test_a_tokenizer_with_no_number_of_extra_tokens(extras: str, tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(vocabulary.tiktoken_file(256))
    (tmp_path / "tokenizer_config.json").write_text(f'{{"extras": {extras}}}')
    with pytest.raises(Refused, match="extras is no number of tokens"):
        Tokenizer.open(tmp_path)


def test_a_damaged_record_of_a_finished_task_is_a_task_to_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    work = store.begin("key")
    store.commit("key", work, {}, 1.0, 1)
    (path,) = store.folder("key").rglob("*.json")
    whole = json.loads(path.read_text())
    assert store.done("key") is not None
    for text in (DEEP.decode(), json.dumps({**whole, "seconds": "x"}), json.dumps({**whole, "info": 7})):
        path.write_text(text)
        assert store.done("key") is None
    path.write_bytes(DEEP)
    assert not store.has_outputs("key")


@pytest.mark.parametrize("load", [cycles.load, record.load, revisions.load, tolerances.load])
@pytest.mark.parametrize("text", [DEEP, b"7", b"[]", b'{"nets": 7, "revisions": 7}', b"\xff"])
def test_a_file_of_records_that_holds_none(load: Callable[[Path], Any], text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="records"):
        load(path)


@dataclass(frozen=True)
class _Sizes:
    width: int
    share: float = 0.5
    names: tuple[str, ...] = ()
    layer: int | None = None


def test_a_record_takes_only_values_of_the_types_it_declares() -> None:
    assert build(_Sizes, {"width": 3, "share": 1, "names": ["a"]}) == _Sizes(3, 1, ("a",))
    wrong: list[Any] = [
        *({"width": value} for value in (True, "3", 3.0, None, [3])),
        *({"width": 3, "names": value} for value in ("a", [1], None)),
        *({"width": 3, "layer": value} for value in ("1", False, [])),
        *({}, [], None, {"width": 3, "depth": 1}),
    ]
    for data in wrong:
        with pytest.raises((TypeError, ValueError)):
            build(_Sizes, data)


def test_the_command_line_says_one_line_and_exits_3(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "checkout", layers=1)
    config = json.loads((checkout / "config.json").read_text())
    del config["model_type"]
    (checkout / "config.json").write_text(json.dumps({**config, "architectures": 7}))
    command = [sys.executable, "-m", "qwen_surgery", "patch", str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and "a bug" not in done.stderr
