"""Many mutants, judged by several processes: ``python -m tests.soundness.run --count 10000 --jobs 16``.

Every era gets as many mutants as any other, a quarter of them under the documented recipe where that one
edits the era at all; with ``--upstream CLONE`` each revision there counts as one more era. Each has a seed of
its own, made of ``--seed`` and its name. Results are appended to ``OUT.parts/`` as they come, one JSON object
a line; a later run with the same ``--json`` goes on where they end. Exits 1 if an edit was unsound.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from golden.eras import ERAS, modeling_source
from tests.soundness.judging import Verdict, judge
from tests.soundness.mutants import mutants

#: An era's mutants are dealt out to this many units of work where there are many processes; each unit makes
#: all of the era's mutants to judge its share of them, so few processes take whole eras.
PARTS = 4
MANY = 8
#: The first eras, where the documented recipe declines by design: nothing there adds the caller's mask.
UNADDED = ("bias-buffer", "registered-mask")


@dataclass(frozen=True)
class Unit:
    """Of *count* mutants of one text, every :data:`PARTS`-th from *part* on, under one recipe."""

    name: str  #: an era, or a revision of the clone
    recipe: str
    count: int
    seed: int
    part: int
    parts: int = PARTS
    clone: str = ""  #: where the revision is, empty for an era

    @property
    def label(self) -> str:
        return f"{self.name}-{self.recipe}-{self.seed}-{self.count}-{self.part}of{self.parts}"


@dataclass(frozen=True)
class Record:
    """One mutant's verdict, and where to find it again."""

    name: str
    recipe: str
    index: int  #: its place among the unit's mutants
    kind: str
    what: str
    verdict: Verdict
    declined: tuple[str, ...]
    change: str  #: the change as a diff, where the edit was unsound


