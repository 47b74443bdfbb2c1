"""Tenants in a live pool: weights, quotas, what an overload means for each, and what they used."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import io
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from typer.testing import CliRunner

from maestro_agents import chargeback
from maestro_agents.chargeback import fold, read
from maestro_agents.cli import build_app
from maestro_agents.cli.snapshot import Watch, find
from maestro_agents.core import (
    EngineSpec,
    EngineState,
    Grant,
    Observation,
    Prediction,
    Refusal,
    ServiceClass,
    Status,
    Ticket,
)
from maestro_agents.errors import NoEngineFits, QuotaExceeded
from maestro_agents.policy import OURS, Plan, Snapshot, plan
from maestro_agents.policy.quota import MINUTE_S, Minutes, Use, may_start, served_in_s
from maestro_agents.queue.memory import MemoryQueue
from maestro_agents.queue.redis import RedisQueue
from maestro_agents.room import SPREAD, refused
from maestro_agents.scheduler import HEADS, Scheduler
from maestro_agents.tenants import Tenant
from tests.queues import fresh_redis_queue

NOW = 1_790_000_000.0
LEASE_S = 10.0
TICK_S = 0.25


# -- the pure part -----------------------------------------------------------------------------------------------------
def ticket(stage_id: str, **changes: Any) -> Ticket:
    base = Ticket(
        stage_id=stage_id, client_id="c", model="m", role="r", prompt_tokens=100, pushed_at_s=NOW, due_at_s=NOW
    )
    return base.evolve(**changes)


def engine(engine_id: str = "a", **changes: Any) -> EngineSpec:
    return EngineSpec(**{"engine_id": engine_id, "url": f"http://{engine_id}/v1", "model": "m", "slots": 8, **changes})


def decided(tickets: list[Ticket], tenants: list[Tenant], used: dict[str, Use], *engines: EngineSpec) -> Plan:
    guess = Prediction(
        output_tokens_mean=50.0, output_tokens_p50=50.0, output_tokens_p90=50.0, output_tokens_p99=50.0,
        service_s=1.0, remaining_s=0.0,
    )  # fmt: skip
    snapshot = Snapshot(
        tickets=tickets,
        predictions={t.stage_id: guess for t in tickets},
        engines=[EngineState(spec=e) for e in engines or (engine(),)],
        quotas=may_start(tenants, used),
    )
    return plan(snapshot, OURS, epoch=1, now_s=NOW)


def names(made: Plan) -> list[str]:
    return [t.stage_id for t, _ in made.grants]


@pytest.mark.parametrize(
    ("limit", "use"),
    [
        ({"max_stages": 3}, Use(stages=1)),
        ({"max_kv_bytes": 450}, Use(kv_bytes=150)),
        ({"tokens_per_minute": 450}, Use(tokens=150)),
    ],
)
def test_a_tenant_at_its_limit_waits_and_nobody_behind_it_does(limit: dict[str, int], use: Use) -> None:
    """Two more of it start, in its own order; those of others keep the places that they would have had."""
    acme = Tenant(name="acme", **limit)  # type: ignore[arg-type]
    tickets = [ticket(f"a{i}", tenant="acme", due_at_s=NOW - 9 + i, pushed_at_s=NOW - 9 + i) for i in range(5)]
    tickets += [ticket(f"b{i}", tenant="other", due_at_s=NOW + i, pushed_at_s=NOW + i) for i in range(3)]
    made = decided(tickets, [acme], {"acme": use})
    assert names(made) == ["a0", "a1", "b0", "b1", "b2"]
    assert made.over_quota == dict.fromkeys(("a2", "a3", "a4"), next(iter(limit)))
    assert names(decided(tickets, [], {})) == ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2"]


def test_a_large_stage_is_not_passed_by_small_ones_of_its_own_tenant() -> None:
    """Else it would wait for ever: its tenant's memory would never be empty enough."""
    acme = Tenant(name="acme", max_kv_bytes=1000)
    large = ticket("large", tenant="acme", prompt_tokens=800, due_at_s=NOW - 1, pushed_at_s=NOW - 1)
    made = decided([large, ticket("small", tenant="acme"), ticket("b")], [acme], {"acme": Use(kv_bytes=500)})
    assert (names(made), list(made.over_quota)) == (["b"], ["large", "small"])


