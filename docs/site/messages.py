"""Troubleshooting by message: every error that the program's code raises, with the help that it gives.

Nothing is imported: the messages are read where they stand, classes and their exit codes from the code too.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

#: Errors of the reading packages; the program puts a file's name before them and ends with this exit code.
_READING = {"ConfigError": 3, "SourceError": 3, "Damaged": 3}
_PACKAGES = ("qwen_surgery", "codemods")
_MEANING = {
    1: "a verification missed, or changes are pending",
    2: "the words make no call that can be meant",
    3: "the input is refused",
    4: "a tool, a package, the network or the disk failed",
}


@dataclass(frozen=True)
class Said:
    """One message: what it says, what helps, the exit code, and the room whose code says it."""

    text: str
    help: str
    exit_code: int
    room: str


def pages() -> dict[str, str]:
    """The one page."""
    grouped: dict[int, dict[str, set[Said]]] = defaultdict(lambda: defaultdict(set))
    for said in found():
        grouped[said.exit_code][said.room].add(said)
    parts = ["# Troubleshooting by message", _INTRO]
    for code, rooms in sorted(grouped.items()):
        parts.append(f"## Exit code {code}: {_MEANING[code]}")
        for room, messages in sorted(rooms.items()):
            parts += [f"### {room}", _table(sorted(messages, key=lambda said: said.text.lower()))]
    return {"troubleshooting.md": "\n\n".join(parts) + "\n"}


_INTRO = """\
Search this page for the words of the message; what differs from run to run stands in ⟨brackets⟩. The program
prints `error: MESSAGE  (WHAT HELPS)`. The small headings are the parts of the program that say it. A message
that begins with `unexpected` is a bug: run again with `--debug` and report it.
"""


def _table(messages: list[Said]) -> str:
    rows = [f"| {_code(said.text)} | {_code(said.help)} |" for said in messages]
    return "\n".join(["| message | what helps |", "|---|---|", *rows])


def _code(text: str) -> str:
    """As it is typed: in a code span, of which a table takes no pipe and no backtick."""
    text = text.replace("`", "'").replace("|", "\\|").strip()
    return f"`{text}`" if text else ""


def found() -> Iterator[Said]:
    """Every message whose words stand in the code where it is raised."""
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in _sources()}
    trees = {file: _Texts(tree).visit(tree) for file, tree in trees.items()}
    codes = _exit_codes(trees.values())
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (name := _name(node.func)) in codes and node.args:
                text = _rendered(node.args[0])
                helped = next((_rendered(k.value) for k in node.keywords if k.arg == "hint"), "")
                if _words(text):
                    yield Said(text, helped if _words(helped) else "", codes[name], _room(file))


def _exit_codes(trees: Iterable[ast.Module]) -> dict[str, int]:
    """Exit code of every class of errors that ends a command."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    codes = dict(_READING)
    for node in classes:
        for line in node.body:
            if isinstance(line, ast.Assign) and _name(line.targets[0]) == "exit_code":
                codes[node.name] = ast.literal_eval(line.value)
    for node in classes:  # what has none of its own has that of what it is derived from
        for base in map(_name, node.bases):
            if base in codes:
                codes.setdefault(node.name, codes[base])
    return codes


class _Texts(ast.NodeTransformer):
    """Puts a module's own texts where the messages name them."""

    def __init__(self, module: ast.Module) -> None:
        self.texts = {
            _name(line.targets[0]): line.value
            for line in module.body
            if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant)
        }

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.texts.get(node.id, node) if isinstance(node.ctx, ast.Load) else node


def _sources() -> list[Path]:
    folders = [Path(str(spec.origin)).parent for name in _PACKAGES if (spec := find_spec(name))]
    return sorted(file for folder in folders for file in folder.rglob("*.py"))


def _room(file: Path) -> str:
    return file.stem if file.parent.name == "qwen_surgery" else file.parent.name


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _words(text: str) -> bool:
    """Whether *text* says anything besides what it is given."""
    return any(part.strip(" :;,.()") for part in _outside(text))


def _outside(text: str) -> list[str]:
    return [part.rpartition("⟩")[2] for part in text.split("⟨")]


def _rendered(node: ast.expr) -> str:
    """The text of a message's expression; a value that is put in is its name in angle brackets."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_rendered(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _rendered(node.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _rendered(node.left) + _rendered(node.right)
    if isinstance(node, ast.IfExp):
        shown = [text for text in (_rendered(node.body), _rendered(node.orelse)) if text]
        return " / ".join(shown) if len(shown) > 1 else f"[{shown[0]}]" if shown else ""
    return f"⟨{_called(node)}⟩"


def _called(node: ast.expr) -> str:
    """A short name of what *node* gives."""
    if isinstance(node, ast.Name):
        return node.id.strip("_").replace("_", " ")
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_").replace("_", " ")
    if isinstance(node, ast.Call):
        return _called(node.args[0] if node.args else node.func)
    if isinstance(node, ast.Subscript):
        return _called(node.value)
    return "..."
