"""The loop: runs arrive, their stages become ready, the policy plans, engines serve, tools run; on a virtual clock.

What decides is what decides live: `policy.plan` with the same snapshot, `fairness.Shares`, `EngineSpeeds` learned from
completions, `join_slack`. What is emulated: engines (`engine.Engine`), the network (half of an engine's ``rtt_s`` each way), tools
(recorded gaps), and what is predicted, which a workload brings with it (`workload.Foreseen`) or which the live statistics
(`RoleStatistics`, `Workflows`) learn while it is played. Prompt lengths are known exactly, prefix hits as the engine has them.

Everything that happens is told as an event (`Event`), from which every figure is counted. No I/O, no randomness: the same
workload, fleet and policy give the same events, byte for byte. Memory is linear in what is in flight.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from maestro_agents.core import (
    EXTEND_TOKENS,
    EngineSpec,
    EngineState,
    Grant,
    Observation,
    Prediction,
    RunEnd,
    Status,
    Ticket,
)
from maestro_agents.policy import Knows, Plan, Policy, Snapshot, plan
from maestro_agents.policy.fairness import Shares
from maestro_agents.policy.priority import end_s
from maestro_agents.predict.roles import RoleStatistics, prediction
from maestro_agents.predict.speed import EngineSpeeds, Speed
from maestro_agents.simulator.engine import Engine, EngineProfile, EngineRequest, RequestRecord
from maestro_agents.simulator.gpus import Gpus, Hooks
from maestro_agents.simulator.hardware import SimEngine, SimFleet
from maestro_agents.simulator.workload import Foreseen, Reference, Run, Stage, Workload, unloaded_s
from maestro_agents.workflow import Remaining, Workflows, join_slack

Event = tuple[Any, ...]
"""(what, when in seconds, ...): see `EVENTS`."""

EVENTS: Final[Mapping[str, tuple[str, ...]]] = {
    "run": ("at_s", "run", "app", "class", "tenant", "deadline_at_s", "stages", "counted", "unloaded_s"),
    "ready": ("at_s", "stage", "run", "role", "model", "prompt_tokens"),
    "grant": ("at_s", "stage", "engine", "kv_bytes"),
    "extend": ("at_s", "stage", "kv_bytes"),
    "end": (
        "at_s", "stage", "engine", "started_at_s", "first_token_at_s", "ended_at_s",
        "prompt_tokens", "output_tokens", "cached_tokens", "preemptions", "kv_bytes_per_token",
    ),
    "requeue": ("at_s", "stage", "engine"),
    "refuse": ("at_s", "stage", "reason"),
    "done": ("at_s", "run"),
    "tier": ("at_s", "gpu", "model", "from", "to", "ready_at_s"),
    "close": ("at_s", "waiting", "running", "plans", "grants"),
}  # fmt: skip
"""What each event tells. Moments are seconds after the workload's start."""

HEADS: Final = 8
"""Waiting stages of a model that one plan looks at beyond the free slots it may fill."""

PLACES: Final = 4
"""Engines of one kind (model, cluster, profile) that one plan looks at: those with the fewest stages."""

DETECT_S: Final = 1.0
"""From an engine's death to its stages' being ready again: two probes, half a second apart."""

LOOK_S: Final = 0.2
"""Shortest time between two looks at how far a stream has outgrown its reservation."""

NO_ENGINE: Final = EngineSpec(engine_id="", url="", model="")
"""What a prediction is made for: it has the speeds of some engine, and nothing else of one."""

_OUTPUTS: Final = ("output_tokens_mean", "output_tokens_p50", "output_tokens_p90", "output_tokens_p99")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outage:
    """A cluster that is gone for a while: its engines die with what they serve, and come back empty."""

    cluster: str
    from_s: float
    to_s: float


@dataclass(slots=True, eq=False)
class _Open:
    """A run that goes on."""

    run: Run
    missing: list[int]
    followers: list[list[int]]
    truth: list[Foreseen] | None
    left: int
    attained_s: float = 0.0
    #: Its stages that wait, by superstep.
    waiting: dict[int, list[_Job]] = field(default_factory=dict[int, "list[_Job]"])
    steps: list[int] = field(default_factory=list[int])
    #: Stage -> the first of the conversation that it goes on with.
    talks: list[int] = field(default_factory=list[int])
    placed: dict[int, str] = field(default_factory=dict[int, str])
    #: Of a stage to come, the one whose end made it ready.
    led: dict[int, int] = field(default_factory=dict[int, int])


