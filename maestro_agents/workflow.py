"""What may still follow a stage: observed runs as evidence, the static graph as prior.

For every (workflow fingerprint, node, visit) the mean of what its run still did after such a stage (`Remaining`), along the
run's own timeline, learned from runs that ended well and shrunk: visit -> node -> moves. Moves are what runs showed of the
graph (`Seen`): which node led to which, how often, and the LLM calls of each node's tasks; they also come from runs that
ended early. Where none were seen the static graph speaks. Static LangGraph graphs mislead (untyped ``Command``, ``Send``,
conditional edges without a map), so they are a prior and no more. A run without a graph (raw SDK calls) is learned by its
roles, per tenant.

(Longer than our modules are: a graph's shape, what runs showed of it and what they took are one subject.)
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import json
import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from maestro_agents.core import Observation, Prediction, RunEnd, Status, Ticket

SHRINK: Final = 4.0
"""Observations that a level needs before it outweighs the level above it."""

VISITS: Final = 4
"""Visits of a node that are told apart; those after them in groups, two to a doubling (4-5, 6-7, 8-11, 12-15 ...)."""

MAX_VISIT: Final = 64
"""From here on all visits are one group."""

MAX_WORKFLOWS: Final = 1_000
MAX_LEVELS: Final = 20_000
"""(workflow, node, visit group) whose remaining work is remembered, and their nodes and workflows; about a kilobyte each."""

MAX_OPEN_RUNS: Final = 10_000
TOUCH_S: Final = 0.01
"""A stage pushed this long before another ended is taken to follow it: a stream is read to its last piece, then closed."""

MAX_STAGES: Final = 1_000
"""Stages of one run that are remembered until it ends."""

MAX_SIBLINGS: Final = 64
"""Stages of a run, the latest, among which the one is sought that led to a call."""

MAX_OPEN_STAGES: Final = 200_000
"""Stages of all runs that are remembered until their runs end; then the runs that began first are forgotten."""

MAX_SEEN: Final = 1_000
"""Nodes of one workflow whose moves are remembered."""

MAX_ROUNDS: Final = 100

WINDOW: Final = 200.0
"""Values that a mean remembers: older ones fade."""

TOOL_WINDOW: Final = 50
"""Values that a median of tool time is taken of."""

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

    def remaining(
        self, spec: Mapping[str, Any], start: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return, by node, the LLM stages that follow it, siblings counted once, and the chance that none does.

        Solves R[u] = sum over v of P[u, v] (m[v] + R[v]). ``m[v]``: mean LLM calls of a task of v. ``P[u, v]``: mean number
        of v-tasks that a u-task led to, divided by the row's sum where that is more than one, since what one task starts
        runs beside each other. ``spec``: the static graph, the prior of both. ``start``: an earlier solution for R.
        The chance: E[u] = sum of P[u, v] (1 - m[v]) E[v], E = 1 at the end; of what runs beside each other, none may call.
        """
        llm = {str(n["id"]): n.get("llm") != "no" for n in spec.get("nodes", ())}
        follow: defaultdict[str, dict[str, float]] = defaultdict(dict)  # how much of a task goes there, as drawn
        for edge in spec.get("edges", ()):
            always = len(edge) > 2 and not edge[2]
            follow[str(edge[0])][str(edge[1])] = 1.0 if always else 0.0
        nodes = dict.fromkeys((*llm, *self.tasks, *self.calls))
        stages = {
            v: (self.calls.get(v, 0.0) + MOVES_PRIOR * llm.get(v, False)) / (self.tasks.get(v, 0.0) + MOVES_PRIOR)
            for v in nodes
        }
        rows: dict[str, list[tuple[str, float]]] = {}
        for u in nodes:
            seen, known = self.moves.get(u, {}), follow[u]
            some = 1.0 / max(1, sum(not share for share in known.values()))  # one of those with a condition
            tasks = self.tasks.get(u, 0.0) or (sum(seen.values()) if u not in llm else 0.0)
            total = tasks + (MOVES_PRIOR if known else 0.0)
            weights = {
                v: seen.get(v, 0.0) + (MOVES_PRIOR * (known[v] or some) if v in known else 0.0) for v in (*known, *seen)
            }
            rows[u] = [(v, weight / total) for v, weight in weights.items()] if total else []

        def after(u: str, found: Mapping[str, float]) -> float:
            row = rows[u]
            each = min(1.0, 1.0 / (sum(p for _, p in row) or 1.0))
            return min(MAX_REMAINING, sum(p * each * (stages[v] + found[v]) for v, p in row if v in stages))

        def ends(u: str, found: Mapping[str, float]) -> float:
            row = [(p, found[v] * max(0.0, 1.0 - stages[v]) if v in stages else 1.0) for v, p in rows[u]]
            if sum(p for p, _ in row) <= 1.0 + 1e-9:
                return sum(p * e for p, e in row) if row else 1.0
            return math.prod(1.0 - min(1.0, p) * (1.0 - e) for p, e in row)

        order = tuple(reversed(nodes))
        return (
            _settle(after, order, {u: start.get(u, 0.0) for u in nodes}, 0.01),
            _settle(ends, order, dict.fromkeys(nodes, 0.0), 0.001),
        )


