"""Recorded runs once more, on a virtual clock: first come first served as engines do, or under Maestro.

The same runs arrive at the same moments; a stage becomes ready the gap after the stages it followed that it was seen to
take; each has the same work. What differs is who waits for whom. Under Maestro the real `Scheduler` decides, with the
real `MemoryQueue` behind it and its own statistics, which learn from a stage when it ends here, and begin empty: nothing
is known that would not have been known.

The engine is the simplest that shows the effect: so many slots, first come first served before them, and a batch in which
each slows the others. KV memory is not modelled: slots alone admit, and no reservation has to grow. No I/O; the same
recording gives the same result.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from maestro_agents.core import EngineSpec, Grant, Ticket
from maestro_agents.policy import OURS, Policy
from maestro_agents.queue.memory import MemoryQueue
from maestro_agents.scheduler import Scheduler
from maestro_agents.simulator.recording import Engine, Recording, Run, Stage

PUBLISH_S: Final = 2.0
"""How often the scheduler publishes credits and what it learned of roles: every fifth of its default lease."""

FOREVER_S: Final = 1e12
"""Leases do not end here: nothing dies."""

RESOLUTION_S: Final = 1e-6
"""Moments are epoch seconds; a double tells them apart to a quarter of a microsecond."""

SEARCHED: Final = 2_000
"""Calls of an engine that `calibrated` looks at."""

SLOWDOWNS: Final = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)

_CLIENT_ID: Final = "replay"


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """One stage in a replay. Seconds on the recording's own clock."""

    pushed_at_s: float
    started_at_s: float
    ended_at_s: float
    engine: str

    @property
    def wait_s(self) -> float:
        return self.started_at_s - self.pushed_at_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a replay came to."""

    #: Run -> when it ended, of runs whose end was recorded.
    ended_at_s: Mapping[str, float]
    #: Stage -> what became of it.
    stages: Mapping[str, Served]


class VirtualClock:
    """Time as the replay says."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def now_s(self) -> float:
        return self.at_s


@dataclass(eq=False, slots=True)
class _Job:
    """A stage on its way through a replay."""

    run: Run
    number: int
    stage: Stage
    pushed_at_s: float = 0.0
    started_at_s: float = 0.0
    left_s: float = 0.0
    token: int = 0


class Batch:
    """An engine: ``slots`` at a time, the others in order of arrival; a batch of n is 1 + slowdown x (n - 1) slower."""

    def __init__(self, key: str, slots: float, slowdown: float) -> None:
        self.key = key
        self.slots = slots
        self.slowdown = slowdown
        self.running: list[_Job] = []
        self.waiting: deque[_Job] = deque()
        self._at_s = 0.0

    @property
    def full(self) -> bool:
        return len(self.running) >= self.slots

    @property
    def _pace(self) -> float:
        return 1.0 + self.slowdown * (len(self.running) - 1)

    @property
    def next_end_s(self) -> float:
        """When the next stage ends if nothing else happens."""
        return self._at_s + min(j.left_s for j in self.running) * self._pace if self.running else math.inf

    def submit(self, job: _Job, work_s: float, now_s: float) -> None:
        """Take a stage; `advance` must have been called for this moment."""
        job.left_s = work_s
        self.waiting.append(job)
        self._fill(now_s)

    def advance(self, now_s: float) -> list[_Job]:
        """Let time pass until ``now_s``, not beyond `next_end_s`; return what ended."""
        if self.running:
            done_s = (now_s - self._at_s) / self._pace
            for job in self.running:
                job.left_s -= done_s
        self._at_s = now_s
        ended = [j for j in self.running if j.left_s <= RESOLUTION_S]
        if ended:
            self.running = [j for j in self.running if j.left_s > RESOLUTION_S]
            self._fill(now_s)
        return ended

    def _fill(self, now_s: float) -> None:
        self._at_s = now_s
        while self.waiting and not self.full:
            job = self.waiting.popleft()
            job.started_at_s = now_s
            self.running.append(job)


class Front(Protocol):
    """Who stands before the engines and says which stage goes where, when."""

    async def offer(self, job: _Job, now_s: float) -> None:
        """A stage became ready."""
        ...

    async def ended(self, job: _Job, batch: Batch, now_s: float) -> None:
        """A stage was answered."""
        ...

    async def run_ended(self, run: Run, now_s: float) -> None:
        """A run is over."""
        ...

    async def turn(self, now_s: float) -> None:
        """All that happened at this moment was said."""
        ...


class Engines:
    """Nobody: each call goes at once where it was seen to go, and queues there."""

    def __init__(self, batches: Mapping[str, Batch]) -> None:
        self._batches = batches

    async def offer(self, job: _Job, now_s: float) -> None:
        self._batches[job.stage.engine].submit(job, job.stage.work_s, now_s)

    async def ended(self, job: _Job, batch: Batch, now_s: float) -> None: ...

    async def run_ended(self, run: Run, now_s: float) -> None: ...

    async def turn(self, now_s: float) -> None: ...


