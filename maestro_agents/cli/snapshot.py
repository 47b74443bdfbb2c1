"""What a queue holds, as values: the whole of it at one moment, and single stages. Reads only, but for `cancel`."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from maestro_agents.core import (
    EngineSpec,
    Observation,
    Refusal,
    RunEnd,
    ServiceClass,
    Status,
    Switch,
    Ticket,
)
from maestro_agents.distance import by_cluster
from maestro_agents.errors import ConfigError, QueueUnavailable
from maestro_agents.nodes import NodeReport
from maestro_agents.policy.quota import Use, may_start
from maestro_agents.ports import Distance, Ledger, Queue, Reservation, Running
from maestro_agents.tenants import Tenant

HEADS: Final = 1_000
"""Waiting stages read per model; beyond it the depth is still right, the split by class is of these."""

RECENT: Final = 500
"""Ended stages and runs that the percentiles and the deadlines are counted over."""

PAGE: Final = 1_000


# -- the snapshot --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One model and service class: what waits, what runs, how long the last ones waited."""

    model: str
    service_class: ServiceClass
    waiting: int
    oldest_s: float
    running: int
    #: Over the last stages that ended; NaN where none has.
    wait_p50_s: float
    wait_p95_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLine:
    """One engine and what is promised of it."""

    engine_id: str
    model: str
    slots: int
    reserved_slots: int
    #: 0 while unknown: then slots alone admit.
    kv_bytes: int
    reserved_kv_bytes: int
    #: Reservations of ended stages that the engine may still be computing.
    draining: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterLine:
    """One cluster: what of it lives, and how far it is from where apps are."""

    cluster: str
    #: That take stages now; those that are dead, or asleep, are not in the fleet that is published.
    engines: int
    slots: int
    reserved_slots: int
    #: Site -> seconds there and back as measured lately; inf: it cannot be reached from there.
    rtts: Mapping[str, float]
    #: What the fleet file says, for sites that have not measured.
    file_rtt_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AgeingLine:
    """An engine whose memory grows: the evidence, and when it is full at the earliest (`policy.ageing`)."""

    engine_id: str
    words: str
    exhausted_at_s: float
    #: Restarts on request so far.
    restarts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLine:
    """The last runs of one service class that came to their end."""

    service_class: ServiceClass
    done: int
    failed: int
    #: Runs that had a deadline, and how many of them met it.
    promised: int
    met: int
    p50_s: float
    p95_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The queue at one moment. ``trouble``: why the rest is old (Redis does not answer)."""

    at_s: float
    source: str
    depth: Mapping[str, int]
    lines: tuple[Line, ...] = ()
    engines: tuple[EngineLine, ...] = ()
    #: Empty where there is one cluster, and nobody measures how far it is.
    clusters: tuple[ClusterLine, ...] = ()
    runs: tuple[RunLine, ...] = ()
    #: The most pressing first.
    ageing: tuple[AgeingLine, ...] = ()
    trouble: str = ""
    #: What the pool's switch says, where that is not ``on``; empty else.
    switch: str = ""
    #: Tenants that hold as much as they may: their stages wait for that, whatever room there is. Tenant -> the limit.
    at_quota: Mapping[str, str] = field(default_factory=dict[str, str])

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; a number that is not known is null."""
        return _plain(dataclasses.asdict(self))


