"""Each rule runs as an ordinary LibCST command, and nothing heavy is imported for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from codemods.framework import registry
from codemods.framework.base import Status
from golden.eras import modeling_source

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", registry.BUILTIN)
def test_the_command_does_what_the_rule_does(name: str) -> None:
    from libcst import parse_module
    from libcst.codemod import CodemodContext, SkipFile

    from codemods.libcst_commands.command import command as command_of

    rule = registry.get(name)
    command = command_of(rule)
    for example in rule.examples:
        context = CodemodContext()
        tree = parse_module(example.before)
        if example.status is Status.APPLIED:
            assert command(context).transform_module(tree).code == example.after
            continue
        with pytest.raises(SkipFile):
            command(context).transform_module(tree)
        assert bool(context.warnings) == (example.status is Status.DECLINED)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["-x"], id="anywhere"),
        pytest.param([], id="in the repository", marks=pytest.mark.repository),
    ],
)
def test_libcst_tool_runs_a_rule(tmp_path: Path, flags: list[str]) -> None:
    """The issue's own command line; -x is needed where .libcst.codemod.yaml is not at hand."""
    file = tmp_path / "modeling_qwen.py"
    file.write_text(modeling_source("sdpa"))
    name = "codemods.disable_torch2.DisableTorch2Command"
    command = [sys.executable, "-m", "libcst.tool", "codemod", "--no-format", *flags, name, str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "SUPPORT_TORCH2 = False\n" in file.read_text()


def test_patching_imports_nothing_heavy() -> None:
    """`patch` answers in a second only without torch, onnx, transformers and LibCST's codemod package."""
    code = (
        "import sys, codemods, codemods.config\n"
        "codemods.run(sys.stdin.read(), 'static')\n"
        "codemods.config.run('{}', 'static', 512)\n"
        "heavy = {'torch', 'onnx', 'transformers', 'libcst.codemod', 'libcst.matchers'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "print('libcst' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=modeling_source("sdpa"), capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.splitlines() == ["[]", "True"], done.stderr