def test_a_nested_stage_passes_every_quota_and_counts() -> None:
    """Its parent runs and waits for it; what comes after it has that much less."""
    acme = Tenant(name="acme", max_stages=1)
    made = decided([ticket("nested", tenant="acme", nested=True), ticket("s", tenant="acme")], [acme], {})
    assert names(made) == ["nested"]
    assert names(decided([ticket("nested", tenant="acme", nested=True)], [acme], {"acme": Use(stages=5)})) == ["nested"]


def test_what_is_beyond_a_quota_for_ever_is_refused_and_a_mere_guess_is_not() -> None:
    """A prompt that the tenant may never have at once is told so; one whose output alone seems too long has it all."""
    for limit in ({"max_kv_bytes": 120}, {"tokens_per_minute": 120}):
        acme = Tenant(name="acme", **limit)  # type: ignore[arg-type]
        made = decided([ticket("never", tenant="acme", prompt_tokens=200), ticket("s", tenant="acme")], [acme], {})
        assert [(t.stage_id, r.reason) for t, r in made.refusals] == [("never", "beyond quota")]
        assert names(made) == ["s"], "100 of prompt fit, 150 with the guess do not"
        assert made.grants[0][1].kv_bytes == (120 if "max_kv_bytes" in limit else 150)
    error = refused(ticket("never", tenant="acme"), Refusal(stage_id="never", reason="beyond quota", retry_after_s=0.0))
    assert isinstance(error, NoEngineFits)
    assert "tokens_per_minute" in str(error)


def test_a_quota_does_not_keep_room_from_others() -> None:
    """A stage that waited long for its tenant's quota reserves no engine, and a model is not full because of it."""
    acme = Tenant(name="acme", max_kv_bytes=200)
    old = ticket("old", tenant="acme", pushed_at_s=NOW - 60, due_at_s=NOW - 60)
    made = decided([old, ticket("b")], [acme], {"acme": Use(kv_bytes=200)}, engine(kv_bytes=150, slots=1))
    assert names(made) == ["b"]


def test_tokens_count_for_a_minute_and_none_escapes() -> None:
    """The guess while it runs; then the real number from the start, and what the guess had not covered from the end."""
    minutes = Minutes()
    minutes.start("s", "acme", tokens=100, at_s=NOW)
    assert minutes.used(NOW + 500)["acme"] == 100, "it still runs"
    minutes.end("s", "acme", tokens=130, at_s=NOW + 10)
    assert minutes.used(NOW + 11)["acme"] == 130
    assert minutes.used(NOW + MINUTE_S)["acme"] == 30
    assert minutes.used(NOW + 10 + MINUTE_S).get("acme", 0) == 0
    minutes.start("less", "acme", tokens=100, at_s=NOW + 100)
    minutes.end("less", "acme", tokens=40, at_s=NOW + 101)
    assert minutes.used(NOW + 101)["acme"] == 40, "what it did not use is free at once"
    minutes.end("unknown", "acme", tokens=7, at_s=NOW + 101)
    assert minutes.used(NOW + 101)["acme"] == 47, "granted by a leader before"
    minutes.start("withdrawn", "acme", tokens=5, at_s=NOW + 101)
    minutes.start("again", "acme", tokens=9, at_s=NOW + 101)
    minutes.runs((), waiting={"again"}, now_s=NOW + 110)
    assert minutes.used(NOW + 110)["acme"] == 52, "nobody said how far it came; one that waits again used nothing"
    assert minutes.used(NOW + 169)["acme"] == 5
    assert minutes.used(NOW + 170).get("acme", 0) == 0


def test_the_moment_to_come_again_is_when_the_narrowest_limit_will_have_let_all_through() -> None:
    """Engines, the tenant's stages at a time, or its tokens: whichever takes longest."""
    about = {"stages": 10, "service_s": 4.0, "tokens": 150.0, "slots": 8}
    assert served_in_s(Tenant(name="t"), **about) == 5.0
    assert served_in_s(Tenant(name="t", max_stages=2), **about) == 20.0
    assert served_in_s(Tenant(name="t", max_stages=2, tokens_per_minute=500), **about) == 180.0


