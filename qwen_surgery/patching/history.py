"""Where a survey's revisions come from: a git repository's objects, a folder, or one file. Reads only.

Of a git repository only objects and refs are used. git runs in a repository of this program's own, made anew
in a temporary folder, whose objects are those of the surveyed one: so nothing that the surveyed repository,
the user or the system configures is in force (programs for signatures, filters, text conversion, monitors,
remotes to fetch from), and replacements and grafts do not count. Refs are read here, as text.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from qwen_surgery.checkout import CONFIG
from qwen_surgery.errors import Refused, ToolFailed, Usage
from qwen_surgery.files import read_regular
from qwen_surgery.patching.receipt import STATE

_GITLINK = "160000"
_HASH = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
#: Names that git itself takes for a ref, less the exotic ones; refs/replace would change what objects hold.
_REF = re.compile(r"refs/(?!replace/)[\w.+@/#=,%-]+")
#: A ref file, or a list of them, is not larger than this; nor are there more of them.
_LARGEST_REFS, _MOST_REFS = 64 << 20, 200_000
#: What is read of one file of a revision; a modeling file has about 60,000 bytes.
LARGEST_FILE = 8 << 20


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
    """A git repository, with or without a work tree: its objects and refs are read, nothing is fetched."""

    path: Path
    since: str | None = None

    def items(self) -> list[Item]:
        with self._reader() as git:
            changes = list(_parse_log(git.run(*self._log_arguments(git))))
            changes.reverse()
            configs = _configs(git, changes)
        return [
            Item(c.commit, c.date, c.path, c.blob, configs.get((c.commit, c.path)))
            for c in _without_repeats(changes)
        ]

    def _log_arguments(self, git: _Git) -> list[str]:
        arguments = ["log", "--all", "--date-order", "-z", "--raw", "--no-abbrev", "--no-renames", "-m"]
        arguments += ["--no-show-signature", "--no-ext-diff", "--no-textconv"]
        arguments += ["--diff-filter=AMT", "--format=%x01%H%x02%cI%x02%P"]
        if self.since is not None:
            known = git.try_run(
                "rev-parse", "--verify", "--quiet", "--end-of-options", self.since + "^{commit}"
            )
            if known.returncode:
                raise Usage(f"--since: {self.path} has no revision {self.since!r}")
            arguments += ["--not", known.stdout.decode().strip()]
        return [*arguments, "--", "*.py"]

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        with (
            self._reader() as git,
            _lines_file(keys) as stdin,
            git.start("cat-file", "--batch", stdin=stdin) as process,
        ):
            assert process.stdout is not None
            while header := process.stdout.readline():
                parts = header.decode().split()
                if len(parts) != 3 or parts[1] in ("missing", "ambiguous"):
                    yield parts[0], None
                    continue
                yield parts[0], _bounded(process.stdout, int(parts[2]))
                process.stdout.read(1)

    @contextlib.contextmanager
    def _reader(self) -> Iterator[_Git]:
        """git in a repository of our own that has this one's objects and refs."""
        store = _store_of(self.path)
        refs = _refs(store)
        head = _head(self.path, store, refs)
        form = "sha256" if any(len(commit) == 64 for commit in (*refs.values(), head)) else "sha1"
        with tempfile.TemporaryDirectory(prefix="qwen-surgery-") as bare:
            git = _Git(self.path, Path(bare), store / "objects")
            git.run("init", "--quiet", "--bare", "--template=", f"--object-format={form}", bare)
            lines = [f"{commit} {name}\n" for name, commit in sorted(refs.items())]
            Path(bare, "packed-refs").write_text("# pack-refs with: sorted\n" + "".join(lines), "utf-8")
            if head:
                Path(bare, "HEAD").write_text(f"{head}\n", "utf-8")
            shallow = _hashes(store / "shallow")
            if shallow:
                Path(bare, "shallow").write_text("".join(f"{commit}\n" for commit in shallow), "utf-8")
            yield git


def _bounded(stream: IO[bytes], size: int) -> bytes:
    """The next *size* bytes; of a giant just more than :data:`LARGEST_FILE`, the rest passed over."""
    data = stream.read(min(size, LARGEST_FILE + 1))
    left = size - len(data)
    while left > 0 and (skipped := stream.read(min(left, 1 << 20))):
        left -= len(skipped)
    return data


