"""Behind the client: one background thread with one event loop. The queue's connections, the listener that delivers
verdicts, the heartbeat that renews leases, and (without Redis) the scheduler itself.

When Maestro is out (`Settings.on_outage`): stages that wait are let through to the last known engines within
``local_concurrency``; the user is told once. What the queue missed meanwhile it learns when it is back. Where the pool's
switch (`core.Switch`) says that calls are not ours, those that wait leave for their own URL at once. An unexpected
exception, of the queue or of ours, is logged once per kind and ends neither a call nor a service of the room.

(Longer than our modules are: it is one machine, whose invariants, stated at the head of `Room`, are best read in one
place.)
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import math
import random
import shlex
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from maestro_agents.core import (
    EngineSpec,
    Grant,
    Mode,
    Observation,
    Refusal,
    RunEnd,
    Status,
    Switch,
    Ticket,
    Verdict,
)
from maestro_agents.distance import LOOK_S, Distances
from maestro_agents.errors import (
    MaestroError,
    NoEngineFits,
    QueueFull,
    QueueUnavailable,
    QuotaExceeded,
    RunGone,
    StageRefused,
)
from maestro_agents.events import EventFile
from maestro_agents.policy import wire_priority
from maestro_agents.ports import RETRY_FLOOR_S, Clock, Queue, Renewal
from maestro_agents.queue.memory import MemoryQueue
from maestro_agents.scheduler import Scheduler
from maestro_agents.tenants import Tenant

if TYPE_CHECKING:
    from maestro_agents.client import Pass
    from maestro_agents.settings import Settings

log = logging.getLogger("maestro")

RETRY_S: Final = 0.25

SPREAD: Final = 0.25
"""Share by which callers that were refused at the same time are told later moments than each other."""

FLUSH_S: Final = 2.0
"""Longest wait at interpreter exit for the last reports to leave."""

UNSENT_LIMIT: Final = 10_000
"""Reports kept for a queue that is out; later ones are dropped."""

SWITCH_S: Final = 0.4
"""How often the pool's switch is read: one ``GET``. Every process obeys within a second."""

NODES_S: Final = 1.0
"""Shortest time between two looks at what nodes could serve, for a call whose model no engine serves."""

FILE_S: Final = 0.5
"""How often the events file is written."""

OWN_LOG_LENGTH: Final = 2_000
"""Observations that an own queue keeps: its only reader, the scheduler beside it, is never further behind."""

_STAYS: Final = "Tenant {tenant!r} may be served by engines of certain clusters only: its call was not made."

WITHDRAWN: Final = "This call was withdrawn while it waited."
UNSERVED_LIMIT: Final = 1_000


