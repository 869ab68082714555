"""What a patch would do to a checkout: from the files on disk and the receipt to new bytes and outcomes.

Every run starts from the unpatched text, so a patch does not depend on what an earlier patch left behind.
Which text is the unpatched one is decided per file, from the receipt's hashes:

- no receipt, or the file is the original the receipt knows: the file on disk;
- the file is what the patch wrote: the original in the receipt;
- the file is neither, and the receipt's recipe would change it: somebody pulled a new upstream text; the file
  on disk (that is how re-running after an upstream pull re-applies);
- the file is neither, and the receipt's recipe finds nothing to do in it: the patched file was edited by
  hand; its edits are kept, and the original stays the one in the receipt.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from codemods.framework.base import Outcome, Status
from golden import revisions
from golden.revisions import Revision
from qwen_surgery.errors import Refused, ToolFailed
from qwen_surgery.files import digest
from qwen_surgery.patching import edits
from qwen_surgery.patching.receipt import FileRecord, Receipt
from qwen_surgery.weights.quantised import Release

if TYPE_CHECKING:
    from qwen_surgery.checkout import Checkout


#: The permission bits of a file that a patch creates.
_MODE = 0o644


class Origin(str, Enum):
    """Where a file on disk stands towards the receipt."""

    FRESH = "fresh"  #: no receipt speaks of it
    ORIGINAL = "original"  #: the original the receipt knows (somebody put it back)
    PATCHED = "patched"  #: exactly what the patch wrote
    PULLED = "pulled"  #: a new upstream text that came after the patch
    EDITED = "edited"  #: the patched text with edits by hand


class Declined(Refused):
    """A required edit was declined or failed; ``plan`` has the outcomes."""

    def __init__(self, plan: Patch, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.plan = plan


@dataclass(frozen=True)
class Patch:
    """A patch not yet written. ``current``, ``reference``, ``result`` hold all Python files and config.json.

    ``current`` is on disk now, ``reference`` the unpatched text, ``result`` the text after the patch.
    """

    checkout: Checkout
    recipe: str
    seq_length: int
    skip: tuple[str, ...]
    receipt: Receipt | None
    origins: dict[str, Origin]
    current: dict[str, bytes]
    reference: dict[str, bytes]
    result: dict[str, bytes]
    outcomes: dict[str, tuple[Outcome, ...]]
    blocking: tuple[tuple[str, Outcome], ...]
    notes: tuple[str, ...]

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the files whose bytes on disk would change."""
        return tuple(name for name in self.outcomes if self.result[name] != self.current[name])

    @property
    def lent(self) -> frozenset[str]:
        """Names of the files that the checkout does not hold yet."""
        return frozenset((self.checkout.modeling,) if self.checkout.lent else ())

    @property
    def edited_files(self) -> tuple[str, ...]:
        """Names of the files that differ from the unpatched text after the patch."""
        return tuple(name for name in self.outcomes if self.result[name] != self.reference[name])

    @property
    def shown(self) -> dict[str, tuple[Outcome, ...]]:
        """The outcomes as they are now: what an earlier patch applied and still stands is ``already``."""
        return {
            name: found if self.origins[name] is not Origin.PATCHED or name in self.changed else _done(found)
            for name, found in self.outcomes.items()
        }

    def diff(self, prefix: str = "") -> bytes:
        """A unified diff of everything that would change, for ``git apply``; *prefix* goes before names."""
        return b"".join(diff(self.current[n], self.result[n], prefix + n) for n in self.changed)

    def known(self) -> Revision | None:
        """The catalogued revision with the bytes of the unpatched modeling file."""
        try:
            return revisions.find(digest(self.reference[self.checkout.modeling]))
        except ValueError as error:
            raise ToolFailed(str(error)) from None

    def era(self) -> str:
        """The era of the unpatched modeling file, by its structure."""
        name = self.checkout.modeling
        if self.reference[name] == self.current[name]:
            return self.checkout.era
        return edits.era(self.reference[name])

    def revision_line(self) -> str:
        """One line: whether the catalogue knows this revision, and whether its outcomes are as recorded."""
        known = self.known()
        if known is None:
            return f"new revision (era {self.era()}): outcomes proven by checks only"
        expected = known.expected.get(self.recipe)
        found = by_codemod(self.outcomes[self.checkout.modeling])
        if expected is not None and not self.skip and self.from_reference and found != expected:
            return f"known revision {known}, but its outcomes differ from the catalogue's"
        return f"known revision {known}"

    @property
    def from_reference(self) -> bool:
        """Whether the outcomes are those of the unpatched text (not of one edited by hand)."""
        return Origin.EDITED not in self.origins.values()


def _done(found: tuple[Outcome, ...]) -> tuple[Outcome, ...]:
    return tuple(
        dataclasses.replace(o, status=Status.ALREADY, reason=f"patched before: {o.reason}")
        if o.status is Status.APPLIED
        else o
        for o in found
    )


def by_codemod(outcomes: Iterable[Outcome]) -> dict[str, list[str]]:
    """The statuses of each codemod's sites, in order: what the catalogue records.

    Of a codemod that only reads, each status once: how many sites it has depends on the sizes in config.json,
    and the catalogue knows a revision by its code.
    """
    from codemods.framework import registry

    reading = {name for name in registry.BUILTIN if not registry.get(name).edits}
    result: dict[str, list[str]] = {}
    for outcome in outcomes:
        statuses = result.setdefault(outcome.codemod, [])
        if outcome.codemod not in reading or outcome.status.value not in statuses:
            statuses.append(outcome.status.value)
    return result