def _configs(git: _Git, changes: list[_Change]) -> dict[tuple[str, str], str]:
    """(commit, path) -> blob of the config.json in the same folder at that commit."""
    wanted = sorted({(c.commit, c.path) for c in changes})
    names = [f"{commit}:{PurePosixPath(path).with_name(CONFIG)}" for commit, path in wanted]
    usable = [i for i, name in enumerate(names) if "\n" not in name]
    with _lines_file(names[i] for i in usable) as stdin:
        answer = git.run("cat-file", "--batch-check", stdin=stdin).decode("utf-8", "replace")
    found = {}
    for i, line in zip(usable, answer.splitlines(), strict=True):
        parts = line.split(" ")
        if len(parts) == 3 and parts[1] == "blob":
            found[wanted[i]] = parts[0]
    return found


def _git_folder(path: Path) -> Path:
    """Where the repository at *path* keeps itself: PATH/.git, what a .git file names, or *path* if bare."""
    dot = path / ".git"
    if dot.is_dir():
        return dot
    text = read_regular(dot, 1 << 16)
    if text is None:
        return path
    named = text.decode("utf-8", "surrogateescape").strip()
    if not named.startswith("gitdir:") or "\0" in named:
        raise Refused(f"{dot} names no repository")
    return path / named.removeprefix("gitdir:").strip()


def _store_of(path: Path) -> Path:
    """The folder with the objects and refs: of a linked work tree that of its main repository."""
    folder = _git_folder(path)
    text = read_regular(folder / "commondir", 1 << 16)
    store = folder if text is None else folder / text.decode("utf-8", "surrogateescape").strip("\n\0")
    if not (store / "objects").is_dir():
        raise Refused(f"{path} is no whole git repository: {store} has no objects")
    if (store / "reftable").is_dir():
        raise Refused(
            f"{path} keeps its refs in reftable format, which is not read",
            hint="survey a clone of it: `git clone --ref-format=files`",
        )
    return store


def _text(file: Path) -> str:
    return (read_regular(file, _LARGEST_REFS) or b"").decode("utf-8", "surrogateescape")


def _hashes(file: Path) -> list[str]:
    return [line for line in _text(file).split() if _HASH.fullmatch(line)]


def _refs(store: Path) -> dict[str, str]:
    """Name -> commit (or tag) of every ref; a loose one counts before a packed one. Symbolic refs are left
    out: what they stand for is there under its own name.
    """
    found: dict[str, str] = {}

    def add(name: str, commit: str) -> None:
        usable = _REF.fullmatch(name) and ".." not in name and "//" not in name
        if usable and not name.endswith((".", "/", ".lock")) and _HASH.fullmatch(commit):
            found[name] = commit

    for line in _text(store / "packed-refs").splitlines():
        commit, _, name = line.partition(" ")
        add(name, commit)
    for number, file in enumerate(_files_below(store / "refs")):
        if number > _MOST_REFS:
            raise Refused(f"{store / 'refs'} holds more than {_MOST_REFS:,} refs")
        add(
            file.relative_to(store).as_posix(), (read_regular(file, 1 << 16) or b"").decode("latin-1").strip()
        )
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (file for name in names if not (file := Path(root, name)).is_symlink())


def _head(path: Path, store: Path, refs: Mapping[str, str]) -> str:
    """The commit that HEAD is at; empty where it is at none."""
    said = _text(_git_folder(path) / "HEAD").strip()
    commit = refs.get(said.removeprefix("ref:").strip(), "") if said.startswith("ref:") else said
    return commit if _HASH.fullmatch(commit) else ""


@dataclass(frozen=True)
class _Git:
    """git, run in the repository *own* on the objects in *objects*; *path* is named in errors."""

    path: Path
    own: Path
    objects: Path

    def start(self, *arguments: str, stdin: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command(*arguments),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self._environment(),
            cwd=self.own,
        )

    def try_run(self, *arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(
                self._command(*arguments),
                stdin=stdin,
                capture_output=True,
                env=self._environment(),
                cwd=self.own,
                check=False,
            )
        except FileNotFoundError:
            raise ToolFailed(
                "git is not installed, and a repository's revisions are read with it",
                hint="install git, or survey a folder of files",
            ) from None

    def run(self, *arguments: str, stdin: int = subprocess.DEVNULL) -> bytes:
        done = self.try_run(*arguments, stdin=stdin)
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
            raise ToolFailed(f"git {arguments[0]} failed in {self.path}: {said[0]}")
        return done.stdout

    def _command(self, *arguments: str) -> list[str]:
        return ["git", "--no-pager", *arguments]

    def _environment(self) -> dict[str, str]:
        """Nothing of git's surroundings is passed on: no configuration, no other repository, no tracing."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        return kept | {
            "GIT_DIR": str(self.own),
            "GIT_OBJECT_DIRECTORY": str(self.objects.absolute()),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_SYSTEM": os.devnull,
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_NO_REPLACE_OBJECTS": "1",
            "GIT_NO_LAZY_FETCH": "1",
            "GIT_ALLOW_PROTOCOL": "none",
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
