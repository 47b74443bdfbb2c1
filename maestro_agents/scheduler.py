"""The spine: collect -> predict -> plan -> grant -> act -> learn. One leader per pool; everything it knows that must
survive is in the queue (tickets, leases, reservations) or a fold over its observation log (statistics).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from maestro_agents import policy
from maestro_agents.core import EngineSpec, EngineState, Observation, Prediction, RunEnd, Ticket
from maestro_agents.errors import QueueUnavailable
from maestro_agents.policy import Order, Plan, Snapshot
from maestro_agents.ports import Clock, EngineHealth, EngineProbe, Queue
from maestro_agents.predict.roles import RoleStatistics
from maestro_agents.predict.speed import EngineSpeeds
from maestro_agents.workflow import Workflows

log = logging.getLogger("maestro.scheduler")

HEADS: Final = 256
"""Waiting stages of a model that one round looks at."""

TICK_S: Final = 0.25
"""Longest pause between two rounds when nothing wakes the scheduler."""

PROBE_S: Final = 0.5
"""Seconds between two looks at an engine's health and metrics."""

FAILURES: Final = 2
"""Probes in a row that an engine must fail before it counts as dead: one may be lost on a busy machine."""


class Scheduler:
    """One candidate for a pool's leadership. ``run`` until cancelled.

    ``engines``: the fleet. ``probe``: reads engines' own account; None where they have none (the caller's own URL).
    ``order``: one of `policy.ORDERS`, or the user's own function.
    """

    def __init__(
        self,
        queue: Queue,
        engines: Iterable[EngineSpec],
        *,
        clock: Clock,
        holder: str,
        order: Order = policy.ORDERS["ours"],
        probe: EngineProbe | None = None,
        lease_s: float = 10.0,
    ) -> None:
        self.queue = queue
        self.engines = {e.engine_id: e for e in engines}
        self.order = order
        self.clock = clock
        self.holder = holder
        self.probe = probe
        self.lease_s = lease_s
        self.epoch = 0
        self.leading = False
        self.decisions = 0
        self.roles = RoleStatistics()
        self.speeds = EngineSpeeds()
        self.workflows = Workflows()
        self._health: dict[str, EngineHealth] = {}
        self._failures: dict[str, int] = {}
        self._probed_at_s: dict[str, float] = {}
        self._hold_until_s = 0.0
        self._incarnation: str | None = None
        self._log_at = ""
        self._led_at_s = -math.inf
        self._published_at_s = -math.inf
        self._reaped_at_s = -math.inf

    # -- the loop ----------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Lead whenever leadership is free; outlive the queue's outages."""
        watcher = asyncio.create_task(self._watch_engines()) if self.probe else None
        try:
            while True:
                try:
                    if await self.lead():
                        await self.step()
                        await self.queue.wake(TICK_S)
                    else:
                        await asyncio.sleep(TICK_S)
                except QueueUnavailable as e:
                    if self.leading:
                        log.warning("%s Waiting for it; engines go on with what they have.", e)
                    self.leading = False
                    await asyncio.sleep(TICK_S)
        finally:
            if watcher:
                watcher.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watcher

    async def step(self) -> Plan:
        """One round."""
        await self.learn()
        snapshot = await self.collect()
        plan = policy.plan(snapshot, self.order, epoch=self.epoch, now_s=self.clock.now_s())
        await self.act(plan)
        await self.keep_house()
        return plan

    # -- lead --------------------------------------------------------------------------------------------------------
    async def lead(self) -> bool:
        """Take or keep leadership; notice a store that restarted, and hold grants back until clients have announced."""
        now_s = self.clock.now_s()
        if self.leading and now_s - self._led_at_s < self.lease_s / 5:
            return True
        restarted = await self._store_restarted()
        at_least = self.epoch + 1 if restarted else 0
        epoch = await self.queue.lead(self.holder, ttl_s=self.lease_s / 2, now_s=now_s, at_least=at_least)
        if epoch is None:
            self.leading = False
            return False
        if restarted:
            self._hold_until_s = now_s + self.lease_s
            log.warning("the queue's store restarted: epoch %d, no new grants for %.1f s", epoch, self.lease_s)
        if epoch != self.epoch:
            log.info("leading with epoch %d as %s", epoch, self.holder)
            self._published_at_s = -math.inf
        self.epoch, self.leading, self._led_at_s = epoch, True, now_s
        if now_s - self._published_at_s > 1.0:
            await self.publish()
        return True

    async def _store_restarted(self) -> bool:
        incarnation = await self.queue.incarnation()
        before, self._incarnation = self._incarnation, incarnation
        if before is not None and before != incarnation:
            self._log_at = ""  # what it remembers of the log may be less than we have read
            return True
        return False

    async def publish(self) -> None:
        """Publish the fleet and its credits: live engines only, and none while grants are held back."""
        now_s = self.clock.now_s()
        valid_until_s = 0.0 if now_s < self._hold_until_s else now_s + self.lease_s / 2
        live = [e for e in self.engines.values() if self.healthy(e.engine_id)]
        if await self.queue.publish(live, p99=self.roles.changed_p99(), epoch=self.epoch, valid_until_s=valid_until_s):
            self._published_at_s = now_s
        else:
            self.leading = False

    async def add_engine(self, engine: EngineSpec) -> None:
        """Let an engine join while running."""
        self.engines[engine.engine_id] = engine
        if self.leading:
            await self.publish()

    def healthy(self, engine_id: str) -> bool:
        """The engine answered lately, or nobody asks."""
        return self.probe is None or (engine_id in self._health and self._failures.get(engine_id, 0) < FAILURES)

    # -- collect, predict --------------------------------------------------------------------------------------------
    async def collect(self) -> Snapshot:
        """The waiting stages that may go next, what they will cost, and the fleet as it is."""
        if self.clock.now_s() < self._hold_until_s:
            return Snapshot(tickets=(), predictions={}, engines=())
        tickets: list[Ticket] = []
        for model in {e.model for e in self.engines.values()}:
            tickets.extend(await self.queue.heads(model, HEADS))
        if not tickets:
            return Snapshot(tickets=(), predictions={}, engines=())
        return Snapshot(tickets=tickets, predictions=self.predict(tickets), engines=await self.fleet())

    def predict(self, tickets: Sequence[Ticket]) -> Mapping[str, Prediction]:
        """What each stage and the run behind it will cost, on the fastest engine of its model."""
        fastest: dict[str, EngineSpec] = {}
        for spec in self.engines.values():
            prefill, decode = self.speeds.of(spec)
            learned = dataclasses.replace(spec, prefill_s_per_token=prefill, decode_s_per_token=decode)
            if spec.model not in fastest or decode < fastest[spec.model].decode_s_per_token:
                fastest[spec.model] = learned
        return {t.stage_id: self.roles.predict(t, fastest[t.model], self.workflows) for t in tickets}

    async def fleet(self) -> list[EngineState]:
        """Every engine with its reservations, health and learned speeds."""
        ledger = await self.queue.ledger()
        states: list[EngineState] = []
        for spec in self.engines.values():
            prefill, decode = self.speeds.of(spec)
            health = self._health.get(spec.engine_id, EngineHealth(healthy=self.probe is None))
            states.append(
                EngineState(
                    spec=spec,
                    reserved_slots=ledger.slots.get(spec.engine_id, 0),
                    reserved_kv_bytes=ledger.kv_bytes.get(spec.engine_id, 0),
                    healthy=self.healthy(spec.engine_id),
                    running=health.running,
                    waiting=health.waiting,
                    prefill_s_per_token=prefill,
                    decode_s_per_token=decode,
                )
            )
        return states

    # -- act ---------------------------------------------------------------------------------------------------------
    async def act(self, plan: Plan) -> None:
        """Carry a plan out. A grant that the queue refuses (cancelled meanwhile, credits spent) is simply not made."""
        for model, moments in plan.moments.items():
            await self.queue.reorder(moments, model)
        for ticket, refusal in plan.refusals:
            await self.queue.refuse(refusal, ticket, now_s=self.clock.now_s())
        for ticket, grant in plan.grants:
            given = await self.queue.grant(grant, ticket, now_s=self.clock.now_s())
            self.decisions += given is not None

    async def keep_house(self) -> None:
        """Now and then: end what the dead left behind, give drained reservations back."""
        now_s = self.clock.now_s()
        if now_s - self._reaped_at_s < 0.5 or now_s < self._hold_until_s:
            return
        self._reaped_at_s = now_s
        lost = await self.queue.reap(now_s=now_s)
        if lost:
            log.warning("%d stages of dead apps ended as lost", len(lost))
        await self.settle()

    async def settle(self) -> None:
        """Give a reservation back once its engine is dead, says that it is idle enough, or (mute) after a lease.

        An engine that runs R requests while L live grants sit on it may still compute R - L of the draining ones.
        """
        by_engine: dict[str, list[tuple[float, int]]] = {}
        draining = await self.queue.draining()
        if not draining:
            return
        live: dict[str, int] = {}
        for running in await self.queue.running():
            live[running.engine_id] = live.get(running.engine_id, 0) + 1
        for i, r in enumerate(draining):
            by_engine.setdefault(r.engine_id, []).append((r.since_s, i))
        now_s = self.clock.now_s()
        for engine_id, entries in by_engine.items():
            health = self._health.get(engine_id)
            entries.sort()
            if engine_id not in self.engines or not self.healthy(engine_id):
                free = entries
            elif health is None or health.running < 0:
                free = [e for e in entries if now_s - e[0] >= self.lease_s]
            else:
                seen_at_s = self._probed_at_s.get(engine_id, 0.0)
                busy = max(0, health.running + max(0, health.waiting) - live.get(engine_id, 0))
                free = [e for e in entries[: max(0, len(entries) - busy)] if e[0] < seen_at_s]
            for _, i in free:
                await self.queue.settle(draining[i])

    # -- learn -------------------------------------------------------------------------------------------------------
    async def learn(self) -> None:
        """Fold new observations into the statistics; at the start that rebuilds them."""
        while True:
            self._log_at, entries = await self.queue.read_log(self._log_at, 500)
            for entry in entries:
                self.take(entry)
            if len(entries) < 500:
                return

    def take(self, entry: Observation | RunEnd) -> None:
        """Learn from one entry of the observation log."""
        if isinstance(entry, RunEnd):
            self.workflows.end_run(entry)
            return
        self.roles.observe(entry)
        self.speeds.observe(entry)
        self.workflows.observe(entry)

    async def _watch_engines(self) -> None:
        """Ask every engine how it is, all at once, for ever."""
        while True:
            await asyncio.gather(*(self._look(e) for e in list(self.engines.values())))
            await asyncio.sleep(PROBE_S)

    async def _look(self, engine: EngineSpec) -> None:
        assert self.probe is not None
        asked_at_s = self.clock.now_s()
        health = await self.probe.probe(engine)
        was = self.healthy(engine.engine_id)
        if not health.healthy:
            self._failures[engine.engine_id] = self._failures.get(engine.engine_id, 0) + 1
        else:
            self._failures[engine.engine_id] = 0
            self._health[engine.engine_id] = health
            self._probed_at_s[engine.engine_id] = asked_at_s
            if health.kv_tokens and not engine.kv_bytes:
                kv_bytes = health.kv_tokens * engine.kv_bytes_per_token
                self.engines[engine.engine_id] = dataclasses.replace(engine, kv_bytes=kv_bytes)
        if was != self.healthy(engine.engine_id):
            log.warning("engine %s is %s", engine.engine_id, "dead" if was else "alive")
            self._published_at_s = -math.inf
            self._led_at_s = -math.inf  # publish the changed fleet in the next round
