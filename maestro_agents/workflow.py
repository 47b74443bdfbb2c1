"""What may still follow a stage: observed runs as evidence, the static graph as prior.

For every (workflow fingerprint, node, visit) the mean of the LLM seconds that were still to come, along the run's own
timeline, learned from finished runs and shrunk: visit -> node -> moves. Moves are what runs showed of the graph (`Seen`):
which node led to which, how often, and the LLM calls of each node's tasks; they also come from runs that ended early. Where
none were seen the static graph speaks. Static LangGraph graphs mislead (untyped ``Command``, ``Send``, conditional edges
without a map), so they are a prior and no more.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
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

MAX_SEEN: Final = 1_000
"""Nodes of one workflow whose moves are remembered."""

MAX_ROUNDS: Final = 100

WINDOW: Final = 200.0
"""Runs that a mean remembers: older ones fade."""

MOVES_PRIOR: Final = 2.0
"""Tasks of a node that must have been seen before they outweigh the static graph."""

MAX_REMAINING: Final = 200.0
"""LLM stages that may follow a node: a loop that was never seen to end counts as this many."""

SETTLED: Final = 3
"""Tasks of a node that ended without an LLM call before "maybe" reads "no"."""

Rows = dict[str, dict[str, float]]


class Seen:
    """What runs showed of one graph: tasks and LLM calls of each node, and what led to what."""

    def __init__(self, window: float = math.inf) -> None:
        self._keep = 1.0 - 1.0 / window
        self.runs = 0
        self.tasks: dict[str, float] = {}
        self.calls: dict[str, float] = {}
        self.moves: Rows = {}

    def add(self, run: RunEnd) -> None:
        """Take what one run showed. Older runs fade."""
        if not run.tasks and not run.calls:
            return
        self.runs += 1
        for table in (self.tasks, self.calls, *self.moves.values()):
            if self._keep < 1.0:
                _fade(table, self._keep)
        for table, news in ((self.tasks, run.tasks), (self.calls, run.calls)):
            for node, n in news.items():
                table[node] = table.get(node, 0.0) + n
        for a, b, n in run.moves:
            row = self.moves.setdefault(a, {})
            row[b] = row.get(b, 0.0) + n
        if len(self.moves) > MAX_SEEN:
            self.moves.pop(next(iter(self.moves)))

    def remaining(self, spec: Mapping[str, Any], start: Mapping[str, float]) -> dict[str, float]:
        """Solve R[u] = sum over v of P[u, v] (m[v] + R[v]): the LLM stages that follow each node, siblings counted once.

        ``m[v]``: mean LLM calls of a task of v. ``P[u, v]``: mean number of v-tasks that a u-task led to, divided by the
        row's sum where that is more than one, since what one task starts runs beside each other. ``spec``: the static
        graph, the prior of both. ``start``: an earlier solution.
        """
        llm = {str(n["id"]): n.get("llm") != "no" for n in spec.get("nodes", ())}
        follow: defaultdict[str, list[str]] = defaultdict(list)
        for edge in spec.get("edges", ()):
            follow[str(edge[0])].append(str(edge[1]))
        nodes = dict.fromkeys((*llm, *self.tasks, *self.calls))
        stages = {
            v: (self.calls.get(v, 0.0) + MOVES_PRIOR * llm.get(v, False)) / (self.tasks.get(v, 0.0) + MOVES_PRIOR)
            for v in nodes
        }
        rows: dict[str, list[tuple[str, float]]] = {}
        for u in nodes:
            seen, known = self.moves.get(u, {}), follow[u]
            tasks = self.tasks.get(u, 0.0) or (sum(seen.values()) if u not in llm else 0.0)
            weights = {v: seen.get(v, 0.0) + (MOVES_PRIOR / len(known) if v in known else 0.0) for v in (*known, *seen)}
            total = max(tasks + (MOVES_PRIOR if known else 0.0), sum(weights.values()))
            rows[u] = [(v, weight / total) for v, weight in weights.items() if v in stages] if total else []
        found = {u: start.get(u, 0.0) for u in nodes}
        for _ in range(MAX_ROUNDS):
            moved = 0.0
            for u in reversed(nodes):
                value = min(MAX_REMAINING, sum(p * (stages[v] + found[v]) for v, p in rows[u]))
                moved = max(moved, abs(value - found[u]))
                found[u] = value
            if moved < 0.01:
                break
        return found


def _fade(table: dict[str, float], keep: float) -> None:
    for name in list(table):
        table[name] *= keep
        if table[name] < 0.01:
            del table[name]


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
    spec: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seen: Seen = field(default_factory=lambda: Seen(WINDOW))
    #: node -> LLM stages after it, by what was seen; solved again after some more runs.
    solved: dict[str, float] = field(default_factory=dict[str, float])
    solved_runs: int = 0
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
            drawn = json.loads(spec)
            heights = llm_heights(drawn)
            known = self._workflow(workflow)
            known.height, known.spec, known.solved_runs = heights, drawn, 0

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
        if o.run_id and not o.replayed:  # what its node did before is no progress
            stages = self._open.setdefault(o.run_id, [])
            if len(stages) < MAX_STAGES:
                stages.append(o)
            if len(self._open) > MAX_OPEN_RUNS:
                self._open.popitem(last=False)

    def end_run(self, run: RunEnd) -> None:
        """Take the end of a run. How long it took teaches only where it ended well; what led to what, always."""
        if run.workflow and run.tasks:
            self._workflow(run.workflow).seen.add(run)
        if run.outcome == "paused":
            return  # it goes on under the same id, or is forgotten with the oldest
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
        prior = _stages_after(known, ticket.node) * self._stage_s.value
        node = known.by_node[ticket.node].towards(prior) if ticket.node in known.by_node else prior
        key = (ticket.node, min(ticket.visit, MAX_VISIT))
        return known.by_visit[key].towards(node) if key in known.by_visit else node


def _stages_after(known: _Workflow, node: str) -> float:
    """LLM stages after a node: by the moves that were seen, before there are any by the static graph."""
    runs = known.seen.runs
    if not runs:
        return known.height.get(node, 0)
    if not known.solved_runs or runs > known.solved_runs * 1.1:
        with contextlib.suppress(KeyError, TypeError, IndexError):  # what a client says of its graph may be anything
            known.solved = known.seen.remaining(known.spec, known.solved)
        known.solved_runs = runs
    return known.solved.get(node, known.height.get(node, 0))


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


# -- one view of drawn and seen ------------------------------------------------------------------------------------------
def merged(drawn: Mapping[str, Any], seen: Seen | None = None) -> dict[str, Any]:
    """One view of a graph: as drawn, with what runs showed, and the shape of both together.

    ``drawn``: ``{"nodes": [{"id", "llm", ...}], "edges": [{"from", "to", "conditional", ...}], ...}``; it is not changed.
    Nodes and edges that only runs showed are added. A node that was seen calling a model is ``yes``; one that was ``maybe``
    and ran `SETTLED` times without is ``no``. Each node gets ``seen`` (tasks, calls), ``in_loop``, ``height`` (LLM nodes on
    the longest path after it) and ``on_longest``; each edge ``seen`` (how often) and ``drawn``.
    """
    nodes = {str(n["id"]): {**n, "drawn": True} for n in drawn["nodes"]}
    edges = {(str(e["from"]), str(e["to"])): {**e, "drawn": True, "seen": 0} for e in drawn["edges"]}
    seen = seen or Seen()
    moves = {(a, b): n for a, row in seen.moves.items() for b, n in row.items()}
    for name in (*seen.tasks, *seen.calls, *(node for move in moves for node in move)):
        nodes.setdefault(name, {"id": name, "kind": "plain", "llm": "no", "drawn": False})
    for name, node in nodes.items():
        tasks, calls = round(seen.tasks.get(name, 0)), round(seen.calls.get(name, 0))
        node["seen"] = {"tasks": tasks, "calls": calls}
        if calls:
            node["llm"] = "yes"
            node["kind"] = "llm" if node.get("kind") == "plain" else node.get("kind")
        elif node["llm"] == "maybe" and tasks >= SETTLED:
            node["llm"] = "no"
    for (a, b), n in moves.items():
        new = {"from": a, "to": b, "conditional": True, "label": "", "drawn": False}
        edges.setdefault((a, b), new)["seen"] = round(n)
    spec = {"nodes": list(nodes.values()), "edges": list(edges)}
    after = llm_heights(spec)
    before = llm_heights({"nodes": spec["nodes"], "edges": [(b, a) for a, b in edges]})
    length = {n: before[n] + (node["llm"] != "no") + after[n] for n, node in nodes.items()}
    longest = max(length.values(), default=0)
    found = loops(nodes, edges)
    for name, node in nodes.items():
        node["in_loop"] = any(name in loop for loop in found)
        node["height"] = after[name]
        node["on_longest"] = longest > 0 and length[name] == longest
    ordered = sorted(nodes.values(), key=lambda node: node.get("kind") == "end")  # the end comes last
    return {**drawn, "runs": seen.runs, "longest": longest, "nodes": ordered, "edges": list(edges.values()), "loops": found}  # fmt: skip


def loops(nodes: Iterable[str], edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Sets of nodes that lead back to themselves (strongly connected; Tarjan, without recursion), each sorted."""
    follow: defaultdict[str, list[str]] = defaultdict(list)
    for a, b in edges:
        follow[a].append(b)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    held: set[str] = set()
    found: list[list[str]] = []
    for start in nodes:
        todo: list[tuple[str, Iterator[str]]] = [] if start in index else [(start, iter(follow[start]))]
        while todo:
            node, rest = todo[-1]
            if node not in index:
                index[node] = low[node] = len(index)
                stack.append(node)
                held.add(node)
            for after in rest:
                if after not in index:
                    todo.append((after, iter(follow[after])))
                    break
                if after in held:
                    low[node] = min(low[node], low[after])
            else:
                todo.pop()
                if todo:
                    low[todo[-1][0]] = min(low[todo[-1][0]], low[node])
                if low[node] == index[node]:
                    at = stack.index(node)
                    group, stack[at:] = stack[at:], []
                    held.difference_update(group)
                    if len(group) > 1 or node in follow[node]:
                        found.append(sorted(group))
    return sorted(found)