def _settle(
    value: Callable[[str, Mapping[str, float]], float], order: Sequence[str], found: dict[str, float], close: float
) -> dict[str, float]:
    """Put ``value(u, found)`` for every u until it moves no more, or `MAX_ROUNDS` times."""
    for _ in range(MAX_ROUNDS):
        moved = 0.0
        for u in order:
            new = value(u, found)
            moved = max(moved, abs(new - found[u]))
            found[u] = new
        if moved < close:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Remaining:
    """What a run still does once a stage has ended. All 0 where nothing is known.

    A run's end is when its last stage and what came after it had ended (`RunEnd`). Seconds are of the run's own timeline:
    what runs beside each other counts once; Maestro's queue is neither LLM time nor tool time; nor is a pause for a person.
    """

    #: LLM calls that begin after it; siblings count each. The static graph alone counts them once.
    stages: float = 0.0
    #: What those calls write, and read.
    output_tokens: float = 0.0
    prompt_tokens: float = 0.0
    #: Seconds in which calls of the run are served, slower siblings of this stage included.
    llm_s: float = 0.0
    #: Seconds in which no call of the run waits or is served: tools, code. The median: a call that once took hours says
    #: little about the next one.
    tool_s: float = 0.0
    #: The chance that no LLM call begins after it.
    ends_p: float = 0.0
    #: Seconds by which it could end later without delaying its run, since a sibling of its superstep takes longer.
    slack_s: float = 0.0
    #: Stages of this node that this rests on, fading; 0: the graph alone.
    n: int = 0

    def of_prediction(self) -> dict[str, float]:
        """As the fields of `core.Prediction`."""
        return {
            "remaining_s": self.llm_s,
            "remaining_tool_s": self.tool_s,
            "remaining_stages": self.stages,
            "remaining_tokens": self.output_tokens,
            "ends_p": self.ends_p,
            "slack_s": self.slack_s,
        }


_MEANS: Final = ("stages", "output_tokens", "prompt_tokens", "llm_s", "ends_p", "slack_s")


@dataclass(slots=True)
class _Level:
    """What was seen to follow one population of stages."""

    n: float = 0.0
    means: tuple[float, ...] = (0.0,) * len(_MEANS)
    tools_s: deque[float] = field(default_factory=lambda: deque[float](maxlen=TOOL_WINDOW))

    def add(self, seen: Remaining) -> None:
        self.n = min(self.n + 1.0, WINDOW)
        self.means = tuple(m + (getattr(seen, f) - m) / self.n for f, m in zip(_MEANS, self.means, strict=True))
        self.tools_s.append(seen.tool_s)

    def towards(self, prior: Remaining) -> Remaining:
        """What is known here, shrunk to ``prior`` by the number of observations."""
        both = self.n + SHRINK
        means = {f: (self.n * m + SHRINK * getattr(prior, f)) / both for f, m in zip(_MEANS, self.means, strict=True)}
        tools_s = sorted([*self.tools_s, *(prior.tool_s for _ in range(round(SHRINK)))])
        return Remaining(**means, tool_s=tools_s[(len(tools_s) - 1) // 2])


class _Stage(NamedTuple):
    """What a run's end needs to know of a stage. Moments are the queue's."""

    node: str
    visit: int
    #: Where siblings run: path of the graph around its node, superstep.
    place: tuple[str, int]
    run_started_at_s: float
    pushed_at_s: float
    granted_at_s: float
    ended_at_s: float
    prompt_tokens: int
    output_tokens: int
    #: It ended well and nobody had made this call before.
    progress: bool


@dataclass(slots=True)
class _Run:
    """A run that goes on."""

    stages: list[_Stage] = field(default_factory=list[_Stage])
    #: It was paused for a person: where its start moves from stage to stage, it did so by pauses.
    paused: bool = False
    attained_s: float = 0.0


@dataclass(slots=True)
class _Workflow:
    #: node -> LLM stages on the longest static path after it.
    height: dict[str, int] = field(default_factory=dict[str, int])
    spec: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seen: Seen = field(default_factory=lambda: Seen(WINDOW))
    #: node -> LLM stages after it, and the chance of none, by what was seen; solved again after some more runs.
    solved: tuple[dict[str, float], dict[str, float]] = field(default_factory=lambda: ({}, {}))
    solved_runs: int = -1
    #: One stage of it: served seconds, tokens out, tokens in.
    stage: tuple[Mean, Mean, Mean] = field(default_factory=lambda: (Mean(), Mean(), Mean()))


class Next(NamedTuple):
    """A model that a run is expected to call right after a stage."""

    model: str
    #: Calls of it; several where the run forks.
    expected: float
    #: Seconds of tools and code from the stage's end to them.
    gap_s: float


@dataclass(slots=True)
class _Follow:
    n: float = 0.0
    calls: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])