def percentile(values: Sequence[float], q: float) -> float:
    """The nearest-rank percentile; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


class Watch:
    """Reads snapshots of one queue. Keeps its place in the observation log, so each entry is read once."""

    def __init__(self, queue: Queue, *, source: str, now_s: Callable[[], float] = time.time) -> None:
        self._queue = queue
        self._source = source
        self._now_s = now_s
        self._log_at = ""
        self._waits: dict[tuple[str, ServiceClass], deque[float]] = {}
        self._runs: dict[ServiceClass, deque[RunEnd]] = {c: deque(maxlen=RECENT) for c in ServiceClass}
        self._incarnation = ""
        self._last: Snapshot | None = None

    async def snapshot(self) -> Snapshot:
        """What the queue holds now; where it does not answer, the last known with the trouble named. Never raises that."""
        try:
            self._last = await self._read()
        except QueueUnavailable:
            empty = Snapshot(at_s=self._now_s(), source=self._source, depth={})
            return dataclasses.replace(self._last or empty, trouble="Redis does not answer, retrying")
        return self._last

    async def _read(self) -> Snapshot:
        queue = self._queue
        incarnation = await queue.incarnation()
        if incarnation != self._incarnation:  # a store that restarted counts its log from the beginning
            self._incarnation, self._log_at = incarnation, ""
            self._waits.clear()
            for ended in self._runs.values():
                ended.clear()
        await self._follow_log()
        specs = await queue.fleet()
        running = await queue.running()
        models = sorted({s.model for s in specs} | {r.ticket.model for r in running})
        heads = {model: await queue.heads(model, HEADS) for model in models}
        return Snapshot(
            at_s=self._now_s(),
            source=self._source,
            depth={model: await queue.depth(model) for model in models},
            lines=tuple(
                self._line(model, service_class, heads[model], running)
                for model in models
                for service_class in ServiceClass
            ),
            engines=engine_lines(specs, await queue.ledger(), await queue.draining()),
            clusters=cluster_lines(specs, await queue.ledger(), await queue.distances(), self._now_s()),
            ageing=ageing_lines(await queue.reports(self._now_s())),
            switch=switch_line(await queue.switch()),
            at_quota=at_quota(await queue.tenants(), running),
            runs=tuple(run_line(service_class, ended) for service_class, ended in self._runs.items() if ended),
        )

    async def _follow_log(self) -> None:
        moved = True
        while moved:
            at, entries = await self._queue.read_log(self._log_at, PAGE)
            moved, self._log_at = at != self._log_at, at
            for entry in entries:
                if isinstance(entry, Observation):
                    if entry.observed:
                        continue  # it never was in the queue
                    key = (entry.model, entry.service_class)
                    self._waits.setdefault(key, deque(maxlen=RECENT)).append(entry.wait_s)
                elif entry.outcome != "paused":
                    self._runs[entry.service_class].append(entry)

    def _line(
        self, model: str, service_class: ServiceClass, heads: Sequence[Ticket], running: Sequence[Running]
    ) -> Line:
        pushed = [t.pushed_at_s for t in heads if t.service_class is service_class]
        waits = self._waits.get((model, service_class), ())
        return Line(
            model=model,
            service_class=service_class,
            waiting=len(pushed),
            oldest_s=max(0.0, self._now_s() - min(pushed)) if pushed else 0.0,
            running=sum(r.ticket.model == model and r.ticket.service_class is service_class for r in running),
            wait_p50_s=percentile(tuple(waits), 0.5),
            wait_p95_s=percentile(tuple(waits), 0.95),
        )


def switch_line(switch: Switch) -> str:
    """The pool's switch in words; nothing where it is on, and was understood."""
    if switch.at_rest:
        return ""
    told = switch.told()
    return f"switch {switch.mode}{f' ({told})' if told else ''}"


def at_quota(tenants: Sequence[Tenant], running: Sequence[Running]) -> dict[str, str]:
    """Tenants with no stage or no KV memory left to them, and which of the two. Tokens of a minute the leader alone counts."""
    used: dict[str, Use] = {}
    for r in running:
        had = used.get(r.ticket.tenant, Use())
        used[r.ticket.tenant] = Use(stages=had.stages + 1, kv_bytes=had.kv_bytes + r.kv_bytes)
    limits = {name: left.lacks(kv_bytes=1, tokens=0) for name, left in may_start(tenants, used).items()}
    return {name: limit for name, limit in limits.items() if limit}


def engine_lines(
    specs: Sequence[EngineSpec], ledger: Ledger, draining: Sequence[Reservation]
) -> tuple[EngineLine, ...]:
    """Each engine of the fleet with what the ledger says is reserved there."""
    drains = Counter(r.engine_id for r in draining)
    return tuple(
        EngineLine(
            engine_id=s.engine_id,
            model=s.model,
            slots=s.slots,
            reserved_slots=ledger.slots.get(s.engine_id, 0),
            kv_bytes=s.kv_bytes,
            reserved_kv_bytes=ledger.kv_bytes.get(s.engine_id, 0),
            draining=drains[s.engine_id],
        )
        for s in sorted(specs, key=lambda s: s.engine_id)
    )


def cluster_lines(
    specs: Sequence[EngineSpec], ledger: Ledger, distances: Sequence[Distance], now_s: float
) -> tuple[ClusterLine, ...]:
    """The clusters that have engines, or that some site measures. Nothing where there is nothing to tell apart."""
    rtts = by_cluster(distances, now_s)
    names = sorted({s.cluster for s in specs} | rtts.keys())
    if len(names) < 2 and not rtts:
        return ()
    here = {name: [s for s in specs if s.cluster == name] for name in names}
    return tuple(
        ClusterLine(
            cluster=name,
            engines=len(there),
            slots=sum(s.slots for s in there),
            reserved_slots=sum(ledger.slots.get(s.engine_id, 0) for s in there),
            rtts=rtts.get(name, {}),
            file_rtt_s=max((s.rtt_s for s in there), default=0.0),
        )
        for name, there in here.items()
    )