class Maestro:
    """The scheduler itself, with its queue, its statistics and its fast path; only the clock is ours."""

    def __init__(self, batches: Mapping[str, Batch], engines: Mapping[str, Engine], policy: Policy) -> None:
        self._batches = batches
        self._engines = engines
        self._clock = VirtualClock()
        self._queue = MemoryQueue(lease_s=FOREVER_S, max_queue=2**31)
        self._specs: defaultdict[str, list[EngineSpec]] = defaultdict(list)
        for e in engines.values():
            self._specs[e.model].append(EngineSpec(engine_id=e.key, url="", model=e.model, slots=e.slots))
        specs = [s for found in self._specs.values() for s in found]
        self.scheduler = Scheduler(
            self._queue, specs, clock=self._clock, holder="replay", policy=policy, lease_s=FOREVER_S
        )
        self._waiting: dict[str, _Job] = {}
        self._published_s = -math.inf

    async def offer(self, job: _Job, now_s: float) -> None:
        await self._at(now_s)
        self._waiting[job.stage.seen.stage_id] = job
        await self._ask(_ticket(job), now_s)

    async def _ask(self, ticket: Ticket, now_s: float) -> None:
        """Push a stage; pushed again, the queue says what it was granted meanwhile."""
        grant = await self._queue.push(ticket, engines=self._specs[ticket.model], now_s=now_s)
        if isinstance(grant, Grant):
            job = self._waiting.pop(ticket.stage_id)
            job.token = grant.token
            there, here = self._engines[grant.engine_id], self._engines[job.stage.engine]
            pace = there.pace_s / here.pace_s if there.pace_s and here.pace_s else 1.0
            self._batches[grant.engine_id].submit(job, job.stage.work_s * pace, now_s)

    async def ended(self, job: _Job, batch: Batch, now_s: float) -> None:
        await self._at(now_s)
        seen = dataclasses.replace(
            job.stage.seen,
            engine_id=batch.key,
            observed=False,
            pushed_at_s=job.pushed_at_s,
            granted_at_s=job.started_at_s,
            finished_at_s=now_s,
        )
        await self._queue.finish(seen, client_id=_CLIENT_ID, token=job.token, now_s=now_s)
        self.scheduler.take(seen)

    async def run_ended(self, run: Run, now_s: float) -> None:
        await self._at(now_s)
        if run.end is not None:
            self.scheduler.take(dataclasses.replace(run.end, ended_at_s=now_s))

    async def turn(self, now_s: float) -> None:
        if self._waiting and any(not b.full for b in self._batches.values()):
            await self._at(now_s)
            plan = await self.scheduler.decide()
            await self.scheduler.act(plan)
            for ticket, _ in plan.grants:
                await self._ask(ticket, now_s)

    async def _at(self, now_s: float) -> None:
        self._clock.at_s = now_s
        if now_s - self._published_s >= PUBLISH_S:
            self._published_s = now_s
            await (self.scheduler.publish() if self.scheduler.leading else self.scheduler.lead())


def _ticket(job: _Job) -> Ticket:
    o = job.stage.seen
    return Ticket(
        stage_id=o.stage_id,
        client_id=_CLIENT_ID,
        model=o.model,
        run_id=o.run_id,
        workflow=o.workflow,
        node=o.node,
        role=o.role,
        service_class=o.service_class,
        tenant=o.tenant,
        deadline_at_s=o.deadline_at_s,
        run_started_at_s=job.run.started_at_s,
        pushed_at_s=job.pushed_at_s,
        due_at_s=job.pushed_at_s,
        prompt_tokens=o.prompt_tokens,
        visit=o.visit,
        step=o.step,
        features=o.features,
        sketch=o.sketch,
    )


# -- play ----------------------------------------------------------------------------------------------------------------
async def first_come(recording: Recording, *, alone: bool = False, tick: Callable[[], None] = lambda: None) -> Outcome:
    """Play it as it was: engines serve first come first served, each call where it went. ``alone``: as if every call
    had an engine for itself.
    """
    batches = {k: Batch(k, e.slots, e.slowdown) for k, e in recording.engines.items()}
    if alone:
        batches = {k: Batch(k, math.inf, 0.0) for k in recording.engines}
    return await _play(recording, batches, Engines(batches), tick)


async def maestro(recording: Recording, *, policy: Policy = OURS, tick: Callable[[], None] = lambda: None) -> Outcome:
    """Play it as it would have been under Maestro."""
    batches = {k: Batch(k, e.slots, e.slowdown) for k, e in recording.engines.items()}
    return await _play(recording, batches, Maestro(batches, recording.engines, policy), tick)


