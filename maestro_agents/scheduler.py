"""The spine: collect -> predict -> plan -> grant -> act -> place -> learn. One leader per pool; everything it knows that must
survive is in the queue (tickets, leases, reservations) or a fold over its observation log (statistics).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from maestro_agents.chargeback import FOLD_S, Chargeback
from maestro_agents.core import EngineSpec, EngineState, Observation, Prediction, RunEnd, Ticket
from maestro_agents.distance import by_cluster
from maestro_agents.errors import QueueUnavailable
from maestro_agents.placer import Placer, Waiting
from maestro_agents.policy import OURS, Plan, Policy, Snapshot, plan
from maestro_agents.policy.admission import open_slots
from maestro_agents.policy.fairness import Shares
from maestro_agents.policy.quota import Left, Minutes, Use, may_start, served_in_s
from maestro_agents.ports import Backlog, Clock, EngineHealth, EngineProbe, Queue, Reservation, Running
from maestro_agents.predict.prefix import PrefixCaches
from maestro_agents.predict.roles import MAX_ROLES, Predicts, RoleStatistics
from maestro_agents.predict.speed import EngineSpeeds
from maestro_agents.tenants import Tenant
from maestro_agents.tokens import EngineKey
from maestro_agents.workflow import Workflows, with_join_slack

T = TypeVar("T")

log = logging.getLogger("maestro.scheduler")

HEADS: Final = 256
"""Waiting stages of a model that one round looks at."""

HEADS_OF_TENANT: Final = 16
"""Of them, of each tenant whose quota may hold its stages back; those come on top."""

TICK_S: Final = 0.25
"""Longest pause between two rounds when nothing wakes the scheduler."""

PROBE_S: Final = 0.5
"""Seconds between two looks at an engine's health and metrics."""

PROBE_LIMIT_S: Final = 3.0
"""An engine that takes longer to say how it is does not answer."""

FAILURES: Final = 2
"""Probes in a row that an engine must fail before it counts as dead: one may be lost on a busy machine."""

ARRIVAL_S: Final = 0.25
"""A stage granted less than this before an engine was looked at may not have reached it yet."""

DRAIN_LEASES: Final = 6.0
"""Leases after which a reservation is given back though its engine never agreed: others may use that engine too."""

RESIGN_S: Final = 1.0
"""Longest that a scheduler which ends in order waits for Redis to hear it."""

DISTANCES_S: Final = 1.0
"""Seconds between two readings of what apps measured of the network (`distance`)."""

GRAPH_RETRY_S: Final = 30.0
"""Seconds after which a workflow that nobody had described is asked for again."""

MAX_GRAPHS: Final = 10_000
MAX_LOST: Final = 1_000

MAX_DEBTS: Final = 100_000
"""Stages whose tenant's debt is remembered, so that each is charged once."""


