"""``survey``: every revision of every modeling file, read from git objects, a folder or a file."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from golden import revisions
from golden.eras import ERAS, modeling_source
from qwen_surgery.patching import edits, history, matrix, survey
from tests.patching.conftest import Result, git, process, snapshot

Cli = Callable[..., Result]


def _source(era: str) -> bytes:
    text = modeling_source(era)
    return text if isinstance(text, bytes) else text.encode()


def _commit(repository: Path, message: str) -> str:
    git("add", "-A", cwd=repository)
    done = git("commit", "--allow-empty", "-m", message, cwd=repository)
    assert done.returncode == 0, done.stderr
    return git("rev-parse", "HEAD", cwd=repository).stdout.decode().strip()


@pytest.fixture
def repository(tmp_path: Path, checkout: Path) -> Path:
    """Upstream's history in small: one commit per era, one that touches something else."""
    path = tmp_path / "upstream"
    path.mkdir()
    git("init", cwd=path)
    shutil.copy(checkout / "config.json", path)
    for era in ERAS:
        (path / "modeling_qwen.py").write_bytes(_source(era))
        _commit(path, era)
    (path / "README.md").write_text("hello\n")
    (path / "modeling_gpt2.py").write_text("class Attention:\n    c_attn = 1\n")
    _commit(path, "not modeling code")
    return path