def units(count: int, seed: int, clone: str = "", parts: int = PARTS) -> list[Unit]:
    """Work for about ``count`` mutants in all, never fewer."""
    revisions = _revisions(clone) if clone else []
    names = [(era, "") for era in ERAS] + [(revision, clone) for revision in revisions]
    each = -(-count // len(names))
    found = []
    for name, home in names:
        documented = 0 if name in UNADDED or home else each // 4
        for recipe, share in (("static", each - documented), ("documented", documented)):
            own = zlib.crc32(f"{seed} {name} {recipe}".encode())
            found += [Unit(name, recipe, share, own, k, parts, home) for k in range(parts) if share]
    return found


def records(unit: Unit) -> Iterator[Record]:
    """The verdicts of one unit, as they come."""
    text, others = _texts(unit)
    made = itertools.islice(mutants(text, unit.seed), unit.count)
    for index, mutant in itertools.islice(enumerate(made), unit.part, None, unit.parts):
        judged = judge(mutant.text, unit.recipe, others)
        change = _change(text, mutant.text) if judged.verdict is Verdict.DIFFERS else ""
        yield Record(
            *(unit.name, unit.recipe, index, mutant.kind, mutant.what),
            *(judged.verdict, judged.declined, change),
        )


def _texts(unit: Unit) -> tuple[str, dict[str, str] | None]:
    if not unit.clone:
        return modeling_source(unit.name), None
    names = ("configuration_qwen.py", "qwen_generation_utils.py")
    others = {name: _git(unit.clone, "show", f"{unit.name}:{name}") for name in names}
    return _git(unit.clone, "show", f"{unit.name}:modeling_qwen.py"), others


def _git(clone: str, *args: str) -> str:
    return subprocess.run(["git", "-C", clone, *args], check=True, capture_output=True).stdout.decode()


def _revisions(clone: str) -> list[str]:
    return _git(clone, "log", "--all", "--format=%h", "--", "modeling_qwen.py").split()


def _change(before: str, after: str) -> str:
    lines = ast.unparse(ast.parse(before)).splitlines()
    return "\n".join(difflib.unified_diff(lines, after.splitlines(), "unchanged", "mutant", lineterm=""))


# -- totals --------------------------------------------------------------------------------------------------


def declined_share(counts: Counter[Verdict]) -> float:
    """The share of the harmless mutants that was declined."""
    harmless = counts[Verdict.EQUAL] + counts[Verdict.HARMLESS]
    return counts[Verdict.HARMLESS] / harmless if harmless else 0.0


def line(name: str, counts: Counter[Verdict]) -> str:
    cells = ", ".join(f"{counts[v]} {v.value}" for v in Verdict)
    share = declined_share(counts)
    return f"{name:<24} {sum(counts.values()):>6}: {cells}; {share:.1%} of the harmless declined"


def report(found: list[Record], shown: int = 5) -> str:
    """Totals in all, by era and by kind of change; why harmless ones were declined; unsound edits in full."""
    lines = [line("all", Counter(r.verdict for r in found))]
    for attribute in ("recipe", "name", "kind"):
        groups: dict[str, Counter[Verdict]] = defaultdict(Counter)
        for record in found:
            groups[getattr(record, attribute)][record.verdict] += 1
        lines += ["", *(line(name, groups[name]) for name in sorted(groups))]
    needless = [r for r in found if r.verdict is Verdict.HARMLESS]
    reasons = Counter((r.kind, _general(reason)) for r in needless for reason in r.declined[:1])
    lines += ["", "declined, harmless:", *(f"{n:>6} {k}: {why}" for (k, why), n in reasons.most_common(25))]
    unsound = [r for r in found if r.verdict is Verdict.DIFFERS]
    for r in unsound[:shown]:
        lines += ["", f"UNSOUND {r.name} {r.recipe} {r.index}: {r.what}", r.change]
    lines += [f"UNSOUND {r.name} {r.recipe} {r.index}: {r.what}" for r in unsound[shown:]]
    return "\n".join(lines)


def _general(reason: str) -> str:
    """A reason without its lines, so that like ones can be counted."""
    return " ".join("N" if word.strip("(),").isdigit() else word for word in reason.split())


# -- processes -----------------------------------------------------------------------------------------------


def _work(job: tuple[Unit, Path]) -> Path:
    """Judge one unit and append its verdicts to a file of its own; those there already are not done again."""
    import torch

    torch.set_num_threads(1)
    unit, folder = job
    path = folder / f"{unit.label}.jsonl"
    done = len(path.read_text().splitlines()) if path.exists() else 0
    with path.open("a") as file:
        for record in _after(unit, done):
            file.write(json.dumps(asdict(record)) + "\n")
            file.flush()
    return path


def _after(unit: Unit, done: int) -> Iterator[Record]:
    skipped = Unit(**{**asdict(unit), "part": unit.part + done * unit.parts})
    return records(skipped)


def _read(path: Path) -> Iterator[Record]:
    for text in path.read_text().splitlines():
        found = json.loads(text)
        yield Record(**{**found, "verdict": Verdict(found["verdict"]), "declined": tuple(found["declined"])})


def run(work: Iterable[Unit], jobs: int, folder: Path) -> list[Record]:
    """Every unit's records, by ``jobs`` processes of one thread each."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    tasks = [(unit, folder) for unit in work]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        paths = []
        for path in pool.imap_unordered(_work, tasks):
            paths.append(path)
            print(f"{len(paths)} of {len(tasks)} parts", file=sys.stderr, flush=True)
    return [record for path in sorted(paths) for record in _read(path)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soundness.run", description=__doc__)
    parser.add_argument("--count", type=int, default=10000, help="mutants in all, at least")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--upstream", default="", help="a git clone whose revisions are mutated too")
    parser.add_argument("--json", type=Path, default=Path("soundness.json"), help="where the records go")
    asked = parser.parse_args()
    start = time.monotonic()
    work = units(asked.count, asked.seed, asked.upstream, PARTS if asked.jobs >= MANY else 1)
    found = run(work, asked.jobs, asked.json.with_name(asked.json.name + ".parts"))
    asked.json.write_text(json.dumps([asdict(record) for record in found], indent=0) + "\n")
    print(report(found))
    print(f"\n{time.monotonic() - start:.0f} s with {asked.jobs} processes, seed {asked.seed}")
    return 1 if any(record.verdict is Verdict.DIFFERS for record in found) else 0


if __name__ == "__main__":
    sys.exit(main())
