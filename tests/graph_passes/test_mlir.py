"""Passes on the Top dialect's text: what they match, what they leave alone, what they write."""

from __future__ import annotations

import pytest

from graph_passes import mlir
from graph_passes.mlir.fused_attention import FusedAttention
from graph_passes.mlir.text import Module, NotTopText

LOCATIONS = "\n".join(f'#loc{i} = loc("value{i}")' for i in range(1, 23))
X, TABLE, HALF = "tensor<1x1x2x8xf32>", "tensor<1x1x1x8xf32>", "tensor<1x1x2x4xf32>"
PLAIN = "do_relu = false, is_scalar = false, relu_limit = -1.000000e+00 : f64"


def module(*body: str, result: str = "%9", kind: str = X) -> str:
    lines = "\n".join(f"    {line}" for line in body)
    return f"""#loc = loc(unknown)
module @net attributes {{module.chip = "ALL", module.weight_file = "net_top_f32_all_weight.npz"}} {{
  func.func @main(%arg0: {X} loc(unknown)) -> ({kind}) {{
{lines}
    return {result} : {kind} loc(#loc)
  }} loc(#loc)
}} loc(#loc)
{LOCATIONS}
"""


def rotary(upper: int = 4, negative: str = "-1.000000e+00", steps: str = "[1, 1, 1, 1]") -> str:
    half = f"axes = [], ends = [1, 1, 2, 8], hasparamConvert_axes = [3], steps = {steps}"
    joined = 'axis = 3 : si32, do_relu = false, only_merge = false, round_mode = "HalfAwayFromZero"'
    return module(
        '%0 = "top.None"() : () -> none loc(#loc)',
        f'%1 = "top.Input"(%arg0) {{do_preprocess = true}} : ({X}) -> {X} loc(#loc1)',
        f'%2 = "top.Weight"() : () -> {TABLE} loc(#loc2)',
        f'%3 = "top.Weight"() : () -> {TABLE} loc(#loc3)',
        f'%4 = "top.Mul"(%1, %2) {{{PLAIN}}} : ({X}, {TABLE}) -> {X} loc(#loc4)',
        f'%5 = "top.Slice"(%1, %0, %0, %0) {{{half}, offset = [0, 0, 0, {upper}]}} : '
        f"({X}, none, none, none) -> {HALF} loc(#loc5)",
        f'%6 = "top.MulConst"(%5) {{const_val = {negative} : f64, {PLAIN}}} : ({HALF}) -> {HALF} loc(#loc6)',
        f'%7 = "top.Slice"(%1, %0, %0, %0) {{{half}, offset = [0, 0, 0, {4 - upper}]}} : '
        f"({X}, none, none, none) -> {HALF} loc(#loc7)",
        f'%8 = "top.Concat"(%6, %7) {{{joined}}} : ({HALF}, {HALF}) -> {X} loc(#loc8)',
        f'%10 = "top.Mul"(%8, %3) {{{PLAIN}}} : ({X}, {TABLE}) -> {X} loc(#loc10)',
        f'%9 = "top.Add"(%4, %10) {{{PLAIN}}} : ({X}, {X}) -> {X} loc(#loc9)',
    )


def concat(axis: int, first: str = "top.Input") -> str:
    out = "tensor<1x2x2x8xf32>"
    return module(
        f'%1 = "{first}"(%arg0) {{do_preprocess = true}} : ({X}) -> {X} loc(#loc1)',
        f'%2 = "top.Abs"(%1) : ({X}) -> {X} loc(#loc2)',
        f'%9 = "top.Concat"(%1, %2) {{axis = {axis} : si32, do_relu = false, only_merge = false}} : '
        f"({X}, {X}) -> {out} loc(#loc9)",
        kind=out,
    )


