"""Writing a plan to the checkout, and undoing it: the only code that changes a checkout's files."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from qwen_surgery import __version__
from qwen_surgery.checkout import Checkout
from qwen_surgery.errors import Refused
from qwen_surgery.files import digest, locked, read_regular
from qwen_surgery.patching import journal
from qwen_surgery.patching import plan as planning
from qwen_surgery.patching.journal import RECEIPT, STATE, RemoveFile, WriteFile
from qwen_surgery.patching.receipt import FileRecord, Receipt


@dataclass(frozen=True)
class Written:
    """What a patch wrote: the plan, the names of the files whose bytes changed, and notes for the user."""

    plan: planning.Patch
    changed: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Restored:
    """What a restore did: the files brought back, and those that were the original already."""

    files: tuple[str, ...]
    untouched: tuple[str, ...]
    notes: tuple[str, ...]


def patch(
    path: Path,
    recipe: str,
    seq_length: int,
    skip: Sequence[str] = (),
    revision: str = "",
    modeling: Path | None = None,
) -> Written:
    """Plan and write the patch of the checkout at *path*.

    Refused, with nothing written, when a required edit is declined; ToolFailed when the disk does not take
    the files, which then hold their old bytes. *revision* is noted in the receipt. *modeling* is the file to
    patch a copy of where the checkout has no code.
    """
    with _session(path) as notes:
        plan = planning.make(Checkout.open(path, modeling), recipe, seq_length, skip)
        planning.refuse_declined(plan)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        receipt = planning.next_receipt(plan, _versions(), now, revision)
        if plan.changed or not planning.same_state(plan, receipt):
            notes += _notes(plan)
            _commit(plan, receipt)
        return Written(plan, plan.changed, tuple(notes))


def restore(path: Path) -> Restored | None:
    """Bring back the original bytes and permission bits of the checkout at *path*; None when not patched.

    A file that the patch created is removed.

    Refused, with nothing written, when a file is neither the patched text nor the original.
    """
    if not path.is_dir():
        raise Refused(f"{path} is not a directory")
    with _session(path) as notes:
        receipt = Receipt.load(path)
        if receipt is None:
            return None
        back, untouched = _to_restore(path, receipt)
        journal.commit(path, [*back, RemoveFile(path / STATE / RECEIPT)])
        notes += _lost_links(path, back)
        return Restored(tuple(a.path.name for a in back), untouched, tuple(notes))


def pending(path: Path) -> bool:
    """Whether an interrupted run waits in the checkout at *path* to be finished or undone."""
    return (path / STATE / journal.JOURNAL).exists()


@contextlib.contextmanager
def _session(path: Path) -> Iterator[list[str]]:
    """Hold the checkout, finish or undo an interrupted run, and leave no empty state directory behind."""
    if not path.is_dir():
        Checkout.open(path)  # raises with the right message
    with locked(path):
        try:
            note = journal.recover(path)
            yield [note] if note else []
        finally:
            journal.drop_state(path)


def _versions() -> dict[str, str]:
    return {
        "qwen-surgery": __version__,
        "libcst": metadata.version("libcst"),
        "python": platform.python_version(),
    }


def _notes(plan: planning.Patch) -> list[str]:
    notes = []
    for name, origin in plan.origins.items():
        path = plan.checkout.path / name
        if name in plan.lent and name in plan.changed:
            notes.append(f"{name} is a patched copy of {plan.checkout.modeling_file}, which is left as it is")
            continue
        if origin is planning.Origin.PULLED:
            notes.append(
                f"{name} is neither the patched text nor the known original: taken as a new upstream text"
            )
        if name not in plan.changed:
            continue
        if path.is_symlink():
            notes.append(
                f"{name} was a symbolic link: it is now a file of this checkout's own, what the link leads "
                "to is unchanged; restore brings the link back"
            )
        elif path.stat().st_nlink > 1:
            notes.append(f"{name} had other hard links: they keep the old bytes; restore joins them again")
    return notes


def _commit(plan: planning.Patch, receipt: Receipt) -> None:
    root = plan.checkout.path
    state = root / STATE
    journal.make_state(root)
    actions: list[WriteFile | RemoveFile] = []
    for name, record in receipt.files.items():
        stored = state / record.stored(name)
        if digest(read_regular(stored, journal.LARGEST) or b"") != record.before:
            actions.append(WriteFile(stored, plan.reference[name], 0o600))
            if not record.created:
                _keep_links(root / name, stored)
    for name in plan.changed:
        actions.append(_changed(plan, receipt, name))
    if receipt.files:
        actions.append(WriteFile(state / RECEIPT, receipt.to_bytes()))
    else:
        actions.append(RemoveFile(state / RECEIPT))
    journal.commit(root, actions)


def _changed(plan: planning.Patch, receipt: Receipt, name: str) -> WriteFile | RemoveFile:
    """The new content of *name*; other options that leave it unpatched bring its mode and links back too."""
    if name in plan.lent:
        return WriteFile(plan.checkout.path / name, plan.result[name], receipt.files[name].mode)
    path, result, expect = plan.checkout.path / name, plan.result[name], digest(plan.current[name])
    old = plan.receipt.files.get(name) if plan.receipt else None
    if old is None or name in receipt.files or digest(result) != old.before:
        return WriteFile(path, result, expect=expect)
    if old.created:
        return RemoveFile(path)
    return _back(plan.checkout.path, name, old, result, expect)


def _back(root: Path, name: str, record: FileRecord, original: bytes, expect: str | None) -> WriteFile:
    link = _linked(root / STATE / record.stored(name))
    return WriteFile(
        root / name, original, record.mode, expect, link if link.exists() else None, record.symlink
    )


def _linked(stored: Path) -> Path:
    return stored.with_name(stored.name + ".link")


def _keep_links(path: Path, stored: Path) -> None:
    """Keep one more name of a hard-linked original, so that restore can join the links again."""
    if not path.is_symlink() and path.stat().st_nlink > 1 and not os.path.lexists(_linked(stored)):
        with contextlib.suppress(OSError):  # no hard links here: restore writes a copy of its own
            os.link(path, _linked(stored), follow_symlinks=False)


def _to_restore(path: Path, receipt: Receipt) -> tuple[list[WriteFile | RemoveFile], tuple[str, ...]]:
    back: list[WriteFile | RemoveFile] = []
    untouched: list[str] = []
    for name, record in receipt.files.items():
        target = path / name
        data = read_regular(target, journal.LARGEST, follow=True)
        now = None if data is None else digest(data)
        if now not in (None, record.before, record.after):
            raise Refused(
                f"{target} was changed since: it is neither what patch wrote nor the original; not restored",
                hint=f"patch again to take it as a new upstream text; the originals lie in {path / STATE}",
            )
        if record.created:
            back.append(RemoveFile(target))
            continue
        if now == record.before and _stands_as_before(target, record):
            untouched.append(name)
            continue
        back.append(_back(path, name, record, receipt.original(path, name), now))
    return back, tuple(untouched)


def _stands_as_before(target: Path, record: FileRecord) -> bool:
    """Whether *target*, which holds the original bytes, also has its mode, or is the link it was."""
    if record.symlink:
        return target.is_symlink() and str(target.readlink()) == record.symlink
    return not target.is_symlink() and stat.S_IMODE(target.stat().st_mode) == record.mode


def _lost_links(path: Path, back: Sequence[WriteFile | RemoveFile]) -> list[str]:
    return [
        f"{action.path.name} was a link to {action.symlink}, which does not hold the original any more: "
        "it was restored as a file"
        for action in back
        if isinstance(action, WriteFile) and action.symlink and not (path / action.path.name).is_symlink()
    ]
