"""Real modeling code: upstream's history, the vendor's hand-edited files, Alibaba's release on PyPI."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import codemods
from codemods.framework.base import Status

#: The revision the vendor's hand-edited 7B file was made from, and where the vendor keeps that file.
STARTED_FROM = "7b08ae1"
HAND_EDITED = "sample/Qwen/tools/Qwen-7B-Chat/modeling_qwen.py"
#: The only edits the documented recipe may decline in upstream's history: no attention_mask is added there.
UNADDED = "attention_mask is never added"


def git(repo: Path, *args: str) -> bytes:
    return subprocess.run(["git", "-C", str(repo), *args], check=True, capture_output=True).stdout


def revisions(repo: Path, path: str = "modeling_qwen.py") -> dict[str, bytes]:
    """Every committed version of a file, by short commit hash."""
    hashes = git(repo, "log", "--all", "--format=%h", "--", path).decode().split()
    return {h: git(repo, "show", f"{h}:{path}") for h in hashes}


def statuses(result: codemods.SourceResult) -> Counter[Status]:
    return Counter(o.status for o in result.outcomes)


@pytest.mark.upstream
@pytest.mark.parametrize("recipe", ["static", "documented"])
def test_every_upstream_revision(upstream: Path, recipe: str) -> None:
    """No failure, a second run that changes nothing; in upstream's own history no unexplained refusal."""
    found = revisions(upstream)
    assert found
    history = STARTED_FROM in found
    assert not history or len(found) >= 17
    for name, data in found.items():
        assert codemods.identify(data) is not None, name
        result = codemods.run(data, recipe)
        assert not result.failed, (name, result.failed)
        assert codemods.run(result.code, recipe).code == result.code, name
        if history and recipe == "static":
            assert not result.declined, (name, result.declined)
        assert not history or all(UNADDED in o.reason for o in result.declined), (name, result.declined)


@pytest.mark.upstream
def test_documented_recipe_is_the_vendor_s_edit(upstream: Path, vendor: Path) -> None:
    """Patched by us or by the vendor's hand: the same program, comments aside."""
    found = revisions(upstream)
    if STARTED_FROM not in found:
        return  # another family's history
    ours = codemods.run(found[STARTED_FROM], "documented").code
    theirs = git(vendor, "show", f"HEAD:{HAND_EDITED}")
    assert ast.dump(ast.parse(ours)) == ast.dump(ast.parse(theirs))


@pytest.mark.upstream
def test_hand_edited_files_need_nothing(vendor: Path) -> None:
    listed = git(vendor, "ls-tree", "-r", "--name-only", "HEAD", "sample/Qwen").decode().splitlines()
    files = [name for name in listed if name.endswith("modeling_qwen.py")]
    assert files
    for name in files:
        result = codemods.run(git(vendor, "show", f"HEAD:{name}"), "static")
        assert set(statuses(result)) <= {Status.ALREADY, Status.ABSENT}, (name, result.outcomes)
        assert not result.changed


@pytest.mark.parametrize("version", ["1.8.1", "1.9.5"])
def test_alibaba_s_release_on_pypi(modelscope_backbone: Callable[[str], bytes], version: str) -> None:
    """Real code of the bias-buffer era, whose main path never adds attention_mask."""
    data = modelscope_backbone(version)
    assert codemods.identify(data) is codemods.Era.BIAS_BUFFER
    static = codemods.run(data, "static")
    assert not static.declined and not static.failed and static.changed
    assert codemods.run(static.code, "static").code == static.code
    applied = {(o.codemod, o.where) for o in static.outcomes if o.status is Status.APPLIED}
    assert ("add-attention-mask", "QWenAttention._attn") in applied
    assert ("drop-causal-mask", "QWenAttention._attn") in applied
    documented = codemods.run(data, "documented")
    assert [o.codemod for o in documented.declined] == ["drop-causal-mask"]
    assert UNADDED in documented.declined[0].reason