def norm(rows: int) -> str:
    kind = f"tensor<1x{rows}x2048xf32>"
    return module(
        f'%1 = "top.Input"(%arg0) {{do_preprocess = true}} : ({kind}) -> {kind} loc(#loc1)',
        '%2 = "top.Weight"() : () -> tensor<1x1x2048xf32> loc(#loc2)',
        f'%9 = "top.RMSNorm"(%1, %2) {{eps = 1.0E-6 : f64, weight_keep_f32 = false}} : '
        f"({kind}, tensor<1x1x2048xf32>) -> {kind} loc(#loc9)",
        kind=kind,
    )


def attention(
    length: int = 4,
    shared: int = 2,
    scale: str = "5.000000e-01",
    order: str = "[0, 2, 3, 1]",
    mask: tuple[int, ...] = (1, 1, 4, 4),
    beta: str = "1.000000e+00",
    extra: str = "",
) -> str:
    """Four heads of 8, keys and values of which belong to groups of heads."""

    def kind(*shape: int) -> str:
        return f"tensor<{'x'.join(map(str, shape))}xf32>"

    times = 4 // shared
    one, few, apart = kind(1, length, 32), kind(1, length, shared, 8), kind(1, length, shared, 1, 8)
    each, all_heads = kind(1, length, shared, times, 8), kind(1, length, 4, 8)
    first, across = kind(1, 4, length, 8), kind(1, 4, 8, length)
    scores, open_places = kind(1, 4, length, length), kind(*mask)
    product = "do_relu = false, hdim_is_batch = false, left_transpose = false, right_transpose = false"
    return module(
        '%0 = "top.None"() : () -> none loc(#loc)',
        f'%1 = "top.Input"(%arg0) {{do_preprocess = true}} : ({all_heads}) -> {all_heads} loc(#loc1)',
        f'%2 = "top.Weight"() : () -> {few} loc(#loc2)',
        f'%3 = "top.Weight"() : () -> {kind(1, length, shared * 8)} loc(#loc3)',
        f'%4 = "top.Weight"() : () -> {open_places} loc(#loc4)',
        f'%5 = "top.Reshape"(%3) {{shape = [1, -1, {shared}, 8]}} : (none) -> {few} loc(#loc5)',
        f'%6 = "top.Reshape"(%3) {{shape = [1, -1, {shared}, 1, 8]}} : (none) -> {apart} loc(#loc6)',
        f'%7 = "top.Unsqueeze"(%2) {{axes = [3]}} : ({few}) -> {apart} loc(#loc7)',
        f'%8 = "top.Tile"(%7) {{tile = [1, 1, 1, {times}, 1]}} : ({apart}) -> {each} loc(#loc8)',
        f'%10 = "top.Tile"(%6) {{tile = [1, 1, 1, {times}, 1]}} : ({apart}) -> {each} loc(#loc10)',
        f'%11 = "top.Reshape"(%8) {{shape = [1, -1, 4, 8]}} : ({each}) -> {all_heads} loc(#loc11)',
        f'%12 = "top.Reshape"(%10) {{shape = [1, -1, 4, 8]}} : ({each}) -> {all_heads} loc(#loc12)',
        f'%13 = "top.Permute"(%1) {{order = [0, 2, 1, 3]}} : ({all_heads}) -> {first} loc(#loc13)',
        f'%14 = "top.Permute"(%11) {{order = {order}}} : ({all_heads}) -> {across} loc(#loc14)',
        f'%15 = "top.Permute"(%12) {{order = [0, 2, 1, 3]}} : ({all_heads}) -> {first} loc(#loc15)',
        f'%16 = "top.MatMul"(%13, %14, %0) {{{product}}} : ({first}, {across}, none) -> {scores} loc(#loc16)',
        f'%17 = "top.MulConst"(%16) {{const_val = {scale} : f64, {PLAIN}}} : '
        f"({scores}) -> {scores} loc(#loc17)",
        f'%18 = "top.Add"(%17, %4) {{{PLAIN}}} : ({scores}, {open_places}) -> {scores} loc(#loc18)',
        f'%19 = "top.Softmax"(%18) {{axis = 3 : si32, beta = {beta} : f64, log = false}} : '
        f"({scores}) -> {scores} loc(#loc19)",
        f'%20 = "top.MatMul"(%19, %15, %0) {{{product}}} : ({scores}, {first}, none) -> {first} loc(#loc20)',
        f'%21 = "top.Permute"(%20) {{order = [0, 2, 1, 3]}} : ({first}) -> {all_heads} loc(#loc)',
        *([extra.format(scores=scores)] if extra else []),
        f'%9 = "top.Reshape"(%21) {{shape = [1, -1, 32]}} : ({all_heads}) -> {one} loc(#loc9)',
        kind=one,
    )