def test_those_refused_together_are_told_different_moments() -> None:
    """Never earlier than the queue said, and spread, so that they do not come back together."""
    refusal = Refusal(stage_id="s", reason="quota", retry_after_s=20.0)
    told = [refused(ticket("s", tenant="acme"), refusal) for _ in range(50)]
    assert all(isinstance(e, QuotaExceeded) and "'acme'" in str(e) and "max_waiting" in str(e) for e in told)
    moments = [e.retry_after_s for e in told if isinstance(e, QuotaExceeded)]
    assert min(moments) >= 20.0
    assert 20.5 < max(moments) <= 20.0 * (1 + SPREAD)


# -- a pool, played on a clock turned by hand --------------------------------------------------------------------------
class Pool:
    """Schedulers on one queue, engines that take a second for a stage, and who was granted when."""

    def __init__(self, *tenants: Tenant, slots: int = 8, queue: Any = None, service_s: float = 1.0) -> None:
        self.at_s = NOW
        self.tenants = tenants
        self.spec = engine(slots=slots)
        self.service_s = service_s
        self.queue: Any = queue or MemoryQueue(lease_s=LEASE_S, max_queue=100_000)
        self.scheduler = self.candidate()
        self.ends: dict[str, float] = {}
        self.waits: defaultdict[str, list[float]] = defaultdict(list)
        self.pushed = 0
        self.finished: list[Observation] = []
        self.most: Counter[str] = Counter()

    def now_s(self) -> float:
        return self.at_s

    def candidate(self) -> Scheduler:
        self.leaders = getattr(self, "leaders", 0) + 1
        return Scheduler(
            self.queue, [self.spec], clock=self, holder=f"leader {self.leaders}", lease_s=LEASE_S, tenants=self.tenants
        )

    async def push(self, tenant: str, **more: Any) -> Grant | Refusal | None:
        self.pushed += 1
        t = ticket(
            f"{tenant}-{self.pushed}", tenant=tenant, pushed_at_s=self.at_s, run_id=f"run {self.pushed}",
            **{"due_at_s": self.at_s, **more},
        )  # fmt: skip
        return await self.queue.push(t, engines=[self.spec], now_s=self.at_s)

    async def tick(self, s: float = TICK_S) -> None:
        """Some time passes, stages end, the leader goes round, and who was granted is noted."""
        self.at_s += s
        await self.queue.renew("c", {}, now_s=self.at_s)
        for r in await self.queue.running():
            await self.queue.renew("c", {r.ticket.stage_id: r.token}, now_s=self.at_s)
            if self.at_s >= r.granted_at_s + self.service_s - 1e-6:
                await self.finish(r)
        if await self.scheduler.lead():
            await self.scheduler.step()
        running = await self.queue.running()
        held = Counter(r.ticket.tenant for r in running)
        self.most |= held
        for r in running:
            if r.ticket.stage_id not in self.ends:
                self.ends[r.ticket.stage_id] = r.granted_at_s
                self.waits[r.ticket.tenant].append(r.granted_at_s - r.ticket.pushed_at_s)

    async def finish(self, r: Any, **more: Any) -> None:
        t = r.ticket
        seen = Observation(**{
            "stage_id": t.stage_id, "run_id": t.run_id, "workflow": "", "role": t.role, "node": "", "model": t.model,
            "engine_id": r.engine_id, "service_class": t.service_class, "tenant": t.tenant, "status": Status.DONE,
            "prompt_tokens": t.prompt_tokens, "output_tokens": 50, "pushed_at_s": t.pushed_at_s,
            "granted_at_s": r.granted_at_s, "finished_at_s": self.at_s,
            "deadline_at_s": t.deadline_at_s, **more,
        })  # fmt: skip
        if await self.queue.finish(seen, client_id="c", token=r.token, now_s=self.at_s):
            self.finished.append(seen)


