"""The parsers: for each, how a mutated input is put on disk and how the program reads it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from golden.eras import python_files
from tests.fuzz import mutate

#: A prepared parser: the first puts the next mutated input into its folder, the second lets the program read.
Write = Callable[[Random], None]
Read = Callable[[], None]
ERA = "sdpa"
CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "model_type": "qwen",
    "hidden_size": 64,
    "intermediate_size": 128,
    "kv_channels": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "seq_length": 64,
    "use_dynamic_ntk": True,
    "layer_norm_epsilon": 1e-06,
    "quantization_config": None,
}


@dataclass(frozen=True)
class Target:
    """One parser. ``errors`` are what it may raise besides the program's own errors."""

    prepare: Callable[[Path], tuple[Write, Read]]
    errors: tuple[type[Exception], ...] = ()


def _sources(folder: Path) -> None:
    for name, text in python_files(ERA).items():
        (folder / name).write_text(text, encoding="utf-8")


def config(folder: Path) -> tuple[Write, Read]:
    from qwen_surgery.checkout import Checkout

    _sources(folder)

    def write(rng: Random) -> None:
        (folder / "config.json").write_bytes(mutate.json_file(CONFIG, rng))

    return write, lambda: Checkout.open(folder).geometry(64) and None


_HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "transformer.wte.weight": {"dtype": "BF16", "shape": [8, 4], "data_offsets": [0, 64]},
    "transformer.ln_f.weight": {"dtype": "F32", "shape": [4], "data_offsets": [64, 80]},
    "lm_head.weight": {"dtype": "F16", "shape": [8, 4], "data_offsets": [80, 144]},
    "other": {"dtype": "I64", "shape": [], "data_offsets": [144, 152]},
}


def _safetensors(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(152)


def safetensors(folder: Path) -> tuple[Write, Read]:
    from qwen_surgery.weights import WeightIndex

    valid = _safetensors(json.dumps(_HEADER).encode())

    def write(rng: Random) -> None:
        by_structure = rng.random() < 0.8
        text = _safetensors(mutate.json_file(_HEADER, rng)) if by_structure else mutate.data(valid, rng)
        (folder / "model.safetensors").write_bytes(text)

    return write, lambda: _read_all(WeightIndex.open(folder))


def _read_all(index: Any) -> None:
    for ref in index.values():
        if ref.dtype in ("BF16", "F16", "F32"):
            ref.read()


_QUANTISED: dict[str, Any] = {
    "a.qweight": {"dtype": "I32", "shape": [2, 8], "data_offsets": [0, 64]},
    "a.qzeros": {"dtype": "I32", "shape": [2, 1], "data_offsets": [64, 72]},
    "a.scales": {"dtype": "F16", "shape": [2, 8], "data_offsets": [72, 104]},
    "a.g_idx": {"dtype": "I32", "shape": [16], "data_offsets": [104, 168]},
    "a.bias": {"dtype": "F16", "shape": [8], "data_offsets": [168, 184]},
}
_SCHEMES: tuple[dict[str, Any], ...] = (
    {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "checkpoint_format": "gptq_v2"},
    {"bits": 4, "group_size": 8, "desc_act": False, "sym": True},
    {"quant_method": "awq", "bits": 4, "group_size": 1, "version": "gemm", "zero_point": True},
)


def release(folder: Path) -> tuple[Write, Read]:
    """A quantised release: what it says of itself, and one layer's integers."""
    from qwen_surgery.weights import WeightIndex

    valid = json.dumps(_QUANTISED).encode()
    numbers = (
        struct.pack("<16I", *range(16)) + bytes(40) + struct.pack("<16I", *[0] * 8, *[1] * 8) + bytes(16)
    )

    def write(rng: Random) -> None:
        scheme = rng.choice(_SCHEMES)
        said = mutate.json_file(scheme, rng) if rng.random() < 0.6 else json.dumps(scheme).encode()
        (folder / "quantize_config.json").write_bytes(said)
        header = mutate.json_file(_QUANTISED, rng) if rng.random() < 0.5 else valid
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + numbers)

    return write, lambda: _read_all(WeightIndex.open(folder))


