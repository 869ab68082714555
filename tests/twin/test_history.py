"""Upstream's real revisions: each one's own whole model is what its nets compute."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_surgery.twin.twin import LIMIT
from tests.codemods.test_history import git
from tests.twin.test_twin import twin
from tests.verification.test_history import MODELING, checkout_of


@pytest.mark.upstream
def test_every_revision_agrees(upstream: Path, tmp_path: Path) -> None:
    revisions = git(upstream, "log", "--all", "--format=%h", "--", MODELING).decode().split()
    assert revisions
    reports = {
        revision: twin(checkout_of(upstream, revision, tmp_path / revision), 48) for revision in revisions
    }
    print({revision: f"{report.worst:.1e}" for revision, report in reports.items()})
    assert max(report.worst for report in reports.values()) <= LIMIT