class Follows:
    """Which models are called right after a stage of a node, how often and how soon. Older runs fade; memory is bounded."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str, int], _Follow] = OrderedDict()

    def _of(self, workflow: str, node: str, visit: int) -> tuple[_Follow, _Follow]:
        """Of its visit, and of all visits."""
        keys = (workflow, node, visit_group(visit)), (workflow, node, -1)
        found = tuple(self._known.setdefault(key, _Follow()) for key in keys)
        while len(self._known) > MAX_LEVELS:
            self._known.popitem(last=False)
        return found[0], found[1]

    def ended(self, workflow: str, node: str, visit: int) -> None:
        """A stage has ended."""
        for level in self._of(workflow, node, visit):
            keep = 1.0 if level.n < WINDOW else 1.0 - 1.0 / WINDOW
            level.n = level.n * keep + 1.0
            if keep < 1.0:
                level.calls = {m: (n * keep, gap_s) for m, (n, gap_s) in level.calls.items() if n > 0.01}

    def followed(self, workflow: str, node: str, visit: int, model: str, gap_s: float) -> None:
        """Of a run's stages the one that had ended last was such a stage when ``model`` was called, ``gap_s`` later."""
        for level in self._of(workflow, node, visit):
            n, mean_s = level.calls.get(model, (0.0, 0.0))
            level.calls[model] = (n + 1.0, mean_s + (gap_s - mean_s) / (n + 1.0))

    def after(self, workflow: str, node: str, visit: int) -> Sequence[Next]:
        """What is expected after a stage; nothing where too few were seen."""
        level = self._known.get((workflow, node, visit_group(visit)))
        if level is None or level.n < SHRINK:
            level = self._known.get((workflow, node, -1))
        if level is None or level.n < 1.0:
            return ()
        return [Next(m, min(n / level.n, MAX_REMAINING), gap_s) for m, (n, gap_s) in level.calls.items()]


_Key = tuple[str] | tuple[str, str] | tuple[str, str, int]


