"""Change what an anchor means, anywhere upstream has had it: the rule must decline, naming a line."""

from __future__ import annotations

import ast
from collections.abc import Callable

import pytest

import codemods
from codemods.add_attention_mask import NAME as ADD
from codemods.framework import recipes, registry
from codemods.framework.base import Status
from codemods.framework.runner import run_rules
from golden.eras import ERAS, modeling_source
from tests.codemods.transforms import expression, mutated

Change = Callable[[ast.AST], ast.AST | None]
MASK = {"drop-causal-mask", "drop-upcast-causal-mask"}


def is_call(node: ast.AST, name: str) -> bool:
    function = getattr(node, "func", None)
    return isinstance(node, ast.Call) and getattr(function, "attr", getattr(function, "id", "")) == name


def upper_triangle(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Attribute) and node.attr == "tril":
        return ast.Attribute(node.value, "triu", node.ctx)
    return None


def shifted_triangle(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and is_call(node, "tril"):
        node.keywords.append(ast.keyword("diagonal", ast.Constant(1)))
        return node
    return None


def swapped_where(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and is_call(node, "where"):
        node.args[1], node.args[2] = node.args[2], node.args[1]
        return node
    return None


def greatest_fill(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Attribute) and node.attr == "min" and is_call(node.value, "finfo"):
        return ast.Attribute(node.value, "max", node.ctx)
    return None


def zero_fill(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Attribute) and node.attr == "min" and is_call(node.value, "finfo"):
        return ast.Constant(0.0)
    return None


def shifted_rows(node: ast.AST) -> ast.AST | None:
    """``key - query : key`` becomes ``key - query + 1 : key``: each query would see one key less."""
    if (
        isinstance(node, ast.Slice)
        and isinstance(node.lower, ast.BinOp)
        and isinstance(node.lower.op, ast.Sub)
    ):
        return ast.Slice(ast.BinOp(node.lower, ast.Add(), ast.Constant(1)), node.upper, node.step)
    return None


def first_rows(node: ast.AST) -> ast.AST | None:
    """``key - query : key`` becomes ``: key``."""
    if (
        isinstance(node, ast.Slice)
        and isinstance(node.lower, ast.BinOp)
        and isinstance(node.lower.op, ast.Sub)
    ):
        return ast.Slice(None, node.upper, node.step)
    return None


def windowed(node: ast.AST) -> ast.AST | None:
    """The mask is combined with another one: dropping it would drop both."""
    if isinstance(node, ast.Call) and is_call(node, "where"):
        node.args[0] = ast.BinOp(node.args[0], ast.BitAnd(), expression("self.window"))
        return node
    return None


def swapped_lengths(node: ast.AST) -> ast.AST | None:
    """``query == key`` becomes ``query != key`` where the triangle is built: a prompt would get no mask."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Compare):
        built = any(is_call(n, "tril") for s in node.body for n in ast.walk(s))
        if built and isinstance(node.test.ops[0], ast.Eq):
            node.test.ops[0] = ast.NotEq()
            return node
    return None


def before_softmax(statement: str) -> Change:
    """Put a statement, written with ``{}`` for the scores, right before the softmax."""

    def change(node: ast.AST) -> ast.AST | None:
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_attn"):
            for i, stmt in enumerate(node.body):
                if any(is_call(n, "softmax") for n in ast.walk(stmt)):
                    (name,) = {n.id for n in ast.walk(stmt) if isinstance(n, ast.Name) and "weights" in n.id}
                    node.body[i:i] = ast.parse(statement.replace("{}", name)).body
                    return node
        return None

    return change


REWRITES = {
    "the product made again": "{} = torch.matmul(query, key.transpose(-1, -2))",
    "a function of the scores": "{} = torch.relu({})",
    "another mask added": "{} = {} + window",
    "filled in place": "{}.masked_fill_(window, 0.0)",
    "written into": "{}[..., 0] = 0.0",
    "a factor that masks": "{} = {} * (window > 0)",
    "masked under a condition": "if self.windowed:\n    {} = torch.where(window, {}, 0.0)",
    "bound in a loop": "for {} in [{}]:\n    pass",
    "bound by a match": "match query:\n    case _:\n        {} = window",
    "a second softmax": "probabilities = torch.softmax(query, dim=-1)",
}


@pytest.mark.parametrize("kind", REWRITES)
@pytest.mark.parametrize("era", ["bias-buffer", "sdpa", "late"])
def test_scores_rewritten_in_a_form_not_known_keep_their_mask(era: str, kind: str) -> None:
    text = mutated(modeling_source(era), before_softmax(REWRITES[kind]))
    assert text is not None
    found = [o for o in outcomes(text, "static", MASK) if o.where.endswith("_attn")]
    assert found and all(o.status is Status.DECLINED and o.line for o in found), found


def adds_mask(node: ast.BinOp) -> bool:
    named = isinstance(node.right, ast.Name) and node.right.id == "attention_mask"
    return isinstance(node.op, ast.Add) and named


def unadded(node: ast.AST) -> ast.AST | None:
    """``scores + attention_mask`` becomes ``scores * 1``: the sum is gone."""
    if isinstance(node, ast.BinOp) and adds_mask(node):
        return ast.BinOp(node.left, ast.Mult(), ast.Constant(1))
    return None


def subtracted(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.BinOp) and adds_mask(node):
        return ast.BinOp(node.left, ast.Sub(), node.right)
    return None


def rebound_mask(node: ast.AST) -> ast.AST | None:
    """``forward`` gives attention_mask another value before it is passed on."""
    if isinstance(node, ast.FunctionDef) and node.name == "forward" and calls_attn(node):
        node.body.insert(0, ast.parse("attention_mask = torch.zeros_like(attention_mask)").body[0])
        return node
    return None


def calls_attn(node: ast.AST) -> bool:
    return any(is_call(n, "_attn") for n in ast.walk(node))


def other_mask_passed(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and is_call(node, "_attn"):
        node.args = [
            ast.Constant(None) if isinstance(a, ast.Name) and a.id == "attention_mask" else a
            for a in node.args
        ]
        return node
    return None


MASK_CHANGES: list[Change] = [
    *(upper_triangle, shifted_triangle, swapped_where, greatest_fill, zero_fill, shifted_rows, first_rows),
    *(windowed, swapped_lengths, subtracted),
]


def outcomes(text: str, recipe: str, rules: set[str]) -> list[codemods.Outcome]:
    """The outcomes of ``rules``, run as in ``recipe`` with what they build on."""
    names = [n for n in recipes.load(recipe).codemods if n in rules or (n == ADD and rules & MASK)]
    result = run_rules(text.encode(), [registry.get(name) for name in names])
    assert not result.failed
    return [o for o in result.outcomes if o.codemod in rules]


@pytest.mark.parametrize("change", MASK_CHANGES, ids=lambda c: c.__name__)
def test_a_mask_that_is_not_causal_stays(change: Change) -> None:
    """Whichever era's mask is altered, no causal-mask edit is made on it, and a line is named."""
    reached = 0
    for era in ERAS:
        text = mutated(modeling_source(era), change)
        if text is None:
            continue
        for outcome in outcomes(text, "documented", MASK):
            if outcome.where.endswith("_attn") and touched(text, modeling_source(era), outcome.where, change):
                assert outcome.status is Status.DECLINED, (era, outcome)
                assert outcome.line is not None and outcome.reason
                reached += 1
    assert reached


def touched(after: str, before: str, where: str, change: Change) -> bool:
    """Whether the method's mask depends on what ``change`` altered."""
    if change is swapped_lengths or change in (upper_triangle, shifted_triangle):
        method = where.rsplit(".", 1)[1]
        return method == "_attn" or "registered_causal_mask" in method_text(after, where) or "bias" in after
    return method_text(after, where) != method_text(ast.unparse(ast.parse(before)), where)


def method_text(text: str, where: str) -> str:
    owner, name = where.split(".")
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            return next((ast.unparse(m) for m in node.body if getattr(m, "name", "") == name), "")
    return ""


@pytest.mark.parametrize("era", ERAS)
def test_without_the_sum_the_documented_recipe_declines_and_the_default_adds_it(era: str) -> None:
    """The documented edit there would leave no masking at all; the default recipe puts the sum back."""
    text = mutated(modeling_source(era), unadded) or modeling_source(era)
    documented = [o for o in outcomes(text, "documented", MASK) if o.where]
    assert documented and all(
        o.status is Status.DECLINED and "attention_mask" in o.reason for o in documented
    )
    static = codemods.run(text, "static")
    assert not static.declined and not static.failed
    assert "+ attention_mask" in method_text(static.code.decode(), "QWenAttention._attn")


@pytest.mark.parametrize("change", [rebound_mask, other_mask_passed], ids=lambda c: c.__name__)
@pytest.mark.parametrize("era", ERAS)
def test_a_mask_lost_on_the_way_is_not_trusted(era: str, change: Change) -> None:
    text = mutated(modeling_source(era), change)
    assert text is not None
    found = [o for o in outcomes(text, "static", {"drop-causal-mask"}) if o.where]
    assert found and all(o.status is Status.DECLINED for o in found)


# -- the divisor ---------------------------------------------------------------------------------------------


def filled(node: ast.AST, make: Callable[[ast.Call], ast.AST]) -> ast.AST | None:
    """``make`` of the tensor the scores are divided by."""
    if not isinstance(node, ast.Call) or not is_call(node, "full") or len(node.args) != 2:
        return None
    return make(node) if isinstance(node.args[1], ast.BinOp) else None


def _with_args(node: ast.Call, size: str, value: str) -> ast.AST:
    node.args = [expression(size), expression(value)]
    return node


def _with_dtype(node: ast.Call) -> ast.AST:
    node.keywords = [ast.keyword("dtype", expression("torch.float16"))]
    return node


DIVISORS = {
    "a vector": lambda n: filled(n, lambda c: _with_args(c, "[1]", "2.0")),
    "a call": lambda n: filled(n, lambda c: _with_args(c, "[]", "self.temperature()")),
    "another dtype": lambda n: filled(n, _with_dtype),
    "a root of it": lambda n: filled(n, lambda c: ast.Call(ast.Attribute(c, "sqrt", ast.Load()), [], [])),
    "a random one": lambda n: filled(n, lambda c: expression("torch.rand([])")),
}


@pytest.mark.parametrize("kind", DIVISORS)
def test_a_divisor_that_is_not_a_plain_number_stays(kind: str) -> None:
    reached = 0
    for era in ERAS:
        text = mutated(modeling_source(era), DIVISORS[kind])
        if text is not None:
            (outcome,) = outcomes(text, "static", {"scalar-divide"})
            assert outcome.status is Status.DECLINED and outcome.line, (era, outcome)
            reached += 1
    assert reached >= 4


# -- present -------------------------------------------------------------------------------------------------


def before_present(statement: str) -> Change:
    """Put a statement right before the one that makes ``present``."""

    def change(node: ast.AST) -> ast.AST | None:
        if isinstance(node, ast.FunctionDef) and node.name == "forward" and calls_attn(node):
            at = next(i for i, s in enumerate(node.body) if "present = (" in ast.unparse(s))
            node.body[at:at] = ast.parse(statement).body
            return node
        return None

    return change


def after_present(statement: str) -> Change:
    def change(node: ast.AST) -> ast.AST | None:
        if isinstance(node, ast.FunctionDef) and node.name == "forward" and calls_attn(node):
            at = next(i for i, s in enumerate(node.body) if "present = (" in ast.unparse(s))
            node.body[at + 1 : at + 1] = ast.parse(statement).body
            return node
        return None

    return change


def swapped_pair(node: ast.AST) -> ast.AST | None:
    names = [getattr(e, "id", "") for e in getattr(node, "elts", ())]
    if isinstance(node, ast.Tuple) and names == ["key", "value"] and isinstance(node.ctx, ast.Load):
        return ast.Tuple(node.elts[::-1], node.ctx)
    return None


def past_behind(node: ast.AST) -> ast.AST | None:
    """The new key before the past."""
    pair = node.args[0] if isinstance(node, ast.Call) and is_call(node, "cat") else None
    if isinstance(pair, (ast.Tuple, ast.List)) and len(pair.elts) == 2:
        pair.elts.reverse()
        return node
    return None


PRESENTS: dict[str, Change] = {
    "key quantised after the join": before_present("key = quantise(key)"),
    "value changed in place": before_present("value.mul_(2)"),
    "value written into": before_present("value[:, 0] = 0"),
    "present made twice": after_present("present = (key.half(), value.half())"),
    "present unpacked": after_present("key, value = present"),
    "present looked into": after_present("length = present[0].size(1)"),
    "use_cache changed between": before_present("use_cache = self.training"),
    "the pair swapped": swapped_pair,
    "the past joined behind": past_behind,
}


@pytest.mark.parametrize("kind", PRESENTS)
@pytest.mark.parametrize("era", ERAS)
def test_present_stays_where_something_depends_on_its_place(era: str, kind: str) -> None:
    text = mutated(modeling_source(era), PRESENTS[kind])
    assert text is not None
    (outcome,) = outcomes(text, "static", {"early-present"})
    assert outcome.status is Status.DECLINED and outcome.line, outcome


# -- the flag ------------------------------------------------------------------------------------------------

FLAG = "SUPPORT_TORCH2"
FLAGS = {
    "bound twice": lambda text: text.replace("\nclass ", f"\n{FLAG} = {FLAG} and True\n\nclass ", 1),
    "rebound by a function": lambda text: text + f"\n\ndef on():\n    global {FLAG}\n    {FLAG} = True\n",
    "read elsewhere": lambda text: text + f"\n\ndef fused():\n    return {FLAG}\n",
    "another guard": lambda text: text.replace(f"and {FLAG}:", "and self.fused:"),
    "the guard turned round": lambda text: text.replace(f"and {FLAG}:", f"and not {FLAG}:"),
    "an effect in its value": lambda text: text.replace(f"{FLAG} = ", f"{FLAG} = setup() or ", 1),
    "reached by name": lambda text: text + "\n\nfused = F.scaled_dot_product_attention\n",
    "called outside attention": lambda text: (
        text + "\n\ndef fused(q, k, v):\n    return F.scaled_dot_product_attention(q, k, v)\n"
    ),
}


@pytest.mark.parametrize("kind", FLAGS)
def test_a_flag_that_does_more_than_guard_attention_stays(kind: str) -> None:
    reached = 0
    for era in ERAS:
        before = modeling_source(era)
        text = FLAGS[kind](before)
        if FLAG in before and text != before:
            found = outcomes(text, "static", {"disable-torch2"})
            assert any(o.status is Status.DECLINED and o.line for o in found), (era, found)
            reached += 1
    assert reached >= 2


def test_a_branch_switched_off_by_hand_needs_no_flag() -> None:
    """Some forks write ``and False`` into the condition: that is done, however the flag looks."""
    for era in ERAS:
        text = modeling_source(era).replace(f"and {FLAG}:", "and False:")
        if text != modeling_source(era):
            (outcome,) = outcomes(text, "static", {"disable-torch2"})
            assert outcome.status is Status.ALREADY
