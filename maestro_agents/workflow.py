"""What may still follow a stage: observed runs as evidence, the static graph as prior.

For every (workflow fingerprint, node, visit) the mean of the LLM seconds that were still to come, along the run's own
timeline, learned from finished runs and shrunk: visit -> node -> static graph. Static LangGraph graphs mislead (untyped
``Command``, ``Send``, conditional edges without a map), so they are a prior and no more.
"""

from __future__ import annotations

import contextlib
import json
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from maestro_agents.core import Observation, RunEnd, Status, Ticket

SHRINK: Final = 4.0
"""Observations that a level needs before it outweighs the level above it."""

MAX_VISIT: Final = 6
MAX_WORKFLOWS: Final = 1_000
MAX_OPEN_RUNS: Final = 10_000
MAX_STAGES: Final = 1_000
"""Stages of one run that are remembered until it ends."""

WINDOW: Final = 200.0
"""Runs that a mean remembers: older ones fade."""


@dataclass(slots=True)
class Mean:
    """A running mean that forgets: after `WINDOW` values each new one weighs 1/`WINDOW`."""

    n: float = 0.0
    value: float = 0.0

    def add(self, x: float) -> None:
        self.n = min(self.n + 1.0, WINDOW)
        self.value += (x - self.value) / self.n

    def towards(self, prior: float) -> float:
        """The mean, shrunk to ``prior`` by the number of observations."""
        return (self.n * self.value + SHRINK * prior) / (self.n + SHRINK)


@dataclass(slots=True)
class _Workflow:
    #: node -> LLM stages on the longest static path after it.
    height: dict[str, int] = field(default_factory=dict[str, int])
    by_visit: defaultdict[tuple[str, int], Mean] = field(default_factory=lambda: defaultdict(Mean))
    by_node: defaultdict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))


class Workflows:
    """Remaining work of every known workflow. Fed by the observation log, asked by the scheduler."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Workflow] = OrderedDict()
        self._open: OrderedDict[str, list[Observation]] = OrderedDict()
        self._stage_s = Mean(value=1.0)

    def describe(self, workflow: str, spec: str) -> None:
        """Learn a static graph: ``{"nodes": [{"id", "llm"}], "edges": [[from, to, conditional]]}``."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            self._workflow(workflow).height = llm_heights(json.loads(spec))

    def _workflow(self, workflow: str) -> _Workflow:
        found = self._known.setdefault(workflow, _Workflow())
        self._known.move_to_end(workflow)
        if len(self._known) > MAX_WORKFLOWS:
            self._known.popitem(last=False)
        return found

    def observe(self, o: Observation) -> None:
        """Take a finished stage."""
        if o.status is not Status.DONE:
            return
        self._stage_s.add(o.service_s)
        if o.run_id:
            stages = self._open.setdefault(o.run_id, [])
            if len(stages) < MAX_STAGES:
                stages.append(o)
            if len(self._open) > MAX_OPEN_RUNS:
                self._open.popitem(last=False)

    def end_run(self, run: RunEnd) -> None:
        """Take the end of a run. Only a run that ended well teaches: others stopped in the middle."""
        stages = self._open.pop(run.run_id, [])
        if run.outcome != "done" or not run.workflow:
            return
        learned = self._workflow(run.workflow)
        for o in stages:
            seconds = busy_after(stages, o.finished_at_s)
            learned.by_visit[o.node, min(o.visit, MAX_VISIT)].add(seconds)
            learned.by_node[o.node].add(seconds)

    def remaining_s(self, ticket: Ticket) -> float:
        """LLM seconds of the run after this stage, waits excluded, parallel stages counted once."""
        known = self._known.get(ticket.workflow)
        if known is None:
            return 0.0
        prior = known.height.get(ticket.node, 0) * self._stage_s.value
        node = known.by_node[ticket.node].towards(prior) if ticket.node in known.by_node else prior
        key = (ticket.node, min(ticket.visit, MAX_VISIT))
        return known.by_visit[key].towards(node) if key in known.by_visit else node


def busy_after(stages: list[Observation], after_s: float) -> float:
    """Length of the union of the stages' service intervals that begin at or after a moment, in seconds."""
    total = 0.0
    reached_s = after_s
    for o in sorted(stages, key=lambda s: s.granted_at_s):
        if o.granted_at_s < after_s:
            continue
        start = max(o.granted_at_s, reached_s)
        total += max(0.0, o.finished_at_s - start)
        reached_s = max(reached_s, o.finished_at_s)
    return total


def llm_heights(spec: Mapping[str, Any]) -> dict[str, int]:
    """LLM nodes on the longest static path after each node; every loop is walked once."""
    llm = {str(n["id"]): n.get("llm") != "no" for n in spec["nodes"]}
    follow: defaultdict[str, list[str]] = defaultdict(list)
    for edge in spec["edges"]:
        follow[str(edge[0])].append(str(edge[1]))
    done: dict[str, int] = {}
    for start in llm:
        if start in done:
            continue
        # Depth first without recursion: a graph may be deeper than Python's stack.
        path = {start}
        todo: list[tuple[str, Iterator[str]]] = [(start, iter(follow[start]))]
        while todo:
            node, rest = todo[-1]
            for after in rest:
                if after in llm and after not in done and after not in path:
                    path.add(after)
                    todo.append((after, iter(follow[after])))
                    break
            else:
                done[node] = max((done[a] + llm[a] for a in follow[node] if a in done), default=0)
                path.discard(node)
                todo.pop()
    return done
