"""Remaining work: the static graph as prior, observed runs as evidence."""

from __future__ import annotations

import json

import pytest

from maestro_agents.core import Observation, RunEnd, ServiceClass, Status, Ticket
from maestro_agents.workflow import Workflows, busy_after, llm_heights

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
