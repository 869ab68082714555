"""``patch`` and ``restore`` as a user meets them: outcomes, exit codes, diffs, JSON, SARIF, re-runs, undo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from golden.eras import ERAS
from tests.patching.conftest import Result, git, process, snapshot

Cli = Callable[..., Result]
Make = Callable[..., Path]
STATUSES = ("applied", "already", "absent", "declined", "failed")


@pytest.mark.parametrize("era", ERAS)
def test_patch_then_again_then_restore(era: str, make: Make, cli: Cli) -> None:
    checkout = make(era)
    before = snapshot(checkout)
    first = cli("patch", checkout)
    assert first.code == 0, first.err
    assert "applied" in first.out
    assert "written: modeling_qwen.py, config.json" in first.err
    patched = snapshot(checkout)
    assert patched["modeling_qwen.py"] != before["modeling_qwen.py"]
    second = cli("patch", checkout)
    assert second.code == 0
    assert "nothing to change" in second.err
    assert "applied  " not in second.out, "what is done already is not said to be applied again"
    assert snapshot(checkout) == patched
    assert cli("restore", checkout).code == 0
    assert snapshot(checkout) == before


def test_outcomes_name_every_codemod_of_the_recipe_with_line_and_reason(checkout: Path, cli: Cli) -> None:
    data = json.loads(cli("patch", checkout, "--check", "--json").out)
    lines = (checkout / "modeling_qwen.py").read_text().count("\n")
    found = data["outcomes"]["modeling_qwen.py"]
    assert {o["codemod"] for o in found} >= {
        "disable-torch2",
        "scalar-divide",
        "drop-causal-mask",
        "drop-upcast-causal-mask",
        "early-present",
    }
    for o in found:
        assert o["status"] in STATUSES
        assert o["reason"]
        if o["status"] != "absent":
            assert 1 <= o["line"] <= o["end_line"] <= lines
    assert sum(data["counts"].values()) == len(found) + len(data["outcomes"]["config.json"])


def test_check_says_pending_by_exit_code_and_writes_nothing(checkout: Path, cli: Cli) -> None:
    before = snapshot(checkout)
    assert cli("patch", checkout, "--check").code == 1
    assert cli("patch", checkout, "--check", "--diff").code == 1
    assert cli("patch", checkout, "--diff").code == 0
    assert snapshot(checkout) == before
    assert cli("patch", checkout).code == 0
    assert cli("patch", checkout, "--check").code == 0
    assert cli("patch", checkout, "--check", "--seq-length", 1024).code == 1


def test_json_is_alone_on_stdout(checkout: Path, cli: Cli) -> None:
    result = cli("patch", checkout, "--json", "--diff")
    data = json.loads(result.out)
    assert data["changed"] == ["modeling_qwen.py", "config.json"]
    assert data["written"] is False
    assert data["diff"].startswith("--- a/")
    result = cli("patch", checkout, "--json")
    assert json.loads(result.out)["written"] is True
    assert json.loads(cli("patch", checkout, "--json").out)["changed"] == []
    assert json.loads(cli("restore", checkout, "--json").out)["restored"] == [
        "modeling_qwen.py",
        "config.json",
    ]


def test_quiet_prints_nothing_but_errors(checkout: Path, cli: Cli) -> None:
    result = cli("patch", checkout, "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")
    result = cli("restore", checkout, "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_a_required_edit_declined_is_exit_3_and_nothing_is_written(make: Make, cli: Cli) -> None:
    """The oldest code never adds attention_mask: without its triangle it would see the future."""
    checkout = make("bias-buffer")
    before = snapshot(checkout)
    for options in ([], ["--check"], ["--diff"], ["--json"]):
        result = cli("patch", checkout, "--recipe", "documented", *options)
        assert result.code == 3
        assert "drop-causal-mask declined" in result.err
        assert "modeling_qwen.py:" in result.err, "the line is named"
    assert json.loads(result.out)["declined"] is True
    assert snapshot(checkout) == before


def test_skip_leaves_an_edit_out_and_is_not_an_error(checkout: Path, cli: Cli) -> None:
    result = cli("patch", checkout, "--skip", "disable-torch2", "--skip", "precision", "--json")
    assert result.code == 0
    outcomes = [o for found in json.loads(result.out)["outcomes"].values() for o in found]
    skipped = {o["codemod"] for o in outcomes if o["suppressed"]}
    assert skipped == {"disable-torch2", "config:bf16"}
    assert cli("patch", checkout, "--check", "--skip", "disable-torch2", "--skip", "precision").code == 0
    assert cli("patch", checkout, "--check").code == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--skip", "nonsense"],
        ["--recipe", "nonsense"],
        ["--seq-length", "0"],
        ["--seq-length", "x"],
        ["--nope"],
    ],
)
def test_usage_errors_are_exit_2(options: list[str], checkout: Path, cli: Cli) -> None:
    before = snapshot(checkout)
    assert cli("patch", checkout, *options).code == 2
    assert snapshot(checkout) == before


def test_a_suppression_comment_is_honoured_and_an_unused_one_reported(checkout: Path, cli: Cli) -> None:
    file = checkout / "modeling_qwen.py"
    data = json.loads(cli("patch", checkout, "--check", "--json").out)
    line = next(o["line"] for o in data["outcomes"]["modeling_qwen.py"] if o["codemod"] == "scalar-divide")
    lines = file.read_text().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace("\n", "  # qwen-surgery: skip[scalar-divide]\n", 1)
    file.write_text("# qwen-surgery: skip[early-present]\n" + "".join(lines))
    result = cli("patch", checkout, "--check", "--json")
    data = json.loads(result.out)
    divide = [o for o in data["outcomes"]["modeling_qwen.py"] if o["codemod"] == "scalar-divide"]
    assert [o["status"] for o in divide] == ["declined"]
    assert divide[0]["suppressed"]
    assert result.code == 1, "other edits are still pending"
    assert any("modeling_qwen.py:1" in note and "early-present" in note for note in data["notes"])


def test_nothing_of_the_checkout_is_executed(checkout: Path, cli: Cli) -> None:
    trap = checkout.parent / "executed"
    for name in ("modeling_qwen.py", "configuration_qwen.py"):
        file = checkout / name
        file.write_text(f"open({str(trap)!r}, 'w')\n" + file.read_text())
    for command in (["patch"], ["patch", "--check"], ["restore"], ["survey"]):
        cli(*command, checkout)
    assert not trap.exists()


def test_heavy_libraries_are_never_imported(checkout: Path) -> None:
    """Nothing on the way from patch to explain may need torch, or wait for it to load."""
    code = (
        "import sys\n"
        "from qwen_surgery.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        "heavy = {'torch', 'onnx', 'transformers', 'onnxruntime', 'numpy', 'onnxsim'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    commands = (
        ["patch", checkout, "--diff"],
        ["patch", checkout],
        ["restore", checkout],
        ["survey", checkout],
        ["explain"],
        ["explain", "early-present"],
        ["--help"],
    )
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-c", code, *(str(a) for a in command)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)


def test_sarif_has_a_result_for_every_site(checkout: Path, cli: Cli, tmp_path: Path) -> None:
    report = tmp_path / "out.sarif"
    data = json.loads(cli("patch", checkout, "--check", "--json", "--sarif", report).out)
    log = json.loads(report.read_text())
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert all(rule["shortDescription"]["text"] != rule["id"] for rule in run["tool"]["driver"]["rules"])
    sites = [o for found in data["outcomes"].values() for o in found]
    assert len(run["results"]) == len(sites)
    for result, site in zip(run["results"], sites, strict=True):
        assert rules[result["ruleIndex"]] == result["ruleId"] == site["codemod"]
        assert result["kind"] == "fail" or result["level"] == "none", "SARIF 3.27.10"
        region = result["locations"][0]["physicalLocation"].get("region")
        assert (region and region["startLine"]) == site["line"]
    assert cli("patch", checkout, "--check", "--sarif", tmp_path / "none" / "x.sarif").code == 4


def test_sarif_calls_a_declined_required_edit_an_error(make: Make, cli: Cli, tmp_path: Path) -> None:
    report = tmp_path / "out.sarif"
    cli("patch", make("bias-buffer"), "--recipe", "documented", "--sarif", report)
    levels = {r["level"] for r in json.loads(report.read_text())["runs"][0]["results"]}
    assert "error" in levels


def test_known_and_new_revisions_are_told_apart(
    checkout: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "new revision (era sdpa): outcomes proven by checks only" in cli("patch", checkout, "--check").err
    monkeypatch.setenv("QWEN_SURGERY_CATALOGUE", str(tmp_path / "catalogue.json"))
    assert cli("survey", checkout, "--record", "a test").code == 0
    assert "known revision" in cli("patch", checkout, "--check").err
    assert json.loads(cli("patch", checkout, "--json").out)["known_revision"]["origin"] == "a test"
    assert "known revision" in cli("patch", checkout).err, "the unpatched text counts, also after patching"
    catalogue = json.loads((tmp_path / "catalogue.json").read_text())
    catalogue["revisions"][0]["expected"]["static"]["disable-torch2"] = ["absent"]
    (tmp_path / "catalogue.json").write_text(json.dumps(catalogue))
    assert "differ from the catalogue" in cli("patch", checkout, "--check").err
    (tmp_path / "catalogue.json").write_text("[]")
    broken = cli("patch", checkout, "--check")
    assert broken.code == 4
    assert "not a catalogue" in broken.err


# --- diffs


def _as_lf(data: bytes) -> bytes:
    return data


def _as_crlf(data: bytes) -> bytes:
    return data.replace(b"\n", b"\r\n")


def _with_bom(data: bytes) -> bytes:
    return b"\xef\xbb\xbf" + data


def _without_final_newline(data: bytes) -> bytes:
    return data.rstrip(b"\n")


def _with_form_feeds(data: bytes) -> bytes:
    return data.replace(b"\nclass ", b"\n\x0c\nclass ")


FORMS = {
    f.__name__.strip("_"): f for f in (_as_lf, _as_crlf, _with_bom, _without_final_newline, _with_form_feeds)
}


@pytest.mark.parametrize("subdirectory", ["", "models/deep"])
@pytest.mark.parametrize("form", FORMS)
def test_git_apply_takes_the_diff_and_gives_the_patched_bytes(
    form: str, subdirectory: str, make: Make, tmp_path: Path
) -> None:
    repository = tmp_path / "repo"
    repository.mkdir()
    checkout = make("sdpa", f"repo/{subdirectory}" if subdirectory else "repo2")
    if not subdirectory:
        checkout = checkout.rename(repository.with_name("repo3"))
        repository = checkout
    for name in ("modeling_qwen.py", "config.json"):
        file = checkout / name
        if name.endswith("py") or form != "with_form_feeds":
            file.write_bytes(FORMS[form](file.read_bytes()))
    git("init", cwd=repository)
    git("config", "core.autocrlf", "false", cwd=repository)
    git("add", ".", cwd=repository)
    git("commit", "-m", "upstream", cwd=repository)
    for cwd in {repository, checkout}:
        argument = os.path.relpath(checkout, cwd)
        made = process("patch", argument, "--diff", cwd=cwd)
        assert made.returncode == 0, made.stderr
        raw = _stdout_bytes("patch", argument, "--diff", cwd=cwd)
        assert b"\x1b[" not in raw, "no colour in a pipe"
        check = git("apply", "--check", "-v", cwd=cwd, stdin=raw)
        assert check.returncode == 0, check.stderr
        assert b"Checking patch" in check.stderr, "git apply skips in silence what it does not find"
    applied = git("apply", cwd=cwd, stdin=raw)
    assert applied.returncode == 0, applied.stderr
    by_git = {n: (checkout / n).read_bytes() for n in ("modeling_qwen.py", "config.json")}
    git("checkout", ".", cwd=repository)
    assert process("patch", checkout).returncode == 0
    assert by_git == {n: (checkout / n).read_bytes() for n in by_git}
    status = git("status", "--porcelain", cwd=repository).stdout.decode()
    assert ".qwen-surgery" not in status, "the receipt does not show up as an untracked file"


def _stdout_bytes(*arguments: str, cwd: Path) -> bytes:
    command = [sys.executable, "-m", "qwen_surgery", *arguments]
    return subprocess.run(command, capture_output=True, check=True, cwd=cwd).stdout


def test_a_diff_made_elsewhere_applies_in_the_checkout(checkout: Path, tmp_path: Path) -> None:
    git("init", cwd=checkout)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    raw = _stdout_bytes("patch", str(checkout), "--diff", cwd=elsewhere)
    check = git("apply", "--check", "-v", cwd=checkout, stdin=raw)
    assert check.returncode == 0
    assert b"Checking patch modeling_qwen.py" in check.stderr


def test_the_diff_touches_only_lines_that_an_outcome_reports(checkout: Path, cli: Cli) -> None:
    data = json.loads(cli("patch", checkout, "--diff", "--json").out)
    reported = set()
    for o in data["outcomes"]["modeling_qwen.py"]:
        if o["status"] == "applied":
            reported |= set(range(o["line"], o["end_line"] + 1))
    at, removed = 0, set()
    for line in data["diff"].split("--- a/")[1].splitlines()[2:]:
        if line.startswith("@@"):
            at = int(line.split()[1].split(",")[0].lstrip("-"))
        elif line.startswith("-"):
            removed.add(at)
            at += 1
        elif line.startswith(" "):
            at += 1
    assert removed
    assert removed <= reported


def test_colours_on_a_terminal_only(checkout: Path) -> None:
    """`script` gives the command a terminal of its own."""
    import pty

    pid, master = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [sys.executable, "-m", "qwen_surgery", "patch", str(checkout), "--diff"])
    seen = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"\x1b[32m+" in seen
    assert b"\x1b[31m-" in seen
    assert b"disable-torch2" in seen


# --- re-running, upstream pulls, undo


def test_another_length_or_recipe_starts_from_the_originals(checkout: Path, make: Make, cli: Cli) -> None:
    before = snapshot(checkout)
    assert cli("patch", checkout).code == 0
    assert cli("patch", checkout, "--seq-length", 1024, "--recipe", "documented").code == 0
    straight = make("sdpa", "straight")
    assert cli("patch", straight, "--seq-length", 1024, "--recipe", "documented").code == 0
    for name in ("modeling_qwen.py", "config.json"):
        assert (checkout / name).read_bytes() == (straight / name).read_bytes()
    assert cli("restore", checkout).code == 0
    assert snapshot(checkout) == before


def test_after_an_upstream_pull_patch_reapplies_and_restore_gives_the_new_upstream_text(
    checkout: Path, cli: Cli
) -> None:
    file = checkout / "modeling_qwen.py"
    original = file.read_bytes()
    assert cli("patch", checkout).code == 0
    pulled = original + b"\n\n# a later upstream release\n"
    file.write_bytes(pulled)
    refused = cli("restore", checkout)
    assert refused.code == 3
    assert "modeling_qwen.py was changed since" in refused.err
    assert file.read_bytes() == pulled, "restore refuses rather than clobbers"
    assert cli("patch", checkout, "--check").code == 1
    again = cli("patch", checkout)
    assert again.code == 0
    assert "new upstream text" in again.err
    assert file.read_bytes() not in (original, pulled)
    assert file.read_bytes().endswith(b"# a later upstream release\n")
    assert cli("patch", checkout, "--check").code == 0
    assert cli("restore", checkout).code == 0
    assert file.read_bytes() == pulled


def test_a_pull_that_needs_a_declined_edit_writes_nothing(checkout: Path, cli: Cli) -> None:
    file = checkout / "modeling_qwen.py"
    original = file.read_text()
    assert cli("patch", checkout).code == 0
    file.write_text(original.replace("SUPPORT_TORCH2 =", "SUPPORT_TORCH2 = None\nSUPPORT_TORCH2 ="))
    before = snapshot(checkout)
    if "SUPPORT_TORCH2 = None" not in file.read_text():
        pytest.fail("the fixture has lost its flag")
    assert cli("patch", checkout).code == 3
    assert snapshot(checkout) == before


def test_hand_edits_to_the_patched_file_are_kept_and_never_overwritten(checkout: Path, cli: Cli) -> None:
    file = checkout / "modeling_qwen.py"
    assert cli("patch", checkout).code == 0
    edited = file.read_bytes() + b"\n\n# mine\n"
    file.write_bytes(edited)
    assert cli("patch", checkout).code == 0
    assert file.read_bytes() == edited
    assert cli("restore", checkout).code == 3
    assert cli("patch", checkout, "--seq-length", 1024).code == 3
    assert file.read_bytes() == edited
    file.write_bytes(edited[: -len(b"\n\n# mine\n")])
    assert cli("restore", checkout).code == 0, "with the edit taken out, the way back is open"


def test_git_checkout_of_the_file_counts_as_restored(checkout: Path, cli: Cli) -> None:
    before = snapshot(checkout)
    assert cli("patch", checkout).code == 0
    for name in ("modeling_qwen.py", "config.json"):
        (checkout / name).write_bytes(before[name][0])
    result = cli("restore", checkout)
    assert result.code == 0
    assert "is the original already" in result.out
    assert snapshot(checkout) == before


def test_a_deleted_file_comes_back(checkout: Path, cli: Cli) -> None:
    before = snapshot(checkout)
    assert cli("patch", checkout).code == 0
    (checkout / "modeling_qwen.py").unlink()
    assert cli("restore", checkout).code == 0
    assert snapshot(checkout) == before


def test_restore_without_a_receipt_says_so(checkout: Path, cli: Cli) -> None:
    result = cli("restore", checkout)
    assert (result.code, result.out) == (0, "")
    assert "nothing to restore" in result.err
    assert cli("restore", checkout / "none").code == 3


def test_a_damaged_receipt_or_original_is_refused(checkout: Path, cli: Cli) -> None:
    assert cli("patch", checkout).code == 0
    state = checkout / ".qwen-surgery"
    patched = (checkout / "modeling_qwen.py").read_bytes()
    receipt = (state / "receipt.json").read_bytes()
    (state / "receipt.json").write_text("{}")
    assert cli("patch", checkout).code == cli("restore", checkout).code == 3
    (state / "receipt.json").write_bytes(receipt)
    for original in (state / "originals").iterdir():
        original.write_bytes(b"")
    result = cli("restore", checkout)
    assert result.code == 3
    assert "does not hold the original" in result.err
    assert (checkout / "modeling_qwen.py").read_bytes() == patched


def test_a_hand_patched_file_without_receipt_is_already_done(make: Make, cli: Cli, checkout: Path) -> None:
    """As after following the vendor's guide: all `already`, nothing to write, no receipt."""
    assert cli("patch", checkout).code == 0
    by_hand = make("sdpa", "by_hand")
    (by_hand / "modeling_qwen.py").write_bytes((checkout / "modeling_qwen.py").read_bytes())
    data = json.loads(cli("patch", by_hand, "--json").out)
    statuses = {o["status"] for o in data["outcomes"]["modeling_qwen.py"]}
    assert statuses <= {"already", "absent"}
    assert data["changed"] == ["config.json"]


def test_a_receipt_says_what_was_done_and_by_what(checkout: Path, cli: Cli) -> None:
    assert cli("patch", checkout, "--seq-length", 256).code == 0
    receipt = json.loads((checkout / ".qwen-surgery" / "receipt.json").read_text())
    assert (receipt["recipe"], receipt["seq_length"]) == ("static", 256)
    assert set(receipt["versions"]) == {"qwen-surgery", "libcst", "python"}
    assert set(receipt["files"]) == {"modeling_qwen.py", "config.json"}
    for record in receipt["files"].values():
        assert record["before"] != record["after"]
        assert (checkout / ".qwen-surgery" / record["original"]).is_file()
    assert json.loads((checkout / "config.json").read_text())["seq_length"] == 256
