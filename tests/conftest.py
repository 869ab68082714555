"""Options and fixtures of the whole suite."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no fault of the program: no example fails by taking long.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--upstream",
        action="append",
        default=[],
        metavar="PATH",
        help="a git clone with real upstream revisions of modeling_qwen.py; may be repeated",
    )
    parser.addoption(
        "--vendor", metavar="PATH", help="a git clone of the vendor's demos, with hand-edited files"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that need a clone when it is not given: they cannot run, so they do not pass."""
    left_out = [item for item in items if _lacks_clone(config, item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _lacks_clone(config: pytest.Config, item: pytest.Item) -> bool:
    names = getattr(item, "fixturenames", ())
    upstream = item.get_closest_marker("upstream") is not None and not config.getoption("--upstream")
    return (upstream and "vendor" not in names) or any(
        name in names and not config.getoption(f"--{name}") for name in ("upstream", "vendor")
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``upstream`` runs once for every clone given."""
    if "upstream" in metafunc.fixturenames:
        paths = [Path(p) for p in metafunc.config.getoption("--upstream")]
        metafunc.parametrize("upstream", paths or [Path()], ids=[p.name or str(p) for p in paths] or ["none"])


@pytest.fixture(scope="session")
def vendor(pytestconfig: pytest.Config) -> Path:
    """The clone given as --vendor."""
    return Path(pytestconfig.getoption("--vendor"))


@pytest.fixture(scope="session")
def modelscope_backbone(pytestconfig: pytest.Config) -> Callable[[str], bytes]:
    """Alibaba's own Qwen implementation as shipped in a release of modelscope on PyPI, by version.

    The wheel is downloaded once, without dependencies, into pytest's cache; it is read, never imported.
    """

    def fetch(version: str) -> bytes:
        folder = pytestconfig.cache.mkdir(f"modelscope-{version}")
        wheel = folder / f"modelscope-{version}-py3-none-any.whl"
        if not wheel.exists():
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*command, f"modelscope=={version}", "-d", str(folder)], check=True)
        with zipfile.ZipFile(wheel) as archive:
            return archive.read("modelscope/models/nlp/qwen/backbone.py")

    return fetch


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many injected errors were caught, and how many clean runs flagged, where the mutants ran."""

    def count(outcome: str, test: str) -> int:
        reports = terminalreporter.stats.get(outcome, [])
        return sum(f"::{test}[" in report.nodeid and report.when == "call" for report in reports)

    caught, missed = (count(outcome, "test_mutant_is_caught") for outcome in ("passed", "failed"))
    clean, flagged = (count(outcome, "test_clean_runs_are_not_flagged") for outcome in ("passed", "failed"))
    if caught + missed:
        terminalreporter.write_line(
            f"mutants: {caught} of {caught + missed} injected errors caught where they were made; "
            f"{flagged} of {clean + flagged} clean eras flagged"
        )