async def test_a_tenant_of_weight_two_gets_twice_the_work_of_one_of_weight_one() -> None:
    """Both always have more waiting than there is room for; the third asks for little, and gets all of it."""
    pool = Pool(Tenant(name="two", weight=2.0), Tenant(name="one"), slots=6)
    for tick in range(1200):
        waiting = await pool.queue.waiting(["one", "two"])
        for name in ("one", "two"):
            for _ in range(20 - waiting[name]):
                await pool.push(name, service_class=ServiceClass.BATCH)
        if tick % 20 == 0:
            await pool.push("calm")
        await pool.tick()
    served = Counter(o.tenant for o in pool.finished[len(pool.finished) // 4 :])
    assert served["two"] / served["one"] == pytest.approx(2.0, rel=0.15)
    assert len(pool.waits["calm"]) == 60
    assert max(pool.waits["calm"]) <= 2 * pool.service_s


async def test_a_flood_of_one_tenant_keeps_nobody_waiting() -> None:
    """It has many times what a round looks at before everybody else's, may have two stages at a time, and has two."""
    pool = Pool(Tenant(name="flood", max_stages=2), slots=6)
    await pool.tick()
    for i in range(4 * HEADS):
        await pool.push("flood", deadline_at_s=NOW + 5 + i, due_at_s=NOW - 1000)
    for tick in range(160):
        if tick % 4 == 0:
            await pool.push("a")
            await pool.push("b")
        await pool.tick()
    assert pool.most["flood"] == 2
    assert len(pool.waits["flood"]) >= 70, "its two are always busy"
    for name in ("a", "b"):
        assert len(pool.waits[name]) == 40
        assert max(pool.waits[name]) <= TICK_S, "the next round at the latest"


async def test_the_tokens_of_any_minute_are_as_many_as_were_granted() -> None:
    """A tenant that always wants more gets its tokens of each minute, no more, and not much less."""
    pool = Pool(Tenant(name="acme", tokens_per_minute=3000), service_s=2.0)
    for _ in range(40):  # what its calls come to is learned first
        await pool.push("other")
        await pool.tick(2.5)
    for _ in range(300):
        await pool.push("acme")
    for _ in range(1200):
        await pool.tick()
        await pool.queue.renew("c", {}, now_s=pool.at_s)
    ended = [o for o in pool.finished if o.tenant == "acme"]
    for o in ended:
        minute = [x for x in ended if o.granted_at_s - MINUTE_S < x.granted_at_s <= o.granted_at_s]
        assert sum(x.prompt_tokens + x.output_tokens for x in minute) <= 3000
    total = sum(o.prompt_tokens + o.output_tokens for o in ended)
    assert total >= 0.9 * 3000 * 5


async def test_a_new_leader_knows_what_runs_and_what_was_used() -> None:
    """Nothing more is granted after a takeover than would have been before it."""
    pool = Pool(Tenant(name="acme", max_stages=3, tokens_per_minute=600))
    for _ in range(30):
        await pool.push("acme", max_tokens=50)
    await pool.tick()
    assert pool.most["acme"] == 3
    old, pool.scheduler = pool.scheduler, pool.candidate()
    await pool.tick(LEASE_S / 2 + 0.1)  # three ended meanwhile: 450 of 600 tokens of this minute, 150 a stage
    await pool.tick()
    assert pool.scheduler.epoch > old.epoch
    assert len(pool.waits["acme"]) == 4
    pool.scheduler = pool.candidate()
    for _ in range(40):
        await pool.tick(LEASE_S / 8)
        assert len([at_s for at_s in pool.ends.values() if at_s > pool.at_s - MINUTE_S]) <= 4


async def test_refusals_of_a_tenant_say_when_there_is_room() -> None:
    """Ten wait, two at a time, a second each, as it was learned: the eleventh is told about five seconds."""
    pool = Pool(Tenant(name="acme", max_stages=2, max_waiting=10))
    for _ in range(100):
        await pool.push("other", max_tokens=50)
        await pool.tick(TICK_S)
    for _ in range(12):
        await pool.push("acme", max_tokens=50)
    await pool.tick()
    for _ in range(10 - (await pool.queue.waiting(["acme"]))["acme"]):
        await pool.push("acme", max_tokens=50)
    pool.service_s = math.inf
    await pool.tick()
    await pool.tick(LEASE_S / 4)  # what waits is published with the fleet
    told = await pool.push("acme")
    assert isinstance(told, Refusal)
    assert told.reason == "quota"
    assert told.retry_after_s == pytest.approx(10 * pool_service_s(pool) / 2, rel=0.05)
    assert await pool.push("other") is None or not isinstance(await pool.push("other"), Refusal)


async def test_why_a_stage_waits_is_shown() -> None:
    """`maestro top --json` names tenants that hold what they may, `maestro queue show` what a stage of one waits for."""
    pool = Pool(Tenant(name="acme", max_stages=1), Tenant(name="calm", max_stages=9))
    for name in ("acme", "acme", "calm"):
        await pool.push(name)
    await pool.tick()
    seen = await Watch(pool.queue, source="here", now_s=pool.now_s).snapshot()
    assert seen.to_json()["at_quota"] == {"acme": "max_stages"}
    assert (await find(pool.queue, "acme-2"))["waits_for"] == "tenant quota (max_stages)"
    assert "waits_for" not in await find(pool.queue, "acme-1")


def pool_service_s(pool: Pool) -> float:
    """What the leader thinks that a stage of the tenant takes."""
    (first, *_) = [t for t in pool.scheduler._seen.tickets if t.tenant == "acme"]
    return pool.scheduler._seen.predictions[first.stage_id].service_s


# -- a random walk: no quota is exceeded, nobody else is held ------------------------------------------------------------
LIMITS = (
    Tenant(name="stages", max_stages=2),
    Tenant(name="kv", max_kv_bytes=700),
    Tenant(name="tokens", tokens_per_minute=900),
    Tenant(name="all", weight=2.0, max_stages=3, max_kv_bytes=900, tokens_per_minute=1500),
)
WHO = st.sampled_from([*(t.name for t in LIMITS), "free"])


class Walk(RuleBasedStateMachine):
    """Apps, engines and leaders do anything; after each round the quotas are counted again, from what happened."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.pool = Pool(*LIMITS, slots=5)
        self.tenants = {t.name: t for t in LIMITS}
        #: Stage -> tenant, when it was granted, tokens: guessed, then real.
        self.granted: dict[str, tuple[str, float, int]] = {}

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def running(self) -> list[Any]:
        return self.do(self.pool.queue.running())

    @initialize()
    def begin(self) -> None:
        self.round()

    @rule(who=WHO, tokens=st.integers(1, 300), n=st.integers(1, 6), nested=st.sampled_from([False] * 5 + [True]))
    def push(self, who: str, tokens: int, n: int, nested: bool) -> None:
        for _ in range(1 if nested else n):
            self.do(self.pool.push(who, prompt_tokens=tokens, max_tokens=60, nested=nested))
        self.note()

    @rule(pick=st.randoms(use_true_random=False), real=st.integers(0, 200))
    def finish(self, pick: random.Random, real: int) -> None:
        if rows := self.running():
            r = pick.choice(rows)
            self.do(self.pool.finish(r, output_tokens=real))
            who, at_s, guessed = self.granted[r.ticket.stage_id]
            self.granted[r.ticket.stage_id] = who, at_s, min(guessed, r.ticket.prompt_tokens + real)

    @rule(pick=st.randoms(use_true_random=False), draining=st.booleans())
    def withdraw(self, pick: random.Random, draining: bool) -> None:
        if rows := self.running():
            r = pick.choice(rows)
            self.do(
                self.pool.queue.cancel(r.ticket.stage_id, "m", client_id="c", now_s=self.pool.at_s, draining=draining)
            )

    @rule(pick=st.randoms(use_true_random=False))
    def give_back(self, pick: random.Random) -> None:
        if rows := self.running():
            r = pick.choice(rows)
            self.do(self.pool.queue.requeue(r.ticket, token=r.token, now_s=self.pool.at_s, draining=False))
            self.granted.pop(r.ticket.stage_id)

    @rule(pick=st.randoms(use_true_random=False))
    def grow(self, pick: random.Random) -> None:
        if rows := self.running():
            r = pick.choice(rows)
            self.do(self.pool.queue.extend(r.ticket.stage_id, client_id="c", token=r.token, kv_bytes=r.kv_bytes + 64))

    @rule()
    def another_leader(self) -> None:
        self.pool.at_s += LEASE_S / 2 + 0.1
        self.alive()
        self.pool.scheduler = self.pool.candidate()
        self.round()

    @rule(seconds=st.sampled_from([0.25, 3.0, 20.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.pool.at_s += seconds
        self.round()

    def alive(self) -> None:
        held = {r.ticket.stage_id: r.token for r in self.running()}
        self.do(self.pool.queue.renew("c", held, now_s=self.pool.at_s))

    def note(self) -> set[str]:
        """Take down what was granted; return the tenants of those that were not nested."""
        new: set[str] = set()
        for r in self.running():
            if r.ticket.stage_id not in self.granted:
                tokens = r.ticket.prompt_tokens + r.output_tokens
                self.granted[r.ticket.stage_id] = (r.ticket.tenant, r.granted_at_s, tokens)
                if not r.ticket.nested:
                    new.add(r.ticket.tenant)
        return new

    @rule()
    def round(self) -> None:
        self.alive()
        self.note()
        s = self.pool.scheduler
        before = self.do(self.pool.queue.ledger()).slots.get("a", 0)
        known = len(self.granted)
        leads = self.do(s.lead())
        if leads:
            self.do(s.step())
        new, rows = self.note(), self.running()
        for name in new & self.tenants.keys():
            limits, own = self.tenants[name], [r for r in rows if r.ticket.tenant == name]
            assert len(own) <= (limits.max_stages or len(own))
            assert sum(r.kv_bytes for r in own) <= (limits.max_kv_bytes or math.inf)
            minute = [t for who, at_s, t in self.granted.values() if who == name and at_s > self.pool.at_s - MINUTE_S]
            assert sum(minute) <= (limits.tokens_per_minute or math.inf)
        if leads and before + len(self.granted) - known < self.pool.spec.slots:
            waits = self.do(self.pool.queue.waiting(["free"]))["free"]
            assert waits == 0, "a slot is free, and a stage without a quota waits"

    def teardown(self) -> None:
        self.loop.close()


def test_no_quota_is_ever_exceeded_and_nobody_else_is_held() -> None:
    """40 steps at random, 15 times: counted again from what happened at every grant, takeovers included."""
    budget: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    run_state_machine_as_test(Walk, settings=settings(max_examples=15, stateful_step_count=40, **budget))


# -- usage -------------------------------------------------------------------------------------------------------------
def sums(days: dict[str, dict[str, int]]) -> dict[str, Counter[str]]:
    """Counters by tenant, days and models together."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for counters in days.values():
        for (tenant, _, _), used in read(counters).items():
            found[tenant].update(used)
    return dict(found)


@pytest.fixture(params=["memory", "redis"])
async def queue(request: pytest.FixtureRequest) -> Any:
    """The specification, and a real Redis."""
    if request.param == "memory":
        yield MemoryQueue(lease_s=LEASE_S)
    else:
        made = await fresh_redis_queue(request.getfixturevalue("redis_url"), lease_s=LEASE_S)
        yield made
        await made.close()


async def test_what_tenants_used_adds_up_to_the_log_over_takeovers(queue: Any) -> None:
    """Each stage is counted once, whoever leads, however often leaders change; GPU seconds are no more than there were."""
    pool = Pool(queue=queue, slots=4)
    pool.at_s = NOW - NOW % 86_400 - 20.0  # some seconds before midnight, UTC
    began_s, pick = pool.at_s, random.Random(7)
    leaders = [pool.scheduler, pool.candidate(), pool.candidate()]
    for n in range(240):
        await pool.push(
            pick.choice(["a", "b", "c"]), deadline_at_s=pool.at_s + 0.6, prompt_tokens=pick.randrange(1, 99)
        )
        await pool.tick()
        if n % 40 == 39:
            pool.at_s += LEASE_S / 2 + 0.1
            pool.scheduler = leaders[n // 40 % 3]
    for s in leaders:
        pool.at_s += LEASE_S
        pool.scheduler = s
        await pool.tick()
    days = sorted({day for o in pool.finished for day in fold([o], lambda _: 0.0)})
    assert len(days) == 2
    counted = sums({day: dict(await queue.usage(day)) for day in days})
    again = sums(fold(pool.finished, lambda _: 1 / 4))
    assert counted == again
    assert set(counted) == {"a", "b", "c"}
    total = Counter[str]()
    for used in counted.values():
        total.update(used)
    assert total["stages"] == len(pool.finished) > 200
    assert total["late"] > 0
    assert total["prompt_tokens"] == sum(o.prompt_tokens for o in pool.finished)
    assert 0 < total["gpu_ms"] / 1000 <= pool.at_s - began_s


async def test_usage_knows_models_and_classes_apart_and_leaves_out_what_was_only_observed() -> None:
    """Failures count, calls to the caller's own URL do not; names of any kind stay apart."""
    base = Observation(
        stage_id="s", run_id="r", workflow="", role="", node="", model="m", engine_id="e", tenant='a|"b', status=Status.DONE,
        service_class=ServiceClass.BATCH, prompt_tokens=10, cached_tokens=4, output_tokens=5, granted_at_s=NOW,
        finished_at_s=NOW + 2, deadline_at_s=NOW + 1,
    )  # fmt: skip
    entries = [
        base,
        dataclasses.replace(base, status=Status.FAILED, deadline_at_s=math.inf),
        dataclasses.replace(base, model="n"),
        dataclasses.replace(base, observed=True),
        dataclasses.replace(base, finished_at_s=1e300, engine_id="gone"),
    ]
    days = fold(entries, {"e": 0.5}.get)
    (today,) = [day for day in days if day != "2026-09-21"]
    assert read(days["2026-09-21"]) == {
        ('a|"b', "m", "batch"): dict(zip(chargeback.COUNTERS, (2, 1, 1, 20, 8, 10, 2000), strict=True)),
        ('a|"b', "n", "batch"): dict(zip(chargeback.COUNTERS, (1, 0, 1, 10, 4, 5, 1000), strict=True)),
    }
    assert read(days[today])['a|"b', "m", "batch"]["stages"] == 1, "an app with a broken clock is counted today"


async def test_entries_of_the_release_before_do_not_fill_a_tenants_bound(redis_url: str) -> None:
    """What was granted by commands that know nothing of it is forgotten by the next leader; what waits is not."""
    queue = await fresh_redis_queue(redis_url, lease_s=LEASE_S)
    try:
        pool = Pool(queue=queue)
        for _ in range(3):
            await pool.push("größe")
        (gone, *_) = [t.stage_id for t in await queue.heads("m", 9)]
        redis: Any = queue._redis
        await redis.zrem(queue._ready("m"), gone)
        await redis.hset(queue._stage(gone), "status", "granted")
        assert (await queue.waiting(["größe"]))["größe"] == 3
        await queue.lead("new", ttl_s=5, now_s=NOW)
        assert (await queue.waiting(["größe"]))["größe"] == 2
    finally:
        await queue.close()


def invoke(*words: str) -> Any:
    return CliRunner().invoke(build_app(["usage"]), ["usage", *words])


@pytest.fixture
def counted(redis_url: str, pool: str) -> Iterable[str]:
    """A pool in which two tenants used something on two days."""

    async def count() -> None:
        queue = RedisQueue(redis_url, pool=pool)
        epoch = await queue.lead("x", ttl_s=5, now_s=NOW)
        assert epoch is not None
        one = {
            chargeback.counter("acme", "m", "batch", what): n
            for what, n in (("stages", 2), ("gpu_ms", 1500), ("newer", 9))
        }
        days = {"2026-11-01": one, "2026-11-02": {**one, chargeback.counter("b", "m", "batch", "stages"): 1}}
        assert await queue.charge(days, after="", to="1-0", epoch=epoch)
        await queue.close()

    asyncio.run(count())
    return pool


def test_usage_is_told_by_day_and_tenant(redis_url: str, counted: str) -> None:
    """As JSON and CSV a line per day, tenant, model and class; as a table added up."""
    where = ("--redis-url", redis_url, "--pool", counted, "--since", "2026-11-01", "--until", "2026-11-02")
    rows = json.loads(invoke(*where, "--json").stdout)
    assert [(r["day"], r["tenant"], r["stages"], r["gpu_s"]) for r in rows] == [
        ("2026-11-01", "acme", 2, 1.5), ("2026-11-02", "acme", 2, 1.5), ("2026-11-02", "b", 1, 0.0),
    ]  # fmt: skip
    assert next(csv.DictReader(io.StringIO(invoke(*where, "--csv", "--tenant", "b").stdout)))["tenant"] == "b"
    table = invoke(*where).stdout.splitlines()
    assert [line.split()[:4] for line in table[1:]] == [["acme", "m", "batch", "4"], ["b", "m", "batch", "1"]]
    assert "No usage" in invoke(*where[:4], "--until", "2026-10-01").stdout


@pytest.mark.parametrize("words", [("--since", "yesterday"), ("--since", "2026-11-02", "--until", "2026-11-01")])
def test_a_day_that_is_none_is_said_so(redis_url: str, words: tuple[str, ...]) -> None:
    """In one line, before anything is asked of Redis."""
    result = invoke("--redis-url", redis_url, *words)
    assert result.exit_code
    assert "--since" in str(result.exception)
