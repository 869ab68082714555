"""The export command: what it writes, what it costs, and that bad input leaves nothing behind."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from golden.eras import make_checkout
from qwen_surgery import nets
from qwen_surgery.errors import Refused, ToolFailed, Usage
from qwen_surgery.exporting import placement
from qwen_surgery.exporting.export import export, trace_templates
from qwen_surgery.exporting.manifest import Manifest
from qwen_surgery.exporting.placement import WeightMode
from qwen_surgery.exporting.template import Template
from qwen_surgery.exporting.writing import rebind
from qwen_surgery.nets import NetKind
from tests.exporting.conftest import LENGTH, Tiny, small_checkout


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen_surgery", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def names(values: Any) -> list[str]:
    return [value.name for value in values]


def shape(value: Any) -> tuple[int, ...]:
    return tuple(d.dim_value for d in value.type.tensor_type.shape.dim)


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is written -------------------------------------------------------------------------------------------


def test_every_net_has_the_contracts_inputs_outputs_and_shapes(tiny: Tiny, exported: Path) -> None:
    expected = nets.nets(tiny.geometry.layers)
    assert [entry.name for entry in Manifest.load(exported).nets] == [net.name for net in expected]
    integers = {onnx.TensorProto.INT32: "int", onnx.TensorProto.FLOAT: "float"}
    for net in expected:
        graph = onnx.load(str(exported / f"{net.name}.onnx"), load_external_data=False).graph
        for found, wanted in (
            (graph.input, nets.inputs(net.kind, tiny.geometry)),
            (graph.output, nets.outputs(net.kind, tiny.geometry)),
        ):
            assert names(found) == [t.name for t in wanted], net.name
            assert [shape(v) for v in found] == [t.shape for t in wanted], net.name
            assert [integers[v.type.tensor_type.elem_type] for v in found] == [t.dtype for t in wanted]


def test_templates_are_valid_models_without_weights(exported: Path) -> None:
    manifest = Manifest.load(exported)
    assert set(manifest.templates) == {net.kind.value for net in manifest.nets}
    for kind in {net.kind for net in manifest.nets}:
        template = Template.load(kind, exported / manifest.template_file(kind))
        onnx.checker.check_model(template.model, full_check=True)
        assert template.model.opset_import[0].version == 15
        wanted = {slot: ref.shape for n in manifest.nets if n.kind is kind for slot, ref in n.weights.items()}
        assert template.slots == wanted


def test_linked_weights_are_the_shards_themselves(tiny: Tiny, exported: Path) -> None:
    shards = sorted(tiny.path.glob("*.safetensors"))
    assert [p.name for p in shards] == left_behind(exported / "weights")
    for shard in shards:
        assert (exported / "weights" / shard.name).samefile(shard)


def test_links_reach_through_symlinks_as_in_the_hugging_face_cache(
    own_checkout: Path, tmp_path: Path
) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for shard in own_checkout.glob("*.safetensors"):
        shard.rename(blobs / shard.name)
        shard.symlink_to(blobs / shard.name)
    Tiny.open(own_checkout).export(tmp_path / "onnx", wanted=["embedding"])
    linked = next((tmp_path / "onnx" / "weights").iterdir())
    assert not linked.is_symlink()
    assert linked.samefile(blobs / linked.name)


@pytest.mark.parametrize("mode", [WeightMode.COPY, WeightMode.INLINE])
def test_copied_and_inline_nets_open_in_any_onnx(tiny: Tiny, tmp_path: Path, mode: WeightMode) -> None:
    manifest = tiny.export(tmp_path / "onnx", mode=mode)
    assert (tmp_path / "onnx" / "weights").exists() == (mode is WeightMode.COPY)
    manifest.check(tmp_path / "onnx")
    for entry in manifest.nets:
        model = onnx.load(str(tmp_path / "onnx" / entry.file))
        stored = {t.name.partition("/")[2]: t for t in model.graph.initializer}
        for slot, ref in entry.weights.items():
            assert stored[slot].raw_data == ref.read_raw().tobytes(), (entry.name, slot)


def test_copy_is_the_fallback_where_links_are_impossible(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "try_link", lambda source, folder: "Invalid cross-device link")
    said: list[str] = []
    assert tiny.export(tmp_path / "onnx", announce=said.append).weights["mode"] == "copy"
    assert "hard links are not possible: Invalid cross-device link" in said[0]
    with pytest.raises(Refused, match="cannot be hard-linked"):
        tiny.export(tmp_path / "other", mode=WeightMode.LINK)


def test_one_trace_per_kind_whatever_the_layer_count(exported: Path) -> None:
    """Two layers' nets differ in nothing but where their weights lie."""
    models = [onnx.load(str(exported / f"block_{i}.onnx"), load_external_data=False) for i in (0, 1)]
    for model in models:
        for tensor in model.graph.initializer:
            if tensor.name.startswith("stored/"):
                del tensor.external_data[:]
    assert models[0].SerializeToString() == models[1].SerializeToString()