@pytest.fixture(autouse=True)
def one_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each content is tried once for the whole file: what the codemods say is tested elsewhere."""
    if "processes" in request.fixturenames:
        return
    monkeypatch.setattr(survey, "_WORTH_PROCESSES", 1000)
    monkeypatch.setattr(edits, "outcomes", _remembered)


_tried: dict[Any, Any] = {}
_outcomes = edits.outcomes


def _remembered(*arguments: Any) -> Any:
    if arguments not in _tried:
        _tried[arguments] = _outcomes(*arguments)
    return _tried[arguments]


@pytest.fixture
def processes() -> None:
    """Let the survey start processes of its own."""


def _rows(result: Result) -> list[dict[str, object]]:
    assert result.code == 0, result.err
    return list(json.loads(result.out)["revisions"])


def test_every_revision_of_a_repository_oldest_first(repository: Path, cli: Cli) -> None:
    before = snapshot(repository)
    rows = _rows(cli("survey", repository, "--json"))
    assert [r["path"] for r in rows] == ["modeling_qwen.py"] * len(ERAS)
    log = git("log", "--reverse", "--format=%H", cwd=repository).stdout.decode().split()
    assert [r["revision"] for r in rows] == log[: len(ERAS)]
    for row in rows:
        names = {o["codemod"] for o in row["outcomes"]}  # type: ignore[attr-defined]
        assert {"disable-torch2", "early-present", "config:seq_length"} <= names
        assert row["patchable"] is True
    assert snapshot(repository) == before, "neither work tree nor git directory is touched"


def test_a_dirty_work_tree_does_not_matter(repository: Path, cli: Cli) -> None:
    rows = _rows(cli("survey", repository, "--json"))
    (repository / "modeling_qwen.py").write_text("broken(\n")
    (repository / "config.json").unlink()
    assert _rows(cli("survey", repository, "--json")) == rows


def test_bare_repository_and_since(repository: Path, cli: Cli, tmp_path: Path) -> None:
    bare = tmp_path / "bare.git"
    assert git("clone", "--bare", str(repository), str(bare), cwd=tmp_path).returncode == 0
    rows = _rows(cli("survey", bare, "--json"))
    assert rows == _rows(cli("survey", repository, "--json"))
    since = str(rows[-3]["revision"])
    assert [r["revision"] for r in _rows(cli("survey", bare, "--json", "--since", since))] == [
        r["revision"] for r in rows[-2:]
    ]
    assert _rows(cli("survey", bare, "--json", "--since", "HEAD")) == []
    for wrong in ("nonsense", "--all"):
        assert cli("survey", bare, f"--since={wrong}").code == 2


def test_all_branches_merges_and_renames_are_seen_once(repository: Path, cli: Cli) -> None:
    git("checkout", "-b", "side", "HEAD~3", cwd=repository)
    (repository / "sub dir").mkdir()
    (repository / "sub dir" / "mödel.py").write_bytes(_source("sdpa") + b"# side\n")
    side = _commit(repository, "side")
    git("checkout", "main", cwd=repository)
    git("merge", "--no-ff", "-m", "merge", "side", cwd=repository)
    rows = _rows(cli("survey", repository, "--json"))
    assert [(r["path"], r["revision"]) for r in rows if r["path"] != "modeling_qwen.py"] == [
        ("sub dir/mödel.py", side)
    ]
    assert len(rows) == len(ERAS) + 1


def test_a_change_made_in_a_merge_itself_is_seen(repository: Path, cli: Cli) -> None:
    git("checkout", "-b", "side", "HEAD~1", cwd=repository)
    (repository / "other").write_text("x")
    _commit(repository, "side")
    git("checkout", "main", cwd=repository)
    git("merge", "--no-ff", "--no-commit", "side", cwd=repository)
    (repository / "modeling_qwen.py").write_bytes(_source("sdpa") + b"# only in the merge\n")
    merge = _commit(repository, "merge")
    rows = _rows(cli("survey", repository, "--json"))
    assert [r["revision"] for r in rows][-1] == merge
    assert len(rows) == len(ERAS) + 1


def test_a_blob_that_a_partial_clone_lacks_is_reported_not_fetched(repository: Path, cli: Cli) -> None:
    blob = git("rev-parse", "HEAD~2:modeling_qwen.py", cwd=repository).stdout.decode().strip()
    (repository / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    rows = _rows(cli("survey", repository, "--json"))
    assert [r["missing"] for r in rows].count(True) == 1
    assert len(rows) == len(ERAS)
    assert "1 missing in this clone" in cli("survey", repository).out


def test_a_promisor_remote_is_not_asked(repository: Path, tmp_path: Path, cli: Cli) -> None:
    git("config", "uploadpack.allowFilter", "true", cwd=repository)
    partial = tmp_path / "partial"
    made = git(
        "clone", "--no-checkout", "--filter=blob:none", f"file://{repository}", str(partial), cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    shutil.move(repository, tmp_path / "moved away")
    rows = _rows(cli("survey", partial, "--json"))
    assert len(rows) == len(ERAS)
    assert all(r["missing"] for r in rows)


def test_a_modeling_file_that_does_not_parse_is_failed_with_its_line(repository: Path, cli: Cli) -> None:
    (repository / "modeling_qwen.py").write_text("class A:\n    c_attn = (\n")
    broken = _commit(repository, "broken")
    (repository / "modeling_qwen.py").write_bytes(_source("sdpa") + b"# repaired\n")
    _commit(repository, "repaired")
    result = cli("survey", repository, "--fail-on", "failed", "--json")
    assert result.code == 1
    assert "parse failed" in result.err
    row = next(r for r in json.loads(result.out)["revisions"] if r["revision"] == broken)
    assert [(o["codemod"], o["status"], o["line"]) for o in row["outcomes"]] == [("parse", "failed", 2)]
    assert row["patchable"] is False


def test_fail_on(repository: Path, cli: Cli) -> None:
    assert cli("survey", repository, "--fail-on", "declined", "--fail-on", "failed").code == 0
    result = cli("survey", repository, "--recipe", "documented", "--fail-on", "declined")
    assert result.code == 1
    assert "drop-causal-mask declined" in result.err
    assert "modeling_qwen.py:" in result.err
    assert cli("survey", repository, "--fail-on", "absent").code == 1
    assert cli("survey", repository, "--fail-on", "applied").code == 2


def test_folder_and_single_file(tmp_path: Path, cli: Cli, checkout: Path) -> None:
    folder = tmp_path / "revisions"
    for era in ERAS:
        (folder / era).mkdir(parents=True)
        (folder / era / "backbone.py").write_bytes(_source(era))
    shutil.copy(checkout / "config.json", folder / "sdpa")
    (folder / "notes.txt").write_text("x")
    rows = _rows(cli("survey", folder, "--json"))
    assert [r["path"] for r in rows] == [f"{era}/backbone.py" for era in sorted(ERAS)]
    with_config = [r["path"] for r in rows if any(o["codemod"].startswith("config:") for o in r["outcomes"])]  # type: ignore[attr-defined]
    assert with_config == ["sdpa/backbone.py"]
    (single,) = _rows(cli("survey", folder / "sdpa" / "backbone.py", "--json"))
    assert single["path"] == "backbone.py"
    assert cli("survey", folder, "--since", "HEAD").code == 2


def test_nothing_to_survey_is_refused(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    assert cli("survey", tmp_path).code == 3
    assert cli("survey", tmp_path / "none").code == 3
    git("init", cwd=tmp_path)
    assert cli("survey", tmp_path).code == 3


def test_git_missing_is_said_plainly(repository: Path, tmp_path: Path) -> None:
    done = process("survey", repository, env={"PATH": str(tmp_path)})
    assert done.returncode == 4
    assert "git is not installed" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_damaged_repository_is_one_line(repository: Path, cli: Cli) -> None:
    shutil.rmtree(repository / ".git" / "objects")
    result = cli("survey", repository)
    assert result.code == 3
    assert "has no objects" in result.err
    assert result.err.count("\n") == 1


def test_markdown_and_plain_matrix_have_a_row_per_revision_and_a_column_per_codemod(
    repository: Path, cli: Cli
) -> None:
    markdown = cli("survey", repository, "--markdown").out
    lines = markdown.splitlines()
    heads = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert heads[:3] == ["revision", "date", "era"]
    assert heads[-1] == "config"
    assert "early-present" in heads
    assert [line.count("|") for line in lines[: len(ERAS) + 2]] == [len(heads) + 1] * (len(ERAS) + 2)
    plain = cli("survey", repository).out.splitlines()
    assert "early-present" in plain[0]
    assert sum("modeling_qwen.py" in line and "applied" in line for line in plain) == len(ERAS)
    assert plain[-1].startswith(f"{len(ERAS)} revisions (0 in the catalogue); {len(ERAS)} can be patched")
    assert cli("survey", repository, "--json", "--markdown").code == 2


def test_equal_contents_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    real = edits.outcomes

    def counting(*arguments: Any) -> Any:
        tried.append(1)
        return real(*arguments)

    monkeypatch.setattr(edits, "outcomes", counting)
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.py").write_bytes(_source("sdpa"))
    rows = survey.run(history.FolderSource(tmp_path), ["static"], 512)
    assert len(rows) == 3
    assert len(tried) == 1


@pytest.mark.usefixtures("processes")
def test_processes_give_what_one_process_gives(repository: Path) -> None:
    source = history.GitSource(repository)
    calls: list[tuple[int, int]] = []
    together = survey.run(source, ["static"], 512, lambda done, total: calls.append((done, total)), 2)
    assert together == survey.run(source, ["static"], 512, workers=1)
    assert calls[-1][0] == calls[-1][1] >= len(ERAS)


def test_a_revision_costs_under_its_share_of_a_minute(tmp_path: Path) -> None:
    """A hundred upstream-sized revisions in 60 s on two cores is 1.2 s of processor time each, at most."""
    count = 4
    for i in range(count):
        source = _source("sdpa")
        padding = b"".join(b"class Unrelated%d:\n    value = %d\n\n\n" % (n, i) for n in range(250))
        (tmp_path / f"r{i}.py").write_bytes(source + padding)
        assert (source + padding).count(b"\n") > 1400
    started = time.process_time()
    rows = survey.run(history.FolderSource(tmp_path), ["static"], 512, workers=1)
    assert len(rows) == count
    assert time.process_time() - started < 1.2 * count


# --- the catalogue


def test_record_adds_revisions_once_and_refreshes_what_is_expected(
    repository: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "catalogue.json"
    monkeypatch.setenv(revisions.VARIABLE, str(file))
    assert f"{len(ERAS)} revisions added, 0 refreshed" in cli("survey", repository, "--record", "here").err
    first = file.read_bytes()
    assert f"0 revisions added, {len(ERAS)} refreshed" in cli("survey", repository, "--record", "there").err
    assert file.read_bytes() == first
    for known in revisions.load().values():
        assert known.origin == "here"
        assert set(known.expected) == set(edits.RECIPES)
        assert known.date
        assert known.revision
    text = file.read_text()
    assert "def " not in text, "facts only, no code"
    assert f"({len(ERAS)} in the catalogue)" in cli("survey", repository).out


def test_the_shipped_catalogue_is_well_formed() -> None:
    catalogue = revisions.load()
    assert revisions.dump(catalogue) == revisions.path().read_bytes(), "as the program would write it"
    origins = {known.origin for known in catalogue.values()}
    assert len(catalogue) >= 40
    assert any("Qwen-7B" in origin for origin in origins)
    assert any("modelscope 1.8.1" in origin for origin in origins)
    for known in catalogue.values():
        assert len(known.sha256) == 64
        for recipe in edits.RECIPES:
            statuses = {s for sites in known.expected[recipe].values() for s in sites}
            assert statuses <= {"applied", "already", "absent", "declined"}, "no revision may fail"
        if "Qwen-7B" in known.origin or "modelscope" in known.origin:
            assert "declined" not in {s for sites in known.expected["static"].values() for s in sites}


@pytest.mark.upstream
def test_real_history_ends_as_the_catalogue_expects(upstream: Path) -> None:
    """Every known revision: the recorded outcomes under both recipes; nothing may fail on any revision."""
    catalogue = revisions.load()
    rows = survey.run(history.open_source(upstream, None), list(edits.RECIPES), 512)
    known = 0
    for row in rows:
        if row.verdict is None or not row.verdict.era:
            continue
        for recipe in edits.RECIPES:
            found = [o for o in matrix.outcomes(row, recipe) if not o.codemod.startswith("config:")]
            assert "failed" not in {o.status.value for o in found}, matrix.label(row)
            assert all(o.reason for o in found)
            if row.verdict.sha256 in catalogue:
                known += 1
                expected = catalogue[row.verdict.sha256].expected[recipe]
                assert matrix.by_codemod(found) == expected, matrix.label(row)
    assert known, f"{upstream} holds no catalogued revision"


@pytest.mark.upstream
def test_a_second_run_on_real_history_changes_no_byte(upstream: Path) -> None:
    import codemods

    source = history.open_source(upstream, None)
    rows = survey.run(source, ["static"], 512)
    keys = sorted({row.item.key for row in rows if row.verdict and row.verdict.era})
    for key, data in source.read(keys):
        assert data is not None
        once = codemods.run(data, "static")
        assert codemods.run(once.code, "static").code == once.code, key


def test_a_summary_is_added_to_the_job_s_page(
    repository: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another step's part of the page stays, and what goes to stdout is as it was."""
    page = tmp_path / "page.md"
    page.write_text("# Tests\n\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    assert len(_rows(cli("survey", repository, "--json"))) == len(ERAS)
    matrix_only = cli("survey", repository, "--markdown").out
    text = page.read_text()
    assert text.startswith("# Tests\n\n## Survey of ")
    assert matrix_only.strip() in text


def test_a_summary_tells_a_failure_and_a_quiet_day(repository: Path, cli: Cli, tmp_path: Path) -> None:
    """Whoever opens the page of a red job, or of a green one without news, reads which it is."""
    page = tmp_path / "page.md"
    failed = cli("survey", repository, "--fail-on", "absent", "--summary", page)
    assert failed.code == 1 and "| absent |" in page.read_text()
    quiet = cli("survey", repository, "--since", "HEAD", "--fail-on", "declined", "--summary", page)
    assert quiet.code == 0
    assert page.read_text().endswith("since HEAD, recipe static\n\nNo revision of Qwen modeling code.\n\n")
    nowhere = cli("survey", repository, "--summary", tmp_path / "none" / "page.md")
    assert nowhere.code == 4 and "page.md" in nowhere.err