class Workflows:
    """Remaining work of every known workflow. Fed by the observation log, asked by the scheduler. Its memory is bounded."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Workflow] = OrderedDict()
        self._levels: OrderedDict[_Key, _Level] = OrderedDict()
        self._open: OrderedDict[str, _Run] = OrderedDict()
        self._open_stages = 0
        #: What was answered since something was learned: stages that wait are asked about again and again.
        self._answers: dict[tuple[str, str, int], Remaining] = {}
        self._stage = (Mean(value=1.0), Mean(), Mean())
        self._follows = Follows()

    def describe(self, workflow: str, spec: str) -> None:
        """Learn a static graph: ``{"nodes": [{"id", "llm"}], "edges": [[from, to, conditional]]}``."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            drawn = json.loads(spec)
            heights = llm_heights(drawn)
            known = self._workflow(workflow)
            known.height, known.spec, known.solved_runs = heights, drawn, -1
            self._answers.clear()

    def _workflow(self, workflow: str) -> _Workflow:
        found = self._known.setdefault(workflow, _Workflow())
        self._known.move_to_end(workflow)
        if len(self._known) > MAX_WORKFLOWS:
            self._known.popitem(last=False)
        return found

    # -- learn -------------------------------------------------------------------------------------------------------
    def observe(self, o: Observation) -> None:
        """Take a finished stage."""
        self._answers.clear()
        done = o.status is Status.DONE
        if done:
            for told in (self._stage, self._workflow(_name(o)).stage):
                for mean, value in zip(told, (o.service_s, o.output_tokens, o.prompt_tokens), strict=True):
                    mean.add(value)
        pushed_at_s = o.pushed_at_s or o.granted_at_s
        granted_at_s = max(o.granted_at_s, pushed_at_s)
        if not o.run_id or not 0 <= pushed_at_s <= granted_at_s <= o.finished_at_s < math.inf:
            return
        run = self._open.setdefault(o.run_id, _Run())
        if done and not o.replayed:
            self._follow(run, o, pushed_at_s)
        if len(run.stages) < MAX_STAGES:
            node = _node(o)
            place = (node.rpartition(":")[0], o.step)
            run.stages.append(
                _Stage(
                    node, o.visit, place, o.run_started_at_s, pushed_at_s, granted_at_s, o.finished_at_s,
                    max(0, o.prompt_tokens), max(0, o.output_tokens), done and not o.replayed,
                )
            )  # fmt: skip
            self._open_stages += 1
        run.attained_s += o.finished_at_s - granted_at_s
        while len(self._open) > MAX_OPEN_RUNS or self._open_stages > MAX_OPEN_STAGES:
            self._open_stages -= len(self._open.popitem(last=False)[1].stages)

    def _follow(self, run: _Run, o: Observation, pushed_at_s: float) -> None:
        before = [s for s in run.stages[-MAX_SIBLINGS:] if s.progress and s.ended_at_s - TOUCH_S <= pushed_at_s]
        if before:
            last = max(before, key=lambda s: s.ended_at_s)
            gap_s = max(0.0, pushed_at_s - last.ended_at_s)
            self._follows.followed(_name(o), last.node, last.visit, o.model, gap_s)
        self._follows.ended(_name(o), _node(o), o.visit)

    def end_run(self, run: RunEnd) -> None:
        """Take the end of a run. What it took teaches only where it ended well; what led to what, always."""
        self._answers.clear()
        workflow = _name(run)
        if run.workflow and run.tasks:
            self._workflow(workflow).seen.add(run)
        if run.outcome == "paused":  # it goes on under the same id, or is forgotten with the oldest
            if run.run_id in self._open:
                self._open[run.run_id].paused = True
            return
        ended = self._open.pop(run.run_id, _Run())
        self._open_stages -= len(ended.stages)
        if run.outcome != "done":
            return
        for stage, seen in after_each(ended.stages, run, paused=ended.paused):
            keys: tuple[_Key, ...] = (
                (workflow,),
                (workflow, stage.node),
                (workflow, stage.node, visit_group(stage.visit)),
            )
            for key in keys:
                self._levels.setdefault(key, _Level()).add(seen)
                self._levels.move_to_end(key)
        while len(self._levels) > MAX_LEVELS:
            self._levels.popitem(last=False)

    # -- ask ---------------------------------------------------------------------------------------------------------
    def attained_s(self, run_id: str) -> float:
        """Seconds that the stages of a run were served so far, those beside each other counted each."""
        run = self._open.get(run_id)
        return run.attained_s if run else 0.0

    def remaining(self, ticket: Ticket) -> Remaining:
        """What the run of a stage still does after it."""
        if not ticket.workflow and not ticket.run_id:
            return Remaining()
        key = (_name(ticket), _node(ticket), visit_group(ticket.visit))
        found = self._answers.get(key)
        if found is None:
            if len(self._answers) >= MAX_LEVELS:
                self._answers.clear()
            found = self._answers[key] = self._remaining(*key)
        return found

    def next_models(self, stage: Ticket | Observation) -> Sequence[Next]:
        """The models that the run of a stage is expected to call right after it, for a placement to wake in time."""
        return self._follows.after(_name(stage), _node(stage), stage.visit)

    def _remaining(self, workflow: str, node: str, visits: int) -> Remaining:
        known = self._known.get(workflow)
        if known is None:
            return Remaining()
        found = self._prior(workflow, known, node)
        here = self._levels.get((workflow, node))
        if here is None:
            return found
        found = here.towards(found)
        visit = self._levels.get((workflow, node, visits))
        return dataclasses.replace(visit.towards(found) if visit else found, n=round(here.n))

    def _prior(self, workflow: str, known: _Workflow, node: str) -> Remaining:
        """What is known of a node before a run that came by it has ended: by its graph, else by its workflow's runs."""
        if node not in known.height and node not in known.seen.tasks and node not in known.seen.calls:
            level = self._levels.get((workflow,))
            return level.towards(Remaining()) if level else Remaining()
        runs = known.seen.runs
        if known.solved_runs < 0 or runs > known.solved_runs * 1.1:
            with contextlib.suppress(KeyError, TypeError, IndexError, AttributeError):  # a spec may say anything
                known.solved = known.seen.remaining(known.spec, known.solved[0])
            known.solved_runs = runs
        height = known.height.get(node, 0)
        stages = known.solved[0].get(node, height) if runs else height
        each_s, output_tokens, prompt_tokens = (
            here.towards(everywhere.value) for here, everywhere in zip(known.stage, self._stage, strict=True)
        )
        return Remaining(
            stages=stages,
            output_tokens=stages * output_tokens,
            prompt_tokens=stages * prompt_tokens,
            llm_s=stages * each_s,
            ends_p=known.solved[1].get(node, 0.0),
        )


