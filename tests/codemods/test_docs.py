"""The generated pages are the rules' own words, and up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from codemods import config, docs
from codemods.framework import registry

pytestmark = pytest.mark.repository

ROOT = Path(__file__).resolve().parents[2]


def test_pages_are_up_to_date() -> None:
    assert docs.outdated(ROOT / docs.FOLDER) == [], "run `python -m codemods.docs`"


def test_every_rule_has_a_page_with_why_and_when_it_declines() -> None:
    pages = docs.pages()
    for name in registry.BUILTIN:
        page = pages[f"{name}.md"]
        assert "**Why.**" in page
        assert ("```diff" in page) == registry.get(name).edits
        assert all(reason in page for reason in registry.get(name).prose.declines)
    for name in config.names():
        assert "**Why.**" in pages[f"config-{name}.md"]


def test_the_command_writes_and_checks(tmp_path: Path) -> None:
    assert docs.main(["--check", str(tmp_path)]) == 1
    assert docs.main([str(tmp_path)]) == 0
    assert docs.main(["--check", str(tmp_path)]) == 0
    (tmp_path / "gone.md").write_text("left over")
    assert docs.outdated(tmp_path) == ["gone.md"]
