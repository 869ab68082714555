"""The data behind ``explain``, taken from the rules' own files."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from codemods.framework.base import Documented, Example
from qwen_surgery.patching import edits


@dataclass(frozen=True)
class Page:
    """What there is to say about one codemod or config edit."""

    name: str
    title: str
    why: str
    precondition: str
    postcondition: str
    declines: tuple[str, ...]
    examples: tuple[Example, ...]
    recipes: tuple[str, ...]
    outcomes: tuple[str, ...] = ()  #: what a config edit's outcomes are called, one per key

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        data = asdict(self)
        for example in data["examples"]:
            example["status"] = example["status"].value
        return data

    def to_markdown(self) -> str:
        """The page as Markdown."""
        language = "json" if self.outcomes else "python"
        return self._render(lambda code: f"```{language}\n{code.rstrip()}\n```", "## {}", "- ")

    def to_text(self) -> str:
        """The page as plain text, 80 columns but for code."""
        return self._render(lambda code: textwrap.indent(code.rstrip(), "    "), "{}:", "- ", width=80)

    def _render(self, code: Callable[[str], str], heading: str, bullet: str, width: int = 0) -> str:
        def wrap(text: str, indent: str = "") -> str:
            return (
                textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False)
                if width
                else text
            )

        mark = "# " if heading.startswith("#") else ""
        parts = [f"{mark}{self.name}: {self.title}", wrap(self.why)]
        if self.recipes:
            parts.append(f"In the recipes: {', '.join(self.recipes)}.")
        if self.precondition:
            parts += [heading.format("Checked before"), wrap(self.precondition)]
        if self.postcondition:
            parts += [heading.format("Checked after"), wrap(self.postcondition)]
        if self.declines:
            listed = "\n".join(wrap(bullet + why, "  ") for why in self.declines)
            parts += [heading.format("Declines when"), listed]
        for example in self.examples:
            parts += [
                heading.format(f"Example, {example.name} ({example.status.value})"),
                code(example.before),
            ]
            if example.after is not None:
                parts += ["becomes", code(example.after)]
        return "\n\n".join(parts)


def everything() -> dict[str, Page]:
    """Every source codemod, then every config edit, by name."""
    from codemods import config
    from codemods.framework import recipes, registry

    pages = {}
    for name in registry.names():
        used = tuple(r for r in recipes.names() if name in recipes.load(r).codemods)
        pages[name] = _page(registry.get(name), used)
    for name in config.names():
        used = tuple(r for r in recipes.names() if name in recipes.load(r).config)
        pages[name] = _page(config.get(name), used, edits.config_labels(name))
    return pages


def _page(codemod: Documented, used: tuple[str, ...], labels: tuple[str, ...] = ()) -> Page:
    said = asdict(codemod.prose)
    return Page(name=codemod.name, examples=codemod.examples, recipes=used, outcomes=labels, **said)


def find(name: str) -> Page | None:
    """The page called *name*, by its own name or by what its outcomes are called."""
    pages = everything()
    return pages.get(name) or next((page for page in pages.values() if name in page.outcomes), None)


def descriptions() -> dict[str, tuple[str, str]]:
    """Codemod, as outcomes name it -> (what it does in one line, why)."""
    return {
        label: (page.title, page.why)
        for name, page in everything().items()
        for label in (page.outcomes or (name,))
    }