def make(checkout: Checkout, recipe: str, seq_length: int, skip: Sequence[str] = ()) -> Patch:
    """Plan the patch of *checkout*; writes nothing. Refused when an edit by hand would be lost."""
    receipt = Receipt.load(checkout.path)
    modeling = checkout.modeling
    current = checkout.read_files()
    origins = _origins(checkout.path, current, receipt, modeling)
    reference = dict(current)
    start = dict(current)
    for name, origin in origins.items():
        if receipt is not None and origin in (Origin.PATCHED, Origin.EDITED):
            reference[name] = receipt.original(checkout.path, name)
            start[name] = reference[name] if origin is Origin.PATCHED else current[name]
    _keep_hand_edits(checkout, origins, receipt, recipe, seq_length, skip)
    done = edits.apply(modeling, start, recipe, seq_length, skip, reference[edits.CONFIG])
    return Patch(
        checkout=checkout,
        recipe=recipe,
        seq_length=seq_length,
        skip=tuple(skip),
        receipt=receipt,
        origins=origins,
        current=current,
        reference=reference,
        result={**current, **done.files},
        outcomes=done.outcomes,
        blocking=done.blocking(),
        notes=(*done.notes, *_of_weights(checkout.path)),
    )


def _of_weights(folder: Path) -> tuple[str, ...]:
    """What is to be known of quantised weights before they are exported."""
    try:
        release = Release.of(folder)
    except Refused as error:
        return (f"its weights cannot be exported: {error}",)
    return () if release is None else (f"quantised ({release}): build keeps the integers as they are",)


def _origins(
    root: Path, current: dict[str, bytes], receipt: Receipt | None, modeling: str
) -> dict[str, Origin]:
    names = (modeling, edits.CONFIG)
    found = dict.fromkeys(names, Origin.FRESH)
    if receipt is None:
        return found
    unknown = []
    for name in names:
        record = receipt.files.get(name)
        if record is None:
            continue
        now = digest(current[name])
        if now == record.after:
            found[name] = Origin.PATCHED
        elif now == record.before:
            found[name] = Origin.ORIGINAL
        else:
            unknown.append(name)
    if unknown:
        config = receipt.original(root, edits.CONFIG) if edits.CONFIG in receipt.files else None
        again = edits.apply(modeling, current, receipt.recipe, receipt.seq_length, receipt.skip, config)
        for name in unknown:
            found[name] = Origin.EDITED if again.files[name] == current[name] else Origin.PULLED
    return found


def _keep_hand_edits(
    checkout: Checkout,
    origins: dict[str, Origin],
    receipt: Receipt | None,
    recipe: str,
    seq_length: int,
    skip: Sequence[str],
) -> None:
    """Another recipe or length starts from the originals, which would drop edits made by hand: refuse."""
    if receipt is None or (recipe, seq_length, tuple(skip)) == (
        receipt.recipe,
        receipt.seq_length,
        receipt.skip,
    ):
        return
    for name, origin in origins.items():
        if origin is Origin.EDITED:
            raise Refused(
                f"{checkout.path / name} was edited by hand after it was patched with recipe"
                f" {receipt.recipe}, length {receipt.seq_length}; other options would lose those edits",
                hint="take your edits out, restore, then patch again",
            )


def refuse_declined(plan: Patch) -> None:
    """Raise Declined when a required edit was declined or failed, naming the first and the count."""
    if not plan.blocking:
        return
    name, outcome = plan.blocking[0]
    more = f" (and {len(plan.blocking) - 1} more)" if len(plan.blocking) > 1 else ""
    where = f"{plan.checkout.path / name}" + (f":{outcome.line}" if outcome.line else "")
    raise Declined(
        plan,
        f"{where}: {outcome.codemod} {outcome.status.value}: {outcome.reason}{more}",
        hint=f"qwen-surgery explain {outcome.codemod}",
    )


def next_receipt(plan: Patch, versions: dict[str, str], time: str, revision: str) -> Receipt:
    """The receipt of *plan* once it is written.

    Modes of files already patched stay as first recorded. A file edited by hand keeps its record, so that
    restore goes on refusing to overwrite the edits.
    """
    files = {}
    for name in plan.edited_files:
        old = plan.receipt.files.get(name) if plan.receipt else None
        if old is not None and plan.origins[name] is Origin.EDITED:
            files[name] = old
            continue
        known = old is not None and plan.origins[name] is Origin.PATCHED
        before, after = digest(plan.reference[name]), digest(plan.result[name])
        if old is not None and known:
            files[name] = FileRecord(before, after, old.mode, old.symlink, old.created)
            continue
        path = plan.checkout.path / name
        if name in plan.lent:
            files[name] = FileRecord(before, after, _MODE, created=True)
            continue
        symlink = str(path.readlink()) if path.is_symlink() else ""
        files[name] = FileRecord(before, after, path.stat().st_mode & 0o777, symlink)
    return Receipt(plan.recipe, plan.seq_length, plan.skip, files, plan.outcomes, versions, time, revision)


def same_state(plan: Patch, receipt: Receipt) -> bool:
    """Whether the receipt on disk already says what *receipt* would say (times and versions aside)."""
    if plan.receipt is None:
        return not receipt.files
    return (
        dataclasses.replace(
            receipt, time=plan.receipt.time, versions=plan.receipt.versions, outcomes=plan.receipt.outcomes
        )
        == plan.receipt
    )


def diff(old: bytes, new: bytes, name: str) -> bytes:
    """A unified diff of one file that ``git apply`` takes: bytes kept, CR and BOM as they are."""
    if old == new:
        return b""
    a, b = b"a/" + name.encode(), b"b/" + name.encode()
    body = difflib.diff_bytes(difflib.unified_diff, _lines(old), _lines(new), a, b, lineterm=b"\n")
    return b"".join(
        line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n" for line in body
    )


def _lines(data: bytes) -> list[bytes]:
    """Split at LF only, as git does: a lone CR or a form feed ends no line."""
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
