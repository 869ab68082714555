"""Upstream's real revisions, in a tiny geometry: patched code computes what the unpatched code computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from golden.eras import make_checkout
from tests.codemods.test_history import git

MODELING = "modeling_qwen.py"
#: What a tiny model changes in a revision's own config.json.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "kv_channels",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
LIMIT = 1e-5


def checkout_of(repo: Path, revision: str, path: Path) -> Path:
    """A tiny checkout whose Python files and config.json are the revision's own."""
    make_checkout(path)
    sizes = json.loads((path / "config.json").read_text())
    for old in path.glob("*.py"):
        old.unlink()
    listed = git(repo, "ls-tree", "--name-only", revision).decode().split()
    for name in [name for name in listed if name.endswith(".py")]:
        (path / name).write_bytes(git(repo, "show", f"{revision}:{name}"))
    config = json.loads(git(repo, "show", f"{revision}:config.json"))
    config |= {key: sizes[key] for key in SIZES}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


@pytest.mark.upstream
def test_every_revision_computes_the_same_patched(upstream: Path, tmp_path: Path) -> None:
    """Ragged prefill and 16 decode steps, up to the whole export length: every net, every layer, and the
    logits."""
    revisions = git(upstream, "log", "--all", "--format=%h", "--", MODELING).decode().split()
    assert revisions
    worst: dict[str, float] = {}
    for revision in revisions:
        path = checkout_of(upstream, revision, tmp_path / revision)
        command = [sys.executable, "-m", "qwen_surgery", "verify", str(path), "--level", "source"]
        options = ["--seq-length", "32", "--steps", "16", "--json", "--trust-remote-code"]
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert done.returncode == 0, f"{revision}: {done.stderr}"
        (level,) = json.loads(done.stdout)["levels"]
        assert level["greedy_tokens"]["reference"] == level["greedy_tokens"]["candidate"]
        found = [check["values"]["max_abs"] for check in level["checks"] if "max_abs" in check["values"]]
        worst[revision] = max(found)
    print(worst)
    assert max(worst.values()) <= LIMIT
