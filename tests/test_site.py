"""The documentation site: it builds without a warning, and what it says is so."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from codemods import config
from codemods.framework import registry as rules
from graph_passes.framework import registry as passes
from qwen_surgery import errors
from qwen_surgery.cli import COMMANDS
from tests.test_rooms import ROOMS

pytestmark = pytest.mark.repository

ROOT = Path(__file__).resolve().parent.parent


class _Text(HTMLParser):
    """The text of a page, and what it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.references: list[str] = []

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        wanted = {"script": "src", "img": "src", "link": "href"}.get(tag)
        self.references += [value for name, value in attrs if name == wanted and value]


def read(page: Path) -> _Text:
    parser = _Text()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def said(site: Path, page: str) -> str:
    return "".join(read(site / page).said)


def test_every_command_codemod_and_pass_has_a_page(site: Path) -> None:
    """A command that was added without a page is one that nobody finds."""
    made = [*(f"commands/{name}.html" for name in COMMANDS)]
    made += [f"codemods/{name}.html" for name in rules.BUILTIN]
    made += [f"codemods/config-{name}.html" for name in config.names()]
    made += [f"passes/{one.name}.html" for one in passes.all_passes()]
    assert [page for page in made if not (site / page).is_file()] == []
    menu = (site / "index.html").read_text(encoding="utf-8")
    assert [page for page in made if f'href="{page}"' not in menu] == []


def test_a_command_s_page_has_its_options_and_its_extras(site: Path) -> None:
    build, toolchain = said(site, "commands/build.html"), said(site, "commands/toolchain.html")
    assert "--seq-length" in build and "qwen-surgery[export,compile,verify]" in build
    assert "toolchain install" in toolchain and "--full" in toolchain
    assert "core packages alone" in said(site, "commands/survey.html")


@pytest.mark.parametrize(
    ("message", "helps"),
    [
        ("no weights found", "qwen-surgery fetch"),
        ("shard is missing", "qwen-surgery fetch"),
        ("TPU-MLIR needs Python 3.10 and none was found", "uv python install 3.10"),
        ("runs the Python files of the checkout", "--trust-remote-code"),
    ],
)
def test_a_message_can_be_looked_up(site: Path, message: str, helps: str) -> None:
    text = said(site, "troubleshooting.html")
    _, found, after = text.partition(message)
    assert found and helps in after[:400]


def test_messages_stand_under_their_exit_code(site: Path) -> None:
    """NoWeights is a refusal although its class says no code of its own."""
    text = said(site, "troubleshooting.html")
    parts = re.split(r"\nExit code (\d): ", text)
    under = dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))
    assert set(under) == {kind.exit_code for kind in errors.SurgeryError.__subclasses__()}
    assert "no weights found" in under[3] and "no weights found" not in under[4]
    assert "missed a tolerance" in under[1] and "no such net" not in under[1]
    assert len(re.findall("\n", text)) > 300, "hundreds of messages"


def test_a_page_needs_nothing_from_the_network(site: Path) -> None:
    """It is read on machines that have none."""
    for page in ("index.html", "screens.html", "troubleshooting.html"):
        away = [one for one in read(site / page).references if re.match(r"(https?:)?//", one)]
        assert away == [], page
    for picture in (site / "screens").glob("*.svg"):
        text = picture.read_text(encoding="utf-8")
        assert "url(http" not in text and "xlink:href" not in text and "@import" not in text


def test_the_rooms_are_those_of_the_imports() -> None:
    """The table says what stands on what; tests/test_rooms.py holds the same order against the imports."""
    text = (ROOT / "docs" / "how.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `([\w.]+)` \|", text, re.M)
    below = {"qwen_surgery", "qwen_surgery.packing.report", "qwen_surgery.__main__"}
    packages = [room for room in ROOMS if room in ("golden", "codemods", "graph_passes")]
    assert table == packages + [r for r in ROOMS if r.startswith("qwen_surgery.") and r not in below]


def test_every_exit_code_is_explained() -> None:
    text = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    explained = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.M)}
    assert explained == {0, *(kind.exit_code for kind in errors.SurgeryError.__subclasses__()), 130, 141}
    table = text.partition("| command |")[2].replace("`, `", "` |\n| `")
    named = set(re.findall(r"^\| `([\w-]+)", table, re.M))
    assert named <= set(COMMANDS)


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_a_readme_s_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links and [link for link in links if "//" not in link and not (ROOT / link).exists()] == []


@pytest.mark.parametrize(
    ("page", "figures"), [("README.md", "measured.md"), ("README.zh-CN.md", "measured.zh-CN.md")]
)
def test_a_readme_s_three_figures_are_measured_ones(page: str, figures: str) -> None:
    """A figure that is changed on one page and not on the other makes both worthless."""
    shown = re.findall(r"^\|[^|\n]+\| [^|\n]*\*\*([\d,]+)", (ROOT / page).read_text(encoding="utf-8"), re.M)
    measured = (ROOT / "docs" / figures).read_text(encoding="utf-8")
    assert len(shown) == 3 and [figure for figure in shown if figure not in measured] == []