def weight_index(folder: Path) -> tuple[Write, Read]:
    from qwen_surgery.weights import WeightIndex

    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    names = [name for name in _HEADER if name != "__metadata__"]
    for shard, held in zip(shards, (names[:2], names[2:]), strict=True):
        header = json.dumps({name: _HEADER[name] for name in held}).encode()
        (folder / shard).write_bytes(_safetensors(header))
    weight_map = {name: shards[position // 2] for position, name in enumerate(names)}
    valid = {"metadata": {"total_size": 152}, "weight_map": weight_map}

    def write(rng: Random) -> None:
        (folder / "model.safetensors.index.json").write_bytes(mutate.json_file(valid, rng))
        (folder / "config.json").write_bytes(mutate.json_file(CONFIG, rng))

    return write, lambda: _read_all(WeightIndex.open(folder))


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def pickled(tensors: dict[str, tuple[str, str, int, tuple[int, int]]]) -> bytes:
    """The pickle that torch.save writes: tensor -> storage class, key, elements, shape."""
    rows = b"".join(
        _text(name)
        + b"ctorch._utils\n_rebuild_tensor_v2\nq\x01(("
        + _text("storage")
        + b"ctorch\n%s\nq\x02" % kind.encode()
        + _text(key)
        + _text("cpu")
        + b"K%ctQK\x00K%cK%c\x86K%cK\x01\x86\x89" % (count, *shape, shape[1])
        + b"ccollections\nOrderedDict\nq\x03)RtR"
        for name, (kind, key, count, shape) in tensors.items()
    )
    return b"\x80\x02ccollections\nOrderedDict\nq\x00)R(" + rows + b"u}" + _text("_metadata") + b"h\x00)Rsb."


TORCH = {
    "a.weight": ("FloatStorage", "0", 12, (3, 4)),
    "b.weight": ("BFloat16Storage", "1", 10, (2, 5)),
    "tied.weight": ("FloatStorage", "0", 12, (3, 4)),
}


def torch_archive(pickle: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A ``pytorch_model.bin`` with the storages of :data:`TORCH`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        parts = {"data.pkl": pickle, "byteorder": b"little", "data/0": bytes(48), "data/1": bytes(20)}
        for name, content in parts.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def torch_zip(folder: Path) -> tuple[Write, Read]:
    from qwen_surgery.weights import WeightIndex

    pickle = pickled(TORCH)
    valid = torch_archive(pickle)

    def write(rng: Random) -> None:
        if rng.random() < 0.7:
            compression = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
            data = torch_archive(mutate.data(pickle, rng), compression)
            data = mutate.data(data, rng) if rng.random() < 0.1 else data
        else:
            data = mutate.data(valid, rng)
        (folder / "pytorch_model.bin").write_bytes(data)

    return write, lambda: _read_all(WeightIndex.open(folder))


GEOMETRY = {
    "layers": 1,
    "hidden": 64,
    "heads": 2,
    "head_dim": 32,
    "vocab": 320,
    "intermediate": 128,
    "seq_length": 8,
}


def _manifest(folder: Path) -> dict[str, Any]:
    (folder / "weights").mkdir()
    (folder / "templates").mkdir()
    (folder / "weights" / "shard.bin").write_bytes(bytes(range(256)))
    (folder / "templates" / "block.onnx").write_bytes(b"template")
    (folder / "block_0.onnx").write_bytes(b"net")

    def sha256(text: bytes) -> str:
        return hashlib.sha256(text).hexdigest()

    weight = {
        "tensor": "h.0",
        "file": "weights/shard.bin",
        "offset": 0,
        "nbytes": 64,
        "dtype": "F32",
        "shape": [4, 4],
    }
    net = {
        "name": "block_0",
        "kind": "block",
        "layer": 0,
        "file": "block_0.onnx",
        "sha256": sha256(b"net"),
        "weights": {"w": weight},
    }
    return {
        "format": 3,
        "checkout": "/a/b",
        "recipe": "static",
        "seq_length": 8,
        "trained_length": 64,
        "geometry": GEOMETRY,
        "sources": {"reference": {"config.json": "0" * 64}, "patched": {}},
        "config": CONFIG,
        "weights": {"mode": "external", "files": {"shard.bin": {"size": 256, "fingerprint": "0" * 64}}},
        "templates": {"block": {"file": "templates/block.onnx", "sha256": sha256(b"template")}},
        "constants": {"templates/block.onnx": sha256(b"template")},
        "passes": ["fold-constants"],
        "twin": {},
        "tools": {"torch": "2"},
        "nets": [net],
    }


def manifest(folder: Path) -> tuple[Write, Read]:
    from qwen_surgery.exporting.manifest import Manifest, fingerprint

    valid = _manifest(folder)
    (folder / "manifest.json").write_text(json.dumps(valid))
    refs = list(Manifest.load(folder).nets[0].weights.values())
    valid["weights"]["files"]["shard.bin"]["fingerprint"] = fingerprint(refs[0].file, refs)

    def write(rng: Random) -> None:
        (folder / "manifest.json").write_bytes(mutate.json_file(valid, rng))

    return write, lambda: Manifest.load(folder).check(folder)


def _tensor(name: str, shape: list[int], data_type: int) -> dict[str, Any]:
    return {"name": name, "data_type": data_type, "shape": [{"dim": shape}], "size": 4}


#: Room for every tensor of a net.
MEMORY = {"ctx_size": 1 << 16, "io_size": 1 << 16}


def _on_device(net: dict[str, Any], device: int) -> dict[str, Any]:
    """*net* as one of several devices has it."""
    (whole,) = net["parameter"]
    outside = {"input_tensor": 1, "output_tensor": 2}
    tensors = {
        key: [{**one, "hidden": hidden, "index": index} for index, one in enumerate(whole[key])]
        for key, hidden in outside.items()
    }
    cascade = {"device_id": device, "step": 0, "main_name": net["name"]}
    return {**net, "name": f"{net['name']}_{device}", "cascade": cascade, "parameter": [{**whole, **tensors}]}


def _bmodel(path: Path, other: str = "", devices: int = 1) -> None:
    """A small bmodel of one layer's decode net and the output layer, and a net called *other*."""
    from qwen_surgery.packing import container

    coefficients = {"address": 0, "check_code": list(range(32)), "binary_coeff": {"start": 0, "size": 64}}
    commands = {"bdc_num": 1, "gdma_num": 1, "binary_bdc": {"start": 64, "size": 32}, "bdc_cmd_byte": 32}
    states = [
        ("input_states", [1, 1, 64], 8),
        ("position_ids", [1, 1], 6),
        ("attention_mask", [1, 1, 1, 9], 8),
    ]
    history = [(name, [1, 8, 2, 32], 8) for name in ("history_k", "history_v")]
    parameter = {
        "input_tensor": [_tensor(*row) for row in (*states, *history)],
        "output_tensor": [_tensor("hidden_states", [1, 1, 64], 8)],
        "coeff_mem": coefficients,
        "cmd_group": [commands],
        "sub_net": [{"cmd_group": [commands], "next_subnet_ids": [1, 2], "id": 0}],
        "ctx_sizes": [1, 2],
        **MEMORY,
    }
    head = {
        "input_tensor": [_tensor("hidden_states", [1, 64], 8)],
        "output_tensor": [_tensor("m_logits", [1, 320], 0)],
        **MEMORY,
    }
    nets = [
        {"name": name, "addr_mode": 1, "parameter": [part]}
        for name, part in (("block_cache_0", parameter), ("lm_head", head), (other, head))
        if name
    ]
    if devices > 1:
        nets = [_on_device(net, device) for net in nets for device in range(devices)]
    model = {
        "type": "BMODEL",
        "version": "2.2",
        "time": "t\n",
        "chip": "BM1684X",
        "net": nets,
        "device_num": devices,
    }
    base = container.head_size(model, paged=False)
    with path.open("w+b", buffering=0) as file:
        container.write_head(file, model, base, 96)
        container.write_at(file, bytes(96), base)


def bmodel(folder: Path) -> tuple[Write, Read]:
    """A bmodel as ``inspect`` reads it, its memory, and its parts as the emulator gets them."""
    from qwen_surgery.packing import cascade, container, report
    from qwen_surgery.runtime import memory

    path = folder / "a.bmodel"
    valid = []
    for devices in (1, 2):
        _bmodel(path, devices=devices)
        valid.append(path.read_bytes())

    def write(rng: Random) -> None:
        path.write_bytes(mutate.data(rng.choice(valid), rng))

    def read() -> None:
        json.dumps(report.inspect(path).to_json())
        with container.Bmodel(path) as opened:
            cascade.apart(opened, folder / "apart.bmodel")
        for shared in (True, False):
            memory.layout(path, shared=shared)

    return write, read


def _plan() -> dict[str, Any]:
    slot = ["slot", "w"]
    moved = ["transpose", [1, 0], ["concat", 0, [slot, ["mul", slot, ["const", [1], [2.0]]]]]]
    plain = {
        "kind": "plain",
        "offset": 0,
        "expression": slot,
        "shape": [4, 4],
        "start": 0,
        "stop": 4,
        "target": "BF16",
        "transposed": False,
    }
    form = {"bits": 4, "group": 4, "symmetric": False, "scale": "BF16", "lanes": 1, "signed": False}
    quantised = {
        "kind": "quantised",
        "offset": 32,
        "scales": 48,
        "zeros": 60,
        "expression": moved,
        "shape": [4, 8],
        "start": 0,
        "stop": 1,
        "form": form,
    }
    return {"size": 64, "placements": [plain, quantised]}


def side_file(folder: Path) -> tuple[Write, Read]:
    """The side file as ``inspect`` reads it, and its plans as ``refit`` packs by them."""
    import numpy as np

    from qwen_surgery.families.qwen1 import Qwen1
    from qwen_surgery.packing import plans, report, sidefile
    from qwen_surgery.weights import TensorRef

    path = folder / "a.bmodel"
    _bmodel(path)
    (folder / "shard").write_bytes(np.linspace(-1, 1, 16, dtype="<f4").tobytes())
    tensors = {"w": TensorRef("w", folder / "shard", 0, 64, "F32", (4, 4))}
    predictions = {kind: {"cycles": 10, "milliseconds": 0.5} for kind in ("block", "block_cache", "lm_head")}
    valid = {
        "format": 1,
        "heads": [sidefile.head_digest(path)],
        "geometry": GEOMETRY,
        "plans": [_plan()],
        "nets": {"block_cache_0": {"plan": 0, "tensors": {"w": ["h.0.w", [4, 4]]}}},
        "config": {**dict.fromkeys(Qwen1.compiled_in, True), "trained_length": 64},
        "predictions": predictions,
        "notes": {"mode": "int4"},
    }

    def write(rng: Random) -> None:
        sidefile.path_for(path).write_bytes(mutate.json_file(valid, rng))

    def read() -> None:
        json.dumps(report.inspect(path).to_json())
        for plan in sidefile.load(path).plans:
            plan.rest()
            plans.pack(plan, tensors, lambda _offset, _packed: None)

    return write, read


def tokenizer(folder: Path) -> tuple[Write, Read]:
    from golden.eras import vocabulary
    from qwen_surgery.tokenizer import check

    ranks = vocabulary.tiktoken_file(260)
    settings = {"model_max_length": 64, "tokenizer_class": "QWenTokenizer", "extras": 5}
    (folder / "tokenization_qwen.py").write_text("")

    def write(rng: Random) -> None:
        both = rng.random() < 0.3
        vocabulary_first = both or rng.random() < 0.5
        (folder / "qwen.tiktoken").write_bytes(mutate.data(ranks, rng) if vocabulary_first else ranks)
        settings_text = mutate.json_file(settings, rng) if both or not vocabulary_first else b"{}"
        (folder / "tokenizer_config.json").write_bytes(settings_text)

    return write, lambda: check(folder) and None


def generation_config(folder: Path) -> tuple[Write, Read]:
    from golden.eras import vocabulary
    from qwen_surgery.chatting.chat import Generation
    from qwen_surgery.tokenizer import check

    (folder / "qwen.tiktoken").write_bytes(vocabulary.tiktoken_file(256))
    (folder / "tokenization_qwen.py").write_text("")
    (folder / "tokenizer_config.json").write_text('{"extras": 5}')
    valid = {
        "chat_format": "chatml",
        "eos_token_id": 258,
        "pad_token_id": 256,
        "top_p": 0.8,
        "do_sample": True,
    }

    def write(rng: Random) -> None:
        (folder / "generation_config.json").write_bytes(mutate.json_file(valid, rng))
        (folder / "config.json").write_bytes(mutate.json_file({"vocab_size": 320}, rng))

    def read() -> None:
        Generation.of(folder)
        check(folder)

    return write, read


def receipt(folder: Path) -> tuple[Write, Read]:
    from qwen_surgery.patching.receipt import Receipt

    digests = {"before": "0" * 64, "after": "1" * 64, "mode": "0644"}
    outcome = {
        "codemod": "scalar-divide",
        "status": "applied",
        "reason": "r",
        "line": 3,
        "end_line": None,
        "where": "f",
        "suppressed": False,
        "required": True,
    }
    valid = {
        "format": 1,
        "recipe": "static",
        "seq_length": 8,
        "skip": ["a"],
        "time": "t",
        "revision": "r",
        "versions": {"python": "3"},
        "files": {"config.json": {**digests, "symlink": "../x"}, "modeling_qwen.py": digests},
        "outcomes": {"modeling_qwen.py": [outcome]},
    }
    state = folder / ".qwen-surgery"
    state.mkdir()

    def write(rng: Random) -> None:
        (state / "receipt.json").write_bytes(mutate.json_file(valid, rng))

    return write, lambda: Receipt.load(folder) and None


def journal(folder: Path) -> tuple[Write, Read]:
    from qwen_surgery.patching.journal import recover

    old, new = (hashlib.sha256(text).hexdigest() for text in (b"old", b"new"))
    steps = [
        {"target": "config.json", "before": old, "after": new},
        {"target": "modeling_qwen.py", "before": old, "after": None},
        {"target": ".qwen-surgery/originals/0123456789abcdef-config.json", "before": None, "after": old},
        {"target": ".qwen-surgery/receipt.json", "before": None, "after": new},
    ]
    checkout = folder / "checkout"

    def write(rng: Random) -> None:
        shutil.rmtree(checkout, ignore_errors=True)
        (checkout / ".qwen-surgery" / "originals").mkdir(parents=True)
        for name in ("config.json", "modeling_qwen.py"):
            (checkout / name).write_bytes(b"old")
        (checkout / ".config.json.qwen-surgery-tmp").write_bytes(b"new")
        valid = {"phase": rng.choice(("prepare", "commit")), "steps": steps}
        (checkout / ".qwen-surgery" / "journal.json").write_bytes(mutate.json_file(valid, rng))

    return write, lambda: recover(checkout) and None


def modeling(folder: Path) -> tuple[Write, Read]:
    import codemods

    text = python_files(ERA)["modeling_qwen.py"].encode()
    lines = text.splitlines(keepends=True)
    path = folder / "modeling_qwen.py"

    def write(rng: Random) -> None:
        if rng.random() < 0.5:
            path.write_bytes(mutate.data(text, rng))
            return
        changed = list(lines)
        for _ in range(rng.choice((1, 2, 5))):
            first, second = rng.randrange(len(changed)), rng.randrange(len(changed))
            how = rng.randrange(3)
            if how == 0:
                del changed[first]
            elif how == 1:
                changed.insert(first, changed[second])
            else:
                changed[first], changed[second] = changed[second], changed[first]
        path.write_bytes(b"".join(changed))

    return write, lambda: codemods.run(path.read_bytes(), "static") and None


def builder_state(folder: Path) -> tuple[Write, Read]:
    """The record of a finished task, and the digests of tensors that an earlier build has read."""
    from qwen_surgery.building.digests import tensor_digests
    from qwen_surgery.building.graph import Store
    from qwen_surgery.weights import TensorRef

    shard = folder / "shard"
    shard.write_bytes(bytes(64))
    ref = TensorRef("w", shard, 0, 64, "F32", (4, 4))
    cache = folder / "digests.json"
    store = Store(folder / "store")
    tensor_digests([ref], cache)
    work = store.begin("key")
    (work / "out").write_bytes(b"out")
    store.commit("key", work, {"said": 1}, 1.0, 100)
    (record,) = (path for path in store.folder("key").rglob("*.json"))
    cached, done = json.loads(cache.read_text()), json.loads(record.read_text())

    def write(rng: Random) -> None:
        cache.write_bytes(mutate.json_file(cached, rng))
        record.write_bytes(mutate.json_file(done, rng))

    def read() -> None:
        digests = tensor_digests([ref], cache)
        if not isinstance(digests[ref], str):
            raise AssertionError(f"{digests[ref]!r} is no digest")
        store.has_outputs("key")
        found = store.done("key")
        if found is not None:
            json.dumps(asdict(found))

    return write, read


def golden(folder: Path) -> tuple[Write, Read]:
    from golden import cycles, record, revisions, tolerances

    catalogue = json.loads(revisions.path().read_bytes())
    catalogue["revisions"] = catalogue["revisions"][:2]
    predictions = json.loads(cycles.FILE.read_bytes())
    predictions["nets"] = predictions["nets"][:2]
    limits = {"source": {"fp32": {"net.max_abs": {"limit": 1e-5, "reason": "rounding"}}}}
    rows = [json.loads(line) for line in record.FILE.read_text().splitlines()[:3]]

    def write(rng: Random) -> None:
        (folder / "revisions.json").write_bytes(mutate.json_file(catalogue, rng))
        (folder / "cycles.json").write_bytes(mutate.json_file(predictions, rng))
        (folder / "tolerances.json").write_bytes(mutate.json_file(limits, rng))
        lines = b"\n".join(mutate.json_file(row, rng) if rng.random() < 0.5 else _line(row) for row in rows)
        (folder / "references.jsonl").write_bytes(lines)

    def one(load: Callable[[Path], Any], name: str, use: Callable[[Any], object]) -> None:
        try:
            found = load(folder / name)
        except ValueError:
            return
        for value in found.values():
            use(value)

    def stages(found: dict[str, Any]) -> None:
        for stage in found.values():
            for summary in stage.tensors.values():
                record.compare(summary, summary)

    def read() -> None:
        one(revisions.load, "revisions.json", str)
        one(cycles.load, "cycles.json", lambda found: cycles.worse(found, 10**9))
        one(tolerances.load, "tolerances.json", lambda found: [limit.holds(1.0) for limit in found.values()])
        one(record.load, "references.jsonl", stages)

    return write, read


def _line(row: Any) -> bytes:
    return json.dumps(row).encode()


def _modeling_errors() -> tuple[type[Exception], ...]:
    from codemods.analysis.source import SourceError

    return (SourceError,)


TARGETS: dict[str, Target] = {
    "config": Target(config),
    "safetensors": Target(safetensors),
    "release": Target(release),
    "weight-index": Target(weight_index),
    "torch-zip": Target(torch_zip),
    "manifest": Target(manifest),
    "side-file": Target(side_file),
    "bmodel": Target(bmodel),
    "tokenizer": Target(tokenizer),
    "generation-config": Target(generation_config),
    "receipt": Target(receipt),
    "journal": Target(journal),
    "builder-state": Target(builder_state),
    "golden": Target(golden),
    "modeling": Target(modeling, _modeling_errors()),
}