class Scheduler:
    """One candidate for a pool's leadership. ``run`` until cancelled.

    ``engines``: the fleet, as far as no node reports it (`placer`). ``probe``: reads engines' own account; None where they have none (the caller's own URL).
    ``policy``: one of `policy.POLICIES`, or one with the user's own functions. ``predictor``: online statistics alone where none is given.
    ``tenants``: what each is granted; one that is not named weighs 1 and has no quota.
    ``key``: signs what the proxies in front of engines ask for; None where clients reach engines without one.
    """

    def __init__(
        self,
        queue: Queue,
        engines: Iterable[EngineSpec],
        *,
        clock: Clock,
        holder: str,
        policy: Policy = OURS,
        probe: EngineProbe | None = None,
        predictor: Predicts | None = None,
        lease_s: float = 10.0,
        key: EngineKey | None = None,
        tenants: Iterable[Tenant] = (),
    ) -> None:
        self.queue = queue
        self.engines = {e.engine_id: e for e in engines}
        self.policy = policy
        self.clock = clock
        self.holder = holder
        self.probe = probe
        self.lease_s = lease_s
        self.key = key
        self.epoch = 0
        self.leading = False
        self.decisions = 0
        self.predictor: Predicts = predictor or RoleStatistics()
        self.speeds = EngineSpeeds()
        self.workflows = Workflows()
        self.placer = Placer(queue, policy.place, self.workflows)
        self.prefixes = PrefixCaches()
        self.tenants = {t.name: t for t in tenants}
        self.metered = {t.name for t in self.tenants.values() if t.metered}
        self.shares = Shares({t.name: t.weight for t in self.tenants.values()})
        self.minutes = Minutes()
        self.chargeback = Chargeback(queue)
        self._debts: OrderedDict[str, float] = OrderedDict()
        #: Engines that nodes report, and those of them whose servers are up.
        self._reported: set[str] = set()
        self._up: set[str] = set()
        self._look_now = asyncio.Event()
        self._published: list[EngineSpec] = []
        #: What the last round looked at, and the stages of each model that waited beyond that.
        self._seen = Snapshot(tickets=(), predictions={}, engines=())
        self._more: dict[str, int] = {}
        #: Further ones of tenants whose quota may hold them back.
        self._held_back: dict[str, int] = {}
        #: Engine -> stages reserved there when the ledger was read last, and stages that this scheduler granted it.
        self._slots: dict[str, int] = {}
        self._grants: dict[str, int] = {}
        self._health: dict[str, EngineHealth] = {}
        self._failures: dict[str, int] = {}
        self._probed_at_s: dict[str, float] = {}
        #: Engines that were alive here and are not: dead, or of a node that fell silent. Spec, or None where `engines` has it.
        self._lost: dict[str, EngineSpec | None] = {}
        #: Engine -> when it answered again, while not all of its slots are open.
        self._back_at_s: dict[str, float] = {}
        #: Cluster -> when an engine of it was found again: who could not reach it before may try again.
        self._found_at_s: dict[str, float] = {}
        #: Cluster -> site -> network seconds.
        self._rtts: Mapping[str, Mapping[str, float]] = {}
        self._rtts_at_s = -math.inf
        self._says_kv = {e.engine_id for e in self.engines.values() if not e.kv_bytes}
        #: Engine -> the moment of the look that was judged last, and the reservations that looked free by it.
        self._spare: dict[str, tuple[float, int]] = {}
        self._hold_until_s = 0.0
        self._incarnation: str | None = None
        self._log_at = ""
        self._taken: OrderedDict[str, None] = OrderedDict()
        self._graphs: OrderedDict[str, float] = OrderedDict()
        self._p99: OrderedDict[str, float] = OrderedDict()
        self._p99_due: dict[str, float] = {}
        self._led_at_s = -math.inf
        self._reaped_at_s = -math.inf
        self._charged_at_s = -math.inf
        self._bugs: set[tuple[str, type[Exception]]] = set()
        #: When the queue last answered it.
        self.heard_at_s = -math.inf

    # -- the loop ----------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Lead whenever leadership is free; outlive the queue's outages, and bugs."""
        with contextlib.suppress(QueueUnavailable):
            await self._part("reading reports", self.meet_nodes())
        await asyncio.gather(*map(self._look, self._served()))  # first see, then lead
        watcher = asyncio.create_task(self._watch_engines())
        try:
            while True:
                try:
                    leads = await self.lead()
                    self.heard_at_s = self.clock.now_s()
                    if leads:
                        await self.step()
                        await self.queue.wake(TICK_S)
                    else:
                        await self.learn()  # whoever takes over knows already
                        await self._part("reading reports", self.meet_nodes())
                        await asyncio.sleep(TICK_S)
                except QueueUnavailable as e:
                    if self.leading:
                        log.warning("%s Waiting for it; engines go on with what they have.", e)
                    self.leading = False
                    await asyncio.sleep(TICK_S)
                except Exception as e:
                    self._bug("the round", e)
                    await asyncio.sleep(TICK_S)
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            await self._resign()

    async def _resign(self) -> None:
        """Give leadership back, so that a standby need not wait until it expires. What was granted stays granted."""
        now_s = self.clock.now_s()
        if self.leading or now_s - self._led_at_s < self.lease_s / 2:  # nobody else may have it yet
            self.leading = False
            with contextlib.suppress(QueueUnavailable, TimeoutError):
                async with asyncio.timeout(RESIGN_S):
                    await self.queue.lead(self.holder, ttl_s=0.0, now_s=now_s)

    async def step(self) -> Plan:
        """One round. What goes wrong in one part of it does not keep the others from their work."""
        await self._part("learning", self.learn())
        await self._part("reading reports", self.meet_nodes())
        await self._part("reading distances", self.meet_distances())
        await self._part("opening slots", self.open_slots())
        decided = await self._part("planning", self.decide()) or Plan()
        await self.act(decided)
        await self._part("placing", self.place(decided))
        await self._part("keeping house", self.keep_house())
        await self._part("counting usage", self.charge())
        return decided

    async def _part(self, name: str, work: Awaitable[T]) -> T | None:
        """Do a part of a round; an unexpected exception is logged, and None its result."""
        try:
            return await work
        except QueueUnavailable:
            raise
        except Exception as e:
            self._bug(name, e)
            return None

    def _bug(self, where: str, error: Exception) -> None:
        """Log an unexpected exception, once per kind."""
        if (where, type(error)) not in self._bugs:
            self._bugs.add((where, type(error)))
            log.error("a bug (%s); the scheduler goes on", where, exc_info=error)

    # -- lead --------------------------------------------------------------------------------------------------------
    async def lead(self) -> bool:
        """Take or keep leadership; notice a store that restarted, and hold grants back until clients have announced."""
        now_s = self.clock.now_s()
        if self.leading and now_s - self._led_at_s < self.lease_s / 5:
            return True
        incarnation = await self.queue.incarnation()
        restarted = self._incarnation not in {None, incarnation}
        at_least = self.epoch + 1 if restarted else 0
        epoch = await self.queue.lead(self.holder, ttl_s=self.lease_s / 2, now_s=now_s, at_least=at_least)
        self._incarnation = incarnation  # only now: a restart that was noticed during an outage still counts after it
        if restarted:
            self._log_at = ""  # what the store remembers of the log may be less than we have read
        if epoch is None:
            self.leading = False
            return False
        if restarted:
            self._hold_until_s = now_s + self.lease_s
            log.warning("the queue's store restarted: epoch %d, no new grants for %.1f s", epoch, self.lease_s)
        if epoch != self.epoch:
            log.info("leading with epoch %d as %s", epoch, self.holder)
            self._p99_due = dict(self._p99)  # to a store that may know none of it
            self.placer.forget()
            self.chargeback.forget()
        self.epoch, self.leading, self._led_at_s = epoch, False, now_s  # it leads once that is published
        await self._part("reading reports", self.meet_nodes(leading=True))
        await self.publish()
        return self.leading

    async def publish(self) -> None:
        """Publish the fleet and its credits: engines that take stages, and none to spend while grants are held back, or where the
        policy has its own mind of where each goes.
        """
        now_s = self.clock.now_s()
        valid_until_s = 0.0 if now_s < self._hold_until_s or self.policy.chooses else now_s + self.lease_s / 2
        live = self._published = self._live()
        changed = self.predictor.changed_p99()
        self._p99_due |= changed
        for role, tokens in changed.items():
            self._p99[role] = tokens
            self._p99.move_to_end(role)
            if len(self._p99) > MAX_ROLES:
                self._p99.popitem(last=False)
        signed = live if self.key is None else [self.key.sign(e, now_s=now_s) for e in live]
        self.leading = await self.queue.publish(
            signed,
            p99=self._p99_due,
            epoch=self.epoch,
            valid_until_s=valid_until_s,
            tenants=tuple(self.tenants.values()),
            backlog=await self._part("measuring what waits", self.backlog()) or Backlog(),
        )
        if self.leading:
            self._p99_due = {}

    def _live(self) -> list[EngineSpec]:
        return [self._as_open(e) for e in self.engines.values() if self.takes(e.engine_id)]

    def _as_open(self, engine: EngineSpec) -> EngineSpec:
        """The engine with the slots that are open: fewer for a while after it was dead, for the fast path and the planner alike."""
        back_at_s = self._back_at_s.get(engine.engine_id)
        if back_at_s is None:
            return engine
        slots = open_slots(engine.slots, self.clock.now_s() - back_at_s)
        return dataclasses.replace(engine, slots=slots)

    def _lose(self, engine_id: str, spec: EngineSpec | None) -> None:
        self._lost[engine_id] = spec
        self._back_at_s.pop(engine_id, None)
        if len(self._lost) > MAX_LOST:
            del self._lost[next(iter(self._lost))]

    async def open_slots(self) -> None:
        """Open more of engines that came back, as time passes."""
        if not self._back_at_s:
            return
        await self._publish_changes()
        now_s = self.clock.now_s()
        for engine_id, back_at_s in tuple(self._back_at_s.items()):
            spec = self.engines.get(engine_id)
            if spec is None or open_slots(spec.slots, now_s - back_at_s) == spec.slots:
                del self._back_at_s[engine_id]

    async def backlog(self) -> Backlog:
        """How long what waits will take, by the last round's predictions: what those that are refused meanwhile are told."""
        slots: Counter[str] = Counter()
        for e in self._published:
            slots[e.model] += e.slots
        by_model: defaultdict[str, list[Ticket]] = defaultdict(list)
        by_tenant: defaultdict[str, list[Ticket]] = defaultdict(list)
        for t in self._seen.tickets:
            by_model[t.model].append(t)
            by_tenant[t.tenant].append(t)
        models: dict[str, float] = {}
        for model, tickets in by_model.items():
            waiting = len(tickets) + self._more.get(model, 0) + self._held_back.get(model, 0)
            models[model] = waiting * self._mean(tickets).service_s / max(1, slots[model])
        bounded = [t for t in self.tenants.values() if t.max_waiting and by_tenant[t.name]]
        counts = await self.queue.waiting([t.name for t in bounded]) if bounded else dict[str, int]()
        tenants: dict[str, float] = {}
        for t in bounded:
            tickets = by_tenant[t.name]
            mean, prompt = self._mean(tickets), sum(x.prompt_tokens for x in tickets) / len(tickets)
            tenants[t.name] = served_in_s(
                t,
                stages=counts[t.name],
                service_s=mean.service_s,
                tokens=prompt + mean.output_tokens_mean,
                slots=slots.total(),
            )
        return Backlog(models=models, tenants=tenants)

    def _mean(self, tickets: Sequence[Ticket]) -> Prediction:
        """What stages of the last round will take on average: seconds and tokens alone."""
        known = [self._seen.predictions[t.stage_id] for t in tickets]
        tokens, service_s = sum(p.output_tokens_mean for p in known), sum(p.service_s for p in known)
        return dataclasses.replace(known[0], output_tokens_mean=tokens / len(known), service_s=service_s / len(known))

    async def _publish_changes(self) -> None:
        if self.leading and self._live() != self._published:
            await self.publish()

    async def add_engine(self, engine: EngineSpec) -> None:
        """Let an engine join while running."""
        self.engines[engine.engine_id] = engine
        if not engine.kv_bytes:
            self._says_kv.add(engine.engine_id)
        if self.leading:
            await self.publish()

    def healthy(self, engine_id: str) -> bool:
        """The engine answered lately, or nobody asks."""
        return self.probe is None or (engine_id in self._health and self._failures.get(engine_id, 0) < FAILURES)

    def takes(self, engine_id: str) -> bool:
        """It may be given stages: it is healthy, and neither asleep nor about to be."""
        return self.healthy(engine_id) and self.placer.takes(engine_id)

    # -- nodes -------------------------------------------------------------------------------------------------------
    async def meet_nodes(self, *, leading: bool | None = None) -> None:
        """Read what nodes report: engines join, change, wake and go. A silent node's are dead. Publish what has changed."""
        if not await self.placer.look(self.clock.now_s(), leading=self.leading if leading is None else leading):
            return
        found = self.placer.engines
        for engine_id in self._reported - found.keys():
            spec = self.engines.pop(engine_id)
            if engine_id in self._up or engine_id in self._lost:
                self._lose(engine_id, spec)
        self._reported = set(found)
        up = {e for e in found if self.placer.runs(e)}
        for engine_id in up ^ self._up:  # its server is a new one, or none
            self._health.pop(engine_id, None)
            self._failures.pop(engine_id, None)
            self.prefixes.forget(engine_id)
        if up - self._up:
            self._look_now.set()
        self._up = up
        for engine_id in self._lost.keys() & found.keys():  # its node speaks (again)
            if engine_id in up:
                self._lost[engine_id] = None
            else:  # it sleeps, or starts: that is the node's and our own doing
                del self._lost[engine_id]
        for engine_id, spec in found.items():
            self.engines[engine_id] = spec if engine_id not in up else self._with_what_it_said(spec)
        await self._publish_changes()

    def _with_what_it_said(self, spec: EngineSpec) -> EngineSpec:
        """The spec that a node reports, with what the engine's own metrics told beyond it."""
        if not spec.kv_bytes:
            self._says_kv.add(spec.engine_id)
        known = self.engines.get(spec.engine_id, spec)
        blocks = max(known.kv_block_tokens, spec.kv_block_tokens)
        return dataclasses.replace(spec, kv_block_tokens=blocks, kv_bytes=spec.kv_bytes or known.kv_bytes)

    async def meet_distances(self) -> None:
        """Read how far clusters are from where apps are, as these measured it."""
        now_s = self.clock.now_s()
        if now_s - self._rtts_at_s >= DISTANCES_S:
            self._rtts_at_s = now_s
            found = [
                d
                for d in await self.queue.distances()
                if math.isfinite(d.rtt_s) or d.measured_at_s > self._found_at_s.get(d.cluster, -math.inf)
            ]
            self._rtts = by_cluster(found, now_s)

    async def place(self, decided: Plan) -> None:
        """Have models awake where they are wanted most. Who is to sleep is published as gone before its node is told."""
        now_s = self.clock.now_s()
        if now_s >= self._hold_until_s and self.placer.asks(now_s):
            ended = {t.stage_id for t, _ in (*decided.grants, *decided.refusals)}
            waiting = Waiting(
                tickets=[t for t in self._seen.tickets if t.stage_id not in ended],
                predictions=self._seen.predictions,
                moments={s: at_s for moments in decided.moments.values() for s, at_s in moments.items()},
                more=self._more,
            )
            await self.placer.decide(waiting, self.engines.values(), self._predict, now_s)
            await self._publish_changes()
        if self.leading:
            await self.placer.tell(self.epoch)

    # -- collect, predict --------------------------------------------------------------------------------------------
    async def decide(self) -> Plan:
        """What to do now."""
        snapshot = await self.collect()
        guarded = dataclasses.replace(self.policy, order=self._moment)
        return plan(snapshot, guarded, epoch=self.epoch, now_s=self.clock.now_s())

    def _moment(self, ticket: Ticket, prediction: Prediction, now_s: float) -> float:
        """The order's answer; first come, first served where a user's own fails."""
        try:
            moment = float(self.policy.order(ticket, prediction, now_s))
            if not math.isnan(moment):
                return moment
            raise ValueError("a moment cannot be NaN")
        except Exception as e:
            self._bug("the order", e)
            return ticket.pushed_at_s

    async def collect(self) -> Snapshot:
        """The waiting stages that may go next, what they will cost, and the fleet as it is."""
        nothing = self._seen = Snapshot(tickets=(), predictions={}, engines=())
        self._more, self._held_back = {}, {}
        if self.clock.now_s() < self._hold_until_s:
            return nothing
        tickets: list[Ticket] = []
        for model in {e.model for e in self.engines.values()}:
            at_most = dict.fromkeys(self.metered, HEADS_OF_TENANT)
            heads = await self._part(f"heads of {model}", self.queue.heads(model, HEADS, at_most=at_most)) or ()
            tickets.extend(heads)
            if len(heads) >= HEADS_OF_TENANT if at_most else len(heads) == HEADS:
                free = sum(t.tenant not in self.metered for t in heads)
                more = self._more if free >= HEADS else self._held_back
                more[model] = max(0, await self.queue.depth(model) - len(heads))
        if not tickets:
            return nothing
        await self._read_graphs(tickets)
        self._seen = Snapshot(
            tickets=tickets,
            predictions=self.predict(tickets),
            engines=await self.fleet(),
            cached_tokens=self.cached_tokens(tickets),
            quotas=await self.quotas(tickets),
        )
        return self._seen

    async def quotas(self, tickets: Iterable[Ticket]) -> Mapping[str, Left]:
        """What may still start of each tenant that has a quota and waits. What runs the queue knows, whoever granted it."""
        names = {t.tenant for t in tickets} & self.metered
        if not names:
            return {}
        now_s = self.clock.now_s()
        running = {r.ticket.stage_id: r for r in await self.queue.running() if r.ticket.tenant in self.metered}
        for stage_id, r in running.items():
            if not self.minutes.knows(stage_id):
                self._starts(r.ticket, r.output_tokens, r.granted_at_s)
        self.minutes.runs(running.keys(), waiting={t.stage_id for t in tickets}, now_s=now_s)
        stages = Counter(r.ticket.tenant for r in running.values())
        kv_bytes, tokens = Counter[str](), self.minutes.used(now_s)
        for r in running.values():
            kv_bytes[r.ticket.tenant] += r.kv_bytes
        used = {name: Use(stages=stages[name], kv_bytes=kv_bytes[name], tokens=tokens.get(name, 0)) for name in names}
        return may_start((self.tenants[name] for name in names), used)

    def _starts(self, ticket: Ticket, output_tokens: int, at_s: float) -> None:
        if ticket.tenant in self.metered:
            tokens = ticket.prompt_tokens + output_tokens
            self.minutes.start(ticket.stage_id, ticket.tenant, tokens=tokens, at_s=at_s)

    async def _read_graphs(self, tickets: Iterable[Ticket]) -> None:
        """The static graphs of workflows that are new here."""
        now_s = self.clock.now_s()
        for workflow in {t.workflow for t in tickets if t.workflow}:
            if now_s < self._graphs.get(workflow, 0.0):
                continue
            spec = await self.queue.described(workflow)
            if spec is not None:
                self.workflows.describe(workflow, spec)
            self._graphs[workflow] = math.inf if spec is not None else now_s + GRAPH_RETRY_S
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)

    def predict(self, tickets: Sequence[Ticket]) -> Mapping[str, Prediction]:
        """What each stage and the run behind it will cost; its tenant is charged for it, once."""
        found = dict(self._predict(tickets))
        slots = sum(e.slots for e in self.engines.values() if self.placer.takes(e.engine_id)) or 1
        for t in tickets:
            p = found[t.stage_id]
            if t.stage_id not in self._debts:
                self._debts[t.stage_id] = self.shares.charge(
                    t.tenant, p.service_s, slots=slots, now_s=self.clock.now_s()
                )
                if len(self._debts) > MAX_DEBTS:
                    self._debts.popitem(last=False)
            debt_s, attained_s = self._debts[t.stage_id], self.workflows.attained_s(t.run_id)
            if debt_s or attained_s:
                found[t.stage_id] = dataclasses.replace(p, debt_s=debt_s, attained_s=attained_s)
        return found

    def _predict(self, tickets: Sequence[Ticket]) -> Mapping[str, Prediction]:
        """What each stage and the run behind it will cost, on the fastest engine of its model."""
        fastest: dict[str, EngineSpec] = {}
        for spec in self.engines.values():
            speed = self.speeds.of(spec)
            decode = speed.usual_decode
            learned = dataclasses.replace(spec, prefill_s_per_token=speed.prefill, decode_s_per_token=decode)
            if spec.model not in fastest or decode < fastest[spec.model].decode_s_per_token:
                fastest[spec.model] = learned
        return with_join_slack(tickets, self.predictor.predict(tickets, fastest, self.workflows))

    def cached_tokens(self, tickets: Iterable[Ticket]) -> Mapping[tuple[str, str], int]:
        """What each engine is expected to have of each prompt in its prefix cache; what it has nothing of is left out."""
        return {
            (t.stage_id, spec.engine_id): tokens
            for t in tickets
            if t.prefix
            for spec in self.engines.values()
            if spec.model == t.model and (tokens := self.prefixes.expected_hit_tokens(t, spec))
        }

    async def fleet(self) -> list[EngineState]:
        """Every engine with its reservations, health and learned speeds."""
        ledger = await self.queue.ledger()
        self._slots = dict(ledger.slots)
        states: list[EngineState] = []
        for spec in self.engines.values():
            speed = self.speeds.of(spec)
            health = self._health.get(spec.engine_id, EngineHealth(healthy=self.probe is None))
            states.append(
                EngineState(
                    spec=self._as_open(spec),
                    reserved_slots=ledger.slots.get(spec.engine_id, 0),
                    reserved_kv_bytes=ledger.kv_bytes.get(spec.engine_id, 0),
                    healthy=self.takes(spec.engine_id),
                    running=health.running,
                    waiting=health.waiting,
                    prefill_s_per_token=speed.prefill,
                    decode_s_per_token=speed.decode,
                    beside_s_per_token=speed.beside,
                    grants=self._grants.get(spec.engine_id, 0),
                    rtts=self._rtts.get(spec.cluster, {}),
                )
            )
        # Of nodes that fell silent: what could serve a stage, if it were there.
        states += [EngineState(spec=spec, healthy=False) for spec in self._lost.values() if spec is not None]
        return states

    def waiting(self) -> Mapping[str, int]:
        """Stages of each model that waited when the last round looked."""
        found = Counter(t.model for t in self._seen.tickets)
        found.update(self._more)
        found.update(self._held_back)
        return {e.model: found[e.model] for e in self.engines.values()}

    def reserved_slots(self) -> Mapping[str, int]:
        """Engine -> stages reserved there when the ledger was read last."""
        return self._slots

    # -- act ---------------------------------------------------------------------------------------------------------
    async def act(self, decided: Plan) -> None:
        """Carry a plan out. A grant that the queue refuses (cancelled meanwhile, credits spent) is simply not made."""
        for model, moments in decided.moments.items():
            await self._part("reordering", self.queue.reorder(moments, model))
        for ticket, refusal in decided.refusals:
            await self._part("refusing", self.queue.refuse(refusal, ticket, now_s=self.clock.now_s()))
        for ticket, grant in decided.grants:
            given = await self._part("granting", self.queue.grant(grant, ticket, now_s=self.clock.now_s()))
            if given is not None:
                self.decisions += 1
                self._starts(ticket, given.output_tokens, given.granted_at_s)
                self._grants[grant.engine_id] = self._grants.get(grant.engine_id, 0) + 1
                self.prefixes.granted(ticket, self.engines[grant.engine_id])

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

    async def charge(self) -> None:
        """Now and then: count what tenants used."""
        now_s = self.clock.now_s()
        if self.leading and now_s - self._charged_at_s >= FOLD_S:
            self._charged_at_s = now_s
            gpus = {e.engine_id: e.gpus / self.placer.beside(e.engine_id) / e.slots for e in self.engines.values()}
            await self.chargeback.fold(gpus, epoch=self.epoch)

    async def settle(self) -> None:
        """Give draining reservations back that their engine does not compute any more.

        A dead engine computes nothing. A mute one (no metrics) is believed idle after a lease. One that says how much it
        runs is believed once two looks at it agree (`_agreed`); one that never agrees, after `DRAIN_LEASES`.
        """
        draining: dict[str, list[Reservation]] = {}
        for r in await self.queue.draining():
            draining.setdefault(r.engine_id, []).append(r)
        self._spare = {e: s for e, s in self._spare.items() if e in draining}
        if not draining:
            return
        running = await self.queue.running()
        now_s = self.clock.now_s()
        for engine_id, entries in draining.items():
            health = self._health.get(engine_id)
            if engine_id not in self.engines or not self.healthy(engine_id):
                free = entries
            elif health is None or not 0 <= health.running < math.inf:
                free = [r for r in entries if now_s - r.since_s >= self.lease_s]
            else:
                free = [r for r in entries if now_s - r.since_s >= DRAIN_LEASES * self.lease_s]
                free = free or self._agreed(engine_id, health, entries, running)
            for r in free:
                await self.queue.settle(r)

    def _agreed(
        self, engine_id: str, health: EngineHealth, entries: Iterable[Reservation], running: Iterable[Running]
    ) -> list[Reservation]:
        """Reservations that are free by an engine's own account, at its last look and at the one before.

        An engine that has R requests while L stages with a live grant have reached it may still compute R - L of those
        that drain; which ones it does not say, so the smallest reservations are given back first. Two looks, since a
        count may miss a request that arrives this moment, and L may hold one that ends this moment; later one.
        """
        looked_at_s = self._probed_at_s[engine_id]
        judged_at_s, before = self._spare.get(engine_id, (-math.inf, 0))
        if looked_at_s <= judged_at_s:
            return []
        here = [s for s in running if s.engine_id == engine_id and s.granted_at_s < looked_at_s]
        reached = sum(s.granted_at_s < looked_at_s - ARRIVAL_S for s in here)
        requests = health.running + max(0, health.waiting)
        old = sorted((r for r in entries if r.since_s < looked_at_s), key=lambda r: r.kv_bytes)
        spare = max(0, len(old) - max(0, requests - reached))
        # What drains for a quarter of a lease lost its connection long ago, and an engine stops then. One look is enough for
        # it, and stages on their way count as arrived: an engine with many short ones would never be seen to agree, and a
        # dead app's memory would be held past two leases.
        aged = [r for r in old if looked_at_s - r.since_s >= self.lease_s / 4]
        sure = max(0, len(old) - max(0, requests - len(here)))
        free = aged[:sure] if aged else old[: min(spare, before)]
        self._spare[engine_id] = (looked_at_s, max(0, spare - len(free)))
        return free

    # -- learn -------------------------------------------------------------------------------------------------------
    async def learn(self) -> None:
        """Fold new observations into the statistics; at the start that rebuilds them. Each entry teaches once."""
        epoch = self.epoch if self.leading else None
        tending = self.predictor.tend(self.queue, epoch=epoch, now_s=self.clock.now_s(), more=self._told)
        await self._part("tending the predictor", tending)
        while True:
            self._log_at, entries = await self.queue.read_log(self._log_at, 500)
            new: list[Observation | RunEnd] = []
            for entry in entries:
                name = f"{entry.run_id} {entry.ended_at_s}" if isinstance(entry, RunEnd) else entry.stage_id
                if name in self._taken:
                    continue  # the log is read again from its beginning after the store restarted
                self._taken[name] = None
                if len(self._taken) > self.queue.log_length:
                    self._taken.popitem(last=False)
                new.append(entry)
            self.take(*new)
            if len(entries) < 500:
                return

    def take(self, *entries: Observation | RunEnd) -> None:
        """Learn from entries of the observation log. One that cannot be learned from keeps no other from teaching."""
        now_s = self.clock.now_s()
        finished = [e for e in entries if isinstance(e, Observation)]
        try:
            self.predictor.observe(finished)  # all at once: a model predicts many as fast as one
        except Exception as e:
            self._bug("learning", e)
            for one in finished:
                with contextlib.suppress(Exception):  # said already
                    self.predictor.observe([one])
        for entry in entries:
            try:
                self._take(entry)
                self.placer.observe(entry, now_s)
            except Exception as e:
                self._bug("learning", e)

    def _take(self, entry: Observation | RunEnd) -> None:
        if isinstance(entry, RunEnd):
            self.predictor.end_run(entry, self.workflows)  # before they learn of it: they are judged by it, too
            self.workflows.end_run(entry)
            return
        if not entry.observed:  # it was served by whom its caller chose, and waited there in nobody's order
            spec = self.engines.get(entry.engine_id)
            network_s = self._rtts.get(spec.cluster, {}).get(entry.site, spec.rtt_s) if spec is not None else 0.0
            self.speeds.observe(entry, beside=self._slots.get(entry.engine_id, 1) - 1, network_s=network_s)
            if spec is not None:
                self.prefixes.observe(entry, spec)
            if entry.tenant in self.metered:
                tokens, at_s = entry.prompt_tokens + entry.output_tokens, min(entry.finished_at_s, self.clock.now_s())
                self.minutes.end(entry.stage_id, entry.tenant, tokens=tokens, at_s=at_s)
        self.workflows.observe(entry)

    def _told(self) -> Mapping[str, Any]:
        """What else the predictor's status tells: how far off the expected prefix hits were, by engine."""
        return {"prefix": self.prefixes.status()}

    # -- engines -----------------------------------------------------------------------------------------------------
    async def _watch_engines(self) -> None:
        """Ask every engine how it is, for ever. One that is slow to answer does not keep the others waiting."""
        looks: dict[str, asyncio.Task[None]] = {}
        try:
            while self.probe is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PROBE_S):
                        await self._look_now.wait()
                self._look_now.clear()
                for engine in self._served():
                    if engine.engine_id not in looks or looks[engine.engine_id].done():
                        looks[engine.engine_id] = asyncio.create_task(self._look(engine))
        finally:
            for look in looks.values():
                look.cancel()
            await asyncio.gather(*looks.values(), return_exceptions=True)

    def _served(self) -> list[EngineSpec]:
        """Engines whose servers are up as far as is known."""
        return [e for e in self.engines.values() if self.placer.runs(e.engine_id)]

    async def _look(self, engine: EngineSpec) -> None:
        if self.probe is None:
            return
        engine_id = engine.engine_id
        asked_at_s = self.clock.now_s()
        health = EngineHealth(healthy=False)
        try:
            async with asyncio.timeout(PROBE_LIMIT_S):
                health = await self.probe.probe(engine)
        except TimeoutError:
            pass
        except Exception as e:  # a probe promises not to
            self._bug(f"the probe of {engine_id}", e)
        was = self.healthy(engine_id)
        engine = self.engines.get(engine_id, engine)  # its node may have said more meanwhile
        if engine_id not in self.engines or not self.placer.runs(engine_id):
            return
        if not health.healthy:
            self._failures[engine_id] = self._failures.get(engine_id, 0) + 1
        else:
            self._failures[engine_id] = 0
            self._health[engine_id] = health
            self._probed_at_s[engine_id] = asked_at_s
            if health.kv_block_tokens > 0:
                engine = dataclasses.replace(engine, kv_block_tokens=health.kv_block_tokens)
            if health.kv_tokens > 0 and engine_id in self._says_kv:
                engine = engine.with_kv_tokens(health.kv_tokens)
            self.engines[engine_id] = engine
        if was != self.healthy(engine_id):
            if was:
                self._lose(engine_id, None)
            elif engine_id in self._lost:
                del self._lost[engine_id]
                self._back_at_s[engine_id] = self._found_at_s[engine.cluster] = self.clock.now_s()
                self._rtts_at_s = -math.inf
            log.log(logging.WARNING if was else logging.INFO, "engine %s is %s", engine_id, "dead" if was else "alive")
            self._led_at_s = -math.inf  # publish the changed fleet in the next round