@dataclass(slots=True, eq=False)
class _Job:
    """A stage that is ready, waits or is served."""

    open: _Open
    number: int
    stage: Stage
    ticket: Ticket
    prediction: Prediction
    due_at_s: float
    #: Its place in the queue of its model.
    entry: tuple[float, str, _Job] | None = None
    granted: Grant | None = None
    granted_at_s: float = 0.0
    place: _Place | None = None
    kv_bytes: int = 0
    covered: int = 0


@dataclass(slots=True, eq=False)
class _Place:
    """An engine with what is reserved there."""

    number: int
    sim: SimEngine
    engine: Engine
    kind: tuple[str, str, str]
    reserved_slots: int = 0
    reserved_kv_bytes: int = 0
    grants: int = 0
    alive: bool = True
    #: It takes stages: its model is awake and stays so.
    open: bool = True
    #: `Gpus` says what of its GPU it has.
    shared: bool = False
    next_s: float = math.inf
    version: int = 0
    jobs: dict[str, _Job] = field(default_factory=dict[str, _Job])
    state: EngineState | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Alone(Reference):
    """Each model's fastest engine with one request in it: no call takes less."""

    of: Mapping[str, EngineProfile]

    def call_s(self, stage: Stage) -> float:
        p = self.of.get(stage.model)
        if p is None:
            return Reference.call_s(self, stage)
        prefill_s = (stage.prompt_tokens - stage.shared_tokens) * p.prefill_s_per_token
        return prefill_s + stage.output_tokens * p.base_s + (stage.output_tokens - 1) * p.decode_s_per_seq