def _name(of: Observation | RunEnd | Ticket) -> str:
    """What a workflow's statistics are kept under; runs without a graph share their tenant's."""
    return of.workflow or f"tenant {of.tenant}"


def _node(of: Observation | Ticket) -> str:
    """The node of a stage; its role where it was called outside any."""
    return (of.workflow and of.node) or of.role or of.node


def visit_group(visit: int) -> int:
    """The visits that a visit is learned with (`VISITS`), as a number."""
    visit = min(max(visit, 0), MAX_VISIT)
    return visit if visit < VISITS else VISITS + int(2 * math.log2(visit / VISITS) + 1e-9)


def after_each(stages: Sequence[_Stage], end: RunEnd, *, paused: bool = False) -> Iterator[tuple[_Stage, Remaining]]:
    """Every stage of a run that was progress, with what the run did after it.

    ``paused``: the run was paused for a person, and each moment is counted from the run's start as its stage had it, which
    is later by the pauses (`maestro_langgraph.runs`). O(n log n).
    """
    if not stages:
        return
    ended_at_s = end.ended_at_s if math.isfinite(end.ended_at_s) else 0.0
    starts = [s.run_started_at_s for s in stages if 0 < s.run_started_at_s < math.inf]
    if paused and starts:
        ended_at_s -= max(*starts, end.started_at_s) - min(starts)
        stages = [_unpaused(s, min(starts)) for s in stages]
    busy = _Cover((s.pushed_at_s, s.ended_at_s) for s in stages)
    served = _Cover((s.granted_at_s, s.ended_at_s) for s in stages if s.progress)
    ended_at_s = max(ended_at_s, *(s.ended_at_s for s in stages))
    mine = sorted((s for s in stages if s.progress), key=lambda s: s.pushed_at_s)
    output, prompt = [0], [0]
    for s in reversed(mine):
        output.append(output[-1] + s.output_tokens)
        prompt.append(prompt[-1] + s.prompt_tokens)
    follow = following([(s.pushed_at_s, s.ended_at_s) for s in mine])
    for s, later, slack_s in zip(mine, follow, _slack(mine), strict=True):
        yield (
            s,
            Remaining(
                stages=later,
                output_tokens=output[later],
                prompt_tokens=prompt[later],
                llm_s=served.after(s.ended_at_s),
                tool_s=max(0.0, ended_at_s - s.ended_at_s - busy.after(s.ended_at_s)),
                ends_p=float(not later),
                slack_s=slack_s,
            ),
        )


def following(calls: Sequence[tuple[float, float]]) -> list[int]:
    """How many of a run's calls, the last ones, begin once each has ended. ``calls``: (pushed, ended), in the order of their push."""
    pushed = [pushed_at_s for pushed_at_s, _ in calls]
    return [
        len(calls) - max(bisect.bisect_left(pushed, ended_at_s - TOUCH_S), bisect.bisect_right(pushed, pushed_at_s))
        for pushed_at_s, ended_at_s in calls
    ]