def test_only_the_wanted_nets(tiny: Tiny, tmp_path: Path) -> None:
    manifest = tiny.export(tmp_path / "onnx", wanted=["lm_head", "block_1", "block_cache"])
    assert [n.name for n in manifest.nets] == ["lm_head", "block_cache_0", "block_1", "block_cache_1"]
    with pytest.raises(Usage, match="there is no net block_7"):
        tiny.export(tmp_path / "other", wanted=["block_7"])


def test_the_same_export_twice_has_the_same_hashes(tiny: Tiny, exported: Path, tmp_path: Path) -> None:
    again = tiny.export(tmp_path / "onnx")
    assert [n.sha256 for n in again.nets] == [n.sha256 for n in Manifest.load(exported).nets]
    assert again.templates == Manifest.load(exported).templates


def test_rebinding_gives_a_whole_new_folder(exported: Path, tmp_path: Path) -> None:
    source = Manifest.load(exported)
    templates = {
        k: Template.load(k, exported / source.template_file(k)) for k in {n.kind for n in source.nets}
    }
    result = rebind(exported, templates, tmp_path / "cleaned", passes=("fold",))
    result.check(tmp_path / "cleaned")
    assert result.passes == ("fold",)
    assert [n.sha256 for n in result.nets] == [n.sha256 for n in source.nets]
    del templates[NetKind.BLOCK]
    with pytest.raises(Refused, match="no template for block"):
        rebind(exported, templates, tmp_path / "other", passes=())


# The manifest ----------------------------------------------------------------------------------------------


def test_the_manifest_tells_sources_recipe_and_length(tiny: Tiny, exported: Path) -> None:
    manifest = Manifest.load(exported)
    assert manifest.recipe == "static"
    assert manifest.geometry == tiny.geometry
    assert set(manifest.sources["reference"]) == set(tiny.sources.reference)
    assert manifest.sources["reference"] != manifest.sources["patched"]


def test_the_folder_can_be_moved(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "moved")
    Manifest.load(tmp_path / "moved").check(tmp_path / "moved")