def sites(text: str, name: str) -> tuple[str, ...]:
    _, reports = mlir.apply(text, [name])
    return reports[0].sites


def test_text_comes_back_character_for_character() -> None:
    """The compiler must get what model_transform wrote wherever no pass has business."""
    for text in (rotary(), concat(1), norm(4)):
        assert Module.parse(text).text() == text
        assert mlir.apply(text, ["rotary"]) == (text, ())


def test_rotary_becomes_one_operation_with_sin_before_cos() -> None:
    text, (report,) = mlir.apply(rotary(), ["top-rope"])
    assert report.sites == ("value9",)
    (rope,) = [op for op in Module.parse(text).ops if op.name == "top.Rope"]
    assert rope.operands == ["%1", "%3", "%2"]  # x, sin, cos
    assert rope.attrs == {"rope_mode": '"contiguous_halves"'}
    assert rope.loc == "#loc9"  # the tensor keeps its name
    assert not [op for op in Module.parse(text).ops if op.name in ("top.Slice", "top.Concat", "top.Add")]


@pytest.mark.parametrize(
    "other",
    [
        rotary(upper=0),
        rotary(negative="1.000000e+00"),
        rotary(steps="[1, 1, 1, 2]"),
        rotary().replace("do_relu = false, is_scalar", "do_relu = true, is_scalar"),
    ],
    ids=["halves swapped", "no sign", "interleaved", "rectified"],
)
def test_what_only_looks_like_rotary_stays(other: str) -> None:
    assert sites(other, "top-rope") == ()


def test_history_is_joined_in_place_and_nothing_else() -> None:
    text, _ = mlir.apply(concat(axis=1), ["kv-join"])
    assert "only_merge = true" in text
    assert sites(concat(axis=3), "kv-join") == ()
    assert sites(concat(axis=1, first="top.Abs"), "kv-join") == ()


def test_a_single_row_gets_a_neighbour_for_its_norm() -> None:
    text, _ = mlir.apply(norm(rows=1), ["grouped-norm"])
    parsed = Module.parse(text)
    (product,) = [op for op in parsed.ops if op.name == "top.MulConst"]
    (after,) = [op for op in parsed.ops if op.name == "top.RMSNorm"]
    assert after.operands[0] == product.result and product.operands == ["%1"]
    assert float(product.attrs["const_val"].split()[0]) == 1.0
    assert parsed.location_name(product) not in ("", "value1", "value9")
    assert sites(norm(rows=512), "grouped-norm") == ()


def test_shared_heads_become_one_operation_that_reads_them_unrepeated() -> None:
    text, (report,) = mlir.apply(attention(), [FusedAttention(from_length=4)])
    assert report.sites == ("value9",)
    parsed = Module.parse(text)
    (fused,) = [op for op in parsed.ops if op.name == "top.FAttention"]
    assert fused.operands == ["%1", "%2", "%5", "%4", "%0"]  # queries, keys, values, mask, no buffer
    assert fused.input_types[1] == fused.input_types[2] == "tensor<1x4x2x8xf32>"
    assert fused.attrs["scale"] == "5.000000e-01 : f64"
    numbers = {
        name: int(fused.attrs[name].split(":")[0]) for name in ("q_head", "kv_head", "dim", "mq", "mk")
    }
    assert numbers == {"q_head": 4, "kv_head": 2, "dim": 8, "mq": 4, "mk": 4}
    assert fused.loc == "#loc9" and fused.output_type == "tensor<1x4x32xf32>"
    assert not [
        op for op in parsed.ops if op.name in ("top.Softmax", "top.MatMul", "top.Tile", "top.Permute")
    ]