@dataclass(slots=True)
class _Open:
    """A run that goes on."""

    run: Run
    #: Number of a stage (-1: the end of the run) -> how many it still waits for.
    missing: dict[int, int]
    followers: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict[int, list[int]](list))


async def _play(recording: Recording, batches: Mapping[str, Batch], front: Front, tick: Callable[[], None]) -> Outcome:
    """``tick`` is called once per stage that ends."""
    ended_at_s: dict[str, float] = {}
    served: dict[str, Served] = {}
    due: list[tuple[float, int, int]] = []  # moment, run, stage (-1: its end)
    runs: list[_Open] = []
    for r, run in enumerate(recording.runs):
        open_ = _Open(run, {})
        runs.append(open_)
        for n, follows in [*((n, s.due) for n, s in enumerate(run.stages)), *([(-1, run.ends)] if run.end else ())]:
            open_.missing[n] = len(follows.after)
            for before in follows.after:
                open_.followers[before].append(n)
            if not follows.after:
                due.append((run.started_at_s + follows.gap_s, r, n))
    heapq.heapify(due)
    place = {id(run): r for r, run in enumerate(recording.runs)}
    while True:
        now_s = min([due[0][0] if due else math.inf, *(b.next_end_s for b in batches.values())])
        if now_s == math.inf:
            return Outcome(ended_at_s=ended_at_s, stages=served)
        for batch in batches.values():
            for job in batch.advance(now_s):
                tick()
                served[job.stage.seen.stage_id] = Served(
                    pushed_at_s=job.pushed_at_s, started_at_s=job.started_at_s, ended_at_s=now_s, engine=batch.key
                )
                await front.ended(job, batch, now_s)
                r = place[id(job.run)]
                for n in runs[r].followers[job.number]:
                    runs[r].missing[n] -= 1
                    if not runs[r].missing[n]:
                        follows = job.run.ends if n < 0 else job.run.stages[n].due
                        heapq.heappush(due, (now_s + follows.gap_s, r, n))
        while due and due[0][0] <= now_s:
            _, r, n = heapq.heappop(due)
            run = runs[r].run
            if n < 0:
                ended_at_s[run.run_id] = now_s
                await front.run_ended(run, now_s)
            else:
                await front.offer(_Job(run, n, run.stages[n], pushed_at_s=now_s), now_s)
        await front.turn(now_s)


# -- what the recording does not show --------------------------------------------------------------------------------------
def calibrated(recording: Recording) -> Recording:
    """The same with every engine's slots known: where nothing showed them, those (with the slowdown) whose replay, call by
    call at the moments they were seen to arrive, comes closest to the latencies that were observed.
    """
    stages: defaultdict[str, list[Stage]] = defaultdict(list)
    for run in recording.runs:
        for stage in run.stages:
            stages[stage.engine].append(stage)
    engines = {k: e if e.slots else _searched(e, stages[k]) for k, e in recording.engines.items()}
    return dataclasses.replace(recording, engines=engines)


def _searched(engine: Engine, stages: Sequence[Stage]) -> Engine:
    calls = sorted(stages, key=_sent_s)[:SEARCHED]
    peak = _peak(calls)
    tried = sorted({*range(1, 9)} | {round(2 ** (i / 2)) for i in range(6, 21)})
    tried = [n for n in tried if n < peak] + [peak]
    best = min(
        ((_misfit(calls, slots, slowdown), slots, slowdown) for slots in tried for slowdown in SLOWDOWNS),
        key=lambda found: (found[0], found[2], -found[1]),
    )
    source = "what fits the latencies best" if best[1] < peak else "the most that were there at a time (never full)"
    return dataclasses.replace(engine, slots=best[1], slowdown=best[2], slots_from=source)


def _sent_s(stage: Stage) -> float:
    return max(stage.seen.granted_at_s, stage.seen.pushed_at_s)


def _peak(calls: Iterable[Stage]) -> int:
    """The most that an engine had at a time, waiting or running."""
    changes = sorted(c for s in calls for c in ((_sent_s(s), 1), (s.seen.finished_at_s, -1)))
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return max(1, most)


def _misfit(calls: Sequence[Stage], slots: int, slowdown: float) -> float:
    """Seconds by which an engine of so many slots ends these calls at other moments than were seen."""
    batch, run = Batch("", slots, slowdown), Run(run_id="", started_at_s=0.0, stages=())
    total, n = 0.0, 0
    while True:
        arrives_s = _sent_s(calls[n]) if n < len(calls) else math.inf
        now_s = min(arrives_s, batch.next_end_s)
        if now_s == math.inf:
            return total
        total += sum(abs(now_s - job.stage.seen.finished_at_s) for job in batch.advance(now_s))
        if arrives_s <= now_s:
            batch.submit(_Job(run, 0, calls[n]), calls[n].work_s, now_s)
            n += 1
