"""The app's side: submit a stage, wait for its grant, report what became of it. Used by every integration.

One `Client` per process. Callers are threads and event loops of the app; they touch nothing but `Pass`, whose waiting is
the one sync edge. Everything asynchronous lives behind it, in one background thread (`maestro_agents.room`). A fork drops
everything and starts anew.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, Final

from maestro_agents.core import (
    EXTEND_TOKENS,
    EngineSpec,
    Grant,
    Mode,
    Observation,
    Refusal,
    RunEnd,
    Status,
    Ticket,
    covered_tokens,
    kv_need_bytes,
)
from maestro_agents.errors import WaitTooLong
from maestro_agents.room import Room, refused

if TYPE_CHECKING:
    from maestro_agents.settings import Settings
    from maestro_agents.tenants import Tenant

BEAT_S: Final = 0.1
"""How often a waiting call shows its caller that it lives (LangGraph's idle timeout)."""

LOOK_S: Final = 5.0
"""How often a waiting call makes sure that the background thread still lives."""

DESCRIBED_LIMIT: Final = 10_000


def _answered() -> concurrent.futures.Future[None]:
    future: concurrent.futures.Future[None] = concurrent.futures.Future()
    future.set_result(None)
    return future


_at_once = _answered()
"""Of every pass that nobody had to wait for."""


class Pass:
    """One stage of this process, from its push to its end. Every method may be called from any thread or loop."""

    def __init__(self, room: Room, ticket: Ticket, original_url: str) -> None:
        self.ticket = ticket
        self.grant: Grant | None = None
        self.engine: EngineSpec | None = None
        self.original_url = original_url
        #: `Mode.ON` while its grant is the queue's business; else it goes out as its caller made it.
        self.mode = Mode.ON
        self.ended = False
        self.first_byte_at_s = 0.0
        #: Output tokens that may pass before more KV memory is asked for; inf where it cannot grow, or is growing now.
        self.outgrown_at = math.inf
        self.extensions = 0
        #: Extensions that found no free KV memory.
        self.overdrafts = 0
        self.future: concurrent.futures.Future[None] = _at_once  # its own where it waits
        self._was_sent = False
        self._submitted = False
        self._patience_s = room.settings.max_wait_s
        self._room = room
        # Notes of the room's loop; nobody else touches them.
        #: The queue may know the stage by its present name.
        self.pushed = False
        #: The queue said that the stage waits there.
        self.queued = False
        #: Its last grant is being given back, and that engine may still be computing.
        self.draining = False
        #: Fencing token of the last grant given back: what comes under it comes too late.
        self.spent_token = 0
        #: A full queue is asked again until the longest wait is over; else it is told to the caller at once.
        self.patient = True
        #: The queue was full when it was last asked; it will be asked again.
        self.turned_away: Refusal | None = None

    @classmethod
    def observed(cls, room: Room, ticket: Ticket, original_url: str) -> Pass:
        """A pass that waits for nothing: its call is measured only, and leaves now."""
        p = cls(room, ticket, original_url)
        p.mode, p._submitted = Mode.OBSERVE, True
        p.engine = room.original(p)
        p.grant = Grant(
            stage_id=ticket.stage_id,
            engine_id=p.engine.engine_id,
            token=0,
            epoch=0,
            kv_bytes=0,
            granted_at_s=ticket.pushed_at_s,
        )
        return p

    # -- wait --------------------------------------------------------------------------------------------------------
    def wait(self, beat: Callable[[], None] | None = None) -> EngineSpec:
        """Block until an engine is granted. Raises `QueueFull`, `QuotaExceeded`, `StageRefused`, `NoEngineFits`, `WaitTooLong`, `RunGone`.

        ``beat`` is called about every 0.1 s meanwhile. Never call it on an event loop: see `wait_async`.
        """
        began_s = time.monotonic()
        try:
            while (slice_s := self._next_slice(began_s, beat)) > 0:
                with contextlib.suppress(TimeoutError):
                    self.future.result(slice_s)
            return self._granted()
        except BaseException:
            self.cancel()
            raise
        finally:
            self._patience_s -= time.monotonic() - began_s

    async def wait_async(self, beat: Callable[[], None] | None = None) -> EngineSpec:
        """The same on the caller's event loop. A cancelled caller withdraws its stage."""
        began_s = time.monotonic()
        try:
            if (slice_s := self._next_slice(began_s, beat)) > 0:
                await self._answered(slice_s, began_s, beat)
            return self._granted()
        except BaseException:
            self.cancel()
            raise
        finally:
            self._patience_s -= time.monotonic() - began_s

    async def _answered(self, slice_s: float, began_s: float, beat: Callable[[], None] | None) -> None:
        ours = asyncio.wrap_future(self.future)
        try:
            while slice_s > 0:
                await asyncio.wait([ours], timeout=slice_s)
                slice_s = self._next_slice(began_s, beat)
        finally:
            if not ours.cancel() and not ours.cancelled():
                ours.exception()  # `_granted` raises it: asyncio need not say that nobody looked

    def _next_slice(self, began_s: float, beat: Callable[[], None] | None) -> float:
        """Seconds to wait before looking again; nothing where the wait is over."""
        if not self._submitted:  # after a requeue it is on its way already
            self._submitted = True
            if not self._room.admit_at_once(self):
                self.future = concurrent.futures.Future()
                self._room.call(self._room.admit, self)
        if not self.future.done() and not self._room.alive:
            self._room.abandon(self)
        if self.future.done():
            return 0.0
        if beat is not None:
            beat()
        left_s = self._patience_s - (time.monotonic() - began_s)
        return min(left_s, LOOK_S if beat is None else BEAT_S)

    def _granted(self) -> EngineSpec:
        if not self.future.done():
            if (full := self.turned_away) is not None:
                raise refused(self.ticket, full, after_s=self._room.settings.max_wait_s)
            raise WaitTooLong(
                f"no engine for {self.ticket.role or 'this call'} ({self.ticket.model}) within "
                f"{self._room.settings.max_wait_s:g} s (MAESTRO_MAX_WAIT_S). See `maestro queue ls`."
            )
        self.future.result()
        assert self.engine is not None  # set before the future
        return self.engine

    # -- report ------------------------------------------------------------------------------------------------------
    def sent(self) -> None:
        """The request is leaving for the engine."""
        self._was_sent = True

    def send_to(self, engine: EngineSpec) -> None:
        """A call that is only measured goes to this engine: its caller has no URL of its own."""
        assert self.grant is not None
        assert self.grant.token == 0  # no queue gave it
        self.engine, self.grant = engine, dataclasses.replace(self.grant, engine_id=engine.engine_id)

    def first_byte(self) -> None:
        """The first byte of the answer reached the caller: from now on nothing is replayed."""
        if not self.first_byte_at_s:
            self.first_byte_at_s = self._room.clock.now_s()

    def grew(self, output_tokens: int) -> None:
        """So many tokens of the answer have come. Where they outgrow the reservation, it is raised. Never blocks.

        Made for every chunk of a stream: all but one call in `EXTEND_TOKENS` is one comparison. One extension is on its
        way at a time; what was outgrown meanwhile is in the next one.
        """
        if output_tokens > self.outgrown_at:
            self._extend(output_tokens)

    def _extend(self, output_tokens: int) -> None:
        grant, engine = self.grant, self.engine
        self.outgrown_at = math.inf  # until the queue has heard
        if self.ended or grant is None or engine is None:
            return
        t, before = self.ticket, grant.output_tokens
        steps = math.ceil((output_tokens - before) / EXTEND_TOKENS)
        covers = covered_tokens(t, (before + steps * EXTEND_TOKENS) / t.choices, engine)
        if covers <= before:
            return
        kv_bytes = max(grant.kv_bytes, kv_need_bytes(t, covers / t.choices, engine))
        # kept here too: this is what is announced to a Redis that forgot
        self.grant = dataclasses.replace(grant, output_tokens=covers, kv_bytes=kv_bytes)
        if kv_bytes == grant.kv_bytes:  # the blocks that it has hold them
            self.outgrown_at = covers
            return
        self.extensions += 1
        self._room.call(self._room.extend, self, grant.token)

    def requeue(self, *, engine_down: bool, answered: bool = False) -> bool:
        """Give the grant back before the first byte, to be tried again: then `wait` again.

        ``engine_down``: elsewhere, and it counts as an attempt; else (busy, slow) anywhere, after a short pause.
        ``answered``: the engine answered with a status, so it computes nothing for this stage any more; else a request
        that was sent keeps its reservation until the engine's own account agrees that it is gone.
        False where the stage may not be tried again (attempts used up, or its first byte is out): the error stands.
        """
        grant, engine = self.grant, self.engine
        if self.ended or grant is None or engine is None or self.first_byte_at_s:
            return False
        if engine_down:
            if self.ticket.attempt >= self._room.settings.max_attempts:
                return False
            excluded = (*self.ticket.excluded_engines, engine.engine_id)
            self.ticket = self.ticket.evolve(excluded_engines=excluded, attempt=self.ticket.attempt + 1)
        draining = self._was_sent and not answered
        self.grant, self.engine, self._was_sent = None, None, False
        self.future = concurrent.futures.Future()
        self._room.call(functools.partial(self._room.requeue, self, grant, draining=draining, at_once=engine_down))
        return True

    def finish(
        self,
        *,
        ok: bool = True,
        prompt_tokens: int = 0,
        output_tokens: int = 0,
        output_estimated: bool = False,
        cached_tokens: int = 0,
        tool_calls: int = 0,
        engine_queue_s: float = 0.0,
        engine_ttft_s: float = 0.0,
    ) -> None:
        """The stage has ended. Never blocks; a second word is ignored."""
        self._end(
            Status.DONE if ok else Status.FAILED,
            prompt_tokens=prompt_tokens or self.ticket.prompt_tokens,
            output_tokens=output_tokens,
            output_estimated=output_estimated,
            cached_tokens=cached_tokens,
            tool_calls=tool_calls,
            engine_queue_s=engine_queue_s,
            engine_ttft_s=engine_ttft_s,
        )

    def _end(self, status: Status, **told: Any) -> None:
        """Report how the stage ended. ``told``: what its answer said of it."""
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
            status=status,
            site=t.site,
            visit=t.visit,
            step=t.step,
            siblings=t.siblings,
            node_attempt=t.node_attempt,
            replayed=t.replayed,
            attempt=t.attempt,
            fast=g.fast,
            priority=g.priority,
            run_started_at_s=t.run_started_at_s,
            deadline_at_s=t.deadline_at_s,
            pushed_at_s=t.pushed_at_s,
            granted_at_s=g.granted_at_s,
            first_byte_at_s=self.first_byte_at_s,
            finished_at_s=self._room.clock.now_s(),
            observed=self.mode is not Mode.ON,
            choices=t.choices,
            prefix=t.prefix,
            kv_reserved_bytes=g.kv_bytes,
            kv_extensions=self.extensions,
            kv_overdrafts=self.overdrafts,
            kv_bytes_per_token=self.engine.kv_bytes_per_token,
            features=t.features,
            sketch=t.sketch,
            **told,
        )
        if not self._room.finish_at_once(self, g, observation):
            self._room.call(self._room.finish, self, g, observation)

    def cancel(self) -> None:
        """Withdraw the stage, wherever it is. Never blocks; after `finish` it does nothing."""
        if self.mode is Mode.OBSERVE and self._was_sent:  # it is recorded however it ends
            self._end(Status.CANCELLED, prompt_tokens=self.ticket.prompt_tokens)
        if not self.ended:
            self.ended = True
            self._room.call(functools.partial(self._room.withdraw, self, was_sent=self._was_sent))

    def drop(self) -> None:
        """End a stage whose report failed, for a bug of ours: its engine must not stay taken. Never blocks."""
        self.ended = True
        self._room.call(functools.partial(self._room.withdraw, self, was_sent=False))


