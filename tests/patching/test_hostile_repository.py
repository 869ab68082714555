"""A surveyed repository runs nothing: whatever its configuration names, whatever surrounds git."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from golden.eras import modeling_source
from tests.patching.conftest import Result, git, process

Cli = Callable[..., Result]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What a program would leave behind that ran."""
    return tmp_path / "ran"


@pytest.fixture
def program(tmp_path: Path, marker: Path) -> Path:
    """A program that a repository would like to have run."""
    path = tmp_path / "program"
    path.write_text(f"#!/bin/sh\ntouch {marker}\ncat >/dev/null 2>&1\nexit 0\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two revisions of a modeling file; the second commit carries something that looks like a signature."""
    path = tmp_path / "upstream"
    path.mkdir()
    git("init", cwd=path)
    for era in ("registered-mask-list", "sdpa"):
        (path / "modeling_qwen.py").write_text(modeling_source(era))
        git("add", "-A", cwd=path)
        assert git("commit", "-m", era, cwd=path).returncode == 0
    text = git("cat-file", "commit", "HEAD", cwd=path).stdout
    signed = text.replace(
        b"\n\n", b"\ngpgsig -----BEGIN PGP SIGNATURE-----\n \n =aaaa\n -----END PGP SIGNATURE-----\n\n", 1
    )
    commit = (
        git("hash-object", "-t", "commit", "-w", "--stdin", cwd=path, stdin=signed).stdout.decode().strip()
    )
    assert git("update-ref", "HEAD", commit, cwd=path).returncode == 0
    return path


def survey(cli: Cli, path: Path, *arguments: object) -> list[str]:
    result = cli("survey", path, "--json", *arguments)
    assert result.code == 0, result.err
    return [row["revision"] for row in json.loads(result.out)["revisions"]]


CONFIG = {
    "signatures": [("log.showSignature", "true"), ("gpg.program", "{program}")],
    "ssh signatures": [
        ("log.showSignature", "true"),
        ("gpg.format", "ssh"),
        ("gpg.ssh.program", "{program}"),
    ],
    "monitor": [("core.fsmonitor", "{program}")],
    "pager": [("core.pager", "{program}"), ("pager.log", "true")],
    "external diff": [("diff.external", "{program}"), ("diff.py.command", "{program}")],
    "text conversion": [("diff.py.textconv", "{program}")],
    "filter": [
        ("filter.x.smudge", "{program}"),
        ("filter.x.clean", "{program}"),
        ("filter.x.process", "{program}"),
    ],
    "hooks": [("core.hooksPath", "{hooks}")],
    "ssh": [("core.sshCommand", "{program}"), ("remote.origin.url", "ssh://localhost/x")],
    "askpass": [("core.askPass", "{program}"), ("credential.helper", "{program}")],
    "promisor": [
        ("core.repositoryFormatVersion", "1"),
        ("extensions.partialClone", "origin"),
        ("remote.origin.promisor", "true"),
        ("remote.origin.url", "ext::{program}"),
        ("protocol.ext.allow", "always"),
        ("remote.origin.uploadpack", "{program}"),
    ],
    "include": [("include.path", "{included}")],
    "alternate refs": [("core.alternateRefsCommand", "{program}")],
    "work tree": [("core.worktree", "/"), ("core.fsmonitor", "{program}")],
    "alias": [("alias.log", "!{program}"), ("alias.cat-file", "!{program}")],
}


@pytest.mark.parametrize("kind", CONFIG)
def test_nothing_that_the_repository_configures_runs(
    kind: str, repository: Path, program: Path, marker: Path, tmp_path: Path, cli: Cli
) -> None:
    """Shown once with log.showSignature and gpg.program: `survey` of a stranger's clone ran a program."""
    wanted = survey(cli, repository)
    included, hooks = tmp_path / "included", tmp_path / "hooks"
    included.write_text(f"[log]\nshowSignature = true\n[gpg]\nprogram = {program}\n")
    hooks.mkdir()
    for hook in ("post-checkout", "reference-transaction", "post-index-change", "fsmonitor-watchman"):
        shutil.copy(program, hooks / hook)
    for key, value in CONFIG[kind]:
        filled = value.format(program=program, included=included, hooks=hooks)
        git("config", "--file", ".git/config", "--add", key, filled, cwd=repository)
    (repository / ".gitattributes").write_text("*.py diff=py filter=x\n")
    (repository / ".git" / "info").mkdir(exist_ok=True)
    (repository / ".git" / "info" / "attributes").write_text("*.py diff=py filter=x\n")
    assert survey(cli, repository) == wanted
    assert survey(cli, repository, "--since", wanted[0]) == wanted[1:]
    assert not marker.exists()


@pytest.mark.parametrize("name", ["GIT_EXTERNAL_DIFF", "GIT_SSH_COMMAND", "GIT_PAGER", "GIT_CONFIG_COUNT"])
def test_nothing_that_surrounds_git_runs(
    name: str, repository: Path, program: Path, marker: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = survey(cli, repository)
    monkeypatch.setenv(name, "2" if name == "GIT_CONFIG_COUNT" else str(program))
    for number, (key, value) in enumerate((("log.showSignature", "true"), ("gpg.program", str(program)))):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{number}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{number}", value)
    assert survey(cli, repository) == wanted
    assert not marker.exists()


def test_replacements_and_grafts_change_no_revision(repository: Path, cli: Cli) -> None:
    """Else a repository could show one text in a clone and another to a survey."""
    wanted = survey(cli, repository)
    other = git("hash-object", "-w", "--stdin", cwd=repository, stdin=b"x = 1\n").stdout.decode().strip()
    blob = git("rev-parse", "HEAD:modeling_qwen.py", cwd=repository).stdout.decode().strip()
    assert git("replace", blob, other, cwd=repository).returncode == 0
    head = git("rev-parse", "HEAD", cwd=repository).stdout.decode().strip()
    (repository / ".git" / "info").mkdir(exist_ok=True)
    (repository / ".git" / "info" / "grafts").write_text(f"{head}\n")
    assert survey(cli, repository) == wanted


def test_packed_loose_and_detached_refs_are_all_seen(repository: Path, cli: Cli) -> None:
    """What is on a branch, a tag or nowhere but under HEAD counts, as it does for git log --all."""
    first = survey(cli, repository)
    git("checkout", "-q", "-b", "side/branch", cwd=repository)
    (repository / "modeling_qwen.py").write_text(modeling_source("late"))
    git("commit", "-q", "-am", "side", cwd=repository)
    git("tag", "-a", "v1", "-m", "one", cwd=repository)
    git("checkout", "-q", "--detach", cwd=repository)
    (repository / "modeling_qwen.py").write_text(modeling_source("tril-forward"))
    git("commit", "-q", "-am", "detached", cwd=repository)
    git("pack-refs", "--all", cwd=repository)
    found = survey(cli, repository)
    assert found[: len(first)] == first and len(found) == len(first) + 2
    assert survey(cli, repository, "--since", "v1") == found[-1:]
    assert survey(cli, repository, "--since", "HEAD~1") == found[-1:]


def test_linked_work_trees_bare_and_sha256_repositories_are_read(
    repository: Path, tmp_path: Path, cli: Cli
) -> None:
    wanted = survey(cli, repository)
    assert git("worktree", "add", "-q", str(tmp_path / "tree"), "-b", "other", cwd=repository).returncode == 0
    assert survey(cli, tmp_path / "tree") == wanted
    assert git("clone", "-q", "--bare", str(repository), str(tmp_path / "bare"), cwd=tmp_path).returncode == 0
    assert survey(cli, tmp_path / "bare") == wanted
    assert (
        git("clone", "-q", "--shared", str(repository), str(tmp_path / "shared"), cwd=tmp_path).returncode
        == 0
    )
    assert survey(cli, tmp_path / "shared") == wanted, "a clone that borrows objects is an ordinary thing"
    longer = tmp_path / "longer"
    longer.mkdir()
    git("init", "-q", "--object-format=sha256", cwd=longer)
    shutil.copy(repository / "modeling_qwen.py", longer)
    git("add", "-A", cwd=longer)
    assert git("commit", "-q", "-m", "x", cwd=longer).returncode == 0
    assert [len(revision) for revision in survey(cli, longer)] == [64]


def test_shallow_clones_end_where_they_end(repository: Path, tmp_path: Path, cli: Cli) -> None:
    wanted = survey(cli, repository)
    url = f"file://{repository}"
    assert git("clone", "-q", "--depth=1", url, str(tmp_path / "shallow"), cwd=tmp_path).returncode == 0
    assert survey(cli, tmp_path / "shallow") == wanted[-1:]


@pytest.mark.parametrize("kind", ["pipe", "link", "words", "reftable"])
def test_a_repository_that_is_none_is_one_line(kind: str, repository: Path, tmp_path: Path) -> None:
    """A pipe in place of a file would hang, a link leads out of the repository."""
    packed = repository / ".git" / "packed-refs"
    if kind == "pipe":
        os.mkfifo(packed)
    elif kind == "link":
        packed.symlink_to("/etc/passwd")
    elif kind == "reftable":
        (repository / ".git" / "reftable").mkdir()
    else:
        shutil.rmtree(repository / ".git")
        (repository / ".git").write_text("gitdir: \0/etc\n")
    done = process("survey", repository, timeout=60)
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and "root:" not in done.stderr


def test_a_giant_in_the_history_is_one_failed_revision(repository: Path, cli: Cli) -> None:
    """Sixty million bytes of source are not parsed, nor held."""
    (repository / "modeling_qwen.py").write_bytes(modeling_source("sdpa").encode() + b"x = 1\n" * 10_000_000)
    git("commit", "-q", "-am", "giant", cwd=repository)
    result = cli("survey", repository, "--json")
    assert result.code == 0 and "a bug" not in result.err
