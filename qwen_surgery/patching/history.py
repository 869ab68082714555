"""Where a survey's revisions come from: a git repository's objects, a folder, or one file. Reads only."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

from qwen_surgery.checkout import CONFIG
from qwen_surgery.errors import Refused, ToolFailed, Usage
from qwen_surgery.patching.receipt import STATE

_GITLINK = "160000"
# Set inside git hooks (pre-commit runs in one); they would point git at another repository.
_GIT_LOCATIONS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX")


@dataclass(frozen=True)
class Item:
    """One Python file at one revision. ``key`` names its content, ``config`` its config.json's."""

    revision: str  #: commit hash; '' outside git
    date: str  #: ISO 8601; the commit's, or the file's modification time
    path: str  #: inside the repository or folder
    key: str
    config: str | None = None


class RevisionSource(Protocol):
    """Something that holds revisions."""

    def items(self) -> list[Item]:
        """Every Python file of every revision, oldest first; each change once."""

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        """The contents of *keys*; None for one that is missing (a partial clone)."""


def open_source(path: Path, since: str | None) -> RevisionSource:
    """The source at *path*; *since* limits a git repository to what is not reachable from that revision."""
    if not path.exists():
        raise Refused(f"{path}: no such file or directory")
    if path.is_dir() and _is_repository(path):
        return GitSource(path, since)
    if since is not None:
        raise Usage(f"--since needs a git repository; {path} is none")
    return FolderSource(path)


def _is_repository(path: Path) -> bool:
    bare = all((path / name).exists() for name in ("HEAD", "objects", "refs"))
    return bare or (path / ".git").exists()


@dataclass
class FolderSource:
    """A folder (searched through) or one file."""

    path: Path
    _files: dict[str, Path] = field(default_factory=dict)

    def items(self) -> list[Item]:
        found = []
        for file in self._python_files():
            name = file.relative_to(self.path).as_posix() if self.path.is_dir() else file.name
            config = file.with_name(CONFIG)
            time = datetime.datetime.fromtimestamp(file.stat().st_mtime, datetime.timezone.utc)
            found.append(
                Item(
                    revision="",
                    date=time.isoformat(timespec="seconds"),
                    path=name,
                    key=self._key(file),
                    config=self._key(config) if config.is_file() else None,
                )
            )
        return found

    def _python_files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        files = []
        for root, folders, names in os.walk(self.path):
            folders[:] = sorted(f for f in folders if f not in (".git", STATE))
            files += [Path(root, name) for name in sorted(names) if name.endswith(".py")]
        return [file for file in files if file.is_file()]

    def _key(self, file: Path) -> str:
        key = hashlib.sha256(file.read_bytes()).hexdigest()
        self._files[key] = file
        return key

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        for key in keys:
            yield key, self._files[key].read_bytes()


