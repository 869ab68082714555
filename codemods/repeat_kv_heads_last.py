"""``repeat-kv-heads-last``: share keys and values among heads as they are stored, heads behind the tokens."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from codemods.analysis import decoder, syntax
from codemods.analysis.source import Source
from codemods.framework.base import Decisions, Example, Rewrite, Rule, Site, Status

NAME = "repeat_kv"

_FILE = """\
def repeat_kv(states, times):
    batch, heads, tokens, width = states.shape
    if times == 1:
        return states
    states = states{picked}.expand({spread})
    return states.reshape({joined}){back}
"""
_FIRST = {
    "picked": "[:, :, None, :, :]",
    "spread": "batch, heads, times, tokens, width",
    "joined": "batch, heads * times, tokens, width",
    "back": "",
}
_LAST = {
    "picked": ".transpose(1, 2)[:, :, :, None, :]",
    "spread": "batch, tokens, heads, times, width",
    "joined": "batch, tokens, heads * times, width",
    "back": ".transpose(1, 2)",
}


class RepeatKvHeadsLast(Rule):
    """Repeat keys and values for their groups of heads with heads behind the tokens.

    Why
        Several heads of queries share one head of keys and values. Upstream repeats these with heads first,
        for which the chip transposes all of the history at every token. With heads last, as the history is
        stored, the repeated heads lie beside each other and nothing is transposed.

    Checked before
        The function spreads a new axis behind the heads over as many copies as it is asked for, and joins it
        with them.

    Checked after
        The function does the same on the transposed axes and transposes the result back.

    Declines
        - the repetition is made in another form
    """

    name = "repeat-kv-heads-last"
    absent = f"no function {NAME} in this file"
    examples = (
        Example("heads first", _FILE.format(**_FIRST), _FILE.format(**_LAST), Status.APPLIED),
        Example("heads last", _FILE.format(**_LAST), None, Status.ALREADY),
        Example("no groups of heads", "x = 1\n", None, Status.ABSENT),
        Example(
            "copies in another order",
            _FILE.format(**{**_FIRST, "picked": "[:, None, :, :, :]"}),
            None,
            Status.DECLINED,
        ),
    )

    def sites(self, source: Source, decided: Decisions) -> Iterator[Site]:
        function = decoder.function(source, NAME)
        if function is None:
            return
        span = (function.lineno, function.end_lineno, NAME)
        form = _Form.of(function)
        if form is None:
            yield Site(Status.DECLINED, "it does not unpack a shape, spread a new axis and join it", *span)
            return
        spread, joined = function.body[-2], function.body[-1]
        if form.fits(spread, joined, heads_last=True):
            yield Site(Status.ALREADY, "it repeats with heads behind the tokens", *span)
        elif form.fits(spread, joined, heads_last=False):
            new = form.statements(heads_last=True)
            edits = tuple(
                Rewrite(stmt, partial(_put, text)) for stmt, text in zip((spread, joined), new, strict=True)
            )
            yield Site(Status.APPLIED, "repeats with heads behind the tokens", *span, edits=edits)
        else:
            yield Site(Status.DECLINED, "the copies are not made behind the heads, in a form known", *span)


@dataclass(frozen=True)
class _Form:
    """The names that the function works with: its arguments, and the four sizes of the first of them."""

    states: str
    times: str
    sizes: tuple[str, str, str, str]

    @classmethod
    def of(cls, function: ast.FunctionDef) -> _Form | None:
        """The names in *function*; None when it is no unpacking, an early return and two statements."""
        statements, names = decoder.body(function), syntax.parameters(function)
        if len(names) != 2 or len(statements) != 4:
            return None
        states, times = names
        unpacked, early = statements[:2]
        if not (isinstance(unpacked, ast.Assign) and isinstance(unpacked.targets[0], ast.Tuple)):
            return None
        sizes = tuple(ast.unparse(size) for size in unpacked.targets[0].elts)
        if ast.unparse(unpacked.value) != f"{states}.shape" or len(set(sizes)) != 4:
            return None
        if ast.unparse(early) != f"if {times} == 1:\n    return {states}":
            return None
        first, second, third, fourth = sizes
        return cls(states, times, (first, second, third, fourth))

    def statements(self, *, heads_last: bool) -> tuple[str, str]:
        """The spreading and the joining statement."""
        x, n = self.states, self.times
        batch, heads, tokens, width = self.sizes
        if heads_last:
            return (
                f"{x} = {x}.transpose(1, 2)[:, :, :, None, :]"
                f".expand({batch}, {tokens}, {heads}, {n}, {width})",
                f"return {x}.reshape({batch}, {tokens}, {heads} * {n}, {width}).transpose(1, 2)",
            )
        return (
            f"{x} = {x}[:, :, None, :, :].expand({batch}, {heads}, {n}, {tokens}, {width})",
            f"return {x}.reshape({batch}, {heads} * {n}, {tokens}, {width})",
        )

    def fits(self, spread: ast.stmt, joined: ast.stmt, *, heads_last: bool) -> bool:
        wanted = self.statements(heads_last=heads_last)
        known = [ast.dump(ast.parse(text).body[0]) for text in wanted]
        return [ast.dump(spread), ast.dump(joined)] == known


def _put(text: str, node: Any) -> Any:
    """The LibCST statement *node* with what *text* says, its comments kept."""
    import libcst as cst

    statement: Any = cst.parse_statement(text)
    return node.with_changes(body=statement.body)