@pytest.mark.parametrize(
    "other",
    [
        attention(order="[0, 2, 1, 3]"),
        attention(beta="5.000000e-01"),
        attention(mask=(1, 4, 4, 4)),
        attention(extra='%22 = "top.Abs"(%19) : ({scores}) -> {scores} loc(#loc)'),
        attention().replace("do_relu = false, hdim", "do_relu = true, hdim"),
        attention().replace("right_transpose = false", "right_transpose = true", 1),
        attention().replace("tile = [1, 1, 1, 2, 1]", "tile = [1, 1, 2, 1, 1]"),
    ],
    ids=[
        "keys not turned",
        "beta",
        "mask of each head",
        "weights read",
        "rectified",
        "turned",
        "heads in turn",
    ],
)
def test_what_only_looks_like_attention_stays(other: str) -> None:
    assert mlir.apply(other, [FusedAttention(from_length=4)])[1][0].sites == ()


def test_attention_of_a_short_prompt_stays() -> None:
    """Its parts keep what lies between them in local memory, and take fewer cycles than the fused kernel."""
    assert mlir.apply(attention(), [FusedAttention(from_length=5)])[1][0].sites == ()
    assert sites(attention(), "fused-attention") == ()


def products(*order: str, late: str = "") -> str:
    """A layer whose products of one norm stand in *order*; the weight of *late* stands behind the first."""
    at = {name: index for index, name in enumerate("qkv")}
    weights = {
        name: f'%{at[name] + 2} = "top.Weight"() : () -> {X} loc(#loc{at[name] + 2})' for name in order
    }
    first, *rest = (
        f'%{at[name] + 5} = "top.MatMul"(%1, %{at[name] + 2}, %0) {{do_relu = false}} : '
        f"({X}, {X}, none) -> {X} loc(#loc{at[name] + 5})"
        for name in order
    )
    return module(
        '%0 = "top.None"() : () -> none loc(#loc)',
        f'%1 = "top.Input"(%arg0) {{do_preprocess = true}} : ({X}) -> {X} loc(#loc1)',
        *(weights[name] for name in "qkv" if name != late),
        first,
        *(weights[name] for name in late),
        *rest,
        f'%8 = "top.Mul"(%5, %6) {{{PLAIN}}} : ({X}, {X}) -> {X} loc(#loc8)',
        f'%9 = "top.Abs"(%6) : ({X}) -> {X} loc(#loc9)',
        result="%8, %9, %7",
        kind=f"{X}, {X}, {X}",
    )


@pytest.mark.parametrize("order", ["vkq", "kqv", "qvk", "vqk"])
def test_queries_come_first_where_an_attention_is_split(order: str) -> None:
    """TPU-MLIR tells the three apart by their order alone."""
    text, (done,) = mlir.apply(products(*order), ["split-attention"])
    assert done.sites == ("value5",)
    assert text == products(*"qkv")


def between(text: str) -> str:
    """*text* with a reader of the first product before the others."""
    lines = text.splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if "top.MatMul" in line)
    value = lines[first].split()[0]
    lines.insert(first + 1, f'    %20 = "top.Abs"({value}) : ({X}) -> {X} loc(#loc20)\n')
    return "".join(lines)


@pytest.mark.parametrize(
    "other", [products(*"qkv"), products(*"vkq", late="q"), between(products(*"kqv")), rotary()]
)
def test_products_in_order_or_that_cannot_move_stay(other: str) -> None:
    assert mlir.apply(other, ["split-attention"])[0] == other


@pytest.mark.parametrize("text", ["", "not mlir", rotary().replace("return", "yield")])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(NotTopText):
        mlir.apply(text)
