"""``python docs/site/screens.py``: pictures of the real program, for docs/screens.

What commands show on a terminal of 100 columns becomes SVG, colours and all; the page of a verification is
photographed by chromium. Takes a few minutes: a small model is built and verified for it.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

from golden.eras import ERAS, make_checkout, modeling_source
from golden.speaking.model import TEXT, make_chat_checkout

COLUMNS = 100
FOLDER = Path(__file__).absolute().parent.parent / "screens"
#: rich's own frame without the font that it would fetch from the network.
FRAME = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g></svg>
"""


def main() -> None:
    """Make every picture."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _history(folder / "upstream", make_checkout(folder / "Qwen-tiny", hidden=16, heads=2, vocab=512))
        _picture("diff", folder, "patch", "Qwen-tiny", "--diff")
        _picture("survey", folder, "survey", "upstream")
        make_chat_checkout(folder / "Qwen-tiny-Chat")
        built = ("--seq-length", "128", "--out", "out")
        _picture("plan", folder, "build", "Qwen-tiny-Chat", *built, "--dry-run")
        _run(folder, "build", "Qwen-tiny-Chat", *built, "--trust-remote-code")
        _picture("build", folder, "build", "Qwen-tiny-Chat", *built, "--trust-remote-code")
        _page(folder, *(str(bmodel) for bmodel in (folder / "out").glob("*/*.bmodel")))


def _run(folder: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "qwen_surgery", *words], cwd=folder, check=True)


def _history(repository: Path, checkout: Path) -> None:
    """A repository with a commit per era, like upstream's."""
    repository.mkdir()
    config = ("-c", "user.name=upstream", "-c", "user.email=upstream@example.org")
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    shutil.copy(checkout / "config.json", repository)
    for i, era in enumerate(ERAS):
        source = modeling_source(era)
        (repository / "modeling_qwen.py").write_bytes(
            source if isinstance(source, bytes) else source.encode()
        )
        date = f"2023-{8 + i // 2:02}-{1 + 14 * (i % 2):02}T12:00:00"
        dated = {**os.environ, "GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        subprocess.run(["git", "add", "-A"], cwd=repository, check=True)
        subprocess.run(["git", *config, "commit", "-qm", era], cwd=repository, env=dated, check=True)


def _picture(name: str, folder: Path, *words: str) -> None:
    # A terminal shows the last screen of a bar that is drawn over and over.
    shown = _on_a_terminal(folder, *words).replace("\r\n", "\n").rpartition("\x1b[2K")[2]
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text(f"$ qwen-surgery {' '.join(words)}", "bold"))
    console.print(Text.from_ansi(shown))
    svg = console.export_svg(title=f"qwen-surgery {words[0]}", code_format=FRAME, unique_id=name)
    (FOLDER / f"{name}.svg").write_text("".join(f"{line.rstrip()}\n" for line in svg.splitlines()))


def _on_a_terminal(folder: Path, *words: str) -> str:
    """What the program shows on a terminal: both streams, escapes and all."""
    main, worker = pty.openpty()
    fcntl.ioctl(worker, termios.TIOCSWINSZ, struct.pack("HHHH", 60, COLUMNS, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    command = [sys.executable, "-m", "qwen_surgery", *words]
    with subprocess.Popen(
        command, cwd=folder, env=env, stdin=worker, stdout=worker, stderr=worker
    ) as running:
        os.close(worker)
        shown = b"".join(iter(lambda: _read(main), b""))
    assert running.returncode == 0, shown.decode()
    return shown.decode().replace(f"{folder}/", "")  # a folder that is gone


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end is closed
        return b""


def _page(folder: Path, *bmodels: str) -> None:
    """The first screen of a verification's page, on a light background."""
    given = ("--seq-length", "128", "--level", "source", "--level", "chip", "--trust-remote-code")
    asked = ("--ask", "So what is a bmodel?", "--ask", "Please count to 5.", "--text", str(TEXT))
    words = ("verify", "Qwen-tiny-Chat", *given, *asked, "--html", "page.html")
    _run(folder, *words, *(word for bmodel in bmodels for word in ("--bmodel", bmodel)))
    shot = f"--screenshot={FOLDER / 'page.png'}"
    size = "--window-size=1100,1000"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size, shot]
    subprocess.run([*command, (folder / "page.html").as_uri()], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
