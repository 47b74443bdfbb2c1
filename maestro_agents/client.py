"""The app's side: submit a stage, wait for its grant, report what became of it. Used by every integration.

One `Client` per process owns one background thread with one event loop: the queue's connections, the listener that
delivers verdicts, the heartbeat that renews leases, and (without Redis) the scheduler itself. Callers are threads and
event loops of the app; they touch nothing but `Pass`, whose waiting is the one sync edge. A fork drops everything and
starts anew.

When Maestro is out (`Settings.on_outage`): stages that wait are let through to the last known engines within
``local_concurrency``; the user is told once. What the queue missed meanwhile it learns when it is back.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import os
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from typing import Any, Final

from maestro_agents.core import (
    EngineSpec,
    Grant,
    Observation,
    Refusal,
    RunEnd,
    Status,
    Ticket,
    Verdict,
)
from maestro_agents.errors import (
    MaestroError,
    NoEngineFits,
    QueueFull,
    QueueUnavailable,
    RunGone,
    StageRefused,
    WaitTooLong,
)
from maestro_agents.ports import Clock, Queue
from maestro_agents.queue.memory import MemoryQueue
from maestro_agents.scheduler import Scheduler
from maestro_agents.settings import Settings

log = logging.getLogger("maestro")

BEAT_S: Final = 0.1
"""How often a waiting call shows its caller that it lives (LangGraph's idle timeout)."""

RETRY_S: Final = 0.25
FLEET_REFRESH_S: Final = 1.0
FLUSH_S: Final = 2.0
"""Longest wait at interpreter exit for the last reports to leave."""

UNSENT_LIMIT: Final = 10_000


class _WallClock:
    def now_s(self) -> float:
        return time.time()


class Pass:
    """One stage of this process, from its push to its end. Every method may be called from any thread or loop."""

    def __init__(self, room: _Room, ticket: Ticket, original_url: str) -> None:
        self.ticket = ticket
        self.grant: Grant | None = None
        self.engine: EngineSpec | None = None
        self.original_url = original_url
        self.ended = False
        self.first_byte_at_s = 0.0
        self._was_sent = False
        self._submitted = False
        self._gives_up_at_s = time.monotonic() + room.settings.max_wait_s
        self._room = room
        self.future: concurrent.futures.Future[None] = concurrent.futures.Future()

    # -- wait --------------------------------------------------------------------------------------------------------
    def wait(self, beat: Callable[[], None] | None = None) -> EngineSpec:
        """Block until an engine is granted. Raises `QueueFull`, `StageRefused`, `NoEngineFits`, `WaitTooLong`, `RunGone`.

        ``beat`` is called about every 0.1 s meanwhile. Never call it on an event loop: see `wait_async`.
        """
        self._submit()
        try:
            with contextlib.suppress(concurrent.futures.TimeoutError):
                if beat is None:
                    self.future.result(self._patience_s())
                else:
                    beat()
                    while self._patience_s() > 0:
                        with contextlib.suppress(concurrent.futures.TimeoutError):
                            self.future.result(BEAT_S)
                            break
                        beat()
            return self._granted()
        except BaseException:
            self.cancel()
            raise

    async def wait_async(self, beat: Callable[[], None] | None = None) -> EngineSpec:
        """The same on the caller's event loop. A cancelled caller withdraws its stage."""
        self._submit()
        try:
            ours = asyncio.wrap_future(self.future)
            if beat is None:
                await asyncio.wait([ours], timeout=self._patience_s())
            else:
                beat()
                while not ours.done() and self._patience_s() > 0:
                    await asyncio.wait([ours], timeout=BEAT_S)
                    beat()
            if ours.done():
                ours.result()
            return self._granted()
        except BaseException:
            self.cancel()
            raise

    def _submit(self) -> None:
        if not self._submitted:  # after a requeue it is on its way already
            self._submitted = True
            self._room.call(self._room.admit, self)

    def _patience_s(self) -> float:
        return self._gives_up_at_s - time.monotonic()

    def _granted(self) -> EngineSpec:
        if not self.future.done() or self.engine is None:
            raise WaitTooLong(
                f"no engine for {self.ticket.role or 'this call'} ({self.ticket.model}) within "
                f"{self._room.settings.max_wait_s:g} s (MAESTRO_MAX_WAIT_S). See `maestro queue ls`."
            )
        self.future.result()
        return self.engine

    # -- report ------------------------------------------------------------------------------------------------------
    def sent(self) -> None:
        """The request is leaving for the engine."""
        self._was_sent = True

    def first_byte(self) -> None:
        """The first byte of the answer reached the caller: from now on nothing is replayed."""
        if not self.first_byte_at_s:
            self.first_byte_at_s = self._room.clock.now_s()

    def requeue(self, *, engine_down: bool) -> bool:
        """Give the grant back before the first byte, to be tried on another engine: wait again.

        False where the stage may not be tried again (attempts used up, or its first byte is out): the error stands.
        """
        grant, engine = self.grant, self.engine
        if self.ended or grant is None or engine is None or self.first_byte_at_s:
            return False
        if self.ticket.attempt >= self._room.settings.max_attempts and engine_down:
            return False
        excluded = (*self.ticket.excluded_engines, engine.engine_id) if engine_down else self.ticket.excluded_engines
        # A busy engine (503) is a signal, not a failure: no attempt is used up.
        attempt = self.ticket.attempt + engine_down
        ticket = self.ticket.evolve(excluded_engines=excluded, attempt=attempt)
        draining = self._was_sent and engine_down
        self.ticket, self.grant, self.engine, self._was_sent = ticket, None, None, False
        self.future = concurrent.futures.Future()
        self._room.call(functools.partial(self._room.requeue, self, grant, draining=draining))
        return True

    def finish(
        self,
        *,
        ok: bool = True,
        prompt_tokens: int = 0,
        output_tokens: int = 0,
        cached_tokens: int = 0,
        tool_calls: int = 0,
        engine_queue_s: float = 0.0,
        engine_ttft_s: float = 0.0,
    ) -> None:
        """The stage has ended. Never blocks; a second word is ignored."""
        if self.ended or self.grant is None or self.engine is None:
            return
        self.ended = True
        t, g = self.ticket, self.grant
        observation = Observation(
            stage_id=t.stage_id,
            run_id=t.run_id,
            workflow=t.workflow,
            role=t.role,
            node=t.node,
            model=t.model,
            engine_id=g.engine_id,
            service_class=t.service_class,
            tenant=t.tenant,
            status=Status.DONE if ok else Status.FAILED,
            visit=t.visit,
            step=t.step,
            attempt=t.attempt,
            fast=g.fast,
            priority=g.priority,
            prompt_tokens=prompt_tokens or t.prompt_tokens,
            output_tokens=output_tokens,
            cached_tokens=cached_tokens,
            tool_calls=tool_calls,
            run_started_at_s=t.run_started_at_s,
            deadline_at_s=t.deadline_at_s,
            pushed_at_s=t.pushed_at_s,
            granted_at_s=g.granted_at_s,
            first_byte_at_s=self.first_byte_at_s,
            finished_at_s=self._room.clock.now_s(),
            engine_queue_s=engine_queue_s,
            engine_ttft_s=engine_ttft_s,
            features=t.features,
        )
        self._room.call(self._room.finish, self, g, observation)

    def cancel(self) -> None:
        """Withdraw the stage, wherever it is. Never blocks; after `finish` it does nothing."""
        if not self.ended:
            self.ended = True
            self._room.call(functools.partial(self._room.withdraw, self, was_sent=self._was_sent))


class _Room:
    """The background thread: everything async lives here. Methods below run on its loop unless they say otherwise."""

    def __init__(self, settings: Settings, client_id: str, engines: dict[str, EngineSpec]) -> None:
        self.settings = settings
        self.client_id = client_id
        self.clock: Clock = _WallClock()
        self.fleet = engines
        self.queue: Queue
        self.scheduler: Scheduler | None = None
        self.waiting: dict[str, Pass] = {}
        self.held: dict[str, Pass] = {}
        self.unsent: deque[Callable[[], Coroutine[Any, Any, Any]]] = deque()
        self.described: OrderedDict[str, None] = OrderedDict()
        self.down_since_s: float | None = None
        self.told = False
        self.local: dict[str, int] = {}
        self.local_free: asyncio.Condition
        self.local_grants: set[str] = set()
        self.withdraw_later: dict[str, str] = {}
        self.ready: asyncio.Event
        self.loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._services: list[asyncio.Task[Any]] = []
        self._thread = threading.Thread(target=self._main, name="maestro", daemon=True)
        self._thread.start()

    # -- from any thread ---------------------------------------------------------------------------------------------
    def call(self, f: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Run a coroutine function of this room, from any thread, without waiting for it."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self.loop.call_soon_threadsafe(self._spawn, f, args)

    def _spawn(self, f: Callable[..., Coroutine[Any, Any, None]], args: tuple[Any, ...]) -> None:
        task = self.loop.create_task(f(*args))
        self._tasks.add(task)
        task.add_done_callback(self._spawned)

    def _spawned(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a bug in Maestro; your call goes on without it", exc_info=task.exception())

    def stop(self) -> None:
        """Flush the last reports, give back what is held, end the thread."""
        if not self._thread.is_alive() or self.loop.is_closed():
            return
        done = asyncio.run_coroutine_threadsafe(self._drain(), self.loop)
        with contextlib.suppress(concurrent.futures.TimeoutError, concurrent.futures.CancelledError, RuntimeError):
            done.result(FLUSH_S)
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(FLUSH_S)

    # -- the thread --------------------------------------------------------------------------------------------------
    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.ready = asyncio.Event()
        self.local_free = asyncio.Condition()
        self._spawn(self._start, ())
        try:
            self.loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.run_until_complete(self.queue.close())
            self.loop.close()

    def _serve(self, service: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine for the life of the room."""
        task = self.loop.create_task(service)
        task.add_done_callback(self._spawned)
        self._services.append(task)

    async def _start(self) -> None:
        s = self.settings
        self.queue = MemoryQueue(lease_s=s.lease_s, max_queue=s.max_queue)
        try:
            if s.redis_url:
                from maestro_agents.queue.redis import RedisClock, RedisQueue

                clock = self.clock = RedisClock()
                queue = self.queue = RedisQueue(s.redis_url, pool=s.pool, lease_s=s.lease_s, max_queue=s.max_queue)
                await clock.sync(queue)
                await self.refresh_fleet()
            else:
                self.scheduler = Scheduler(
                    self.queue, self.fleet.values(), clock=self.clock, holder=self.client_id, lease_s=s.lease_s
                )
                await self.scheduler.lead()
                self._serve(self.scheduler.run())
        except QueueUnavailable as e:
            self._down(e)
        finally:
            self._serve(self._listen())
            self._serve(self._beat())
            self.ready.set()

    async def _drain(self) -> None:
        for p in [*self.waiting.values(), *self.held.values()]:
            p.ended = True
            await self.withdraw(p, was_sent=p.engine is not None)
        await asyncio.sleep(0)
        if ours := self._tasks - {asyncio.current_task()}:
            await asyncio.wait(ours, timeout=FLUSH_S / 2)

    # -- admit -------------------------------------------------------------------------------------------------------
    async def admit(self, p: Pass) -> None:
        """Push the stage; its future is done here (fast path), by the listener, or when Maestro is out."""
        if not self.ready.is_set():
            await self.ready.wait()
            p.ticket = p.ticket.evolve(pushed_at_s=self.clock.now_s())  # the queue's clock is known only now
        if p.ended:
            return
        places = await self.places(p)
        if not places and self.down_since_s is not None:
            await self.admit_locally(p)
            return
        if not places:
            self._tell_unserved(p.ticket.model)
            self._let_through(p, self._original(p))
            return
        self.waiting[p.ticket.stage_id] = p
        while not p.ended and p.ticket.stage_id in self.waiting:
            if self._out():
                await self.admit_locally(p)
                return
            try:
                verdict = await self.queue.push(p.ticket, engines=places, now_s=self.clock.now_s())
            except QueueUnavailable as e:
                self._down(e)
                await asyncio.sleep(RETRY_S)
                continue
            except Exception as e:  # a bug of ours must not break the user's graph
                log.exception("a bug in Maestro; the call goes to its own URL")
                self._down(QueueUnavailable(str(e)))
                self.waiting.pop(p.ticket.stage_id, None)
                self._let_through(p, self._original(p))
                return
            if verdict is not None:
                self.deliver(verdict)
            return

    async def places(self, p: Pass) -> list[EngineSpec]:
        """The engines that may serve a pass; empty where it is none of ours and passes through untouched."""
        t = p.ticket
        if self.scheduler is not None and not self.settings.fleet:
            return [await self._own_url(p)]
        found = [e for e in self.fleet.values() if e.model == t.model]
        if not found and self.settings.redis_url and self.down_since_s is None:
            with contextlib.suppress(QueueUnavailable):  # a model that joined a moment ago
                await self.refresh_fleet()
            found = [e for e in self.fleet.values() if e.model == t.model]
        if t.pinned_engine:
            return [e for e in found if e.engine_id == t.pinned_engine] or found
        return [e for e in found if e.engine_id not in t.excluded_engines] or found

    def _tell_unserved(self, model: str) -> None:
        if not self.fleet and not self.told:
            self.told = True
            log.warning(
                "no scheduler has published a fleet in pool %r: calls for %r go to their own URL. "
                "Start `maestro up fleet.toml` or `maestro scheduler`.",
                self.settings.pool,
                model,
            )

    async def _own_url(self, p: Pass) -> EngineSpec:
        """Without a fleet, the URL that the app already uses is the engine, bounded by ``local_concurrency``."""
        spec = self._original(p)
        if spec.engine_id not in self.fleet and self.scheduler is not None:
            self.fleet[spec.engine_id] = spec
            await self.scheduler.add_engine(spec)
        return spec

    def _original(self, p: Pass) -> EngineSpec:
        return EngineSpec(
            engine_id=f"{p.ticket.model}@{p.original_url}",
            url=p.original_url,
            model=p.ticket.model,
            slots=self.settings.local_concurrency,
            original=True,
        )

    def deliver(self, verdict: Verdict) -> None:
        """Hand a verdict to the pass that waits for it. One that nobody waits for is given back."""
        p = self.waiting.pop(verdict.stage_id, None)
        if isinstance(verdict, Refusal):
            if p is not None:
                p.ended = True
                _fail(p, _refusal(p, verdict))
            return
        engine = self.fleet.get(verdict.engine_id)
        if p is None or p.ended or engine is None:
            held = self.held.get(verdict.stage_id)
            if held is None or held.grant is None or held.grant.token != verdict.token:
                self._spawn(self._return, (verdict, p))
            return
        if verdict.fast:
            from maestro_agents.policy import wire_priority

            verdict = dataclasses.replace(verdict, priority=wire_priority(p.ticket.due_at_s))
        p.grant, p.engine = verdict, engine
        self.held[verdict.stage_id] = p
        _succeed(p)

    async def _return(self, grant: Grant, p: Pass | None) -> None:
        """A grant without a taker: its caller is gone, or its engine is unknown here yet."""
        if p is not None and not p.ended:
            with contextlib.suppress(QueueUnavailable):
                await self.refresh_fleet()
            if grant.engine_id in self.fleet:
                self.waiting[grant.stage_id] = p
                self.deliver(grant)
                return
        model = p.ticket.model if p else ""
        await self._say(self.queue.cancel, grant.stage_id, model, now_s=self.clock.now_s(), draining=False)

    # -- Maestro is out ----------------------------------------------------------------------------------------------
    def _down(self, why: Exception) -> None:
        if self.down_since_s is None:
            self.down_since_s = time.monotonic()
        if not self.told:
            self.told = True
            then = {
                "open": f"After {self.settings.outage_after_s:g} s calls go to the last known engines, "
                f"{self.settings.local_concurrency} at a time",
                "closed": "Calls fail",
                "original_url": "Calls go to their own URL",
            }[self.settings.on_outage]
            log.warning("Maestro is out: %s %s (MAESTRO_ON_OUTAGE=%s).", why, then, self.settings.on_outage)

    def _up(self) -> None:
        if self.down_since_s is not None:
            self.down_since_s = None
            if self.told:
                log.warning("Maestro is back.")
        self.told = False

    def _out(self) -> bool:
        return self.down_since_s is not None and time.monotonic() - self.down_since_s > self.settings.outage_after_s

    async def admit_locally(self, p: Pass) -> None:
        """Admit without the queue, by ``on_outage``: bounded by this process alone, on the engine with fewest of ours."""
        t = p.ticket
        self.waiting.pop(t.stage_id, None)
        self.withdraw_later[t.stage_id] = t.model
        if self.settings.on_outage == "closed":
            p.ended = True
            _fail(p, QueueUnavailable("Maestro is out and MAESTRO_ON_OUTAGE=closed: the call was not made."))
            return
        engines = [e for e in self.fleet.values() if e.model == t.model and not e.original]
        if self.settings.on_outage == "original_url" or not engines:
            engines = [self._original(p)]
        engines = [e for e in engines if e.engine_id not in t.excluded_engines] or engines
        async with self.local_free:
            await self.local_free.wait_for(
                lambda: p.ended or sum(self.local.values()) < self.settings.local_concurrency
            )
            if p.ended:
                return
            engine = min(engines, key=lambda e: (self.local.get(e.engine_id, 0), e.engine_id))
            self.local[engine.engine_id] = self.local.get(engine.engine_id, 0) + 1
            self.local_grants.add(t.stage_id)
        self._let_through(p, engine)

    def _let_through(self, p: Pass, engine: EngineSpec) -> None:
        now_s = self.clock.now_s()
        p.grant = Grant(
            stage_id=p.ticket.stage_id, engine_id=engine.engine_id, token=0, epoch=0, kv_bytes=0, granted_at_s=now_s
        )
        p.engine = engine
        _succeed(p)

    async def _free_local(self, p: Pass, grant: Grant) -> None:
        if p.ticket.stage_id in self.local_grants:
            self.local_grants.discard(p.ticket.stage_id)
            async with self.local_free:
                self.local[grant.engine_id] -= 1
                self.local_free.notify()

    # -- reports -----------------------------------------------------------------------------------------------------
    async def finish(self, p: Pass, grant: Grant, observation: Observation) -> None:
        """Say that a stage ended."""
        self.held.pop(p.ticket.stage_id, None)
        if grant.token == 0:
            await self._free_local(p, grant)
            return
        await self._say(self.queue.finish, observation, token=grant.token, now_s=observation.finished_at_s)

    async def requeue(self, p: Pass, grant: Grant, *, draining: bool) -> None:
        """Say that a stage goes back into the queue, then wait for its next grant."""
        t = p.ticket
        self.held.pop(t.stage_id, None)
        if grant.token == 0:
            await self._free_local(p, grant)
            await asyncio.sleep(RETRY_S)
            if not t.excluded_engines or self._out():
                await self.admit(p)
                return
        else:
            if not t.excluded_engines:
                await asyncio.sleep(RETRY_S)  # a full engine: not at once again
            self.waiting[t.stage_id] = p  # before the queue may answer
            try:
                ours = await self.queue.requeue(t, token=grant.token, now_s=self.clock.now_s(), draining=draining)
            except QueueUnavailable as e:
                self._down(e)
                ours = False
            if ours:
                return
            self.waiting.pop(t.stage_id, None)
        # The queue knows this stage no more under its name (or never did): a new one.
        p.ticket = t.evolve(stage_id=_renamed(t.stage_id))
        await self.admit(p)

    async def withdraw(self, p: Pass, *, was_sent: bool) -> None:
        """Say that a stage's caller is gone. A grant that is on its way finds no taker and is given back."""
        await self.ready.wait()
        stage_id = p.ticket.stage_id
        known = self.waiting.pop(stage_id, None) or self.held.pop(stage_id, None)
        if not p.future.done():
            p.future.cancel()
        if p.grant is not None and p.grant.token == 0:
            await self._free_local(p, p.grant)
        elif known is not None:
            await self._say(self.queue.cancel, stage_id, p.ticket.model, now_s=self.clock.now_s(), draining=was_sent)
        async with self.local_free:
            self.local_free.notify_all()

    async def end_run(self, run: RunEnd) -> None:
        """The run is over: wake whoever still waits for it, then tell the statistics."""
        for p in [p for p in self.waiting.values() if p.ticket.run_id == run.run_id]:
            p.ended = True
            _fail(p, RunGone())
            await self.withdraw(p, was_sent=False)
        await self.ready.wait()
        await self._say(self.queue.end_run, run)

    async def describe(self, workflow: str, spec: str) -> None:
        """Hand over a workflow's static graph, once."""
        await self.ready.wait()
        if self.scheduler is not None:
            self.scheduler.workflows.describe(workflow, spec)
        await self._say(self.queue.describe, workflow, spec)

    async def _say(self, f: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Tell the queue something; what it cannot hear now is told again when it is back."""
        try:
            await f(*args, **kwargs)
        except QueueUnavailable as e:
            self._down(e)
            if len(self.unsent) < UNSENT_LIMIT:
                self.unsent.append(lambda: f(*args, **kwargs))

    # -- listener and heartbeat --------------------------------------------------------------------------------------
    async def _listen(self) -> None:
        """Deliver verdicts as they come."""
        while True:
            try:
                for verdict in await self.queue.verdicts(self.client_id, 2.0):
                    self.deliver(verdict)
            except QueueUnavailable as e:
                self._down(e)
                await asyncio.sleep(RETRY_S)

    async def _beat(self) -> None:
        """Renew leases, notice outages and their ends, keep the fleet fresh."""
        period_s = min(self.settings.lease_s / 3, 1.0)
        unled_since: float | None = None
        while True:
            await asyncio.sleep(period_s)
            stages = dict.fromkeys(self.waiting, 0)
            stages |= {s: p.grant.token for s, p in self.held.items() if p.grant is not None}
            try:
                renewal = await self.queue.renew(self.client_id, stages, now_s=self.clock.now_s())
                if self.settings.redis_url:
                    await self.refresh_fleet()
            except QueueUnavailable as e:
                self._down(e)
                if self._out():
                    await self._rescue()
                continue
            unled_since = None if renewal.led else (unled_since or time.monotonic())
            if unled_since is not None and time.monotonic() - unled_since > self.settings.outage_after_s:
                self._down(QueueUnavailable("no scheduler leads this pool. Start `maestro scheduler`."))
                self.down_since_s = unled_since
                await self._rescue()
                continue
            if renewal.led:
                self._up()
            await self._reconcile(renewal.gone, renewal.granted)

    async def _rescue(self) -> None:
        """Stages that wait in a queue that does not move are admitted locally."""
        for p in list(self.waiting.values()):
            self.waiting.pop(p.ticket.stage_id, None)
            self._spawn(self.admit_locally, (p,))

    async def _reconcile(self, gone: tuple[str, ...], granted: tuple[str, ...]) -> None:
        """Bring a queue that forgot, or that we did not hear, to what is true here."""
        with contextlib.suppress(QueueUnavailable):
            while self.unsent:
                await self.unsent[0]()
                self.unsent.popleft()
            for stage_id, model in list(self.withdraw_later.items()):
                await self.queue.cancel(stage_id, model, now_s=self.clock.now_s(), draining=False)
                del self.withdraw_later[stage_id]
            for stage_id in gone:
                if (held := self.held.get(stage_id)) is not None and held.grant is not None:
                    await self.queue.announce(held.ticket, held.grant, now_s=self.clock.now_s())
                elif (p := self.waiting.pop(stage_id, None)) is not None:
                    p.ticket = p.ticket.evolve(stage_id=_renamed(stage_id))
                    self._spawn(self.admit, (p,))
            for stage_id in granted:
                if (p := self.waiting.get(stage_id)) is not None:
                    verdict = await self.queue.push(p.ticket, engines=(), now_s=self.clock.now_s())
                    if verdict is not None and stage_id in self.waiting:
                        self.deliver(verdict)

    async def refresh_fleet(self) -> None:
        """Read the engines that the scheduler last published; an empty answer does not erase what is known."""
        found = await self.queue.fleet()
        if found:
            self.fleet = {e.engine_id: e for e in found}


class Client:
    """This process's connection to Maestro. Use `Client.current`."""

    _current: Client | None = None
    _lock = threading.Lock()

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client_id = f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        engines: dict[str, EngineSpec] = {}
        if settings.fleet and not settings.redis_url:
            from maestro_agents.fleet import load_fleet

            engines = {e.engine_id: e for e in load_fleet(settings.fleet).running()}
        self._room = _Room(settings, self.client_id, engines)

    @classmethod
    def current(cls) -> Client:
        """The process's client, started on first use; a fork gets its own."""
        if cls._current is None:
            with cls._lock:
                if cls._current is None:
                    cls._current = cls(Settings.load(**_overrides))
        return cls._current

    @classmethod
    def reset(cls) -> None:
        """Close the current client; the next use starts a new one."""
        with cls._lock:
            client, cls._current = cls._current, None
        if client is not None:
            client.close()

    @classmethod
    def configure(cls, **settings: Any) -> None:
        """Settings that win over environment and file. Raises `ConfigError` at once; restarts a running client."""
        Settings.load(**{**_overrides, **settings})
        _overrides.update(settings)
        cls.reset()

    def now_s(self) -> float:
        """The queue's clock."""
        return self._room.clock.now_s()

    def open(self, ticket: Ticket, *, original_url: str) -> Pass | None:
        """A pass for one stage, or None where this call is none of ours: then it goes out untouched.

        Never blocks and never raises for trouble of infrastructure.
        """
        if self.settings.mode == "off":
            return None
        room = self._room
        own_url_mode = room.scheduler is not None and not self.settings.fleet
        if room.fleet and not own_url_mode and not any(e.model == ticket.model for e in room.fleet.values()):
            return None
        now_s = self.now_s()
        return Pass(
            room,
            ticket.evolve(client_id=self.client_id, pushed_at_s=now_s, due_at_s=ticket.due_at_s or now_s),
            original_url,
        )

    def end_run(self, run: RunEnd) -> None:
        """A run is over (or paused). Never blocks; its stages that still wait raise `RunGone`."""
        self._room.call(self._room.end_run, run)

    def describe(self, workflow: str, spec: str) -> None:
        """The static graph of a workflow, as JSON; said once per fingerprint. Never blocks."""
        if workflow not in self._room.described:
            self._room.described[workflow] = None
            self._room.call(self._room.describe, workflow, spec)

    def close(self) -> None:
        """Give back what is held and end the background thread."""
        self._room.stop()


_overrides: dict[str, Any] = {}


def _refusal(p: Pass, refusal: Refusal) -> MaestroError:
    t = p.ticket
    if refusal.reason == "full":
        return QueueFull(f"The queue for model {t.model!r} is full.", retry_after_s=refusal.retry_after_s)
    if refusal.reason == "deadline":
        return StageRefused(
            f"The deadline of {t.role or 'this run'} cannot be met.", retry_after_s=refusal.retry_after_s
        )
    return NoEngineFits(
        f"no engine for {t.model!r} could ever hold {t.prompt_tokens} prompt tokens + output of {t.role or 'this call'}"
    )


def _succeed(p: Pass) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        p.future.set_result(None)


def _fail(p: Pass, error: BaseException) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        p.future.set_exception(error)


def _renamed(stage_id: str) -> str:
    """A new name for a stage whose old one has ended in the queue."""
    base, _, n = stage_id.partition("~")
    return f"{base}~{int(n or 0) + 1}"


def _after_fork() -> None:
    """A child has no thread and must not share its parent's sockets."""
    Client._current = None  # pyright: ignore[reportPrivateUsage]
    Client._lock = threading.Lock()  # pyright: ignore[reportPrivateUsage]


os.register_at_fork(after_in_child=_after_fork)
atexit.register(Client.reset)
