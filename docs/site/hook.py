"""mkdocs calls this: it adds the pages that are made from the program itself, so that they are never old."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import commands
import messages
import passes
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

#: Each gives pages: path in the site -> Markdown.
MAKERS: tuple[Callable[[], dict[str, str]], ...] = (commands.pages, passes.pages, messages.pages)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page per command, codemod and pass into their sections of the menu."""
    found = {
        "Commands": commands.pages(),
        "Codemods": sorted(_codemods(Path(config.docs_dir)), key=lambda path: "README" not in path),
        "Graph passes": passes.pages(),
    }
    for section in config.nav or ():
        for title, pages in found.items():
            if title in section:
                section[title] += pages
    return config


def _codemods(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in sorted((folder / "codemods").glob("*.md")))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages to those that were written."""
    for make in MAKERS:
        for path, text in make().items():
            files.append(File.generated(config, path, content=text))
    return files