def flip(file: Path, offset: int) -> None:
    """Change one bit of *file*."""
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def test_another_fine_tunes_weights_are_refused(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    ref = Manifest.load(folder).net("block_1").weights["mlp.w1.weight"]
    flip(ref.file, ref.offset + ref.nbytes // 2)
    with pytest.raises(Refused, match=f"{ref.file.name} is not the file that manifest.json describes"):
        Manifest.load(folder).check(folder)


@pytest.mark.parametrize("offset", [10**9, 2**47])
def test_a_weight_behind_its_files_end_is_refused(exported: Path, tmp_path: Path, offset: int) -> None:
    """However far: a place that no file can have is no error of the system's."""
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (ref,) = (net["weights"]["ln_1.weight"] for net in manifest["nets"] if net["name"] == "block_1")
    ref["offset"] = offset
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(Refused, match="is not the file that manifest"):
        Manifest.load(folder).check(folder)


@pytest.mark.parametrize("part", ["block_1.onnx", "templates/block.onnx", "constants.bin"])
def test_a_part_from_elsewhere_is_refused(exported: Path, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    flip(folder / part, (folder / part).stat().st_size // 2)
    with pytest.raises(Refused, match=f"{part} is not the file that manifest.json describes"):
        Manifest.load(folder).check(folder)
    (folder / part).unlink()
    with pytest.raises(Refused, match=f"{part} is missing"):
        Manifest.load(folder).check(folder)


# Refusals --------------------------------------------------------------------------------------------------


def test_without_trust_nothing_of_the_checkout_runs(own_checkout: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    modeling = own_checkout / "modeling_qwen.py"
    modeling.write_text(modeling.read_text() + f"\nopen({str(mark)!r}, 'w').close()\n")
    refused = run("export", own_checkout, "--onnx-path", tmp_path / "onnx")
    assert refused.returncode == 2
    assert "--trust-remote-code" in refused.stderr
    assert not mark.exists()
    assert not (tmp_path / "onnx").exists()
    trusted = run("export", own_checkout, "--onnx-path", tmp_path / "onnx", "--trust-remote-code", "--json")
    assert trusted.returncode == 0, trusted.stderr
    assert mark.exists()
    assert json.loads(trusted.stdout)["seq_length"] == 512


def test_a_patched_checkout_is_exported_as_it_was_patched(own_checkout: Path, tmp_path: Path) -> None:
    """Not for 512, and with the original files as the reference."""
    patched = run("patch", own_checkout, "--seq-length", 40, "--recipe", "documented")
    assert patched.returncode == 0, patched.stderr
    done = run(
        *("export", own_checkout, "--onnx-path", tmp_path / "onnx", "--trust-remote-code"),
        *("--nets", "embedding", "--no-twin"),  # documented edits are not exact with LogN on
    )
    assert done.returncode == 0, done.stderr
    manifest = Manifest.load(tmp_path / "onnx")
    assert (manifest.seq_length, manifest.recipe, manifest.trained_length) == (40, "documented", 2048)


def change_config(checkout: Path, **values: Any) -> None:
    path = checkout / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 3}, r"tensor transformer.h.2.ln_1.weight is missing from the checkpoint"),
        ({"num_hidden_layers": 1}, r"tensor transformer.h.1.* belongs to no net"),
        ({"vocab_size": 513}, r"tensor transformer.wte.weight has shape \[512, 32\].*\[513, 32\]"),
        ({"intermediate_size": 64}, r"tensor transformer.h.0.mlp.w1.weight has shape"),
        ({"no_bias": False}, r"tensor transformer.h.0.attn.c_proj.bias is missing"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(
    own_checkout: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    change_config(own_checkout, **values)
    with pytest.raises(Refused, match=message):
        Tiny.open(own_checkout).export(tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("recipe", ["static", "documented"])
@pytest.mark.parametrize(("switch", "other"), [("dynamic_ntk", "logn"), ("logn", "dynamic_ntk")])
def test_a_length_that_cannot_be_exact_is_refused_with_the_reason(
    tmp_path: Path, switch: str, other: str, recipe: str
) -> None:
    path = small_checkout(tmp_path / "checkout", trained_length=LENGTH - 1, **{switch: True, other: False})
    with pytest.raises(Refused, match=f"export length {LENGTH} is above the trained length {LENGTH - 1}"):
        Tiny.open(path, recipe=recipe).export(tmp_path / "onnx")
    assert left_behind(tmp_path) == ["checkout"]


def test_inline_refuses_files_that_protobuf_cannot_hold(tmp_path: Path) -> None:
    path = make_checkout(tmp_path / "big", layers=1, hidden=8192, heads=64, vocab=151_936, sparse=True)
    with pytest.raises(Refused, match=r"net embedding would be a file of 2.5 GB; protobuf ends at 2 GB"):
        Tiny.open(path).export(tmp_path / "onnx", mode=WeightMode.INLINE)


def test_a_folder_with_other_files_is_never_replaced(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "thesis.txt").write_text("years of work")
    with pytest.raises(Refused, match="holds other files and no export"):
        tiny.export(tmp_path / "onnx")
    assert left_behind(tmp_path / "onnx") == ["thesis.txt"]


def test_a_full_disk_is_told_before_the_start(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ToolFailed, match=r"the export needs .* MB of disk, .* has 0 MB free"):
        tiny.export(tmp_path / "onnx")
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("limit", [0, 30_000])
def test_a_disk_that_fills_up_on_the_way_leaves_the_earlier_export(
    tiny: Tiny, tmp_path: Path, limit: int
) -> None:
    """A file-size limit fails writes as a full disk does; at 30 kB only some of the files fit."""
    folder = tmp_path / "onnx"
    tiny.export(folder, wanted=["embedding"])
    before = Manifest.load(folder)
    failed = run(
        *("export", tiny.path, "--onnx-path", folder, "--trust-remote-code", "--weights", "copy"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert failed.returncode == 4
    assert "the file size limit (ulimit -f) forbids it; nothing was changed" in failed.stderr
    assert left_behind(tmp_path) == ["onnx"]
    assert Manifest.load(folder) == before
    before.check(folder)


def test_the_checkout_is_never_written(own_checkout: Path, tmp_path: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in own_checkout.iterdir()}
    Tiny.open(own_checkout).export(tmp_path / "onnx")
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in own_checkout.iterdir()} == before


# Cost ------------------------------------------------------------------------------------------------------


def test_a_72b_layer_at_length_8192_is_traced_with_almost_no_memory(tmp_path: Path) -> None:
    """One such layer's fp32 weights are 3.5 GB, its scores 17 GB: nothing of the kind may be made."""
    sizes = {"hidden": 8192, "heads": 64, "intermediate": 49152, "vocab": 1024}
    path = make_checkout(tmp_path / "big", layers=1, trained_length=8192, sparse=True, **sizes)
    big = Tiny.open(path, length=8192)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    templates = trace_templates(big.sources, big.geometry, [NetKind.BLOCK, NetKind.BLOCK_CACHE])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    for kind, template in templates.items():
        onnx.checker.check_model(template.model, full_check=True)
        assert [shape(v) for v in template.model.graph.output] == [
            t.shape for t in nets.outputs(kind, big.geometry)
        ]


def test_large_and_small_layers_have_the_same_graph(tmp_path: Path) -> None:
    """Where sizes are only reckoned with, the operators must be those that are seen when all is computed."""
    options = {"layers": 1, "sparse": True, "heads": 2, "vocab": 512}
    graphs = []
    for hidden in (64, 2048):
        opened = Tiny.open(make_checkout(tmp_path / str(hidden), hidden=hidden, **options), length=32)
        template = trace_templates(opened.sources, opened.geometry, [NetKind.BLOCK_CACHE])
        graph = template[NetKind.BLOCK_CACHE].model.graph
        graphs.append([(node.op_type, list(node.input), list(node.output)) for node in graph.node])
    assert graphs[0] == graphs[1]


def test_tables_are_kept_once_for_all_layers(tiny: Tiny, exported: Path) -> None:
    table = LENGTH * tiny.geometry.head_dim * 4
    assert (exported / "constants.bin").stat().st_size == 4096 + table  # cosines, padding, sines
    for name in ("block_0", "block_1", "block_cache_0", "block_cache_1"):
        graph = onnx.load(str(exported / f"{name}.onnx"), load_external_data=False).graph
        places = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer}
        assert places["constant/rotary/cos"] == {
            "location": "constants.bin",
            "offset": "0",
            "length": f"{table}",
        }


def test_nets_of_a_traced_module_keep_the_slot_names(tiny: Tiny) -> None:
    """Packing and the graph passes find weights by these names."""
    template = trace_templates(tiny.sources, tiny.geometry, [NetKind.BLOCK])[NetKind.BLOCK]
    assert list(template.slots)[:3] == ["ln_1.weight", "attn.c_attn.weight", "attn.c_attn.bias"]
    tables = {t.name: onnx.numpy_helper.to_array(t) for t in template.model.graph.initializer}
    assert set(tables) == {"constant/rotary/cos", "constant/rotary/sin"}
    np.testing.assert_allclose(tables["constant/rotary/cos"][0], 1.0)


def test_export_needs_trust_in_the_library_too(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(Usage, match="runs the Python files of the checkout"):
        export(tiny.sources, tiny.index, tiny.geometry, tmp_path / "onnx", trust_remote_code=False)