@dataclass
class GitSource:
    """A git repository, with or without a work tree; only its objects are read, nothing is fetched."""

    path: Path
    since: str | None = None

    def items(self) -> list[Item]:
        raw = self._git(*self._log_arguments())
        changes = list(_parse_log(raw))
        changes.reverse()
        configs = self._configs(changes)
        return [
            Item(c.commit, c.date, c.path, c.blob, configs.get((c.commit, c.path)))
            for c in _without_repeats(changes)
        ]

    def _log_arguments(self) -> list[str]:
        arguments = ["log", "--all", "--date-order", "-z", "--raw", "--no-abbrev", "--no-renames", "-m"]
        arguments += ["--diff-filter=AMT", "--format=%x01%H%x02%cI%x02%P"]
        if self.since is not None:
            known = self._run(
                "rev-parse", "--verify", "--quiet", "--end-of-options", self.since + "^{commit}"
            )
            if known.returncode:
                raise Usage(f"--since: {self.path} has no revision {self.since!r}")
            arguments += ["--not", known.stdout.decode().strip()]
        return [*arguments, "--", "*.py"]

    def _configs(self, changes: list[_Change]) -> dict[tuple[str, str], str]:
        """(commit, path) -> blob of the config.json in the same folder at that commit."""
        wanted = sorted({(c.commit, c.path) for c in changes})
        names = [f"{commit}:{PurePosixPath(path).with_name(CONFIG)}" for commit, path in wanted]
        usable = [i for i, name in enumerate(names) if "\n" not in name]
        with _lines_file(names[i] for i in usable) as stdin, self._objects_only() as only:
            answer = self._git("cat-file", "--batch-check", stdin=stdin, extra=only).decode(
                "utf-8", "replace"
            )
        found = {}
        for i, line in zip(usable, answer.splitlines(), strict=True):
            parts = line.split(" ")
            if len(parts) == 3 and parts[1] == "blob":
                found[wanted[i]] = parts[0]
        return found

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        with (
            _lines_file(keys) as stdin,
            self._objects_only() as only,
            self._start("cat-file", "--batch", stdin=stdin, extra=only) as process,
        ):
            assert process.stdout is not None
            while header := process.stdout.readline():
                parts = header.decode().split()
                if len(parts) != 3 or parts[1] in ("missing", "ambiguous"):
                    yield parts[0], None
                    continue
                data = process.stdout.read(int(parts[2]))
                process.stdout.read(1)
                yield parts[0], data

    def _command(self, *arguments: str) -> list[str]:
        return ["git", "-C", str(self.path), "--no-pager", *arguments]

    @contextlib.contextmanager
    def _objects_only(self) -> Iterator[dict[str, str]]:
        """The environment that makes git see this repository's objects and nothing of its configuration.

        In a partial clone git would otherwise ask the remote for each object it lacks, or die trying.
        """
        objects = self.path / self._git("rev-parse", "--git-path", "objects").decode().strip("\n")
        form = self._git("rev-parse", "--show-object-format").decode().strip()
        with tempfile.TemporaryDirectory(prefix="qwen-surgery-") as bare:
            self._git("init", "--quiet", "--bare", "--template=", f"--object-format={form}", bare)
            yield {"GIT_DIR": bare, "GIT_OBJECT_DIRECTORY": str(objects.absolute())}

    def _start(self, *arguments: str, stdin: int, extra: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command(*arguments),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**_environment(), **extra},
        )

    def _run(
        self, *arguments: str, stdin: int = subprocess.DEVNULL, extra: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        environment = {**_environment(), **(extra or {})}
        try:
            return subprocess.run(
                self._command(*arguments), stdin=stdin, capture_output=True, env=environment, check=False
            )
        except FileNotFoundError:
            raise ToolFailed(
                "git is not installed, and a repository's revisions are read with it",
                hint="install git, or survey a folder of files",
            ) from None

    def _git(
        self, *arguments: str, stdin: int = subprocess.DEVNULL, extra: Mapping[str, str] | None = None
    ) -> bytes:
        done = self._run(*arguments, stdin=stdin, extra=extra)
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
            raise ToolFailed(f"git {arguments[0]} failed in {self.path}: {said[0]}")
        return done.stdout


def _environment() -> dict[str, str]:
    """git's surroundings: the repository that PATH is, whatever GIT_DIR says; no prompt, no lock taken."""
    return {
        **{name: value for name, value in os.environ.items() if name not in _GIT_LOCATIONS},
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_OPTIONAL_LOCKS": "0",
        "LC_ALL": "C",
    }


@contextlib.contextmanager
def _lines_file(lines: Iterable[str]) -> Iterator[int]:
    """A temporary file with one line per text, as a descriptor to read from: no deadlock on long input."""
    with tempfile.TemporaryFile() as file:
        for line in lines:
            file.write(line.encode("utf-8", "surrogateescape") + b"\n")
        file.flush()
        file.seek(0)
        yield file.fileno()


@dataclass(frozen=True)
class _Change:
    commit: str
    date: str
    path: str
    blob: str
    merge: bool


def _parse_log(raw: bytes) -> Iterator[_Change]:
    """Read ``git log -z --raw`` with the format above: commits start with \\x01, changes with a colon."""
    commit = date = blob = ""
    merge = skip = False
    for token in raw.decode("utf-8", "surrogateescape").split("\0"):
        text = token.lstrip("\n")
        if text.startswith("\x01"):
            commit, date, parents = text[1:].split("\n")[0].split("\x02")
            merge = " " in parents
            text = text.partition("\n")[2]
            blob = ""
        if text.startswith(":") and not blob:
            fields = text[1:].split(" ")
            skip, blob = fields[1] == _GITLINK, fields[3]
        elif text and blob:
            if not skip:
                yield _Change(commit, date, text, blob, merge)
            blob = ""


def _without_repeats(changes: list[_Change]) -> list[_Change]:
    """A merge lists again what its parents changed; keep of a merge only what is new in it."""
    ordinary = {(c.path, c.blob) for c in changes if not c.merge}
    kept: list[_Change] = []
    seen: set[tuple[str, str]] = set()
    for change in changes:
        content = (change.path, change.blob)
        if not change.merge:
            kept.append(change)
        elif content not in ordinary and content not in seen:
            seen.add(content)
            kept.append(change)
    return kept
