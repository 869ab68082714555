"""The task graph: what runs, what does not run again, and what is on disk at any moment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from qwen_surgery.building.graph import (
    DONE,
    Answer,
    Cost,
    Expansion,
    Graph,
    Store,
    Task,
    duration,
    peak_disk,
    stale,
)
from qwen_surgery.building.runner import Progress, Runner
from qwen_surgery.building.step import Step
from qwen_surgery.errors import Refused, SurgeryError, ToolFailed
from qwen_surgery.files import require_disk
from tests.building.actions import Crash, Die, Fail, Overlap, Refuse, Write


def chain(count: Path | None = None, **texts: str) -> Graph:
    """a -> b -> d, a -> c -> d; c is kept, b is not."""
    text = {"a": "a", "b": "b", "c": "c", "d": "d", **texts}

    def task(name: str, *needs: str, keep: bool = False) -> Task:
        step = Write(text[name], count=str(count) if count else "")
        return Task(name, step, needs=needs, cost=Cost(disk=100), keep=keep)

    return Graph([task("d", "b", "c", keep=True), task("b", "a"), task("c", "a", keep=True), task("a")])


def runner(graph: Graph, tmp_path: Path, **more: object) -> Runner:
    return Runner(graph, Store(tmp_path / "store"), tmp_path / "logs", **{"jobs": 2, **more})  # type: ignore[arg-type]


def counted(file: Path) -> list[str]:
    return sorted(file.read_text().split()) if file.exists() else []


def output(graph: Graph, tmp_path: Path, name: str) -> Path:
    return Store(tmp_path / "store").folder(graph.keys[name]) / "out.txt"


def test_a_graph_runs_in_order_and_gives_each_task_its_needs(tmp_path: Path) -> None:
    graph = chain()
    runner(graph, tmp_path).run()
    assert output(graph, tmp_path, "d").read_text() == "d+b+a+c+a"


def test_intermediates_go_as_soon_as_used_and_kept_ones_stay(tmp_path: Path) -> None:
    graph = chain()
    runner(graph, tmp_path).run()
    assert not output(graph, tmp_path, "a").exists()
    assert not output(graph, tmp_path, "b").exists()
    assert output(graph, tmp_path, "c").exists()
    store = Store(tmp_path / "store")
    assert all(store.done(graph.keys[name]) is not None for name in "abcd"), "the records stay"


def test_a_second_run_runs_nothing(tmp_path: Path) -> None:
    count = tmp_path / "count"
    runner(chain(count), tmp_path).run()
    assert counted(count) == ["a", "b", "c", "d"]
    runner(chain(count), tmp_path).run()
    assert counted(count) == ["a", "b", "c", "d"]


def test_a_change_runs_only_what_depends_on_it(tmp_path: Path) -> None:
    count = tmp_path / "count"
    runner(chain(count), tmp_path).run()
    graph = chain(count, b="B")
    runner(graph, tmp_path).run()
    # b's need a was dropped, so a runs again; c is kept and does not.
    assert counted(count) == ["B", "a", "a", "b", "c", "d", "d"]
    assert output(graph, tmp_path, "d").read_text() == "d+B+a+c+a"


def test_a_lost_or_cut_output_is_made_again(tmp_path: Path) -> None:
    graph = chain()
    runner(graph, tmp_path).run()
    final = output(graph, tmp_path, "d")
    final.write_text("d+")
    assert stale(graph, Store(tmp_path / "store"))[-1] == "d"
    runner(graph, tmp_path).run()
    assert final.read_text() == "d+b+a+c+a"


def test_a_damaged_record_is_no_record(tmp_path: Path) -> None:
    graph = chain()
    runner(graph, tmp_path).run()
    marker = Store(tmp_path / "store").folder(graph.keys["d"]) / DONE
    marker.write_text(marker.read_text()[:20])
    assert Store(tmp_path / "store").done(graph.keys["d"]) is None
    runner(graph, tmp_path).run()
    assert json.loads(marker.read_text())["info"] == {"length": 3}


def test_chains_that_part_and_meet_again_start_at_once(tmp_path: Path) -> None:
    """As layers that a text decides do: through eighty of them go more ways than can ever be walked."""
    tasks = [Task("state0", Refuse())]
    for i in range(80):
        tasks.append(Task(f"chosen{i}", Write("c"), needs=(f"state{i}",)))
        tasks.append(Task(f"state{i + 1}", Write("s"), needs=(f"state{i}", f"chosen{i}")))
    with pytest.raises(Refused, match="the input is bad"):
        runner(Graph(tasks), tmp_path).run()


def test_the_task_with_most_behind_it_starts_first(tmp_path: Path) -> None:
    """However short it is itself; with one job at a time the order is the same on every machine."""
    count = str(tmp_path / "count")

    def task(name: str, seconds: float, *needs: str) -> Task:
        return Task(name, Write(name, count=count), needs=needs, cost=Cost(seconds=seconds))

    tasks = [task("long", 5), task("first", 1), task("short", 2), task("second", 3, "first")]
    runner(Graph([*tasks, task("last", 4, "second", "short")]), tmp_path, jobs=1).run()
    assert (tmp_path / "count").read_text().split() == ["first", "second", "short", "long", "last"]


def test_places_do_not_change_a_key_and_params_do() -> None:
    base = Task("a", Write("a", sleep=0.0))
    moved = Task("a", Write("a", sleep=0.1))
    other = Task("a", Write("b"))
    key = Graph([base]).keys["a"]
    assert Graph([moved]).keys["a"] == key
    assert Graph([other]).keys["a"] != key


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([Task("a", Write("a"), needs=("b",)), Task("b", Write("b"), needs=("a",))], "circle"),
        ([Task("a", Write("a"), needs=("x",))], "no task"),
        ([Task("a", Write("a")), Task("a", Write("b"))], "two tasks"),
    ],
)
def test_a_graph_that_cannot_be_is_refused(tasks: list[Task], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Graph(tasks)


@pytest.mark.parametrize(
    ("step", "kind", "text"),
    [
        (Refuse(), Refused, "the input is bad"),
        (Fail(), ToolFailed, "model_deploy failed"),
        (Die(), ToolFailed, "killed by signal 9"),
        (Crash(), SurgeryError, "missing"),
    ],
)
def test_a_failing_task_raises_its_error_and_leaves_nothing(
    tmp_path: Path, step: Step, kind: type[SurgeryError], text: str
) -> None:
    graph = Graph(
        [
            Task("a", step, keep=True),
            Task("b", Write("b"), needs=("a",)),
        ]
    )
    with pytest.raises(kind, match=text) as caught:
        runner(graph, tmp_path).run()
    assert caught.value.exit_code == kind.exit_code
    store = Store(tmp_path / "store")
    assert store.done(graph.keys["a"]) is None
    assert not store.folder(graph.keys["a"]).exists()
    assert not list(store.work.iterdir()), "no half output stays behind"


def test_a_tools_last_words_reach_the_user(tmp_path: Path) -> None:
    graph = Graph([Task("a", Fail())])
    with pytest.raises(ToolFailed) as caught:
        runner(graph, tmp_path).run()
    assert caught.value.log_tail == "last words"
    assert caught.value.signal == 7


def test_a_task_that_the_kernel_kills_says_which_signal_it_was(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed) as caught:
        runner(Graph([Task("a", Die())]), tmp_path).run()
    assert caught.value.signal == 9


def test_a_failure_stops_what_runs_beside_it(tmp_path: Path) -> None:
    import time

    graph = Graph(
        [
            Task("slow", Write("s", sleep=60), cost=Cost(seconds=99)),
            Task("bad", Fail()),
        ]
    )
    started = time.monotonic()
    with pytest.raises(ToolFailed):
        runner(graph, tmp_path).run()
    assert time.monotonic() - started < 30


def test_tasks_that_do_not_fit_in_memory_together_run_one_by_one(tmp_path: Path) -> None:
    def seen(memory: int) -> list[int]:
        place = tmp_path / f"place{memory}"
        place.mkdir()
        tasks = [
            Task(f"t{i}-{memory}", Overlap(place), cost=Cost(memory=memory), keep=True) for i in range(3)
        ]
        graph = Graph(tasks)
        done = runner(graph, tmp_path, jobs=3, memory=100).run()
        return [done[name].info["seen"] for name in graph.order]

    assert seen(60) == [1, 1, 1], "60 and 60 do not go into 100"
    assert seen(200) == [1, 1, 1], "larger than all memory: alone, but it runs"
    assert max(seen(30)) > 1, "three times 30 go into 100"


def test_progress_says_what_happens_and_how_long_it_takes(tmp_path: Path) -> None:
    events: list[str] = []
    etas: list[float] = []

    def watch(progress: Progress, event: str) -> None:
        events.append(event)
        etas.append(progress.eta())

    runner(chain(), tmp_path, watch=watch, jobs=1).run()
    names = [event.split()[1] for event in events if event.startswith("start")]
    assert (names[0], {*names[1:3]}, names[3]) == ("a", {"b", "c"}, "d")
    assert [event for event in events if event] == [
        f"{w} {name}" for name in names for w in ("start", "done")
    ]
    assert etas[0] > 0
    assert etas[-1] == 0


def test_a_chain_is_no_shorter_for_several_jobs() -> None:
    """A build by gptq says twice too early that it will be done, where its layers are thought to share."""
    long = Graph([Task(f"t{i}", Write("x"), needs=(f"t{i - 1}",) if i else ()) for i in range(9)])
    apart = Graph([Task(f"t{i}", Write("x")) for i in range(9)])
    seconds = {f"t{i}": 2.0 for i in range(9)}
    assert [duration(long, seconds, jobs) for jobs in (1, 2, 4)] == [18.0, 18.0, 18.0]
    assert [duration(apart, seconds, jobs) for jobs in (1, 2, 4)] == [18.0, 9.0, 4.5]
    assert duration(long, {"t3": 2.0, "t4": 1.0}, 2) == 3.0, "what is done takes nothing"
    assert duration(long, {}, 2) == 0.0


def test_peak_disk_counts_what_is_held_at_one_time() -> None:
    long = Graph(
        [Task(f"t{i}", Write("x"), needs=(f"t{i - 1}",) if i else (), cost=Cost(disk=100)) for i in range(9)]
    )
    assert peak_disk(long, long.order) == 300, "a chain holds two links; one more may be under way"
    kept = Graph([Task(f"t{i}", Write("x"), cost=Cost(disk=100), keep=True) for i in range(9)])
    assert peak_disk(kept, kept.order) == 1000


def test_a_disk_that_is_too_small_is_said_before_anything_runs(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    graph = Graph([Task("a", Write("a"), cost=Cost(disk=free * 2))])
    with pytest.raises(ToolFailed, match="MB free"):
        runner(graph, tmp_path).run()
    assert not (tmp_path / "logs").exists()
    with pytest.raises(ToolFailed, match="disk"):
        require_disk(tmp_path, free * 2)


def test_results_of_earlier_inputs_are_retired(tmp_path: Path) -> None:
    old, new = chain(), chain(b="B")
    runner(old, tmp_path).run()
    runner(new, tmp_path).run()
    store = Store(tmp_path / "store")
    store.retire(new.keys.values())
    assert not store.folder(old.keys["d"]).exists()
    assert output(new, tmp_path, "d").exists()


def growing(count: Path, first: str = "x") -> Graph:
    """``probe``, which is known; ``next`` follows from what it says, and ``last`` from what that says."""

    def after(name: str, needs: str, more: list[Expansion]) -> Expansion:
        def grow(answers: Mapping[str, Answer]) -> list[Task | Expansion]:
            (answer,) = answers.values()
            text = f"{name}{answer.info['length']}"
            made = Task(
                name, Write(text, count=str(count)), needs=(needs,), cost=Cost(disk=100), keep=True,
                expected={"length": 9},
            )  # fmt: skip
            return [made, *more]

        return Expansion((needs,), grow)

    probe = Task(
        "probe", Write(first, count=str(count)), cost=Cost(disk=100), keep=True, expected={"length": 9}
    )
    return Graph([probe, after("next", "probe", [after("last", "next", [])])])


def test_a_finished_task_adds_tasks_and_these_add_others(tmp_path: Path) -> None:
    graph = growing(tmp_path / "count")
    done = runner(graph, tmp_path).run()
    assert list(done) == ["probe", "next", "last"]
    assert output(graph, tmp_path, "last").read_text() == "last2+next1+x"


def test_a_grown_graph_grows_again_from_the_records_and_runs_nothing(tmp_path: Path) -> None:
    count = tmp_path / "count"
    first, second = growing(count), growing(count)
    runner(first, tmp_path).run()
    done = runner(second, tmp_path).run()
    assert second.keys == first.keys
    assert list(done) == ["probe", "next", "last"]
    assert counted(count) == ["last2", "next1", "x"]


def test_a_lost_result_in_the_middle_of_a_grown_graph_is_made_again_and_no_other(tmp_path: Path) -> None:
    count = tmp_path / "count"
    graph = growing(count)
    runner(graph, tmp_path).run()
    output(graph, tmp_path, "next").unlink()
    runner(growing(count), tmp_path).run()
    assert counted(count) == ["last2", "next1", "next1", "x"]


def test_a_plan_knows_what_will_grow_and_takes_records_for_what_is_done(tmp_path: Path) -> None:
    store, count = Store(tmp_path / "store"), tmp_path / "count"
    graph = growing(count)
    assert graph.grow(store) is False, "nothing has run: nothing is known"
    graph.grow(store, plan=True)
    assert graph.order == ("probe", "next", "last")
    assert peak_disk(graph, stale(graph, store)) == 400
    assert counted(count) == []
    made = growing(count)
    runner(made, tmp_path).run()
    output(made, tmp_path, "last").unlink()
    again = growing(count)
    again.grow(store, plan=True)
    assert stale(again, store) == ("last",), "with the key that the record of the task before gives it"


def test_tasks_are_announced_before_they_run(tmp_path: Path) -> None:
    """Whoever retires old results must know of them by then."""
    count = tmp_path / "count"
    seen: list[tuple[int, list[str]]] = []
    runner(growing(count), tmp_path, grown=lambda g: seen.append((len(g.keys), counted(count)))).run()
    assert seen == [(1, []), (2, ["x"]), (3, ["next1", "x"])]


def test_a_dropped_output_that_a_grown_task_needs_is_made_again(tmp_path: Path) -> None:
    count = tmp_path / "count"

    def more(answers: Mapping[str, Answer]) -> list[Task | Expansion]:
        return [Task("late", Write("late", count=str(count)), needs=("a",), keep=True)]

    tasks = [
        Task("a", Write("a", count=str(count))),
        Task("b", Write("b", count=str(count)), needs=("a",), keep=True),
    ]
    graph = Graph([*tasks, Expansion(("b",), more)])
    runner(graph, tmp_path).run()
    assert output(graph, tmp_path, "late").read_text() == "late+a"
    assert counted(count)[-2:] == ["b", "late"]


def test_an_expansion_that_asks_for_nonsense_is_refused(tmp_path: Path) -> None:
    again = Expansion(("a",), lambda answers: [Task("a", Write("b"))])
    graph = Graph([Task("a", Write("a"), keep=True), again])
    with pytest.raises(ValueError, match="two tasks are called a"):
        runner(graph, tmp_path).run()
