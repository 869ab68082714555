"""Every built-in pass on real nets: it acts where it should, changes no result, and comes to rest."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest

import graph_passes.mlir
from graph_passes import clean
from graph_passes.framework import equality, registry
from graph_passes.framework.base import BasePass
from graph_passes.framework.runner import apply, infer_shapes
from qwen_surgery.exporting.template import Template
from qwen_surgery.nets import NetKind
from tests.graph_passes.graphs import model, node

Templates = Callable[[str], dict[NetKind, Template]]


def interface(proto: onnx.ModelProto) -> list[tuple[str, list[int]]]:
    values = [*proto.graph.input, *proto.graph.output]
    return [(v.name, [d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values]


@pytest.mark.parametrize("kind", [NetKind.BLOCK, NetKind.BLOCK_CACHE])
def test_a_cleaned_layer_has_the_same_interface_and_results(
    templates: Templates, era: str, kind: NetKind
) -> None:
    """Otherwise the demos, or the numbers, would break: run whole, not region by region."""
    _cleans_exactly(templates(era)[kind].model)


@pytest.mark.parametrize("kind", [k for k in NetKind if not k.per_layer and k is not NetKind.LM_HEAD_TOPK])
def test_a_cleaned_head_has_the_same_interface_and_results(templates: Templates, kind: NetKind) -> None:
    _cleans_exactly(templates("sdpa")[kind].model)


def _cleans_exactly(before: onnx.ModelProto) -> None:
    result = clean(before, check="each")
    assert interface(result.model) == interface(before)
    assert equality.compare_whole(before, result.model) is None
    assert len(result.model.graph.node) <= len(before.graph.node)


def test_every_era_ends_in_the_same_block(templates: Templates, era: str) -> None:
    """The passes see through each era's way of writing a block; one that slipped by would cost cycles."""
    newest, this = (clean(templates(e)[NetKind.BLOCK_CACHE].model, check="off").model for e in ("sdpa", era))
    assert Counter(n.op_type for n in this.graph.node) == Counter(n.op_type for n in newest.graph.node)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fold-constants", NetKind.BLOCK),
        ("rotary", NetKind.BLOCK),
        ("joint-mlp", NetKind.BLOCK),
        ("zero-bias", NetKind.BLOCK),
        ("token-lanes", NetKind.BLOCK_CACHE),
    ],
)
def test_a_pass_acts_on_upstreams_own_form(templates: Templates, name: str, kind: NetKind) -> None:
    result = clean(templates("registered-mask-list")[kind].model, ["fold-constants", name])
    assert name in result.applied


def test_a_mask_gets_its_floor_where_a_row_can_be_closed_everywhere(templates: Templates) -> None:
    """In prefill, and in the one mask there; a token's own place is open, so that decode costs nothing."""
    nets = templates("sdpa")
    block = clean(nets[NetKind.BLOCK].model, ["bounded-mask"]).model
    floors = [one for one in block.graph.node if one.op_type == "Max"]
    assert [one.input[0] for one in floors] == ["attention_mask"]
    assert not [one for one in block.graph.node if one not in floors and "attention_mask" in one.input]
    assert clean(nets[NetKind.BLOCK_CACHE].model, ["bounded-mask"]).applied == ()


def test_cleaning_twice_changes_nothing_more(templates: Templates) -> None:
    once = clean(templates("sdpa")[NetKind.BLOCK].model, check="off")
    again = clean(once.model, check="off")
    assert again.applied == ()
    assert [n.op_type for n in again.model.graph.node] == [n.op_type for n in once.model.graph.node]


def test_the_input_model_is_left_alone(templates: Templates) -> None:
    """Passes are pure: whoever holds the exported template still has it."""
    before = templates("sdpa")[NetKind.BLOCK].model
    bytes_before = before.SerializeToString(deterministic=True)
    clean(before, check="off")
    assert before.SerializeToString(deterministic=True) == bytes_before


def test_weights_stay_inputs_and_are_only_moved(templates: Templates) -> None:
    """The packer evaluates what is between a weight and its product: concat and transpose, no arithmetic."""
    cleaned = clean(templates("sdpa")[NetKind.BLOCK].model, check="off").model
    follows = {i.name for i in cleaned.graph.input if i.name.startswith("weight/") and "weight" in i.name}
    constants = {t.name for t in cleaned.graph.initializer}
    moved = set()
    for one in cleaned.graph.node:
        data = [i for i in one.input if i not in constants]
        if data and all(i in follows for i in data):
            follows |= set(one.output)
            moved.add(one.op_type)
    assert moved == {"Transpose", "Concat"}


def test_what_passes_values_on_is_dropped_and_rounding_kept() -> None:
    """Identity of a weight is what TPU-MLIR loses; float32 to float16 and back rounds."""
    nodes = [
        node("Identity", ["weight/w"], "w"),
        node("Cast", ["x"], "c", to=1),
        node("Cast", ["c"], "h", to=10),
        node("Cast", ["h"], "f", to=1),
        node("MatMul", ["f", "w"], "m"),
        node("Neg", ["x"], "nobody reads this"),
        node("Identity", ["m"], "i"),
        node("Neg", ["i"], "z"),
    ]
    before = model(nodes, {"x": (1, 4, 8), "weight/w": (8, 8)}, {"z": (1, 4, 8)})
    after = clean(before, ["fold-constants"]).model
    assert Counter(n.op_type for n in after.graph.node) == {"Cast": 2, "MatMul": 1, "Neg": 1}