class _SteadyClock:
    """Epoch seconds that never jump: the wall clock read once, carried forward by the monotonic one."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    def now_s(self) -> float:
        return time.monotonic() + self._offset_s


class Room:
    """The background thread: everything async lives here. Methods below run on its loop unless they say otherwise.

    A pass whose caller waits is in ``waiting``, under its stage's present name, from `admit` until it is answered
    (`_let_go`). One that holds a grant of the queue is in ``held``; one that was let through by this process alone is in
    ``local``. After every ``await`` a pass may have been withdrawn, answered or renamed: whoever goes on looks first
    whether it still waits under the name it had (`_waits`).
    """

    def __init__(
        self, settings: Settings, client_id: str, engines: dict[str, EngineSpec], tenants: Sequence[Tenant] = ()
    ) -> None:
        self.settings = settings
        self.client_id = client_id
        self.clock: Clock = _SteadyClock()
        self.queue: Queue = MemoryQueue(
            lease_s=settings.lease_s, max_queue=settings.max_queue, log_length=OWN_LOG_LENGTH
        )
        self.scheduler: Scheduler | None = None
        self._tenants = tenants
        self.fleet = engines
        self.switch = Switch()
        #: See `Client.salt`.
        self.salt = b""
        self._switch_unread = False
        #: How much of a new call is ours now: the setting, or less by the switch.
        self.mode = settings.mode
        self.events = EventFile(settings.events) if settings.events and settings.mode is not Mode.OFF else None
        #: Every model that the fleet ever served: its calls are ours also while its engines are dead.
        self.models = {e.model for e in engines.values()}
        #: Every tenant that ever had residency rules: its prompts go where the fleet's owner allows, or nowhere.
        self.restricted = {t.name for t in tenants if t.allow_clusters}
        self.distances = Distances(settings.site, lambda: self.clock.now_s())  # noqa: PLW0108 - the clock may become another
        self._met_nodes_at_s = -math.inf
        self.waiting: dict[str, Pass] = {}
        self.held: dict[str, Pass] = {}
        #: Stage -> engine, of those let through by this process alone; never more than ``local_concurrency``.
        self.local: dict[str, str] = {}
        self.local_queue: dict[str, Pass] = {}
        self.unsent: deque[Callable[[], Awaitable[Any]]] = deque()
        self.described: OrderedDict[str, None] = OrderedDict()
        self.down_since_s: float | None = None
        self.told = False
        self.closed = settings.mode is Mode.OFF
        self.ready = asyncio.Event()
        self._unled_since_s: float | None = None
        self._sync_clock: Callable[[], Awaitable[None]] | None = None
        self._bugs: set[tuple[str, type[BaseException]]] = set()
        self._told_unserved = False
        self._told_dropping = False
        self._unserved: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._services: list[asyncio.Task[Any]] = []
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="maestro", daemon=True)
        if self.closed:
            self.loop.close()
        else:
            self._thread.start()

    # -- from any thread ---------------------------------------------------------------------------------------------
    @property
    def alive(self) -> bool:
        """Somebody will hear what is said to this room. In a forked child of its process nobody does."""
        return not self.closed and self._thread.is_alive()

    def call(self, f: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Run a coroutine function of this room, from any thread, without waiting for it."""
        if self.alive:
            with contextlib.suppress(RuntimeError):  # the loop was closed this moment: the process is ending
                self.loop.call_soon_threadsafe(self._spawn, f, args)

    def abandon(self, p: Pass) -> None:
        """Answer a pass that this room, closed, cannot serve any more. From any thread."""
        if p.ticket.tenant in self.restricted:
            _fail(p, QueueUnavailable(f"Maestro was shut down. {_STAYS.format(tenant=p.ticket.tenant)}"))
        elif self.settings.on_outage == "closed":
            _fail(p, QueueUnavailable("Maestro was shut down and MAESTRO_ON_OUTAGE=closed: the call was not made."))
        else:
            self._let_through(p, self.original(p))

    def tell_unserved(self, model: str) -> None:
        """Say, once per model, that the fleet does not name it; what to do about it, once. From any thread."""
        if model in self._unserved or len(self._unserved) >= UNSERVED_LIMIT:
            return
        level = logging.INFO if self._unserved else logging.WARNING
        self._unserved.add(model)
        log.log(
            level,
            "no engine of the fleet serves model %r: its calls go out as they are. Run `maestro doctor --model %s`.",
            model,
            shlex.quote(model),
        )

    def original(self, p: Pass) -> EngineSpec:
        """The caller's own URL as an engine. From any thread."""
        return EngineSpec(
            engine_id=_original_id(p),
            url=p.original_url,
            model=p.ticket.model,
            slots=self.settings.local_concurrency,
            original=True,
        )

    def stop(self) -> None:
        """Flush the last reports, give back what is held, end the thread."""
        if not self.alive:
            return
        self.closed = True
        with contextlib.suppress(RuntimeError):
            done = asyncio.run_coroutine_threadsafe(self._drain(), self.loop)
            with contextlib.suppress(TimeoutError, concurrent.futures.CancelledError):
                done.result(FLUSH_S)
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(FLUSH_S)

    # -- the thread --------------------------------------------------------------------------------------------------
    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        self._spawn(self._start, ())
        try:
            self.loop.run_forever()
        finally:
            self.closed = True
            self.loop.run_until_complete(self._end())
            self.loop.close()

    def _spawn(self, f: Callable[..., Coroutine[Any, Any, None]], args: tuple[Any, ...]) -> None:
        task = self.loop.create_task(f(*args))
        self._tasks.add(task)
        task.add_done_callback(self._spawned)

    def _spawned(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._bug("the client", error)

    def _bug(self, where: str, error: BaseException) -> None:
        """Log an unexpected exception, once per kind: the next thousand say nothing new."""
        if (where, type(error)) not in self._bugs:
            self._bugs.add((where, type(error)))
            log.error("a bug in Maestro (%s); your calls go on", where, exc_info=error)

    async def _start(self) -> None:
        s = self.settings
        began_s = time.monotonic()
        try:
            if s.redis_url:
                from maestro_agents.queue.redis import RedisClock, RedisQueue

                clock = self.clock = RedisClock()
                queue = self.queue = RedisQueue(s.redis_url, pool=s.pool, lease_s=s.lease_s, max_queue=s.max_queue)
                self._sync_clock = functools.partial(clock.sync, queue)
                async with self._within_patience():
                    self._obey(await queue.switch())  # before all else: while it is off nobody waits for the rest
                    await self._meet()
            elif s.mode is Mode.ON:
                self.scheduler = Scheduler(
                    self.queue,
                    self.fleet.values(),
                    clock=self.clock,
                    holder=self.client_id,
                    lease_s=s.lease_s,
                    tenants=self._tenants,
                )
                await self.scheduler.lead()
                if not self.own_url_mode:  # else there is one engine, and nothing to choose by
                    self.salt = await self.queue.salt()
                self._services.append(self.loop.create_task(self.scheduler.run()))
        except Exception as e:
            self._trouble("start", e, since_s=began_s)
        services = [("heartbeat", self.beat, min(s.lease_s / 3, 1.0))]
        if s.mode is Mode.ON:
            services.append(("listener", self.listen, 0.0))
        if s.redis_url:
            services.append(("switch", self.watch_switch, SWITCH_S))
        if s.site and s.mode is Mode.ON and not self.own_url_mode:
            services.append(("distances", self.look_around, LOOK_S))
        if self.events is not None:
            services.append(("events file", functools.partial(asyncio.to_thread, self.events.write), FILE_S))
        for name, service, pause_s in services:
            self._services.append(self.loop.create_task(self._for_ever(name, service, pause_s)))
        self.ready.set()

    async def _for_ever(self, name: str, service: Callable[[], Awaitable[None]], pause_s: float) -> None:
        """Repeat one round of a service for the life of the room, whatever happens in it."""
        while True:
            await asyncio.sleep(pause_s)
            try:
                await service()
            except Exception as e:
                self._bug(name, e)
                await asyncio.sleep(RETRY_S)

    async def _drain(self) -> None:
        for p in list(self.waiting.values()):
            if p.pushed:
                self._spawn(functools.partial(self._say, self._cancel, p.ticket, draining=p.draining), ())
            self.abandon(p)
        for p in list(self.held.values()):
            self._spawn(functools.partial(self.withdraw, was_sent=True), (p,))
        deadline_s = time.monotonic() + FLUSH_S / 2
        while self._tasks and time.monotonic() < deadline_s:
            await asyncio.wait(self._tasks, timeout=FLUSH_S / 2)
        if self.events is not None:
            self.events.write()
        with contextlib.suppress(QueueUnavailable):
            await self._flush()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(Exception):
            await self.distances.close()
        with contextlib.suppress(Exception):
            await self.queue.close()

    # -- admit -------------------------------------------------------------------------------------------------------
    def admit_at_once(self, p: Pass) -> bool:
        """Grant a stage on its caller's thread, where this process schedules itself and an engine is free. From any thread.

        False: nothing has happened, `admit` it.
        """
        queue, t = self._own_queue(), p.ticket
        if queue is None or self.mode is not Mode.ON:
            return False
        places = [self.fleet.get(_original_id(p))] if self.own_url_mode else self._fast_places(t)
        known = [place for place in places if place is not None]
        if not known:
            return False
        grant = queue.push_at_once(t, engines=known, now_s=self.clock.now_s(), priority=_priority(t))
        if grant is None:
            return False
        p.pushed = True
        self._take(p, grant, self.fleet[grant.engine_id])
        return True

    async def admit(self, p: Pass) -> None:
        """Push a stage; its caller is answered here (fast path), by the listener, or when Maestro is out."""
        if p.ended:  # withdrawn before it came here; `withdraw` may have found an older future of it
            _fail(p, RunGone(WITHDRAWN))
            return
        self.waiting[p.ticket.stage_id] = p
        if not self.ready.is_set():
            await self.ready.wait()
            if not self._waits(p, p.ticket.stage_id):
                return
            p.ticket = p.ticket.evolve(pushed_at_s=self.clock.now_s())  # the queue's clock is known only now
        if self.mode is Mode.ON:
            await self._push(p)
        else:
            self._bypass(p)  # the switch was turned while it came

    def _waits(self, p: Pass, stage_id: str) -> bool:
        return self.waiting.get(stage_id) is p

    async def _push(self, p: Pass) -> None:
        t = p.ticket
        verdict: Verdict | None = None
        while self._waits(p, t.stage_id):
            if self._out():
                self._admit_locally(p)
                return
            try:
                places = await self._places(p)
                if not self._waits(p, t.stage_id):
                    return
                if places is None:
                    self._pass_by(p)
                    return
                p.pushed = True
                verdict = await self.queue.push(t, engines=places, now_s=self.clock.now_s())
                p.turned_away = _turned_away(t, verdict) if p.patient else None
                if p.turned_away is None:
                    break
                verdict = None
                await asyncio.sleep(RETRY_FLOOR_S * random.uniform(1.0, 2.0))
            except QueueUnavailable as e:
                self._down(e)
                await asyncio.sleep(RETRY_S)
            except Exception as e:  # a bug must not break the user's graph, nor let it storm an engine
                self._bug("push", e)
                if self._waits(p, t.stage_id):
                    self._admit_locally(p)
                return
        if verdict is not None:
            self.deliver(verdict)
        elif self._waits(p, t.stage_id):
            p.queued = True
        elif (p.ended or self.closed or p.mode is not Mode.ON) and t.stage_id not in self.held:
            # withdrawn, or let out, while the push was on its way, and the word of it may have overtaken the push
            await self._say(self._cancel, t, draining=False)

    async def _places(self, p: Pass) -> list[EngineSpec] | None:
        """The engines that may serve a pass now; None where the fleet never served its model."""
        if self.own_url_mode:
            return [await self._own_url(p)]
        model = p.ticket.model
        if model not in self.models and self.settings.redis_url:
            await self.refresh_fleet()  # it may have joined a moment ago
            if self.clock.now_s() - self._met_nodes_at_s >= NODES_S:
                self._met_nodes_at_s = self.clock.now_s()
                self.models |= await self._models_of_nodes()
        return self._fast_places(p.ticket) if model in self.models else None

    def _fast_places(self, t: Ticket) -> list[EngineSpec]:
        """Where the fast path, which weighs nothing, may go. A nested stage, which cannot wait for the planner: anywhere that it reaches."""
        found = self._engines_for(t)
        return self.distances.reached(found) if t.nested else self.distances.alike(found)

    def _engines_for(self, t: Ticket) -> list[EngineSpec]:
        """The engines that may serve a stage, as far as is known here."""
        found = [e for e in self.fleet.values() if e.serves(t) and not e.original]
        if t.pinned_engine:
            return [e for e in found if e.engine_id == t.pinned_engine] or found
        return [e for e in found if e.engine_id not in t.excluded_engines] or found

    def _pass_by(self, p: Pass) -> None:
        """A model that no fleet serves: the call goes to its own URL. Without any fleet, ``closed`` forbids that."""
        if not self.models and self._on_outage(p.ticket.tenant) == "closed":
            self._refuse(p, QueueUnavailable("no scheduler has published a fleet, and MAESTRO_ON_OUTAGE=closed."))
            return
        if not self.models and not self._told_unserved:
            self._told_unserved = True
            log.warning(
                "no scheduler has published a fleet in pool %r: calls for %r go to their own URL. "
                "Start `maestro up fleet.toml` or `maestro scheduler`.",
                self.settings.pool,
                p.ticket.model,
            )
        if self.models:
            self.tell_unserved(p.ticket.model)
        self._let_through(p, self.original(p))

    @property
    def own_url_mode(self) -> bool:
        """No Redis and no fleet: the URLs that the app already uses are the engines."""
        return self.settings.redis_url is None and self.settings.fleet is None

    async def _own_url(self, p: Pass) -> EngineSpec:
        """Without a fleet, the URL that the app already uses is the engine, bounded by ``local_concurrency``."""
        spec = self.original(p)
        if spec.engine_id not in self.fleet and self.scheduler is not None:
            self.fleet[spec.engine_id] = spec
            await self.scheduler.add_engine(spec)
        return spec

    # -- answer ------------------------------------------------------------------------------------------------------
    def deliver(self, verdict: Verdict) -> None:
        """Hand a verdict to the pass that waits for it. A grant that nobody waits for is given back."""
        p = self.waiting.get(verdict.stage_id)
        if isinstance(verdict, Refusal):
            if p is not None:
                self._refuse(p, refused(p.ticket, verdict))
            return
        if p is None:
            if verdict.stage_id not in self.held:  # else it was told twice
                self._spawn(self._return, (verdict,))
            return
        if verdict.token <= p.spent_token:
            return  # told twice, and given back since
        engine = self.fleet.get(verdict.engine_id)
        if engine is None:
            self._spawn(self._meet_engine, (p, verdict))
            return
        self._take(p, verdict, engine)

    def _take(self, p: Pass, grant: Grant, engine: EngineSpec) -> None:
        """Hand a grant of the queue over. From any thread."""
        if grant.fast and not grant.priority:
            grant = dataclasses.replace(grant, priority=_priority(p.ticket))
        self.held[grant.stage_id] = p
        self._hand(p, grant, engine)

    async def _return(self, grant: Grant) -> None:
        """A grant without a taker: its caller is gone."""
        cancel = functools.partial(self.queue.cancel, grant.stage_id, "", client_id=self.client_id, draining=False)
        await self._say(lambda: cancel(now_s=self.clock.now_s()))

    async def _meet_engine(self, p: Pass, grant: Grant) -> None:
        """A grant on an engine that is not known here: it joined this moment, or it died this moment."""
        with contextlib.suppress(QueueUnavailable):
            await self.refresh_fleet()
        if not self._waits(p, grant.stage_id) or grant.token <= p.spent_token:
            return
        if grant.engine_id in self.fleet:
            self.deliver(grant)
        else:
            await self.requeue(p, grant, draining=False, at_once=False)

    def _hand(self, p: Pass, grant: Grant, engine: EngineSpec) -> None:
        self._let_go(p)
        p.grant, p.engine = grant, engine
        p.outgrown_at = grant.output_tokens if grant.output_tokens and engine.kv_bytes else math.inf
        p.extensions = p.overdrafts = 0
        if not p.future.done():
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # its caller gave up: `withdraw` comes
                p.future.set_result(None)

    def _refuse(self, p: Pass, error: MaestroError) -> None:
        self._let_go(p)
        p.ended = True
        _fail(p, error)

    def _let_go(self, p: Pass) -> None:
        """It waits no longer."""
        self.waiting.pop(p.ticket.stage_id, None)
        self.local_queue.pop(p.ticket.stage_id, None)
        p.queued = False

    def _rename(self, p: Pass) -> None:
        """A new name for a stage that waits: under the old one the queue ended it, or must not serve it any more."""
        self._let_go(p)
        p.ticket = p.ticket.evolve(stage_id=_renamed(p.ticket.stage_id))
        p.pushed, p.draining, p.spent_token = False, False, 0
        self.waiting[p.ticket.stage_id] = p

    # -- the switch --------------------------------------------------------------------------------------------------
    async def watch_switch(self) -> None:
        """Learn what the operator allows. While Redis is away the last word holds, and one that comes back empty is told."""
        try:
            async with self._within_patience():
                found = await self.queue.switch()
                if self._switch_unread and found == Switch() != self.switch:
                    await self.queue.set_switch(self.switch, if_lost=True)
                else:
                    self._obey(found)
            self._switch_unread = False
        except (QueueUnavailable, TimeoutError):  # the heartbeat notices too, and says so
            self._switch_unread = True

    def _obey(self, switch: Switch) -> None:
        """Do as the operator says. Whoever waits for a grant that is not wanted any more leaves at once."""
        before, news, self.switch = self.mode, switch != self.switch, switch
        self.mode = min(self.settings.mode, switch.mode, key=lambda mode: mode.rank)
        if self.mode is before:
            if news and switch.mode is Mode.ON and not switch.at_rest:
                log.warning("the switch of pool %r was %s", self.settings.pool, switch.reason)
            return
        then = {
            Mode.ON: "Calls are ordered and routed again",
            Mode.OBSERVE: "Calls go out as they are, and are measured",
            Mode.OFF: "Calls go out as they are",
        }[self.mode]
        why = switch.told() or "nobody said why"
        log.warning("the switch of pool %r is %s (%s). %s.", self.settings.pool, switch.mode, why, then)
        if self.mode is not Mode.ON:
            for p in list(self.waiting.values()):
                self._bypass(p)

    def _bypass(self, p: Pass) -> None:
        """Let a pass that waits out, as its caller made it. The queue is told to forget it."""
        p.mode = self.mode
        if p.pushed:
            self._spawn(functools.partial(self._say, self._cancel, p.ticket, draining=p.draining), ())
        self._let_through(p, self.original(p))

    async def look_around(self) -> None:
        """Know how far the clusters are (`distance`)."""
        if self.mode is Mode.ON:
            await self.distances.look(self.queue, list(self.fleet.values()))

    # -- Maestro is out ----------------------------------------------------------------------------------------------
    def _trouble(self, where: str, error: Exception, *, since_s: float) -> None:
        """The queue cannot be used: it is out, or it has a bug, which is as bad."""
        if isinstance(error, TimeoutError):
            error = QueueUnavailable(f"Redis did not answer within {self._patience_s:g} s. Run `maestro doctor`.")
        elif not isinstance(error, MaestroError):
            self._bug(where, error)
        self._down(error, since_s=since_s)

    def _down(self, why: Exception, *, since_s: float | None = None) -> None:
        if self.down_since_s is None:
            self.down_since_s = time.monotonic() if since_s is None else since_s
        if not self.told:
            self.told = True
            then = {
                "open": f"After {self.settings.outage_after_s:g} s calls go to the last known engines, "
                f"{self.settings.local_concurrency} at a time",
                "closed": "Calls fail",
                "original_url": "Calls go to their own URL",
            }[self._on_outage()]
            if self.settings.mode is Mode.OBSERVE:
                log.warning("nothing is recorded in Redis for now: %s Your calls are not affected.", why)
            else:
                log.warning("Maestro is out: %s %s (MAESTRO_ON_OUTAGE=%s).", why, then, self._on_outage())

    def _up(self) -> None:
        """Maestro is back: those that wait for room in this process go to the queue instead."""
        self._unled_since_s = self.down_since_s = None
        self._told_dropping = False
        if self.told:
            self.told = False
            log.warning("Maestro is back.")
            if self.settings.redis_url:
                self.salt = b""  # a Redis that forgot it has another now: it is read with the next beat
        returning = list(self.local_queue.values())
        self.local_queue.clear()
        for p in returning:
            self._spawn(self._push, (p,))

    def _out(self) -> bool:
        return self.down_since_s is not None and time.monotonic() - self.down_since_s > self.settings.outage_after_s

    def _on_outage(self, tenant: str = "") -> str:
        """What an outage means for a call: a tenant with residency rules has to be let out by name, and never to its own URL."""
        said = self.settings.on_outage
        if tenant in self.restricted:
            return "open" if said == "open" else "closed"
        return said or "open"

    @property
    def _patience_s(self) -> float:
        """How long the heartbeat waits for an answer before it calls that an outage."""
        return max(1.0, self.settings.outage_after_s)

    def _within_patience(self) -> asyncio.Timeout:
        return asyncio.timeout(self._patience_s)

    def _admit_locally(self, p: Pass) -> None:
        """Admit without the queue, by ``on_outage``, bounded by this process alone."""
        if p.pushed:
            self._later(functools.partial(self._cancel, p.ticket, draining=p.draining))
        self._rename(p)
        if self._on_outage(p.ticket.tenant) == "closed":
            closed = "Maestro is out and MAESTRO_ON_OUTAGE=closed: the call was not made."
            if p.ticket.tenant in self.restricted and self.settings.on_outage != "closed":
                closed = (
                    f"Maestro is out. {_STAYS.format(tenant=p.ticket.tenant)} MAESTRO_ON_OUTAGE=open would let it go to the "
                    "allowed engines that were known last."
                )
            self._refuse(p, QueueUnavailable(closed))
        elif p.ticket.nested:
            self._start_locally(p)  # its parent, which holds a slot, waits for it
        else:
            self.local_queue[p.ticket.stage_id] = p
            self._fill_locally()

    def _fill_locally(self) -> None:
        while self.local_queue and len(self.local) < self.settings.local_concurrency:
            self._start_locally(next(iter(self.local_queue.values())))

    def _start_locally(self, p: Pass) -> None:
        """Let a pass through to the known engine with fewest of ours, the nearest of those; or to its own URL."""
        t = p.ticket
        known = [] if self._on_outage(t.tenant) == "original_url" else self._engines_for(t)
        engines = self.distances.reached(known) or known
        if not engines and t.tenant in self.restricted:
            why = f"Maestro is out. {_STAYS.format(tenant=t.tenant)} No allowed one is known."
            self._refuse(p, QueueUnavailable(why))
            return
        busy = Counter(self.local.values())
        near = self.distances.rtt_s
        engine = min(engines or [self.original(p)], key=lambda e: (busy[e.engine_id], near(e), e.engine_id))
        self.local[p.ticket.stage_id] = engine.engine_id
        self._let_through(p, engine.in_outage())

    def _let_through(self, p: Pass, engine: EngineSpec) -> None:
        grant = Grant(
            stage_id=p.ticket.stage_id,
            engine_id=engine.engine_id,
            token=0,
            epoch=0,
            kv_bytes=0,
            priority=0 if engine.original else _priority(p.ticket),
            granted_at_s=self.clock.now_s(),
        )
        self._hand(p, grant, engine)

    def _end_locally(self, stage_id: str) -> bool:
        """Give the slot of a stage back that was let through; False where it had none."""
        if self.local.pop(stage_id, None) is None:
            return False
        self._fill_locally()
        return True

    # -- reports, on their caller's thread where nobody waits for what they free -------------------------------------------
    def _own_queue(self) -> MemoryQueue | None:
        """The queue, where it is this process's own and in order: what needs no waiting can then be said from any thread."""
        led = self.scheduler is not None and self.ready.is_set() and self.down_since_s is None
        return self.queue if led and self.alive and isinstance(self.queue, MemoryQueue) else None

    def finish_at_once(self, p: Pass, grant: Grant, observation: Observation) -> bool:
        """`finish`, from any thread. False: nothing has happened."""
        queue = self._own_queue()
        if queue is None or p.mode is not Mode.ON or self.held.get(grant.stage_id) is not p:
            return False
        if not queue.finish_at_once(observation, client_id=p.ticket.client_id, token=grant.token):
            return False
        self.held.pop(grant.stage_id, None)
        if self.events is not None:
            self.events.add(observation)
        return True

    def end_run_at_once(self, run: RunEnd) -> bool:
        """`end_run`, from any thread. False: nothing has happened."""
        queue = self._own_queue()
        if queue is None or self.waiting:
            return False
        queue.end_run_at_once(run)
        if self.events is not None:
            self.events.add(run)
        return True

    # -- reports -----------------------------------------------------------------------------------------------------
    async def finish(self, p: Pass, grant: Grant, observation: Observation) -> None:
        """Say that a stage ended, unless it was withdrawn before."""
        if p.mode is Mode.OFF:
            return
        if self.events is not None:
            self.events.add(observation)
        if p.mode is Mode.OBSERVE:
            await self._record(observation)
        elif not self._end_locally(grant.stage_id) and self.held.pop(grant.stage_id, None) is p:
            say = functools.partial(self.queue.finish, observation, client_id=p.ticket.client_id, token=grant.token)
            await self._say(lambda: say(now_s=observation.finished_at_s))

    async def _record(self, observation: Observation) -> None:
        """Hand over what was only measured. Without Redis and scheduler nobody would read it."""
        await self.ready.wait()
        if self.down_since_s is not None:
            self._later(functools.partial(self.queue.observe, observation))
        elif self.settings.redis_url or self.scheduler is not None:
            await self._say(self.queue.observe, observation)

    async def requeue(self, p: Pass, grant: Grant, *, draining: bool, at_once: bool) -> None:
        """Say that a stage goes back into the queue, where it waits for its next grant."""
        t = p.ticket
        self._end_locally(t.stage_id)
        self.held.pop(t.stage_id, None)
        self.waiting[t.stage_id] = p  # before the queue may answer
        p.draining, p.spent_token = draining, grant.token
        if self.mode is not Mode.ON:
            self._bypass(p)
            return
        if at_once:
            await self._look_again(p, grant.engine_id)
            t = p.ticket
        else:
            await asyncio.sleep(RETRY_S)
        if grant.token and self._waits(p, t.stage_id):
            try:
                ours = await self.queue.requeue(t, token=grant.token, now_s=self.clock.now_s(), draining=draining)
            except Exception as e:
                ours = False
                if isinstance(e, QueueUnavailable):
                    self._down(e)
                else:
                    self._bug("requeue", e)
                self._later(functools.partial(self._cancel, t, draining=draining))
            if ours and self._waits(p, t.stage_id):
                p.queued, p.draining = True, False
                return
        if self._waits(p, t.stage_id):  # the queue knows this stage no more by its name, or never did
            self._rename(p)
            await self._push(p)

    async def _look_again(self, p: Pass, engine_id: str) -> None:
        """A call could not connect. Where its whole cluster cannot be reached from here, it does not try its other engines."""
        engine = self.fleet.get(engine_id)
        if engine is None or engine.original or not self.settings.site:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETRY_S):
                await self.distances.doubt(self.queue, self.fleet.values(), engine.cluster)
        if not math.isfinite(self.distances.rtt_s(engine)):
            lost = (e.engine_id for e in self.fleet.values() if e.cluster == engine.cluster)
            excluded = tuple(dict.fromkeys((*p.ticket.excluded_engines, *lost)))
            p.ticket = p.ticket.evolve(excluded_engines=excluded)

    async def withdraw(self, p: Pass, *, was_sent: bool) -> None:
        """Say that a stage's caller is gone. A grant that is on its way finds no taker and is given back."""
        t = p.ticket
        known = self._waits(p, t.stage_id) or self.held.pop(t.stage_id, None) is not None
        self._let_go(p)
        _fail(p, RunGone(WITHDRAWN))
        if not self._end_locally(t.stage_id) and known and p.pushed:
            # At the caller's own URL the bound is on what this app keeps open, and that is closed now.
            ours = p.engine is None or not p.engine.original
            await self._say(self._cancel, t, draining=ours and (was_sent or p.draining))

    async def extend(self, p: Pass, token: int) -> None:
        """Say what a reservation has grown to. Until that is heard, be it after an outage, it is the stage's only word of it."""
        await self._say(self._extend, p, token)

    async def _extend(self, p: Pass, token: int) -> None:
        grant = p.grant
        if p.ended or grant is None or grant.token != token:
            return
        client_id = p.ticket.client_id
        fits = await self.queue.extend(grant.stage_id, client_id=client_id, token=token, kv_bytes=grant.kv_bytes)
        if p.grant is grant:
            p.overdrafts += fits is False
            p.outgrown_at = grant.output_tokens

    async def _cancel(self, t: Ticket, *, draining: bool) -> Status | None:
        now_s = self.clock.now_s()
        return await self.queue.cancel(t.stage_id, t.model, client_id=t.client_id, now_s=now_s, draining=draining)

    async def end_run(self, run: RunEnd) -> None:
        """The run is over: wake whoever still waits for it, then tell the statistics."""
        if self.events is not None:
            self.events.add(run)
        for p in [p for p in self.waiting.values() if p.ticket.run_id == run.run_id]:
            p.ended = True
            _fail(p, RunGone())
            self._spawn(functools.partial(self.withdraw, was_sent=False), (p,))
        await self.ready.wait()
        await self._say(self.queue.end_run, run)

    async def describe(self, workflow: str, spec: str) -> None:
        """Hand over a workflow's static graph, once."""
        await self.ready.wait()
        await self._say(self.queue.describe, workflow, spec)

    async def _say(self, f: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> None:
        """Tell the queue something; what it cannot hear now is told again when it is back."""
        try:
            await f(*args, **kwargs)
        except QueueUnavailable as e:
            self._down(e)
            self._later(functools.partial(f, *args, **kwargs))
        except Exception as e:
            self._bug(f"report: {getattr(f, '__name__', 'grant')}", e)

    def _later(self, report: Callable[[], Awaitable[Any]]) -> None:
        if len(self.unsent) < UNSENT_LIMIT:
            self.unsent.append(report)
        elif not self._told_dropping:
            self._told_dropping = True
            log.warning("%d reports wait for the queue to come back: further ones are dropped.", UNSENT_LIMIT)

    async def _flush(self) -> None:
        """Tell the queue what it missed. Raises `QueueUnavailable`, and forgets nothing then."""
        while self.unsent:
            report = self.unsent.popleft()
            try:
                await report()
            except QueueUnavailable:
                self.unsent.appendleft(report)
                raise
            except Exception as e:
                self._bug("a late report", e)

    # -- listener and heartbeat --------------------------------------------------------------------------------------
    async def listen(self) -> None:
        """Deliver the next verdicts."""
        try:
            verdicts = await self.queue.verdicts(self.client_id, 2.0)
        except QueueUnavailable:  # the heartbeat notices too, and says so
            await asyncio.sleep(RETRY_S)
            return
        for verdict in verdicts:
            self.deliver(verdict)

    async def beat(self) -> None:
        """Renew leases, notice outages and their ends, keep the fleet fresh."""
        began_s = time.monotonic()
        believed = {s: 0 for s, p in self.waiting.items() if p.queued}
        believed |= {s: g.token for s, p in tuple(self.held.items()) if (g := p.grant) is not None}
        try:
            async with self._within_patience():
                if self.settings.redis_url:
                    await self._meet()
                renewal = await self.queue.renew(self.client_id, believed, now_s=self.clock.now_s())
        except Exception as e:
            self._trouble("heartbeat", e, since_s=began_s)
        else:
            needs_no_leader = self.settings.mode is Mode.OBSERVE
            self._judge(led=renewal.led or needs_no_leader, at_s=began_s)
            await self._reconcile(believed, renewal)
        if self._out():
            for p in [p for s, p in self.waiting.items() if s not in self.local_queue]:
                self._admit_locally(p)

    def _judge(self, *, led: bool, at_s: float) -> None:
        """The queue answered: Maestro is back, or out all the same where nobody has led it for some time."""
        if led:
            self._up()
            return
        self._unled_since_s = at_s if self._unled_since_s is None else self._unled_since_s
        if at_s - self._unled_since_s > self.settings.outage_after_s:
            self._down(
                QueueUnavailable("no scheduler leads this pool. Start `maestro scheduler`."),
                since_s=self._unled_since_s,
            )

    async def _meet(self) -> None:
        """Learn from Redis what it is asked for: its clock, once, and the fleet."""
        if self._sync_clock is not None:
            await self._sync_clock()
            self._sync_clock = None
        if not self.salt:
            self.salt = await self.queue.salt()
        self.restricted |= {t.name for t in await self.queue.tenants() if t.allow_clusters}
        asleep = await self._models_of_nodes()
        await self.refresh_fleet()
        self.models |= asleep  # last: who knows some models takes the calls of all others for none of ours

    async def refresh_fleet(self) -> None:
        """Read the engines that the scheduler last published; an empty answer does not erase what is known."""
        found = await self.queue.fleet()
        if found and self.settings.redis_url:
            self.fleet = {e.engine_id: e for e in found}
            self.models |= {e.model for e in found}

    async def _models_of_nodes(self) -> set[str]:
        """Models that sleep on some node are served, too: a stage waits for its model to wake."""
        return {e.spec.model for report in await self.queue.reports(self.clock.now_s()) for e in report.engines}

    async def _reconcile(self, believed: Mapping[str, int], renewal: Renewal) -> None:
        """Bring a queue that forgot, or that we did not hear, to what is true here."""
        with contextlib.suppress(QueueUnavailable):
            await self._flush()
        for stage_id in renewal.gone:
            if believed[stage_id]:
                await self._say(self._announce, stage_id, believed[stage_id])
            elif (p := self.waiting.get(stage_id)) is not None and p.queued:
                self._spawn(self._push_again, (p,))
        for stage_id in renewal.granted:
            await self._say(self._fetch, stage_id)

    async def _announce(self, stage_id: str, token: int) -> None:
        """Tell a queue that forgot it what is held here."""
        p = self.held.get(stage_id)
        if p is None or (grant := p.grant) is None or grant.token != token:
            return
        await self.queue.announce(p.ticket, grant, now_s=self.clock.now_s())
        if self.held.get(stage_id) is not p:  # it ended meanwhile, and may have said so too early to be heard
            await self._cancel(p.ticket, draining=True)

    async def _fetch(self, stage_id: str) -> None:
        """Ask for a grant whose message was lost: pushing a known stage again returns it."""
        if (p := self.waiting.get(stage_id)) is not None:
            verdict = await self.queue.push(p.ticket, engines=(), now_s=self.clock.now_s())
            if verdict is not None and self._waits(p, stage_id):
                self.deliver(verdict)

    async def _push_again(self, p: Pass) -> None:
        """The queue ended a stage that waits here, or forgot it. Unless it refused it, it goes in anew."""
        t = p.ticket
        status = None
        with contextlib.suppress(QueueUnavailable):
            status = await self._cancel(t, draining=False)
        if status is Status.REFUSED:
            await asyncio.sleep(RETRY_S)  # its refusal is on its way, or was lost
            if self._waits(p, t.stage_id):
                self._refuse(p, StageRefused("This call was refused; why, was lost on the way."))
        elif self._waits(p, t.stage_id):
            self._rename(p)
            await self._push(p)


def _priority(t: Ticket) -> int:
    """What the engine orders by, of a stage that no planner saw."""
    return 0 if t.nested else wire_priority(t.due_at_s)


def refused(t: Ticket, refusal: Refusal, *, after_s: float = 0.0) -> MaestroError:
    """What the caller of a refused stage is told. ``after_s``: for so long it was tried.

    Of those that are refused together each is told another moment to come again, so that they do not come together.
    """
    again_s = refusal.retry_after_s * random.uniform(1.0, 1.0 + SPREAD)
    tried = f", and was for {after_s:g} s (MAESTRO_MAX_WAIT_S)" if after_s else ""
    if refusal.reason == "full":
        return QueueFull(f"The queue for model {t.model!r} is full{tried}.", retry_after_s=again_s)
    if refusal.reason == "quota":
        what = f"Tenant {t.tenant!r} has as many calls waiting as it may (max_waiting){tried}."
        return QuotaExceeded(what, retry_after_s=again_s)
    if refusal.reason == "beyond quota":
        return NoEngineFits(
            f"{t.prompt_tokens} prompt tokens of {t.role or 'this call'} are more than tenant {t.tenant!r} may ever use at a "
            "time: see max_kv_gb and tokens_per_minute in the fleet file."
        )
    if refusal.reason == "deadline":
        return StageRefused(f"The deadline of {t.role or 'this run'} cannot be met.", retry_after_s=again_s)
    if refusal.reason == "operator":
        return StageRefused("An operator withdrew this call (`maestro queue cancel`).")
    if refusal.reason == "residency":
        return NoEngineFits(
            f"tenant {t.tenant!r} may not be served anywhere that {t.model!r} is: see allow_clusters in the fleet file."
        )
    return NoEngineFits(
        f"no engine for {t.model!r} could ever hold {t.prompt_tokens} prompt tokens + output of {t.role or 'this call'}"
    )


def _turned_away(t: Ticket, verdict: Verdict | None) -> Refusal | None:
    """The refusal of a queue, or of a tenant's part of it, that is full, where its caller would rather wait than be told."""
    if isinstance(verdict, Refusal) and verdict.reason in ("full", "quota") and not t.refuse_late:
        return verdict
    return None


def _original_id(p: Pass) -> str:
    return f"{p.ticket.model}@{_plain_url(p.original_url)}"


@functools.lru_cache(maxsize=256)
def _plain_url(url: str) -> str:
    """A URL without what may be secret in it: name, password, query."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _fail(p: Pass, error: BaseException) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        p.future.set_exception(error)


def _renamed(stage_id: str) -> str:
    """A new name for a stage whose old one has ended in the queue."""
    base, _, n = stage_id.rpartition("~")
    return f"{base}~{int(n) + 1}" if base and n.isdecimal() else f"{stage_id}~1"