class World:
    """One play of a workload. ``tell``: takes every event as it happens."""

    def __init__(
        self,
        workload: Workload,
        fleet: Sequence[SimEngine] | SimFleet,
        policy: Policy,
        *,
        tell: Callable[[Event], None],
        outages: Iterable[Outage] = (),
    ) -> None:
        self.now_s = 0.0
        self.plans = 0
        self.grants = 0
        self._workload = workload
        self._policy = policy
        self._tell = tell
        self._events: list[tuple[float, int, Callable[..., None], Any]] = []
        self._count = 0
        self._gpus: Gpus | None = None
        engines: Sequence[SimEngine] = fleet.engines if isinstance(fleet, SimFleet) else fleet
        self._slots = sum(e.spec.slots for e in engines)
        if isinstance(fleet, SimFleet) and Gpus.shared(fleet):
            self._gpus = Gpus(fleet, workload, policy.place)
            engines = [*self._gpus.engines, *(e for e in engines if len(e.gpus) > 1)]
        count = len(self._gpus.engines) if self._gpus else 0
        self._places = [
            _Place(
                n, e, Engine(e.profile), (e.spec.model, e.spec.cluster, str(e.profile)), open=n >= count, shared=n < count
            )
            for n, e in enumerate(engines)
        ]  # fmt: skip
        self._by_id = {p.sim.spec.engine_id: p for p in self._places}
        #: Model -> kind -> stages reserved -> engines with so many, in the order in which they came to have them.
        self._index: dict[str, dict[tuple[str, str, str], list[dict[int, _Place]]]] = defaultdict(dict)
        self._of: defaultdict[str, list[_Place]] = defaultdict(list)
        for p in self._places:
            self._of[p.sim.spec.model].append(p)
            if p.open:
                self._enter(p)
        self._queues: defaultdict[str, list[tuple[float, str, _Job]]] = defaultdict(list)
        self._dirty: dict[str, None] = {}
        self._waiting = 0
        self._running = 0
        self._speeds = EngineSpeeds()
        self._shares = Shares(workload.tenants)
        told = policy.knows in {Knows.PREDICTED, Knows.STAGE}
        self._online = told and any(s.foreseen is None for r in workload.runs for s in r.stages)
        self._predictor = RoleStatistics()
        self._workflows = Workflows()
        self._caps = workload.caps()
        self._average = _average(workload) if policy.knows is Knows.NOTHING else None
        self._fastest: dict[str, tuple[float, Speed]] = {}
        slowest_first = sorted((e.profile.base_s, n, e) for n, e in enumerate(engines))[::-1]
        self._alone = _Alone(of={e.spec.model: e.profile for _, _, e in slowest_first})
        self._hits = {e.spec.model: [1.0, 1.0] for e in engines}  # prompt tokens that had to be computed, of how many
        if self._gpus:
            self._gpus.begin(
                Hooks(later=self._at, tell=tell, start=self._open, stop=self._close, resize=self._resize, slow=self._slow,
                      due_at_s=self._due_at_s)
            )  # fmt: skip
        for o in outages:
            self._at(o.from_s, self._die, o.cluster)
            self._at(o.to_s, self._revive, o.cluster)

    def play(self, tick: Callable[[], None] = lambda: None) -> None:
        """Play it to its horizon. ``tick`` is called once per run that arrives."""
        runs = iter(self._workload.runs)
        run = next(runs, None)
        horizon_s = self._workload.horizon_s
        events = self._events
        while True:
            arrives_s = run.at_s if run else math.inf
            at_s = min(arrives_s, events[0][0] if events else math.inf)
            if at_s > horizon_s or at_s == math.inf:
                break
            self.now_s = at_s
            while events and events[0][0] <= at_s:
                _, _, what, arg = heapq.heappop(events)
                what(arg)
            while run and run.at_s <= at_s:
                self._arrive(run)
                tick()
                run = next(runs, None)
            while self._dirty:
                self._plan(next(iter(self._dirty)))
        self.now_s = horizon_s
        self._tell(("close", horizon_s, self._waiting, self._running, self.plans, self.grants))

    def _at(self, at_s: float, what: Callable[..., None], arg: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (at_s, self._count, what, arg))

    # -- runs ----------------------------------------------------------------------------------------------------------
    def _arrive(self, run: Run) -> None:
        counted = run.at_s >= self._workload.warmup_s
        self._tell(
            ("run", run.at_s, run.run_id, run.app, run.service_class.value, run.tenant, run.at_s + run.deadline_s,
             len(run.stages), counted, unloaded_s(run.stages, self._alone) + run.end_gap_s)
        )  # fmt: skip
        followers: list[list[int]] = [[] for _ in run.stages]
        talks: list[int] = []
        for n, stage in enumerate(run.stages):
            talks.append(n if stage.shares < 0 else talks[stage.shares])
            for before in stage.after:
                followers[before].append(n)
        truth = _truth(run, followers) if self._policy.knows is Knows.ALL else None
        o = _Open(
            run,
            [len(s.after) for s in run.stages],
            followers,
            truth,
            len(run.stages),
            steps=run.steps(),
            talks=talks,
        )
        for n, stage in enumerate(run.stages):
            if not stage.after:
                self._soon(stage.gap_s, (o, n))
        if not run.stages:
            self._end_run(o)

    def _soon(self, after_s: float, what: tuple[_Open, int]) -> None:
        if after_s > 0:
            self._at(self.now_s + after_s, self._ready, what)
        else:
            self._ready(what)

    def _ready(self, what: tuple[_Open, int]) -> None:
        """A stage can be made now: push it."""
        o, n = what
        run, stage = o.run, o.run.stages[n]
        stage_id = f"{run.run_id}.{n}"
        ticket = Ticket(
            stage_id=stage_id,
            client_id="sim",
            model=stage.model,
            run_id=run.run_id,
            workflow=run.app,
            node=stage.role,
            role=stage.role,
            service_class=run.service_class,
            tenant=run.tenant,
            deadline_at_s=run.at_s + run.deadline_s,
            run_started_at_s=run.at_s,
            pushed_at_s=self.now_s,
            prompt_tokens=stage.prompt_tokens,
            max_tokens=self._caps[run.app],
            visit=stage.visit,
            step=o.steps[n],
            streams=True,
        )
        self._tell(("ready", self.now_s, stage_id, run.run_id, stage.role, stage.model, stage.prompt_tokens))
        job = _Job(o, n, stage, ticket, self._predict(o, n, ticket), 0.0)
        if self._gpus:
            if (led := o.led.pop(n, None)) is not None:
                self._gpus.followed(run, led, stage)
            self._waits(job)
        beside = o.waiting.setdefault(o.steps[n], [])
        beside.append(job)
        self._waiting += 1
        slack_s = join_slack((j.ticket, j.prediction.service_s) for j in beside)
        for other in beside if slack_s else ():
            other.prediction = dataclasses.replace(other.prediction, slack_s=slack_s[other.ticket.stage_id])
            if other is not job:
                self._push(other)
        self._push(job)

    def _waits(self, job: _Job) -> None:
        assert self._gpus is not None
        lost_at_s = job.ticket.deadline_at_s - end_s(job.prediction)
        self._gpus.waits(job.ticket.stage_id, job.ticket.model, job.prediction.service_s, lost_at_s, self.now_s)

    def _push(self, job: _Job) -> None:
        """Queue a stage by its moment; an entry of it that is already there counts no more (`_heads`)."""
        job.due_at_s = self._policy.order(job.ticket, job.prediction, self.now_s)
        job.ticket = dataclasses.replace(job.ticket, due_at_s=job.due_at_s)
        job.entry = (job.due_at_s, job.ticket.stage_id, job)
        heapq.heappush(self._queues[job.ticket.model], job.entry)
        self._dirty[job.ticket.model] = None

    def _end_run(self, o: _Open) -> None:
        self._tell(("done", self.now_s, o.run.run_id))
        if self._gpus:
            self._gpus.run_ended(o.run)
        if self._online:
            self._workflows.end_run(
                RunEnd(
                    run_id=o.run.run_id, workflow=o.run.app, outcome="done", started_at_s=o.run.at_s, ended_at_s=self.now_s,
                    tenant=o.run.tenant,
                )
            )  # fmt: skip

    # -- predict -------------------------------------------------------------------------------------------------------
    def _speed(self, model: str) -> Speed:
        """The fastest engine's, as the live scheduler asks for it; worked out anew once a second."""
        at_s, found = self._fastest.get(model, (-math.inf, None))
        if found is None or self.now_s - at_s >= 1.0:
            places = self._of[model]
            speeds = [self._speeds.of(p.sim.spec) for p in [p for p in places if p.open] or places]
            found = min(speeds, key=lambda s: s.usual_decode) if speeds else Speed(0.0, 0.02, 0.0, 0.0)
            self._fastest[model] = (self.now_s, found)
        return found

    def _predict(self, o: _Open, n: int, ticket: Ticket) -> Prediction:
        speed = self._speed(ticket.model)
        if self._online:
            engine = dataclasses.replace(
                NO_ENGINE, prefill_s_per_token=speed.prefill, decode_s_per_token=speed.usual_decode
            )
            p = self._predictor.predict((ticket,), {ticket.model: engine}, self._workflows)[ticket.stage_id]
        else:
            known = self._known(o, n)
            computed, prompts = self._hits[ticket.model]
            prefill, decode = speed.prefill * computed / prompts, speed.usual_decode
            engine = dataclasses.replace(NO_ENGINE, prefill_s_per_token=prefill, decode_s_per_token=decode)
            rest = Remaining(
                stages=known.stages, output_tokens=known.output_tokens, tool_s=known.tool_s, ends_p=known.ends_p,
                llm_s=known.prompt_tokens * prefill + known.output_tokens * decode,
            )  # fmt: skip
            p = prediction(ticket, known.estimate, engine, rest)
        if self._policy.knows is Knows.STAGE:
            p = dataclasses.replace(p, **Remaining(slack_s=p.slack_s).of_prediction())
        debt_s = self._shares.charge(ticket.tenant, p.service_s, slots=self._slots, now_s=self.now_s)
        return dataclasses.replace(p, attained_s=o.attained_s, debt_s=debt_s)

    def _known(self, o: _Open, n: int) -> Foreseen:
        """What the policy may know of a stage: the truth, what stages do on average, or what the workload foresees."""
        stage = o.run.stages[n]
        if o.truth is not None:
            return dataclasses.replace(o.truth[n], **dict.fromkeys(_OUTPUTS, stage.output_tokens))
        known = self._average or stage.foreseen
        assert known is not None
        return known

    # -- plan ----------------------------------------------------------------------------------------------------------
    def _plan(self, model: str) -> None:
        """Let the policy place waiting stages of a model, as long as it does."""
        queue = self._queues[model]
        while queue:
            engines = self._shortlist(model)
            if not engines:
                break
            free = sum(e.free_slots for e in engines)
            heads = self._heads(model, min(free, 64) + HEADS)
            if not heads:
                break
            made = self._ask(heads, engines)
            placed = {t.stage_id for t, _ in made.grants} | {t.stage_id for t, _ in made.refusals}
            for entry in heads:
                if entry[1] not in placed:
                    heapq.heappush(queue, entry)
            jobs = {job.ticket.stage_id: job for _, _, job in heads}
            for ticket, refusal in made.refusals:
                self._leave(jobs[ticket.stage_id])
                self._tell(("refuse", self.now_s, ticket.stage_id, refusal.reason))
            for ticket, grant in made.grants:
                self._grant(jobs[ticket.stage_id], grant)
            if not made.grants or len(made.grants) < len(heads):
                break
        self._dirty.pop(model, None)

    def _ask(self, heads: Sequence[tuple[float, str, _Job]], engines: list[EngineState]) -> Plan:
        """One decision: the very function that the live scheduler calls."""
        self.plans += 1
        here = {e.spec.engine_id for e in engines}
        cached: dict[tuple[str, str], int] = {}
        for _, stage_id, job in heads:
            if job.stage.shares >= 0 and (engine_id := job.open.placed.get(job.stage.shares)):
                cached[stage_id, engine_id] = job.stage.shared_tokens
                place = self._by_id[engine_id]
                if engine_id not in here and place.alive and place.open and place.reserved_slots < place.sim.spec.slots:
                    here.add(engine_id)
                    engines.append(self._state(place))
        return plan(
            Snapshot(
                tickets=[job.ticket for _, _, job in heads],
                predictions={stage_id: job.prediction for _, stage_id, job in heads},
                engines=engines,
                cached_tokens=cached,
                complete=False,
            ),
            self._policy,
            epoch=1,
            now_s=self.now_s,
        )

    def _heads(self, model: str, n: int) -> list[tuple[float, str, _Job]]:
        """Take the first ``n`` waiting stages off the queue. One whose moment has moved is put back where it belongs."""
        queue, order = self._queues[model], self._policy.order
        found: list[tuple[float, str, _Job]] = []
        while queue and len(found) < n:
            entry = heapq.heappop(queue)
            moment, _, job = entry
            if job.entry is not entry:
                continue  # it has another moment by now
            new = order(job.ticket, job.prediction, self.now_s)
            if new > moment + 1e-9:
                self._push(job)
            else:
                found.append(entry)
        return found

    def _shortlist(self, model: str) -> list[EngineState]:
        """Of each kind of engine the few with a free slot and the fewest stages: cost O(kinds x slots), not O(fleet)."""
        found: list[EngineState] = []
        for by_load in self._index[model].values():
            n = 0
            for same in by_load[:-1]:
                for place in same.values():
                    found.append(self._state(place))
                    n += 1
                    if n == PLACES:
                        break
                if n == PLACES:
                    break
        return found

    def _state(self, p: _Place) -> EngineState:
        if p.state is None:
            speed = self._speeds.of(p.sim.spec)
            p.state = EngineState(
                spec=p.sim.spec,
                reserved_slots=p.reserved_slots,
                reserved_kv_bytes=p.reserved_kv_bytes,
                healthy=p.alive,
                prefill_s_per_token=speed.prefill,
                decode_s_per_token=speed.decode,
                beside_s_per_token=speed.beside,
                grants=p.grants,
            )
        return p.state

    def _enter(self, p: _Place) -> None:
        """Put an engine into the index, by how many stages it has; one that is full is in the last group."""
        by_load = self._index[p.sim.spec.model].get(p.kind)
        if by_load is None:
            by_load = self._index[p.sim.spec.model][p.kind] = [{} for _ in range(p.sim.spec.slots + 1)]
        by_load[min(p.reserved_slots, p.sim.spec.slots)][p.number] = p
        p.state = None

    def _move(self, p: _Place, slots: int, kv_bytes: int) -> None:
        """Change what is reserved on an engine."""
        if p.open:
            self._remove(p)
        p.reserved_slots += slots
        p.reserved_kv_bytes += kv_bytes
        p.state = None
        if p.open:
            self._enter(p)
        if p.shared and self._gpus:
            self._gpus.load(p.number, p.reserved_slots, p.reserved_kv_bytes, self.now_s)

    def _remove(self, p: _Place) -> None:
        del self._index[p.sim.spec.model][p.kind][min(p.reserved_slots, p.sim.spec.slots)][p.number]

    # -- GPUs that models share (`gpus.Hooks`) -------------------------------------------------------------------------
    def _open(self, number: int) -> None:
        p = self._places[number]
        p.engine.clear_cache(self.now_s)
        p.open = True
        self._enter(p)
        self._dirty[p.sim.spec.model] = None

    def _close(self, number: int) -> None:
        p = self._places[number]
        self._remove(p)
        p.open = False

    def _resize(self, number: int, kv_bytes: int, promised_bytes: int) -> None:
        p = self._places[number]
        spec = p.sim.spec
        p.engine.resize(kv_bytes // (p.sim.profile.block_size * spec.kv_bytes_per_token), self.now_s)
        p.sim = dataclasses.replace(p.sim, spec=dataclasses.replace(spec, kv_bytes=promised_bytes))
        p.state = None
        self._dirty[spec.model] = None
        self._at(self.now_s, self._collect, p)

    def _slow(self, number: int, factor: float) -> None:
        p = self._places[number]
        p.engine.slow(factor, self.now_s)
        self._at(self.now_s, self._collect, p)

    def _due_at_s(self, model: str) -> float:
        """The smallest moment among the waiting stages of a model."""
        queue = self._queues[model]
        while queue and queue[0][2].entry is not queue[0]:  # it has another moment by now
            heapq.heappop(queue)
        return queue[0][0] if queue else math.inf

    # -- serve ---------------------------------------------------------------------------------------------------------
    def _leave(self, job: _Job) -> None:
        """It waits no more."""
        beside = job.open.waiting[job.open.steps[job.number]]
        beside.remove(job)
        if not beside:
            del job.open.waiting[job.open.steps[job.number]]
        self._waiting -= 1
        if self._gpus:
            self._gpus.leaves(job.ticket.stage_id, job.ticket.model)

    def _grant(self, job: _Job, grant: Grant) -> None:
        p = self._by_id[grant.engine_id]
        self.grants += 1
        p.grants += 1
        self._leave(job)
        self._running += 1
        job.granted, job.granted_at_s = grant, self.now_s
        job.place, job.kv_bytes, job.covered = p, grant.kv_bytes, grant.output_tokens
        p.jobs[job.ticket.stage_id] = job
        self._move(p, 1, grant.kv_bytes)
        self._tell(("grant", self.now_s, job.ticket.stage_id, grant.engine_id, grant.kv_bytes))
        if self._gpus:
            ends_at_s = self.now_s + job.prediction.service_s
            self._gpus.expect(job.open.run, job.number, ends_at_s)
            if p.shared:
                self._gpus.serves(p.number, job.ticket.stage_id, ends_at_s)
        if p.sim.spec.rtt_s:
            self._at(self.now_s + p.sim.spec.rtt_s / 2, self._submit, (job, p))
        else:
            self._submit((job, p))

    def _submit(self, what: tuple[_Job, _Place]) -> None:
        """It reaches its engine."""
        job, p = what
        if job.place is not p or not p.alive:
            return
        stage = job.stage
        assert job.granted is not None
        p.engine.submit(
            EngineRequest(
                request_id=job.ticket.stage_id,
                prompt_tokens=stage.prompt_tokens,
                output_tokens=stage.output_tokens,
                priority=job.granted.priority,
                # A conversation is one text, which grows with every call of it.
                prefix=(
                    (f"{job.ticket.run_id}.{job.open.talks[job.number]}", stage.prompt_tokens + stage.output_tokens),
                ),
            ),
            self.now_s,
        )
        self._collect(p)
        if stage.output_tokens > job.covered:
            self._at(self.now_s + max(LOOK_S, job.covered * p.sim.profile.base_s), self._grow, (job, p))

    def _grow(self, what: tuple[_Job, _Place]) -> None:
        """A stream may have outgrown its KV reservation: extend it, as a client does (`ports.Queue.extend`)."""
        job, p = what
        if job.place is not p or job.ticket.stage_id not in p.jobs:
            return
        emitted = p.engine.emitted(job.ticket.stage_id, self.now_s)
        while emitted >= job.covered:
            job.covered += EXTEND_TOKENS
            more = p.sim.spec.kv_bytes_of(job.stage.prompt_tokens, job.covered) - job.kv_bytes
            if more > 0:
                job.kv_bytes += more
                self._move(p, 0, more)
                self._tell(("extend", self.now_s, job.ticket.stage_id, job.kv_bytes))
        if job.stage.output_tokens > job.covered:
            step_s = p.sim.profile.base_s + p.engine.num_running * p.sim.profile.decode_s_per_seq
            self._at(self.now_s + max(LOOK_S, (job.covered - emitted) * step_s), self._grow, (job, p))

    def _wake(self, what: tuple[_Place, int]) -> None:
        p, version = what
        if version == p.version:
            self._collect(p)

    def _collect(self, p: _Place) -> None:
        """See what has ended on an engine, and when to look again."""
        for record in p.engine.ended(self.now_s):
            job = p.jobs[record.request.request_id]
            if p.sim.spec.rtt_s:
                self._at(self.now_s + p.sim.spec.rtt_s / 2, self._finish, (job, record))
            else:
                self._finish((job, record))
        next_s = p.engine.next_end_s
        if next_s != p.next_s:
            p.next_s = next_s
            p.version += 1
            if next_s < math.inf:
                self._at(max(next_s, self.now_s), self._wake, (p, p.version))

    def _finish(self, what: tuple[_Job, RequestRecord]) -> None:
        """The answer has reached its caller."""
        job, r = what
        p, o, stage_id = job.place, job.open, job.ticket.stage_id
        if p is None or p.jobs.pop(stage_id, None) is None:
            return  # its engine died while the answer was on its way
        assert job.granted is not None
        spec = p.sim.spec
        self._tell(
            ("end", self.now_s, stage_id, spec.engine_id, r.started_at_s, r.first_token_at_s, r.ended_at_s,
             r.request.prompt_tokens, r.output_tokens, r.cached_tokens, r.preemptions, spec.kv_bytes_per_token)
        )  # fmt: skip
        self._running -= 1
        beside = p.reserved_slots - 1
        self._move(p, -1, -job.kv_bytes)
        served_s = self.now_s - job.granted_at_s
        self._speeds.add(spec.engine_id, r.request.prompt_tokens - r.cached_tokens, r.output_tokens, served_s, beside)
        hits = self._hits[spec.model]
        hits[0] += 0.001 * (r.request.prompt_tokens - r.cached_tokens)
        hits[1] += 0.001 * r.request.prompt_tokens
        o.placed[job.number] = spec.engine_id
        o.attained_s += served_s
        if self._online:
            self._observe(job, r)
        if self._gpus:
            self._gpus.ended(o.run, job.number, p.number if p.shared else -1, self.now_s)
        o.left -= 1
        for n in o.followers[job.number]:
            o.missing[n] -= 1
            if not o.missing[n]:
                o.led[n] = job.number
                self._soon(o.run.stages[n].gap_s, (o, n))
        if not o.left:
            if o.run.end_gap_s:
                self._at(self.now_s + o.run.end_gap_s, self._end_run, o)
            else:
                self._end_run(o)
        self._dirty[spec.model] = None

    def _observe(self, job: _Job, r: RequestRecord) -> None:
        t, granted = job.ticket, job.granted
        assert granted is not None
        seen = Observation(
            stage_id=t.stage_id, run_id=t.run_id, workflow=t.workflow, role=t.role, node=t.node, model=t.model,
            engine_id=granted.engine_id, service_class=t.service_class, tenant=t.tenant, status=Status.DONE, visit=t.visit,
            step=t.step, prompt_tokens=t.prompt_tokens, output_tokens=r.output_tokens, cached_tokens=r.cached_tokens,
            run_started_at_s=t.run_started_at_s, pushed_at_s=t.pushed_at_s, granted_at_s=job.granted_at_s,
            finished_at_s=self.now_s,
        )  # fmt: skip
        self._predictor.observe((seen,))
        self._workflows.observe(seen)

    # -- faults --------------------------------------------------------------------------------------------------------
    def _die(self, cluster: str) -> None:
        """Every engine of a cluster is gone, and what it served is ready again once that is noticed."""
        for p in self._places:
            if p.sim.spec.cluster != cluster or not p.alive:
                continue
            if p.open:
                self._remove(p)
            p.alive, p.open, p.state = False, False, None
            for stage_id, job in p.jobs.items():
                self._tell(("requeue", self.now_s, stage_id, p.sim.spec.engine_id))
                self._running -= 1
                job.place = None
                self._at(self.now_s + DETECT_S, self._again, job)
            p.jobs = {}
            p.engine = Engine(p.sim.profile)
            p.reserved_slots = p.reserved_kv_bytes = 0
            p.next_s, p.version = math.inf, p.version + 1
        if self._gpus:
            self._gpus.die(cluster)

    def _again(self, job: _Job) -> None:
        job.granted = None
        job.open.waiting.setdefault(job.open.steps[job.number], []).append(job)
        self._waiting += 1
        if self._gpus:
            self._waits(job)
        self._push(job)

    def _revive(self, cluster: str) -> None:
        for p in self._places:
            if p.sim.spec.cluster == cluster and not p.alive:
                p.alive = True
                if not p.shared:
                    p.open = True
                    self._enter(p)
                    self._dirty[p.sim.spec.model] = None
        if self._gpus:
            self._gpus.revive(cluster, self.now_s)


def _truth(run: Run, followers: Sequence[Sequence[int]]) -> list[Foreseen]:
    """What is left after each stage along the path that writes the most."""
    nothing = Foreseen(
        output_tokens_mean=0, output_tokens_p50=0, output_tokens_p90=0, output_tokens_p99=0,
        basis="truth", tool_s=run.end_gap_s, ends_p=1.0,
    )  # fmt: skip
    found = [nothing] * len(run.stages)
    ends = [0] * len(run.stages)  # output tokens from this stage on, itself included
    for n in range(len(run.stages) - 1, -1, -1):
        if followers[n]:
            longest = max(followers[n], key=lambda f: ends[f])
            s, after = run.stages[longest], found[longest]
            found[n] = dataclasses.replace(
                after, stages=after.stages + 1, output_tokens=after.output_tokens + s.output_tokens,
                prompt_tokens=after.prompt_tokens + s.prompt_tokens, tool_s=after.tool_s + s.gap_s, ends_p=0.0,
            )  # fmt: skip
        ends[n] = run.stages[n].output_tokens + int(found[n].output_tokens)
    return found


def _average(workload: Workload) -> Foreseen:
    """What all stages of a workload come to on average."""
    n = outputs = stages = output = prompt = 0
    tool_s = 0.0
    for run in workload.runs:
        followers: list[list[int]] = [[] for _ in run.stages]
        for i, s in enumerate(run.stages):
            for before in s.after:
                followers[before].append(i)
        for s, t in zip(run.stages, _truth(run, followers), strict=True):
            n, outputs, stages = n + 1, outputs + s.output_tokens, stages + t.stages
            output, prompt, tool_s = output + t.output_tokens, prompt + t.prompt_tokens, tool_s + t.tool_s
    n = max(1, n)
    mean = outputs / n
    return Foreseen(
        output_tokens_mean=mean, output_tokens_p50=mean, output_tokens_p90=2 * mean, output_tokens_p99=4 * mean,
        stages=stages / n, output_tokens=output / n, prompt_tokens=prompt / n, tool_s=tool_s / n, basis="average",
    )  # fmt: skip