class Client:
    """This process's connection to Maestro. Use `Client.current`."""

    _current: Client | None = None
    _lock = threading.Lock()

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client_id = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        engines, tenants = _fleet_of(settings)
        self._room = Room(settings, self.client_id, engines, tenants)

    @classmethod
    def current(cls) -> Client:
        """The process's client, started on first use; a fork gets its own."""
        if cls._current is None:
            with cls._lock:
                if cls._current is None:
                    cls._current = cls(cls.configured())
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
        from maestro_agents.settings import Settings

        _fleet_of(Settings.load(**{**_overrides, **settings}))
        _overrides.update(settings)
        cls.reset()

    @classmethod
    def configured(cls) -> Settings:
        """The settings that the next client starts with. Raises `ConfigError`."""
        from maestro_agents.settings import Settings  # what reads them is slow to import

        return Settings.load(**_overrides)

    def now_s(self) -> float:
        """The queue's clock."""
        return self._room.clock.now_s()

    @property
    def mode(self) -> Mode:
        """How much of this process's calls is ours now: its setting, or less where the pool's switch says so."""
        return self._room.mode

    @property
    def salt(self) -> bytes:
        """What hashes of prompts are keyed with; empty while it is not known here, or nobody would compare them."""
        return self._room.salt if self._room.mode is Mode.ON else b""

    @property
    def tells_features(self) -> bool:
        """Somebody predicts from features. Not where the app's own URLs are the engines and nothing of it leaves the process."""
        return not self._room.own_url_mode

    @property
    def engines(self) -> Sequence[EngineSpec]:
        """The engines of the fleet that were last known here, healthy or not."""
        return tuple(e for e in self._room.fleet.values() if not e.original)

    @property
    def models(self) -> AbstractSet[str]:
        """Every model that the fleet serves, can wake, or served since this process began. Empty until a fleet is known."""
        return frozenset(self._room.models)

    @property
    def ready(self) -> bool:
        """It has asked its queue what there is, and was answered, or has given up for now."""
        return self._room.ready.is_set()

    @property
    def out(self) -> bool:
        """Maestro is out: the queue does not answer, or nobody leads it."""
        return self._room.down_since_s is not None

    def mode_of(self, key: str) -> Mode:
        """How much of a call is ours. ``key``: what keeps the calls of one run together (``rollout``)."""
        mode, rollout = self._room.mode, self.settings.rollout
        return Mode.OBSERVE if mode is Mode.ON and rollout < 100 and _percentile(key) >= rollout else mode

    def open(self, ticket: Ticket, *, original_url: str, key: str = "") -> Pass | None:
        """A pass for one stage, or None where this call is none of ours: then it goes out untouched.

        ``key``: see `mode_of`; the run, or for an anonymous call the stage, where it is empty.
        Never blocks and never raises for trouble of infrastructure.
        """
        room, mode = self._room, self.mode_of(key or ticket.run_id or ticket.stage_id)
        if mode is Mode.OFF:
            return None
        if mode is Mode.ON and room.models and ticket.model not in room.models:
            room.tell_unserved(ticket.model)
            return None
        if ticket.client_id != self.client_id or not ticket.due_at_s:
            now_s = self.now_s()
            ticket = ticket.evolve(client_id=self.client_id, pushed_at_s=now_s, due_at_s=ticket.due_at_s or now_s)
        return (Pass if mode is Mode.ON else Pass.observed)(room, ticket, original_url)

    def end_run(self, run: RunEnd) -> None:
        """A run is over (or paused). Never blocks; its stages that still wait raise `RunGone`."""
        if self.mode is Mode.OFF:
            return
        if not self._room.end_run_at_once(run):
            self._room.call(self._room.end_run, run)

    def describe(self, workflow: str, spec: str) -> None:
        """The static graph of a workflow, as JSON; said once per fingerprint. Never blocks."""
        if self.mode is not Mode.OFF and workflow not in self._room.described:
            self._room.described[workflow] = None
            if len(self._room.described) > DESCRIBED_LIMIT:
                self._room.described.popitem(last=False)
            self._room.call(self._room.describe, workflow, spec)

    def close(self) -> None:
        """Give back what is held and end the background thread."""
        self._room.stop()


_overrides: dict[str, Any] = {}


def _percentile(key: str) -> float:
    """Where a key lies between 0 and 100: the same in every process, evenly spread."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64 * 100


def _fleet_of(settings: Settings) -> tuple[dict[str, EngineSpec], Sequence[Tenant]]:
    """The fleet that this process schedules itself, and its tenants. Raises `ConfigError`."""
    if settings.redis_url or not settings.fleet or settings.mode is not Mode.ON:
        return {}, ()
    from maestro_agents.fleet import load_fleet

    fleet = load_fleet(settings.fleet)
    return {e.engine_id: e for e in fleet.running()}, fleet.tenants


_parents: list[Client] = []
"""Clients of the processes that this one was forked from: kept, since collecting one would touch its loop and sockets."""


def _after_fork() -> None:
    """A child has no thread and must not share its parent's sockets, nor a lock that one of its threads may hold."""
    global _at_once
    _at_once = _answered()
    if Client._current is not None:  # pyright: ignore[reportPrivateUsage]
        _parents.append(Client._current)  # pyright: ignore[reportPrivateUsage]
    Client._current = None  # pyright: ignore[reportPrivateUsage]
    Client._lock = threading.Lock()  # pyright: ignore[reportPrivateUsage]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(Client.reset)