def _unpaused(stage: _Stage, started_at_s: float) -> _Stage:
    """The stage as if its run had never been paused."""
    pauses_s = stage.run_started_at_s - started_at_s
    if not 0 < pauses_s < math.inf:
        return stage
    return stage._replace(
        pushed_at_s=stage.pushed_at_s - pauses_s,
        granted_at_s=stage.granted_at_s - pauses_s,
        ended_at_s=stage.ended_at_s - pauses_s,
    )


class _Cover:
    """The union of some intervals."""

    def __init__(self, intervals: Iterable[tuple[float, float]]) -> None:
        self._from: list[float] = []
        self._to: list[float] = []
        for start, end in sorted(intervals):
            if self._to and start <= self._to[-1]:
                self._to[-1] = max(self._to[-1], end)
            else:
                self._from.append(start)
                self._to.append(end)
        self._rest = [0.0]  # from the last backwards
        for start, end in zip(reversed(self._from), reversed(self._to), strict=True):
            self._rest.append(self._rest[-1] + end - start)

    def after(self, moment: float) -> float:
        """Length of what lies after a moment."""
        n = bisect.bisect_right(self._to, moment)
        if n == len(self._to):
            return 0.0
        return self._rest[len(self._to) - n] - max(0.0, moment - self._from[n])


def _slack(stages: Sequence[_Stage]) -> list[float]:
    """By how much each stage ended before its superstep did, in their order, which is that of their push.

    Siblings: calls from the same graph and superstep whose time (queue included) overlaps; the superstep ends with its last
    one, as if none had waited in the queue. What the same node called next there counts as going on with it.
    """
    found = [0.0] * len(stages)
    groups: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    reached: dict[tuple[str, int], float] = {}
    for i, s in enumerate(stages):
        if s.pushed_at_s >= reached.get(s.place, math.inf) - TOUCH_S:
            _share_slack(stages, groups.pop(s.place), found)
            del reached[s.place]
        groups[s.place].append(i)
        reached[s.place] = max(s.ended_at_s, reached.get(s.place, s.ended_at_s))
    for group in groups.values():
        _share_slack(stages, group, found)
    return found


def _share_slack(stages: Sequence[_Stage], group: Sequence[int], found: list[float]) -> None:
    """Write the slack of one group of siblings into ``found``."""
    ends = {i: stages[i].pushed_at_s + stages[i].ended_at_s - stages[i].granted_at_s for i in group}
    last = max(ends.values())
    going_on: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)  # (-pushed, least slack from there on)
    for i in reversed(group):
        s, slack_s = stages[i], last - ends[i]
        later = going_on[s.node]
        n = bisect.bisect_right(later, -(s.ended_at_s - TOUCH_S), key=lambda x: x[0])
        if n:
            slack_s = min(slack_s, later[n - 1][1])
        found[i] = max(0.0, slack_s)
        later.append((-s.pushed_at_s, min(found[i], later[-1][1]) if later else found[i]))


# -- siblings that wait ------------------------------------------------------------------------------------------------
def join_slack(waiting: Iterable[tuple[Ticket, float]]) -> dict[str, float]:
    """Stage -> seconds by which it is predicted to end before the slowest of its siblings that wait beside it.

    ``waiting``: tickets with their predicted service seconds. Siblings are of one run, graph and superstep, and end as if
    each was served at once. A stage that waits alone is left out: what is known of it was learned (`Remaining.slack_s`).
    A sibling that is served already is not seen, so this may be too little, not too much.
    """
    groups: defaultdict[tuple[str, str, int], list[tuple[str, float]]] = defaultdict(list)
    for t, service_s in waiting:
        if t.run_id and not t.nested:
            groups[t.run_id, _node(t).rpartition(":")[0], t.step].append((t.stage_id, t.pushed_at_s + service_s))
    found: dict[str, float] = {}
    for group in groups.values():
        if len(group) > 1:
            last = max(end for _, end in group)
            found.update((stage_id, last - end) for stage_id, end in group)
    return found


def with_join_slack(tickets: Iterable[Ticket], predictions: dict[str, Prediction]) -> dict[str, Prediction]:
    """The predictions of stages that wait, with what siblings that wait together say of each other's slack."""
    waiting = ((t, predictions[t.stage_id].service_s) for t in tickets)
    for stage_id, slack_s in join_slack(waiting).items():
        predictions[stage_id] = dataclasses.replace(predictions[stage_id], slack_s=slack_s)
    return predictions


# -- the static graph --------------------------------------------------------------------------------------------------
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