def rotary_model(first: str, second: str, steps: int = 1) -> onnx.ModelProto:
    """x*cos + Concat(-first, second)*sin with parts of x called upper and lower."""
    index = {"zero": 0, "half": 4, "end": 8, "axis": 2, "step": steps}
    constants = {k: np.asarray([v], np.int64) for k, v in index.items()}
    nodes = [
        node("Slice", ["x", "zero", "half", "axis", "step"], "lower"),
        node("Slice", ["x", "half", "end", "axis", "step"], "upper"),
        node("Neg", [first], "negative"),
        node("Concat", ["negative", second], "rotated", axis=2),
        node("Mul", ["x", "cos"], "a"),
        node("Mul", ["rotated", "sin"], "b"),
        node("Add", ["b", "a"], "y"),
    ]
    shape = (1, 4, 8)
    return model(nodes, {"x": shape, "cos": shape, "sin": shape}, {"y": shape}, constants)


def test_rotary_is_recognised_by_what_it_takes_not_by_its_looks() -> None:
    """Sin first is put in order; the same operators on swapped halves are something else and stay as they
    are.
    """
    assert clean(rotary_model("upper", "lower"), ["rotary"]).applied == ("rotary",)
    assert clean(rotary_model("lower", "upper"), ["rotary"]).applied == ()


def mlp(w2_shape: tuple[int, int], activation: str = "Sigmoid", same_input: bool = True) -> onnx.ModelProto:
    nodes = [
        node("Transpose", ["weight/w1"], "t1", perm=[1, 0]),
        node("Transpose", ["weight/w2"], "t2", perm=[1, 0]),
        node("MatMul", ["x", "t1"], "a"),
        node("MatMul", ["x" if same_input else "other", "t2"], "b"),
        node(activation, ["b"], "s"),
        node("Mul", ["b", "s"], "g"),
        node("Mul", ["a", "g"], "y"),
    ]
    inputs = {"x": (1, 4, 16), "other": (1, 4, 16), "weight/w1": (32, 16), "weight/w2": w2_shape}
    return model(nodes, inputs, {"y": (1, 4, 32)})


def test_joint_mlp_joins_only_a_gated_pair() -> None:
    assert clean(mlp((32, 16)), ["joint-mlp"]).applied == ("joint-mlp",)
    assert clean(mlp((32, 16), activation="Tanh"), ["joint-mlp"]).applied == ()
    assert clean(mlp((32, 16), same_input=False), ["joint-mlp"]).applied == ()
    assert clean(mlp((1, 16)), ["joint-mlp"]).applied == ()


def test_zero_bias_leaves_narrowing_products_and_biased_ones_alone() -> None:
    def product(out: int, biased: bool) -> onnx.ModelProto:
        nodes = [node("MatMul", ["x", "weight/w"], "m"), node("Add", ["m", "weight/b"], "y")]
        inputs = {"x": (1, 4, 16), "weight/w": (16, out), "weight/b": (out,)}
        if not biased:
            nodes[1] = node("Neg", ["m"], "y")
        return model(nodes, inputs, {"y": (1, 4, out)})

    assert clean(product(16, False), ["zero-bias"]).applied == ("zero-bias",)
    assert clean(product(8, False), ["zero-bias"]).applied == ()
    assert clean(product(16, True), ["zero-bias"]).applied == ()


def test_free_length_lets_keys_and_values_be_shared_at_any_length() -> None:
    """A dynamic net that repeats keys for groups of heads otherwise ended the vendor's runtime."""
    nodes = [
        node("Reshape", ["x", "apart"], "heads"),
        node("Expand", ["heads", "times"], "copies"),
        node("Reshape", ["copies", "joined"], "y"),
    ]
    shapes = {"apart": [1, 8, -1, 1, 4], "times": [1, 8, 2, 3, 4], "joined": [1, 8, 24]}
    constants = {name: np.array(shape, np.int64) for name, shape in shapes.items()}
    before = model(nodes, {"x": [1, 8, 8]}, {"y": [1, 8, 24]}, constants)
    after = clean(before, ["free-length"], check="each").model
    assert equality.compare_whole(before, after) is None
    known = {one.name: onnx.numpy_helper.to_array(one).tolist() for one in after.graph.initializer}
    assert [known[one.input[1]] for one in after.graph.node] == [
        [1, -1, 2, 1, 4],
        [1, 1, 2, 3, 4],
        [1, -1, 24],
    ]


def test_every_pass_describes_itself_and_has_its_own_file() -> None:
    passes = registry.all_passes()
    homes = [type(one).__module__ for one in passes]
    assert len(set(homes)) == len(homes)
    for one in passes:
        assert one.summary and one.why and one.precondition, one.name
        assert type(one).__module__.rsplit(".", 1)[-1] == one.name.replace("-", "_")


def test_every_pass_file_is_listed() -> None:
    """A pass that no list names never runs, and nobody would notice."""
    listed = {reference.partition(":")[0] for reference in (*registry.ONNX_PASSES, *registry.MLIR_PASSES)}
    for package in (graph_passes, graph_passes.mlir):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(found.name)
            owners = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, BasePass)]
            if any(owner.__module__ == found.name for owner in owners):
                assert found.name in listed, f"name {found.name} in graph_passes/framework/registry.py"


def test_a_single_pass_gives_shapes_for_every_tensor(templates: Templates) -> None:
    fold = next(p for p in registry.onnx_passes() if p.name == "fold-constants")
    folded, _ = apply(fold, infer_shapes(_copy(templates("sdpa")[NetKind.BLOCK].model)))
    known = {v.name for v in folded.graph.value_info} | {o.name for o in folded.graph.output}
    assert all(out in known for one in folded.graph.node for out in one.output)


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy
