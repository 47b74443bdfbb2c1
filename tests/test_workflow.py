"""Remaining work: the static graph as prior, observed runs as evidence."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import pytest

from maestro_agents.core import Observation, RunEnd, ServiceClass, Status, Ticket
from maestro_agents.queue.redis import RedisQueue
from maestro_agents.workflow import MAX_REMAINING, Seen, Workflows, busy_after, llm_heights, loops, merged

SPEC = {
    "nodes": [{"id": n, "llm": llm} for n, llm in (("a", "yes"), ("b", "yes"), ("c", "yes"), ("tool", "no"), ("d", "maybe"))],
    "edges": [["__start__", "a", False], ["a", "b", False], ["a", "c", False], ["b", "tool", False], ["c", "tool", False],
              ["tool", "d", False], ["d", "a", True], ["d", "__end__", True]],
}  # fmt: skip


def observed(run: str, node: str, start: float, end: float, visit: int = 0) -> Observation:
    return Observation(
        stage_id=f"{run}{node}{visit}", run_id=run, workflow="w", role=node, node=node, model="m", engine_id="e", tenant="t",
        service_class=ServiceClass.BATCH, status=Status.DONE, visit=visit, granted_at_s=start, finished_at_s=end,
    )  # fmt: skip


def ended(run: str, outcome: str = "done") -> RunEnd:
    return RunEnd(run_id=run, workflow="w", outcome=outcome, started_at_s=0, ended_at_s=9)


def at(node: str, visit: int = 0) -> Ticket:
    return Ticket(stage_id="s", client_id="c", model="m", workflow="w", node=node, visit=visit)


def test_heights_count_llm_nodes_on_the_longest_path() -> None:
    """Parallel branches count once, tools not at all, a loop is walked once."""
    assert llm_heights(SPEC) == {"a": 2, "b": 1, "c": 1, "tool": 1, "d": 0}


def test_parallel_stages_count_once() -> None:
    """Remaining seconds are the union of the later service intervals; waits between them are not work."""
    stages = [observed("r", n, s, e) for n, s, e in (("a", 0, 1), ("b", 2, 5), ("c", 3, 6), ("d", 10, 11))]
    assert busy_after(stages, 1) == pytest.approx(5.0)
    assert busy_after(stages, 11) == 0.0


def test_an_unknown_workflow_has_nothing_left() -> None:
    """No guess is made where nothing is known."""
    assert Workflows().remaining_s(at("a")) == 0.0


def test_the_static_graph_is_the_prior_and_runs_are_the_evidence() -> None:
    """With the graph alone the height speaks; after some runs what was seen does."""
    known = Workflows()
    known.describe("w", json.dumps(SPEC))
    assert known.remaining_s(at("a")) == pytest.approx(2.0)
    for i in range(40):
        for o in (observed(f"r{i}", "a", 0, 1), observed(f"r{i}", "b", 1, 5), observed(f"r{i}", "d", 6, 7)):
            known.observe(o)
        known.end_run(ended(f"r{i}"))
    assert known.remaining_s(at("a")) == pytest.approx(5.0, rel=0.2)
    assert known.remaining_s(at("d")) == pytest.approx(0.0, abs=0.2)


def test_a_run_that_stopped_in_the_middle_teaches_nothing() -> None:
    """Cancelled and failed runs would make every node look nearly done."""
    known = Workflows()
    known.describe("w", json.dumps(SPEC))
    known.observe(observed("r", "a", 0, 1))
    known.end_run(ended("r", "cancelled"))
    assert known.remaining_s(at("a")) == pytest.approx(2.0)


def test_a_wrong_graph_description_is_ignored() -> None:
    """What a client says of its graph cannot stop the scheduler."""
    known = Workflows()
    for text in ("", "{}", "[1]", '{"nodes": 3, "edges": []}'):
        known.describe("w", text)
    assert known.remaining_s(at("a")) == 0.0


# -- what runs showed --------------------------------------------------------------------------------------------------
def showed(*moves: tuple[str, str, int], outcome: str = "done", **calls: int) -> RunEnd:
    """The end of a run: a task of a node for each move that leaves it, unless several leave one task."""
    tasks: dict[str, int] = {}
    for _, b, n in moves:
        if b != "__end__":
            tasks[b] = tasks.get(b, 0) + n
    return RunEnd(
        run_id="r", workflow="w", outcome=outcome, started_at_s=0, ended_at_s=9, tasks=tasks, calls=calls, moves=moves
    )


UNDECLARED = {"nodes": [{"id": n, "llm": "yes"} for n in "abc"], "edges": [["__start__", "a", False]]}
CHAIN = (("__start__", "a", 1), ("a", "b", 1), ("b", "c", 1), ("c", "__end__", 1))


def test_seen_moves_speak_where_the_graph_declares_none() -> None:
    """A run that failed teaches the way too; the more runs, the nearer to what they showed."""
    known = Workflows()
    known.describe("w", json.dumps(UNDECLARED))
    assert known.remaining_s(at("a")) == 0.0
    known.end_run(showed(*CHAIN[:3], outcome="error", a=1, b=1))
    first = known.remaining_s(at("a"))
    assert 0.2 < first < 2.0
    for _ in range(100):
        known.end_run(showed(*CHAIN, a=1, b=1, c=1))
    assert first < known.remaining_s(at("a")) == pytest.approx(2.0, rel=0.1)
    assert known.remaining_s(at("c")) == pytest.approx(0.0, abs=0.1)


def test_a_node_that_never_calls_and_siblings_beside_each_other_do_not_count() -> None:
    """A maybe that makes no call weighs nothing after some runs; five tasks of one superstep are one after another's wait."""
    known = Workflows()
    known.describe("w", json.dumps(SPEC))
    run = showed(
        ("__start__", "a", 1), ("a", "b", 5), ("b", "tool", 5), ("tool", "d", 1), ("d", "__end__", 1), a=1, b=5
    )
    for _ in range(200):
        known.end_run(dataclasses.replace(run, tasks={"a": 1, "b": 5, "tool": 1, "d": 1}))
    assert known.remaining_s(at("a")) == pytest.approx(1.0, rel=0.15)
    assert known.remaining_s(at("b")) == pytest.approx(0.0, abs=0.15)


def test_a_loop_that_was_never_seen_to_end_is_bounded() -> None:
    """The sum is cut, and asking stays cheap."""
    known = Workflows()
    for _ in range(20):
        known.end_run(showed(("a", "a", 1000), a=1000))
        assert 10 < known.remaining_s(at("a")) <= MAX_REMAINING


def test_old_runs_fade() -> None:
    """A program that changed its ways without changing its shape is learned anew."""
    seen = Seen(window=10)
    for _ in range(50):
        seen.add(showed(("a", "b", 1), b=1))
    for _ in range(50):
        seen.add(showed(("a", "c", 1), c=1))
    assert seen.moves["a"]["c"] > 100 * seen.moves["a"].get("b", 0)


def test_the_merged_view_adds_what_was_seen_and_settles_maybe() -> None:
    """New nodes and edges are marked; seen calling is yes; running often without is no; the drawing is left alone."""
    drawn = {
        "nodes": [{"id": n, "llm": llm, "kind": "plain"} for n, llm in (("a", "no"), ("b", "maybe"), ("c", "maybe"))],
        "edges": [{"from": "a", "to": "b", "conditional": False, "label": ""}],
    }
    before = json.dumps(drawn)
    seen = Seen()
    for _ in range(3):
        seen.add(showed(("a", "b", 1), ("b", "new", 1), ("new", "b", 1), a=1))
    whole = merged(drawn, seen)
    nodes = {n["id"]: n for n in whole["nodes"]}
    assert {n: (v["llm"], v["drawn"], v["in_loop"]) for n, v in nodes.items()} == {
        "a": ("yes", True, False),
        "b": ("no", True, True),
        "c": ("maybe", True, False),
        "new": ("no", False, True),
    }
    assert {(e["from"], e["to"]): (e["seen"], e["drawn"]) for e in whole["edges"]} == {
        ("a", "b"): (3, True),
        ("b", "new"): (3, False),
        ("new", "b"): (3, False),
    }
    assert whole["loops"] == [["b", "new"]]
    assert nodes["a"]["seen"] == {"tasks": 0, "calls": 3}
    assert json.dumps(drawn) == before


async def test_what_a_run_showed_travels_through_redis(redis_url: str, pool: str) -> None:
    """The scheduler reads from the log what the app wrote to it."""
    queue = RedisQueue(redis_url, pool=pool)
    try:
        run = showed(*CHAIN, a=1)
        await queue.end_run(run)
        _, entries = await queue.read_log("", 10)
        assert entries == [run]
    finally:
        await queue.close()


def test_loops_are_found_however_deep() -> None:
    """Without recursion: a graph may be deeper than Python's stack."""
    names = [str(i) for i in range(5_000)]
    edges = list(pairwise([*names, names[0]]))
    assert loops([*names, "alone", "self"], [*edges, ("0", "alone"), ("self", "self")]) == [sorted(names), ["self"]]
