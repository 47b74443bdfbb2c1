"""The queue in one process: the specification that `redis.RedisQueue` is held to.

Used as it is where no Redis is configured (one process, one event loop) and by tests and simulations. Read it beside
`ports.Queue`, which states the promises, and `core.TRANSITIONS`, which states the moves.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import heapq
import secrets
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from types import CoroutineType
from typing import Any, ParamSpec, TypeVar, cast

from maestro_agents.core import (
    Command,
    EngineSpec,
    Grant,
    Observation,
    Refusal,
    RunEnd,
    Status,
    Switch,
    Ticket,
    Verdict,
    covered_tokens,
    kv_need_bytes,
    move,
)
from maestro_agents.nodes import NodeReport, Wanted
from maestro_agents.ports import (
    MODEL_BYTES,
    MODELS_KEPT,
    NO_BACKLOG,
    RETRY_FLOOR_S,
    Backlog,
    Distance,
    Ledger,
    Renewal,
    Reservation,
    Running,
)
from maestro_agents.tenants import Tenant

_P = ParamSpec("_P")
_T = TypeVar("_T")

DEFAULT_P99_OUTPUT_TOKENS = 1024.0
"""Reserved for a role that was never seen, where the caller sets no bound."""

LOG_LENGTH = 20_000
SKIPPED_TOKENS = 1_000_000
"""Observations kept: what statistics are rebuilt from after a restart."""


def _alone(command: Callable[_P, Awaitable[_T]]) -> Callable[_P, CoroutineType[Any, Any, _T]]:
    """A command that waits for nothing inside, kept apart from those that come from other threads (``.._at_once``)."""

    @functools.wraps(command)
    async def alone(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with cast("MemoryQueue", args[0])._lock:
            return await command(*args, **kwargs)

    return alone


@dataclass(slots=True)
class _Stage:
    ticket: Ticket
    status: Status
    grant: Grant | None = None


@dataclass(slots=True)
class _Wish:
    """What is wanted of a node, as text; nothing yet where that is empty."""

    version: int = 0
    wanted: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class MemoryQueue:
    """See `ports.Queue`. ``lease_s``: how long a grant or a client lives without a renewal."""

    def __init__(self, *, lease_s: float = 10.0, max_queue: int = 10_000, log_length: int = LOG_LENGTH) -> None:
        self.lease_s = lease_s
        self.max_queue = max_queue
        self.log_length = log_length
        self._lock = threading.Lock()
        self._stages: dict[str, _Stage] = {}
        #: How a stage ended, and whose it was.
        self._ended: OrderedDict[str, tuple[Status, str]] = OrderedDict()
        self._ready: defaultdict[str, set[str]] = defaultdict(set)
        self._clients: dict[str, float] = {}
        self._inbox: defaultdict[str, deque[Verdict]] = defaultdict(deque)
        self._mail: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._slots: defaultdict[str, int] = defaultdict(int)
        self._kv_bytes: defaultdict[str, int] = defaultdict(int)
        self._draining: dict[str, Reservation] = {}
        self._log: deque[tuple[int, Observation | RunEnd]] = deque(maxlen=log_length)
        self._logged = 0
        self._fence = 0
        self._epoch = 0
        self._leader: tuple[str, float] | None = None
        self._engines: dict[str, EngineSpec] = {}
        self._p99: Mapping[str, float] = {}
        self._tenants: dict[str, Tenant] = {}
        self._backlog = NO_BACKLOG
        self._usage: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._charged_to = ""
        self._credit_epoch = 0
        self._credits_until_s = 0.0
        self._specs: dict[str, str] = {}
        self._switch: Switch | None = None
        self._api_keys: dict[str, str] = {}
        self._salt = secrets.token_bytes(16)
        self._distances: dict[tuple[str, str], Distance] = {}
        self._models: dict[str, tuple[str, bytes]] = {}
        self._predictor_status = ""
        self._reports: dict[str, tuple[float, str]] = {}
        self._wanted: defaultdict[str, _Wish] = defaultdict(_Wish)
        self._wake = asyncio.Event()

    # -- the client's side -------------------------------------------------------------------------------------------
    async def push(self, ticket: Ticket, *, engines: Sequence[EngineSpec], now_s: float) -> Verdict | None:
        with self._lock:
            known = self._stages.get(ticket.stage_id)
            if known is not None or ticket.stage_id in self._ended:
                ours = known is not None and known.ticket.client_id == ticket.client_id
                return known.grant if known is not None and ours else None
            self._clients[ticket.client_id] = now_s + self.lease_s
            if (grant := self._fast(ticket, engines, now_s)) is not None:
                return grant
            waiting = self._ready[ticket.model]
            if len(waiting) >= self.max_queue:
                return _later(ticket, "full", self._backlog.models.get(ticket.model, 0.0))
            tenant = self._tenants.get(ticket.tenant)
            most = 0 if tenant is None or ticket.nested else tenant.max_waiting
            if most and self._waiting_of(ticket.tenant) >= most:
                return _later(ticket, "quota", self._backlog.tenants.get(ticket.tenant, 0.0))
            self._stages[ticket.stage_id] = _Stage(ticket, Status.QUEUED)
            waiting.add(ticket.stage_id)
            self._wake.set()
            return None

    def push_at_once(
        self, ticket: Ticket, *, engines: Sequence[EngineSpec], now_s: float, priority: int
    ) -> Grant | None:
        """The fast path of `push` alone, for a stage that is new; from any thread. None: nothing has happened."""
        with self._lock:
            return self._fast(ticket, engines, now_s, priority) if ticket.client_id in self._clients else None

    def _fast(self, ticket: Ticket, engines: Sequence[EngineSpec], now_s: float, priority: int = 0) -> Grant | None:
        tenant = self._tenants.get(ticket.tenant)
        if not ticket.nested and (self._ready.get(ticket.model) or (tenant is not None and tenant.metered)):
            return None
        spec = self._credit(ticket, engines, now_s)
        if spec is None:
            return None
        out = covered_tokens(ticket, self._p99_of(ticket), spec)
        grant = self._lease(ticket, spec.engine_id, self._need(ticket, spec), now_s, fast=True, priority=priority)
        grant = dataclasses.replace(grant, output_tokens=out)
        self._stages[ticket.stage_id] = _Stage(ticket, Status.GRANTED, grant)
        return grant

    def _credit(self, ticket: Ticket, engines: Sequence[EngineSpec], now_s: float) -> EngineSpec | None:
        """The engine whose credits pay for this ticket now: the one with most free slots, first named on a tie."""
        if self._credit_epoch != self._epoch or now_s >= self._credits_until_s:
            return None
        best: EngineSpec | None = None
        best_free = 0
        for candidate in engines:
            spec = self._engines.get(candidate.engine_id)
            if spec is None:
                continue
            free = spec.slots - self._slots[spec.engine_id]
            fits = spec.kv_bytes == 0 or self._kv_bytes[spec.engine_id] + self._need(ticket, spec) <= spec.kv_bytes
            if (ticket.nested or (free > 0 and fits)) and (best is None or free > best_free):
                best, best_free = spec, free
        return best

    def _need(self, ticket: Ticket, spec: EngineSpec) -> int:
        return kv_need_bytes(ticket, self._p99_of(ticket), spec)

    def _p99_of(self, ticket: Ticket) -> float:
        return self._p99.get(ticket.role_key, DEFAULT_P99_OUTPUT_TOKENS)

    def _lease(
        self, ticket: Ticket, engine_id: str, kv_bytes: int, now_s: float, *, fast: bool, priority: int = 0
    ) -> Grant:
        self._fence += 1
        self._slots[engine_id] += 1
        self._kv_bytes[engine_id] += kv_bytes
        return Grant(
            stage_id=ticket.stage_id,
            engine_id=engine_id,
            token=self._fence,
            epoch=self._epoch,
            kv_bytes=kv_bytes,
            priority=priority,
            granted_at_s=now_s,
            lease_until_s=now_s + self.lease_s,
            fast=fast,
        )

    async def verdicts(self, client_id: str, timeout_s: float) -> Sequence[Verdict]:
        box, mail = self._inbox[client_id], self._mail[client_id]
        if not box:
            try:
                async with asyncio.timeout(timeout_s):  # not wait_for: before 3.12 it can forget a cancellation
                    await mail.wait()
            except TimeoutError:
                return ()
        mail.clear()
        found = tuple(box)
        box.clear()
        return found

    def _tell(self, client_id: str, verdict: Verdict) -> None:
        self._inbox[client_id].append(verdict)
        self._mail[client_id].set()

    @_alone
    async def renew(self, client_id: str, stages: Mapping[str, int], *, now_s: float) -> Renewal:
        self._clients[client_id] = now_s + self.lease_s
        gone: list[str] = []
        granted: list[str] = []
        for stage_id, token in stages.items():
            stage = self._stages.get(stage_id)
            if stage is not None and stage.ticket.client_id != client_id:
                stage = None
            if stage is not None and stage.grant is not None and token in (0, stage.grant.token):
                stage.grant = dataclasses.replace(stage.grant, lease_until_s=now_s + self.lease_s)
                if token == 0:
                    granted.append(stage_id)
            elif stage is None or stage.grant is not None or token != 0:
                gone.append(stage_id)
        led = self._leader is not None and self._leader[1] > now_s
        return Renewal(gone=tuple(gone), granted=tuple(granted), epoch=self._epoch, led=led)

    @_alone
    async def announce(self, ticket: Ticket, grant: Grant | None, *, now_s: float) -> None:
        known = self._stages.get(ticket.stage_id)
        forgot_grant = known is not None and known.status is Status.QUEUED and grant is not None
        if ticket.stage_id in self._ended or (known is not None and not forgot_grant):
            return
        if known is not None and known.ticket.client_id != ticket.client_id:
            return
        self._ready[ticket.model].discard(ticket.stage_id)
        self._clients[ticket.client_id] = now_s + self.lease_s
        if grant is None:
            self._stages[ticket.stage_id] = _Stage(ticket, Status.QUEUED)
            self._ready[ticket.model].add(ticket.stage_id)
            self._wake.set()
            return
        self._fence = max(self._fence, grant.token)
        self._slots[grant.engine_id] += 1
        self._kv_bytes[grant.engine_id] += grant.kv_bytes
        self._stages[ticket.stage_id] = _Stage(
            ticket, Status.GRANTED, dataclasses.replace(grant, lease_until_s=now_s + self.lease_s)
        )

    @_alone
    async def finish(self, observation: Observation, *, client_id: str, token: int, now_s: float) -> bool:
        command = Command.FINISH if observation.status is Status.DONE else Command.FAIL
        stage = self._held(observation.stage_id, client_id, token)
        if stage is None:
            return False
        self._end(stage, command)
        self._append(observation)
        return True

    def finish_at_once(self, observation: Observation, *, client_id: str, token: int) -> bool:
        """`finish` from any thread, where nobody waits for what it frees. False: nothing has happened."""
        with self._lock:
            stage = self._held(observation.stage_id, client_id, token)
            if stage is None or any(self._ready.values()):
                return False
            self._end(stage, Command.FINISH if observation.status is Status.DONE else Command.FAIL)
            self._append(observation)
            return True

    def end_run_at_once(self, run: RunEnd) -> None:
        """`end_run` from any thread."""
        with self._lock:
            self._append(run)

    def _held(self, stage_id: str, client_id: str, token: int) -> _Stage | None:
        """The stage, where this client holds it under this token."""
        stage = self._stages.get(stage_id)
        if stage is None or stage.status is not Status.GRANTED or stage.grant is None:
            return None
        return stage if (stage.ticket.client_id, stage.grant.token) == (client_id, token) else None

    def _end(self, stage: _Stage, command: Command, *, drain_since_s: float | None = None) -> None:
        """Move a stage to its terminal status; free its reservation, or let it drain."""
        to = move(stage.status, command)
        if stage.status is Status.QUEUED:
            self._ready[stage.ticket.model].discard(stage.ticket.stage_id)
        elif stage.grant is not None:
            self._return(stage.grant, drain_since_s)
        del self._stages[stage.ticket.stage_id]
        self._ended[stage.ticket.stage_id] = (to, stage.ticket.client_id)
        if len(self._ended) > self.log_length:
            self._ended.popitem(last=False)

    def _return(self, grant: Grant, drain_since_s: float | None) -> None:
        if drain_since_s is None:
            self._free(grant.engine_id, grant.kv_bytes)
        else:
            key = f"{grant.stage_id}#{grant.token}"
            self._draining[key] = Reservation(
                stage_id=key, engine_id=grant.engine_id, kv_bytes=grant.kv_bytes, since_s=drain_since_s
            )

    def _free(self, engine_id: str, kv_bytes: int) -> None:
        self._slots[engine_id] -= 1
        self._kv_bytes[engine_id] -= kv_bytes
        if any(self._ready.values()):
            self._wake.set()

    def _append(self, entry: Observation | RunEnd) -> None:
        self._logged += 1
        self._log.append((self._logged, entry))

    @_alone
    async def requeue(self, ticket: Ticket, *, token: int, now_s: float, draining: bool) -> bool:
        stage = self._held(ticket.stage_id, ticket.client_id, token)
        if stage is None or stage.grant is None:
            return False
        self._return(stage.grant, now_s if draining else None)
        stage.ticket, stage.grant, stage.status = ticket, None, Status.QUEUED
        self._ready[ticket.model].add(ticket.stage_id)
        self._wake.set()
        return True

    @_alone
    async def cancel(
        self, stage_id: str, model: str, *, client_id: str | None, now_s: float, draining: bool
    ) -> Status | None:
        stage = self._stages.get(stage_id)
        if stage is None:
            status, owner = self._ended.get(stage_id, (None, client_id))
            return status if client_id in (None, owner) else None
        if client_id not in (None, stage.ticket.client_id):
            return None
        before = stage.status
        self._end(stage, Command.CANCEL, drain_since_s=now_s if draining else None)
        return before

    @_alone
    async def extend(self, stage_id: str, *, client_id: str, token: int, kv_bytes: int) -> bool | None:
        stage = self._held(stage_id, client_id, token)
        if stage is None or stage.grant is None:
            return None
        engine_id, before = stage.grant.engine_id, stage.grant.kv_bytes
        stage.grant = dataclasses.replace(stage.grant, kv_bytes=max(before, kv_bytes))
        self._kv_bytes[engine_id] += stage.grant.kv_bytes - before
        spec = self._engines.get(engine_id)
        return spec is None or spec.kv_bytes == 0 or self._kv_bytes[engine_id] <= spec.kv_bytes

    @_alone
    async def end_run(self, run: RunEnd) -> None:
        self._append(run)

    @_alone
    async def observe(self, observation: Observation) -> None:
        self._append(observation)

    async def switch(self) -> Switch:
        return self._switch or Switch()

    async def set_switch(self, switch: Switch, *, if_lost: bool = False) -> None:
        if self._switch is None or not if_lost:
            self._switch = Switch.decode(switch.encode())

    async def describe(self, workflow: str, spec: str) -> None:
        self._specs.setdefault(workflow, spec)

    async def salt(self) -> bytes:
        return self._salt

    async def fleet(self) -> Sequence[EngineSpec]:
        return tuple(self._engines.values())

    async def tenants(self) -> Sequence[Tenant]:
        return tuple(self._tenants.values())

    async def add_api_key(self, digest: str, about: str) -> None:
        self._api_keys[digest] = about

    async def api_keys(self) -> Mapping[str, str]:
        return dict(self._api_keys)

    async def remove_api_key(self, digest: str) -> bool:
        return self._api_keys.pop(digest, None) is not None

    async def tell_distances(self, distances: Sequence[Distance]) -> None:
        self._distances |= {(d.site, d.cluster): d for d in distances}

    async def distances(self) -> Sequence[Distance]:
        return tuple(self._distances.values())

    # -- the scheduler's side ----------------------------------------------------------------------------------------
    async def lead(self, holder: str, *, ttl_s: float, now_s: float, at_least: int = 0) -> int | None:
        if self._leader is not None and self._leader[0] != holder and self._leader[1] > now_s:
            return None
        if self._leader is None or self._leader[0] != holder:
            self._epoch += 1
        self._epoch = max(self._epoch, at_least)
        self._fence += SKIPPED_TOKENS if at_least else 0
        self._leader = (holder, now_s + ttl_s)
        return self._epoch

    async def wake(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()

    @_alone
    async def publish(
        self,
        engines: Sequence[EngineSpec],
        *,
        p99: Mapping[str, float],
        epoch: int,
        valid_until_s: float,
        tenants: Sequence[Tenant] = (),
        backlog: Backlog = NO_BACKLOG,
    ) -> bool:
        if epoch < self._epoch:
            return False
        self._tenants, self._backlog = {t.name: t for t in tenants}, backlog
        self._engines = {e.engine_id: e for e in engines}
        self._p99 = {**self._p99, **p99}
        self._credit_epoch, self._credits_until_s = epoch, valid_until_s
        return True

    @_alone
    async def heads(self, model: str, n: int, *, at_most: Mapping[str, int] | None = None) -> Sequence[Ticket]:
        tickets = (self._stages[s].ticket for s in self._ready[model])
        if not at_most:
            return heapq.nsmallest(n, tickets, key=_by_moment)
        left, found = dict(at_most), list[Ticket]()
        for ticket in sorted(tickets, key=_by_moment):
            if not ticket.nested and ticket.tenant in left:
                left[ticket.tenant] -= 1
                if left[ticket.tenant] < 0:
                    continue
            elif n <= 0:
                break
            else:
                n -= 1
            found.append(ticket)
        return found

    @_alone
    async def waiting(self, tenants: Collection[str]) -> Mapping[str, int]:
        return {tenant: self._waiting_of(tenant) for tenant in tenants}

    def _waiting_of(self, tenant: str) -> int:
        waiting = (self._stages[s].ticket for stages in self._ready.values() for s in stages)
        return sum(t.tenant == tenant and not t.nested for t in waiting)

    @_alone
    async def reorder(self, moments: Mapping[str, float], model: str) -> None:
        for stage_id, due_at_s in moments.items():
            if stage_id in self._ready[model]:
                stage = self._stages[stage_id]
                stage.ticket = stage.ticket.evolve(due_at_s=due_at_s)

    @_alone
    async def grant(self, grant: Grant, ticket: Ticket, *, now_s: float) -> Grant | None:
        stage = self._stages.get(grant.stage_id)
        spec = self._engines.get(grant.engine_id)
        if stage is None or stage.status is not Status.QUEUED or spec is None or grant.epoch != self._epoch:
            return None
        if self._clients.get(stage.ticket.client_id, 0.0) <= now_s:
            self._end(stage, Command.LOSE)
            return None
        full = self._slots[spec.engine_id] >= spec.slots
        full |= spec.kv_bytes > 0 and self._kv_bytes[spec.engine_id] + grant.kv_bytes > spec.kv_bytes
        if full and not ticket.nested:
            return None
        given = self._lease(stage.ticket, grant.engine_id, grant.kv_bytes, now_s, fast=False)
        given = dataclasses.replace(
            given, output_tokens=grant.output_tokens, priority=grant.priority, because=grant.because
        )
        self._ready[ticket.model].discard(grant.stage_id)
        stage.status, stage.grant = Status.GRANTED, given
        self._tell(stage.ticket.client_id, given)
        return given

    async def described(self, workflow: str) -> str | None:
        return self._specs.get(workflow)

    @_alone
    async def refuse(self, refusal: Refusal, ticket: Ticket, *, now_s: float) -> bool:
        stage = self._stages.get(refusal.stage_id)
        if stage is None or stage.status is not Status.QUEUED:
            return False
        self._end(stage, Command.REFUSE)
        self._tell(stage.ticket.client_id, refusal)
        return True

    @_alone
    async def reap(self, *, now_s: float) -> Sequence[str]:
        lost: list[str] = []
        for stage_id, stage in list(self._stages.items()):
            if stage.status is Status.GRANTED and stage.grant is not None and stage.grant.lease_until_s <= now_s:
                self._end(stage, Command.LOSE, drain_since_s=now_s)
                lost.append(stage_id)
            elif stage.status is Status.QUEUED and self._clients.get(stage.ticket.client_id, 0.0) <= now_s:
                self._end(stage, Command.LOSE)
                lost.append(stage_id)
        return tuple(lost)

    @_alone
    async def draining(self) -> Sequence[Reservation]:
        return tuple(self._draining.values())

    @_alone
    async def settle(self, reservation: Reservation) -> bool:
        if self._draining.pop(reservation.stage_id, None) is None:
            return False
        self._free(reservation.engine_id, reservation.kv_bytes)
        return True

    @_alone
    async def running(self) -> Sequence[Running]:
        return tuple(
            Running(
                ticket=s.ticket,
                engine_id=s.grant.engine_id,
                token=s.grant.token,
                kv_bytes=s.grant.kv_bytes,
                granted_at_s=s.grant.granted_at_s,
                lease_until_s=s.grant.lease_until_s,
                output_tokens=s.grant.output_tokens,
                because=s.grant.because,
            )
            for s in self._stages.values()
            if s.status is Status.GRANTED and s.grant is not None
        )

    @_alone
    async def ledger(self) -> Ledger:
        return Ledger(
            slots={k: v for k, v in self._slots.items() if v}, kv_bytes={k: v for k, v in self._kv_bytes.items() if v}
        )

    async def depth(self, model: str) -> int:
        return len(self._ready[model])

    @_alone
    async def read_log(self, after: str, n: int) -> tuple[str, Sequence[Observation | RunEnd]]:
        start = int(after or 0)
        unread = takewhile(lambda numbered: numbered[0] > start, reversed(self._log))  # most is read already
        found = list(unread)[: -n - 1 : -1]
        return (str(found[-1][0]) if found else after), tuple(e for _, e in found)

    @_alone
    async def charge(self, days: Mapping[str, Mapping[str, int]], *, after: str, to: str, epoch: int) -> bool:
        if epoch < self._epoch or after != self._charged_to:
            return False
        for day, counters in days.items():
            self._usage[day].update(counters)
        self._charged_to = to
        return True

    async def charged_to(self) -> str:
        return self._charged_to

    async def usage(self, day: str) -> Mapping[str, int]:
        return dict(self._usage.get(day, {}))

    @_alone
    async def publish_model(self, version: str, *, card: str, data: bytes | None, epoch: int | None) -> bool:
        if data is not None and len(data) > MODEL_BYTES:
            raise ValueError(f"model {version} has {len(data)} bytes: {MODEL_BYTES} at most")
        if (epoch is not None and epoch < self._epoch) or (data is None and version not in self._models):
            return False
        first = self._models.get(version, (card, b"")) if data is None else (card, data)
        others = [(v, kept) for v, kept in self._models.items() if v != version]
        self._models = dict([(version, first), *others][:MODELS_KEPT])
        return True

    async def model(self, known: str) -> tuple[str, bytes] | None:
        version, (_, data) = next(iter(self._models.items()), (known, ("", b"")))
        return None if version == known else (version, data)

    async def models(self) -> Mapping[str, str]:
        return {version: card for version, (card, _) in self._models.items()}

    async def set_predictor_status(self, status: str) -> None:
        self._predictor_status = status

    async def predictor_status(self) -> str:
        return self._predictor_status

    # -- the nodes' side ---------------------------------------------------------------------------------------------
    @_alone
    async def report(self, report: NodeReport, *, now_s: float, ttl_s: float) -> None:
        self._reports[report.node_id] = (now_s + ttl_s, report.encode())
        self._wake.set()

    @_alone
    async def reports(self, now_s: float) -> Sequence[NodeReport]:
        self._reports = {node: kept for node, kept in self._reports.items() if kept[0] > now_s}
        return [NodeReport.decode(body) for _, (_, body) in sorted(self._reports.items())]

    @_alone
    async def want(self, node_id: str, wanted: Wanted) -> bool:
        if wanted.epoch < self._epoch:
            return False
        wish, body = self._wanted[node_id], wanted.encode()
        if wish.wanted != body:
            wish.version, wish.wanted = wish.version + 1, body
            wish.changed.set()
        return True

    async def wanted(self, node_id: str, *, known: str, timeout_s: float) -> tuple[str, Wanted] | None:
        wish = self._wanted[node_id]
        if not wish.wanted or known == str(wish.version):
            if timeout_s <= 0.0:
                return None
            wish.changed.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await wish.changed.wait()
            except TimeoutError:
                return None
        return str(wish.version), Wanted.decode(wish.wanted)

    async def incarnation(self) -> str:
        return "memory"

    async def close(self) -> None:
        return None

    def status(self, stage_id: str) -> Status | None:
        """The status of a stage, also of one that ended lately."""
        stage = self._stages.get(stage_id)
        return stage.status if stage else self._ended.get(stage_id, (None, ""))[0]


def _by_moment(ticket: Ticket) -> tuple[float, str]:
    return ticket.due_at_s, ticket.stage_id


def _later(ticket: Ticket, reason: str, after_s: float) -> Refusal:
    return Refusal(stage_id=ticket.stage_id, reason=reason, retry_after_s=max(RETRY_FLOOR_S, after_s))
