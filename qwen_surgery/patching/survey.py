"""Every codemod on every revision: the work behind ``qwen-surgery survey``. Nothing is written anywhere."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

from codemods.framework.base import Outcome, Status
from qwen_surgery import families
from qwen_surgery.patching import edits
from qwen_surgery.patching.history import Item, RevisionSource

# Below this many different contents, starting processes costs more than it saves.
_WORTH_PROCESSES = 4


@dataclass(frozen=True)
class FileVerdict:
    """What a recipe makes of one content of a modeling file (and the config.json beside it, if any)."""

    sha256: str
    era: str
    outcomes: dict[str, tuple[Outcome, ...]]  #: recipe -> sites, in order


@dataclass(frozen=True)
class SurveyRow:
    """One revision of one modeling file; ``missing`` when a partial clone lacks its content."""

    item: Item
    verdict: FileVerdict | None

    @property
    def missing(self) -> bool:
        return self.verdict is None


def looks_like_modeling(path: str) -> bool:
    """Whether a file that cannot be read is worth reporting: its name is one that modeling code goes by."""
    name = PurePosixPath(path).name.lower()
    return name.endswith(".py") and ("modeling" in name and "qwen" in name and "qwen2" not in name)


def run(
    source: RevisionSource,
    recipes: Sequence[str],
    seq_length: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    workers: int | None = None,
) -> list[SurveyRow]:
    """Try *recipes* on every modeling file of *source*, judged by content; equal contents are tried once.

    *progress* is called with how many of how many contents are done. *workers* is the number of processes;
    by default one per available core.
    """
    items = source.items()
    contents = {key: data for key, data in source.read(sorted({i.key for i in items})) if _candidate(data)}
    configs = {i.config for i in items if i.key in contents and i.config}
    config_texts = dict(source.read(sorted(configs)))
    items = [item for item in items if item.key in contents]
    pairs = sorted({(item.key, item.config or "") for item in items})
    verdicts: dict[tuple[str, str], FileVerdict | None] = {}
    jobs = [
        (pair, data, config_texts.get(pair[1]), item_name)
        for pair in pairs
        if (data := contents[pair[0]]) is not None
        and (item_name := next(i.path for i in items if (i.key, i.config or "") == pair))
    ]
    with _executor(len(jobs), workers) as executor:
        waiting = {
            pair: executor.submit(judge, data, config, name, tuple(recipes), seq_length)
            for pair, data, config, name in jobs
        }
        for done, (pair, future) in enumerate(waiting.items(), 1):
            verdicts[pair] = future.result()
            progress(done, len(waiting))
    return list(_rows(items, contents, verdicts))


def _rows(
    items: Iterable[Item],
    contents: dict[str, bytes | None],
    verdicts: dict[tuple[str, str], FileVerdict | None],
) -> Iterable[SurveyRow]:
    for item in items:
        if contents[item.key] is None:
            if looks_like_modeling(item.path):
                yield SurveyRow(item, None)
            continue
        verdict = verdicts[(item.key, item.config or "")]
        if verdict is not None:
            yield SurveyRow(item, verdict)


def _candidate(data: bytes | None) -> bool:
    """Whether a content may be a family's modeling code: spares parsing thousands of other files."""
    return data is None or any(family.may_be_modeling(data) for family in families.all_families())


def judge(
    data: bytes, config: bytes | None, name: str, recipes: tuple[str, ...], seq_length: int
) -> FileVerdict | None:
    """Try *recipes* on one content; None when it is no known family's modeling code.

    A file called like modeling code that does not parse gets a ``failed`` outcome that says where.
    """
    from qwen_surgery.files import digest

    try:
        era = edits.era(data)
    except edits.SourceError as error:
        if not looks_like_modeling(name):
            return None
        broken = Outcome("parse", Status.FAILED, str(error), error.line)
        return FileVerdict(digest(data), "", dict.fromkeys(recipes, (broken,)))
    if not era:
        return None
    return FileVerdict(
        digest(data),
        era,
        {recipe: edits.outcomes(data, config, recipe, seq_length) for recipe in recipes},
    )


class _Here(Executor):
    """Runs a job at once, in this process."""

    def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        future: Future[object] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def _executor(jobs: int, workers: int | None) -> Executor:
    count = min(jobs, workers or len(os.sched_getaffinity(0)))
    if jobs < _WORTH_PROCESSES or count < 2:
        return _Here()
    edits.warm()  # what is imported before the fork is shared by all processes
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("fork"))