def ageing_lines(reports: Sequence[NodeReport]) -> tuple[AgeingLine, ...]:
    """What nodes say of engines whose memory grows without end."""
    found = [
        AgeingLine(engine_id=e.spec.engine_id, words=e.ageing, exhausted_at_s=e.exhausted_at_s, restarts=e.rejuvenation)
        for report in reports
        for e in report.engines
        if e.ageing
    ]
    return tuple(sorted(found, key=lambda line: (line.exhausted_at_s, line.engine_id)))


def run_line(service_class: ServiceClass, ended: Sequence[RunEnd] | deque[RunEnd]) -> RunLine:
    """Count runs that ended: completion over those that are done, deadlines over those that had one."""
    took = [r.ended_at_s - r.started_at_s for r in ended if r.outcome == "done"]
    promised = [r for r in ended if math.isfinite(r.deadline_at_s)]
    return RunLine(
        service_class=service_class,
        done=len(took),
        failed=len(ended) - len(took),
        promised=len(promised),
        met=sum(r.met_deadline for r in promised),
        p50_s=percentile(took, 0.5),
        p95_s=percentile(took, 0.95),
    )


# -- one stage -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A stage that the queue holds: its ticket and, where it runs, its lease."""

    ticket: Ticket
    lease: Running | None = None

    @property
    def status(self) -> Status:
        return Status.GRANTED if self.lease else Status.QUEUED

    def to_json(self) -> dict[str, Any]:
        lease = {} if self.lease is None else dataclasses.asdict(self.lease)
        lease.pop("ticket", None)
        return _plain({"status": self.status.value, **dataclasses.asdict(self.ticket), **lease})


async def entries(queue: Queue) -> tuple[Entry, ...]:
    """All stages that the queue holds: the running ones, then the waiting ones of each model by their moment."""
    running = [Entry(ticket=r.ticket, lease=r) for r in await queue.running()]
    models = sorted({s.model for s in await queue.fleet()})
    waiting = [Entry(ticket=t) for m in models for t in await queue.heads(m, await queue.depth(m))]
    return (*running, *waiting)


def named(held: Sequence[Entry], stage: str) -> Entry | None:
    """The stage of this id, or the one whose id begins so. Raises `ConfigError` where several do."""
    found = [e for e in held if e.ticket.stage_id.startswith(stage)]
    exact = [e for e in found if e.ticket.stage_id == stage]
    if len(found) > 1 and not exact:
        raise ConfigError(f"{len(found)} stages begin with {stage!r}: give more of the id")
    return (exact or found or [None])[0]


async def find(queue: Queue, stage: str) -> dict[str, Any]:
    """One stage, by the beginning of its id, as JSON values: held by the queue, or in the observation log.

    Raises `ConfigError` for neither.
    """
    if entry := named(held := await entries(queue), stage):
        full = {} if entry.lease else at_quota(await queue.tenants(), [e.lease for e in held if e.lease])
        limit = full.get(entry.ticket.tenant)
        return {**entry.to_json(), **({"waits_for": f"tenant quota ({limit})"} if limit else {})}
    after, at = "-", ""
    while at != after:
        after = at
        at, page = await queue.read_log(after, PAGE)
        for seen in page:
            if isinstance(seen, Observation) and seen.stage_id.startswith(stage):
                return _plain(dataclasses.asdict(seen))
    raise ConfigError(f"no stage {stage!r} in the queue or in what it remembers; `maestro queue ls` names them")


async def cancel(queue: Queue, stage: str, *, now_s: float) -> str:
    """Withdraw a waiting stage, by the beginning of its id: it is refused, and its caller told at once. Returns its id.

    Raises `ConfigError` for a stage that does not wait: a running call is its app's, and its engine's, to end.
    """
    entry = named(await entries(queue), stage)
    if entry is None:
        raise ConfigError(f"no stage {stage!r} waits; `maestro queue ls` names those that do")
    stage_id = entry.ticket.stage_id
    refusal = Refusal(stage_id=stage_id, reason="operator", retry_after_s=0.0)
    if entry.lease is None and await queue.refuse(refusal, entry.ticket, now_s=now_s):
        return stage_id
    where = f" on {entry.lease.engine_id}" if entry.lease else ""
    raise ConfigError(f"stage {stage_id!r} runs{where} already: only its app can end it now")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    return value
