"""The spine: what the leader does round by round, on the queue in memory and a clock turned by hand."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_agents import scheduler as scheduler_module
from maestro_agents.core import (
    EngineSpec,
    Grant,
    Observation,
    Prediction,
    Refusal,
    RunEnd,
    ServiceClass,
    Status,
    Ticket,
)
from maestro_agents.errors import QueueUnavailable
from maestro_agents.policy import LIVE, Policy
from maestro_agents.ports import EngineHealth
from maestro_agents.predict.prefix import prompt_blocks
from maestro_agents.queue.memory import MemoryQueue
from maestro_agents.queue.redis import RedisClock, RedisQueue
from maestro_agents.scheduler import DRAIN_LEASES, FAILURES, Scheduler

LEASE_S = 10.0
NOW_S = 1_790_000_000.0


class Clock:
    """Turned by hand."""

    def __init__(self) -> None:
        self.at_s = NOW_S

    def now_s(self) -> float:
        return self.at_s


class Store(MemoryQueue):
    """The queue in memory, which can restart, fail, and tell what was published."""

    def __init__(self) -> None:
        super().__init__(lease_s=LEASE_S)
        self.run = "first"
        self.faults: dict[str, list[Exception | None]] = {}
        self.published: list[tuple[tuple[str, ...], dict[str, float], float]] = []

    def _fail(self, name: str) -> None:
        """Raise the next fault of a command; a list's last stays."""
        faults = self.faults.get(name)
        if faults and (fault := faults[0] if len(faults) == 1 else faults.pop(0)) is not None:
            raise fault

    async def incarnation(self) -> str:
        self._fail("incarnation")
        return self.run

    async def lead(self, holder: str, *, ttl_s: float, now_s: float, at_least: int = 0) -> int | None:
        self._fail("lead")
        return await super().lead(holder, ttl_s=ttl_s, now_s=now_s, at_least=at_least)

    async def publish(self, engines: Sequence[EngineSpec], **more: Any) -> bool:
        self._fail("publish")
        done = await super().publish(engines, **more)
        self.published.append((tuple(e.engine_id for e in engines), dict(more["p99"]), more["valid_until_s"]))
        return done

    async def heads(self, model: str, n: int, **more: Any) -> Sequence[Ticket]:
        self._fail(f"heads {model}")
        return await super().heads(model, n, **more)

    async def grant(self, grant: Grant, ticket: Ticket, *, now_s: float) -> Grant | None:
        self._fail(f"grant {ticket.stage_id}")
        return await super().grant(grant, ticket, now_s=now_s)

    async def reap(self, *, now_s: float) -> Sequence[str]:
        self._fail("reap")
        return await super().reap(now_s=now_s)

    async def wake(self, timeout_s: float) -> None:
        self._fail("wake")
        await super().wake(timeout_s)


class Probe:
    """Engines' own account, as the test says."""

    def __init__(self, **says: EngineHealth) -> None:
        self.says = says
        self.raises: dict[str, Exception] = {}
        self.hangs: dict[str, asyncio.Event] = {}

    async def probe(self, spec: EngineSpec) -> EngineHealth:
        if spec.engine_id in self.hangs:
            await self.hangs[spec.engine_id].wait()
        if spec.engine_id in self.raises:
            raise self.raises[spec.engine_id]
        return self.says.get(spec.engine_id, EngineHealth(healthy=False))

    async def close(self) -> None: ...


def idle(running: Any = 0, waiting: int = 0, kv_tokens: int = 0) -> EngineHealth:
    return EngineHealth(healthy=True, running=running, waiting=waiting, kv_tokens=kv_tokens)


def engine(engine_id: str = "a", **more: Any) -> EngineSpec:
    return EngineSpec(**{"engine_id": engine_id, "url": f"http://{engine_id}/v1", "model": "m", "slots": 1, **more})


class World:
    """A scheduler on a store, a client that pushes, and the moves of both."""

    def __init__(self, *engines: EngineSpec, probe: Probe | None = None, order: str = "ours") -> None:
        self.clock, self.store = Clock(), Store()
        self.engines = engines or (engine(),)
        self.probe = probe
        self.scheduler = self.candidate("first", order=order)

    def candidate(self, holder: str, *, order: str = "ours", store: Any = None) -> Scheduler:
        return Scheduler(
            store or self.store,
            self.engines,
            clock=self.clock,
            holder=holder,
            policy=LIVE[order],
            probe=self.probe,
            lease_s=LEASE_S,
        )

    async def round(self, after_s: float = 0.0, scheduler: Scheduler | None = None) -> bool:
        """One turn of the loop, some time later. False where it does not lead."""
        self.clock.at_s += after_s
        s = scheduler or self.scheduler
        if not await s.lead():
            return False
        await s.step()
        return True

    async def look(self) -> None:
        for e in self.engines:
            await self.scheduler._look(e)

    async def push(self, stage_id: str, **more: Any) -> Grant | Refusal | None:
        """Push with no engine allowed for the fast path, unless told."""
        engines = more.pop("engines", ())
        now_s = self.clock.now_s()
        t = Ticket(**{
            "stage_id": stage_id, "client_id": "c", "model": "m", "role": "r", "run_id": f"run-{stage_id}",
            "prompt_tokens": 10, "pushed_at_s": now_s, "due_at_s": now_s, **more,
        })  # fmt: skip
        return await self.store.push(t, engines=engines, now_s=now_s)

    async def renew(self, **stages: int) -> None:
        await self.store.renew("c", stages, now_s=self.clock.now_s())

    def statuses(self, *stage_ids: str) -> list[str]:
        return [str(self.store.status(s)) for s in stage_ids]

    async def granted(self) -> dict[str, str]:
        return {r.ticket.stage_id: r.engine_id for r in await self.store.running()}

    async def token(self, stage_id: str) -> int:
        return next(r.token for r in await self.store.running() if r.ticket.stage_id == stage_id)

    async def finish(self, stage_id: str, *, output_tokens: int = 50, after_s: float = 1.0) -> bool:
        (running,) = (r for r in await self.store.running() if r.ticket.stage_id == stage_id)
        self.clock.at_s += after_s
        return await self.store.finish(
            observed(running.ticket, running.engine_id, output_tokens, running.granted_at_s, self.clock.at_s),
            client_id=running.ticket.client_id,
            token=running.token,
            now_s=self.clock.at_s,
        )

    async def reserved(self) -> int:
        return sum((await self.store.ledger()).slots.values())


def observed(t: Ticket, engine_id: str, output_tokens: int, granted_at_s: float, at_s: float) -> Observation:
    return Observation(
        stage_id=t.stage_id, run_id=t.run_id, workflow=t.workflow, role=t.role, node=t.node, model=t.model,
        engine_id=engine_id, service_class=ServiceClass.INTERACTIVE, tenant="default", status=Status.DONE,
        prompt_tokens=t.prompt_tokens, output_tokens=output_tokens, pushed_at_s=t.pushed_at_s,
        granted_at_s=granted_at_s, finished_at_s=at_s,
    )  # fmt: skip


def history(role: str, output_tokens: int, n: int = 30, **more: Any) -> list[Observation]:
    """Stages of a role that ended earlier."""
    t = Ticket(stage_id="x", client_id="c", model="m", role=role, prompt_tokens=10, **more)
    return [
        observed(t.evolve(stage_id=f"{role}-{i}-{output_tokens}"), "a", output_tokens, NOW_S, NOW_S + 1)
        for i in range(n)
    ]


async def until(holds: Callable[[], Awaitable[object] | object], limit_s: float = 10.0) -> None:
    """Wait for what another task does."""
    async with asyncio.timeout(limit_s):
        while True:
            found = holds()
            if await found if isinstance(found, Awaitable) else found:
                return
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(scheduler: Scheduler):
    """The loop itself, until the end of the block."""
    task = asyncio.create_task(scheduler.run())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


# -- order, admission, the fast path -------------------------------------------------------------------------------------
async def test_the_role_with_short_answers_goes_first_once_that_is_known() -> None:
    """Two stages wait for one slot: who was learned to be short overtakes who was learned to be long."""
    w = World()
    w.store._log.extend(enumerate([*history("long", 900), *history("short", 5)], start=1))
    await w.round()
    await w.push("a-long", role="long", deadline_at_s=NOW_S + 100)
    await w.push("b-short", role="short", deadline_at_s=NOW_S + 100)
    await w.round()
    assert await w.granted() == {"b-short": "a"}
    heads = await w.store.heads("m", 5)
    assert heads[0].stage_id == "a-long"
    assert heads[0].due_at_s > NOW_S + 10, "its moment was written back"


async def test_a_users_own_order_is_followed() -> None:
    """Any function of ticket, prediction and time."""
    w = World()
    await w.round()
    w.scheduler.policy = Policy(order=lambda ticket, _prediction, _now_s: -float(ticket.stage_id))
    for stage_id in ("1", "2", "3"):
        await w.push(stage_id)
    await w.round()
    assert list(await w.granted()) == ["3"]


async def test_kv_memory_admits() -> None:
    """A second stage waits while the first one's reservation fills the engine, and starts when it is given back."""
    w = World(engine(slots=8, kv_bytes=1_000, kv_bytes_per_token=1))
    await w.round()
    await w.push("1", max_tokens=590, prompt_tokens=10, role="r")
    await w.push("2", max_tokens=590, prompt_tokens=10, role="r")
    await w.round()
    assert len(await w.granted()) == 1
    (first,) = await w.granted()
    assert (await w.store.ledger()).kv_bytes == {"a": 10 + 512}, "prompt + p99 of a role that was never seen"
    await w.finish(first)
    await w.round()
    (second,) = await w.granted()
    assert second != first


async def test_a_stage_that_fits_nowhere_is_refused_and_a_late_one_that_asked_for_it() -> None:
    """The client is told, with the reason; nothing is left in the queue."""
    w = World(engine(kv_bytes=100, kv_bytes_per_token=1))
    await w.round()
    await w.push("huge", prompt_tokens=200)
    await w.push("late", deadline_at_s=NOW_S - 1, refuse_late=True, max_tokens=1)
    await w.round()
    told = {v.stage_id: v for v in await w.store.verdicts("c", 0.1)}
    assert isinstance(told["huge"], Refusal)
    assert told["huge"].reason == "no engine fits"
    assert isinstance(told["late"], Refusal)
    assert told["late"].reason == "deadline"
    assert await w.store.depth("m") == 0


async def test_an_idle_engines_slot_is_granted_in_the_push() -> None:
    """After a round there are credits, and a role's learned p99 is what the fast path reserves."""
    w = World(engine(kv_bytes=10_000, kv_bytes_per_token=1))
    w.store._log.extend(enumerate(history("r", 300), start=1))
    await w.round()
    await w.round(LEASE_S / 4)
    granted = await w.push("1", engines=w.engines, prompt_tokens=10)
    assert isinstance(granted, Grant)
    assert granted.fast
    (found,) = (p99 for _, p99, _ in w.store.published if p99)
    assert granted.kv_bytes == 10 + found["m|r"]
    assert found["m|r"] >= 300


async def test_nested_stages_need_no_room() -> None:
    """A stage whose parent holds the only slot is granted beside it."""
    w = World()
    await w.round()
    await w.push("parent")
    await w.round()
    await w.push("child", nested=True)
    await w.push("other")
    await w.round()
    assert set(await w.granted()) == {"parent", "child"}


# -- learning ------------------------------------------------------------------------------------------------------------
async def test_completions_change_predictions() -> None:
    """Lengths by role, speed by engine, remaining work by workflow: all from the observation log."""
    w = World()
    t = Ticket(stage_id="s", client_id="c", model="m", role="r", workflow="w", node="first", prompt_tokens=10)
    before = w.scheduler.predict([t])["s"]
    at_s = NOW_S
    for run in range(20):
        for n, node in enumerate(("first", "second")):
            o = history("r", 400, 1, workflow="w", node=node)[0]
            at_s = NOW_S + 100 * run + 10 * n
            o = observed(t.evolve(stage_id=f"{run}-{n}", run_id=str(run), node=node), "a", 400, at_s, at_s + 10)
            w.store._append(o)
        end = RunEnd(run_id=str(run), workflow="w", outcome="done", started_at_s=0, ended_at_s=at_s + 20)
        await w.store.end_run(end)
    await w.scheduler.learn()
    after = w.scheduler.predict([t])["s"]
    assert (before.basis, after.basis) == ("prior", "role(40)")
    assert after.output_tokens_p50 == 400 != before.output_tokens_p50
    assert after.service_s == pytest.approx(10, rel=0.2)
    assert before.remaining_s == 0
    assert after.remaining_s == pytest.approx(10, rel=0.2), "one more stage follows"
    assert (after.remaining_stages, after.remaining_tokens) == (pytest.approx(1, rel=0.2), pytest.approx(400, rel=0.2))
    assert after.remaining_tool_s == pytest.approx(10), "from the last stage to the end of the run"
    assert after.ends_p < 0.2
    assert w.scheduler.predict([t.evolve(node="second")])["s"].ends_p > 0.8


async def test_siblings_that_wait_together_share_what_they_know() -> None:
    """The one with the long prompt is what their run waits for; the other, and nobody else, has time to spare."""
    w = World()
    t = Ticket(stage_id="short", client_id="c", model="m", run_id="r", workflow="w", node="a", step=2, prompt_tokens=10)
    waiting = [t, t.evolve(stage_id="long", node="b", prompt_tokens=10_000), t.evolve(stage_id="alone", run_id="other")]
    found = w.scheduler.predict(waiting)
    ahead_s = found["long"].service_s - found["short"].service_s
    assert ahead_s > 0
    assert {s: p.slack_s for s, p in found.items()} == {"short": pytest.approx(ahead_s), "long": 0.0, "alone": 0.0}


async def test_the_static_graph_is_read_from_the_queue() -> None:
    """A workflow that was described counts with its height before any run ended; it is asked for once."""
    w = World()
    spec = {"nodes": [{"id": "x", "llm": "yes"}, {"id": "y", "llm": "yes"}], "edges": [["x", "y", False]]}
    await w.store.describe("w", json.dumps(spec))
    await w.round()
    await w.push("1", workflow="w", node="x")
    await w.push("2", workflow="w", node="y")
    await w.push("3", workflow="unknown", node="y")
    await w.round()
    t = Ticket(stage_id="s", client_id="c", model="m", workflow="w", node="x")
    assert w.scheduler.predict([t])["s"].remaining_s > w.scheduler.predict([t.evolve(node="y")])["s"].remaining_s == 0
    asked: list[str] = []
    real = w.store.described

    async def described(workflow: str) -> str | None:
        asked.append(workflow)
        return await real(workflow)

    w.store.described = described  # type: ignore[method-assign]
    await w.round(1)
    assert asked == []
    await w.round(scheduler_module.GRAPH_RETRY_S)
    assert asked == ["unknown"]


async def test_an_entry_that_cannot_be_learned_from_does_not_stop_the_others(caplog: Any) -> None:
    """It is told once; the entries beside it teach."""
    w = World()
    bad, good = history("r", 100, 2)
    w.store._log.extend([(1, bad), (2, good)])
    real = w.scheduler.predictor.observe

    def observe(finished: Sequence[Observation]) -> None:
        if bad in finished:
            raise ZeroDivisionError
        real(finished)

    w.scheduler.predictor.observe = observe  # type: ignore[method-assign]
    await w.scheduler.learn()
    t = Ticket(stage_id="s", client_id="c", model="m", role="r")
    assert w.scheduler.predict([t])["s"].basis == "role(1)"
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR] == [
        "a bug (learning); the scheduler goes on"
    ]


async def test_p99_that_could_not_be_published_is_published_later() -> None:
    """A publication that fails loses nothing, and a new epoch gets all roles."""
    w = World()
    w.store._log.extend(enumerate([*history("x", 30), *history("y", 40)], start=1))
    await w.round()
    w.store.faults["publish"] = [QueueUnavailable(), None]
    with pytest.raises(QueueUnavailable):
        await w.round(LEASE_S / 4)
    await w.round(LEASE_S / 4)
    assert set(w.store.published[-1][1]) == {"m|x", "m|y"}
    await w.round(LEASE_S / 4)
    assert w.store.published[-1][1] == {}, "nothing changed"
    w.store.run = "second"
    await w.round(LEASE_S / 4)
    assert set(w.store.published[-1][1]) == {"m|x", "m|y"}, "the store may know none of it"


async def test_what_it_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Endless new stages, roles, workflows and drained reservations leave a bounded memory."""
    monkeypatch.setattr(scheduler_module, "MAX_ROLES", 50)
    monkeypatch.setattr(scheduler_module, "MAX_GRAPHS", 20)
    w = World(probe=Probe(a=idle()))
    w.store.log_length = 100
    await w.look()
    for i in range(300):
        w.store._append(history(f"role{i}", 30, 1)[0])
        await w.push(f"s{i}", workflow=f"w{i}")
        await w.round(LEASE_S / 4)
        await w.finish(f"s{i}")
    s = w.scheduler
    assert (len(s._taken), len(s._p99), len(s._graphs)) == (100, 50, 20)
    assert (s._p99_due, s._spare) == ({}, {})


# -- leadership ----------------------------------------------------------------------------------------------------------
async def test_a_standby_takes_over_within_two_leases_and_knows_what_was_learned() -> None:
    """While the leader renews, the other stands by; when it falls silent, it leads under a higher epoch."""
    w = World()
    w.store._log.extend(enumerate(history("r", 300), start=1))
    second = w.candidate("second")
    for _ in range(10):
        assert await w.round(LEASE_S / 4)
        assert not await w.round(scheduler=second)
    await second.learn()
    assert second.predict([Ticket(stage_id="s", client_id="c", model="m", role="r")])["s"].basis == "role(30)"
    await w.push("1")
    w.clock.at_s += LEASE_S
    await w.renew(**{"1": 0})
    assert await w.round(scheduler=second)
    assert (w.scheduler.epoch, second.epoch) == (1, 2)
    assert await w.granted() == {"1": "a"}


async def test_who_lost_leadership_in_the_middle_of_a_round_grants_nothing() -> None:
    """Its grants carry an old epoch, its publication is refused, and it stands by again."""
    w = World(engine(slots=4))
    await w.round()
    await w.push("1")
    plan = await w.scheduler.decide()
    assert plan.grants
    second = w.candidate("second")
    w.clock.at_s += LEASE_S
    await w.renew(**{"1": 0})
    assert await second.lead()
    await w.scheduler.act(plan)
    assert await w.granted() == {}
    assert w.scheduler.decisions == 0
    await w.scheduler.publish()
    assert not w.scheduler.leading
    assert not await w.scheduler.lead()
    assert await w.round(scheduler=second)
    assert await w.granted() == {"1": "a"}


async def test_a_candidate_whose_publication_is_refused_does_not_lead() -> None:
    """`lead` says False where a newer epoch ruled between its two words."""
    w = World()

    async def refused(*_: Any, **__: Any) -> bool:
        return False

    w.store.publish = refused  # type: ignore[method-assign]
    assert not await w.scheduler.lead()


async def test_two_real_schedulers_on_one_redis(redis_url: str, pool: str) -> None:
    """Exactly one leads; when it ends without a word, the other serves what waits within two leases."""
    lease_s = 1.0
    queues = [RedisQueue(redis_url, pool=pool, lease_s=lease_s) for _ in range(3)]
    clock = RedisClock()
    await clock.sync(queues[0])
    a, b = (Scheduler(q, [engine()], clock=clock, holder=uuid.uuid4().hex, lease_s=lease_s) for q in queues[:2])
    async with running(a) as task_a, running(b) as task_b:
        await until(lambda: a.leading or b.leading)
        assert a.leading != b.leading
        (task_a if a.leading else task_b).cancel()
        heir = b if a.leading else a
        died_at_s = clock.now_s()
        t = Ticket(stage_id="s", client_id="c", model="m", pushed_at_s=died_at_s)
        await queues[2].push(t, engines=(), now_s=died_at_s)
        while not (verdicts := await queues[2].verdicts("c", 1.0)):
            await queues[2].renew("c", {"s": 0}, now_s=clock.now_s())
            assert clock.now_s() - died_at_s < 10 * lease_s
        assert clock.now_s() - died_at_s < 2 * lease_s + 1
        assert isinstance(verdicts[0], Grant)
        assert verdicts[0].epoch == heir.epoch == 2
    for q in queues:
        await q.close()


# -- restarts of the store -----------------------------------------------------------------------------------------------
async def test_after_a_restart_of_the_store_nothing_is_granted_for_a_lease() -> None:
    """The epoch is raised, credits are void, and grants begin again when clients had time to announce."""
    w = World()
    await w.round()
    w.store.run = "second"
    await w.round(LEASE_S / 4)
    assert w.scheduler.epoch == 2
    assert w.store.published[-1][2] == 0.0, "no credits"
    assert await w.push("1", engines=w.engines) is None
    for _ in range(3):
        await w.renew(**{"1": 0})
        await w.round(LEASE_S / 4)
        assert await w.granted() == {}
    await w.renew(**{"1": 0})
    await w.round(LEASE_S / 4 + 0.01)
    assert await w.granted() == {"1": "a"}
    assert w.store.published[-1][2] > w.clock.at_s


async def test_nothing_is_reaped_while_clients_announce() -> None:
    """A client that could not renew in the outage is not dead yet."""
    w = World()
    await w.round()
    await w.push("1")
    w.store.run = "second"
    w.clock.at_s += 1.5 * LEASE_S
    await w.round()
    assert w.statuses("1") == ["queued"]
    await w.round(LEASE_S + 1)
    assert w.statuses("1") == ["lost"]


async def test_a_restart_that_is_noticed_during_an_outage_still_counts_after_it() -> None:
    """The store says who it is, then does not answer: when it does, the hold begins."""
    w = World()
    await w.round()
    w.store.run = "second"
    w.store.faults["lead"] = [QueueUnavailable(), None]
    with pytest.raises(QueueUnavailable):
        await w.round(LEASE_S / 4)
    await w.push("1")
    await w.round(0.25)
    assert w.scheduler.epoch == 2
    assert await w.granted() == {}


async def test_a_log_that_is_read_again_teaches_once() -> None:
    """A store that kept its log over a restart does not double what was learned; one that lost it takes nothing away."""
    w = World()
    w.store._log.extend(enumerate(history("r", 300), start=1))
    w.store._logged = 30
    await w.round()
    w.store.run = "second"
    await w.round(LEASE_S / 4)
    w.store._log.clear()
    w.store._logged = 0
    w.store.run = "third"
    w.store._append(history("r", 301, 1)[0])
    await w.round(LEASE_S / 4)
    t = Ticket(stage_id="s", client_id="c", model="m", role="r")
    assert w.scheduler.predict([t])["s"].basis == "role(31)"


# -- the dead and what they leave ----------------------------------------------------------------------------------------
async def test_a_dead_apps_stages_end_as_lost_and_their_reservations_drain() -> None:
    """Granted and waiting alike; a mute engine is believed idle a lease later."""
    w = World()
    await w.round()
    await w.push("1")
    await w.round()
    await w.push("2")
    await w.round(LEASE_S + 0.1)
    assert w.statuses("1", "2") == ["lost", "lost"]
    assert await w.reserved() == 1
    await w.round(LEASE_S - 0.1)
    assert await w.reserved() == 1
    await w.round(0.6)
    assert await w.reserved() == 0


async def drain(w: World, n: int, *, kv_bytes: Sequence[int] = ()) -> None:
    """``n`` granted stages whose callers went away in the middle."""
    names = [f"d{i}-{w.scheduler.decisions}" for i in range(n)]
    for i, name in enumerate(names):
        await w.push(name, prompt_tokens=kv_bytes[i] if kv_bytes else 10, max_tokens=0)
        await w.round()
        assert name in await w.granted()
    for name in names:
        await w.store.cancel(name, "m", client_id=None, now_s=w.clock.at_s, draining=True)


async def look_and_settle(w: World, health: EngineHealth, *, times: int = 1, every_s: float = 0.6) -> int:
    """Some looks at the engine, each judged; how many reservations are left."""
    assert w.probe is not None
    w.probe.says["a"] = health
    for _ in range(times):
        w.clock.at_s += every_s
        await w.renew()
        await w.look()
        await w.scheduler.settle()
        await w.scheduler.settle()  # the same look again proves nothing new
    return await w.reserved()


async def test_a_reservation_is_free_when_two_looks_say_so() -> None:
    """One look may miss a request that arrives this moment."""
    w = World(engine(slots=4), probe=Probe(a=idle()))
    await w.look()
    await w.round()
    await drain(w, 2)
    assert await look_and_settle(w, idle()) == 2
    assert await look_and_settle(w, idle()) == 0


async def test_an_engine_that_still_computes_keeps_the_reservations() -> None:
    """As many as it runs beyond the live stages stay, the largest; what waits inside it counts as well."""
    w = World(engine(slots=4, kv_bytes_per_token=1), probe=Probe(a=idle()))
    await w.look()
    await w.round()
    await drain(w, 3, kv_bytes=(10, 30, 20))
    assert await look_and_settle(w, idle(running=2, waiting=1), times=5) == 3
    assert await look_and_settle(w, idle(running=1), times=2) == 1
    assert (await w.store.ledger()).kv_bytes == {"a": 30}
    assert await look_and_settle(w, idle(), times=2) == 0


async def test_live_stages_are_not_mistaken_for_abandoned_ones() -> None:
    """What the engine runs for them does not count; a grant too young to have reached it does not speak for it."""
    w = World(engine(slots=4), probe=Probe(a=idle()))
    await w.look()
    await w.round()
    await drain(w, 1)
    await w.push("live")
    await w.round()
    token = await w.token("live")
    # the abandoned one still runs, the live one has not arrived
    assert await look_and_settle(w, idle(running=1), every_s=0.1) == 2
    assert await look_and_settle(w, idle(running=1), every_s=0.1) == 2
    # both run
    w.clock.at_s += 1
    assert await look_and_settle(w, idle(running=2), times=4) == 2
    # the live one alone
    await w.renew(live=token)
    assert await look_and_settle(w, idle(running=1), times=2) == 1
    assert list(await w.granted()) == ["live"]


@pytest.mark.parametrize("junk", [10**9, 3, math.inf, math.nan, -1, -(10**6)])
async def test_an_engine_that_never_agrees_is_overruled(junk: Any) -> None:
    """Others use it too, or it reports nonsense: a mute one is believed after a lease, a busy one after some."""
    w = World(engine(slots=4), probe=Probe(a=idle()))
    await w.look()
    await w.round()
    await drain(w, 2)
    mute = not 0 <= junk < math.inf
    limit_s = LEASE_S * (1 if mute else DRAIN_LEASES)
    assert await look_and_settle(w, idle(running=junk), every_s=limit_s / 2) == 2
    assert await look_and_settle(w, idle(running=junk), every_s=limit_s / 2 - 1) == 2
    assert await look_and_settle(w, idle(running=junk), every_s=1.1) == 0


async def test_a_dead_engine_and_one_that_left_compute_nothing() -> None:
    """Their reservations are given back at once."""
    w = World(engine(slots=4), probe=Probe(a=idle()))
    await w.look()
    await w.round()
    await drain(w, 2)
    assert await look_and_settle(w, EngineHealth(healthy=False), times=1) == 2
    assert await look_and_settle(w, EngineHealth(healthy=False), times=FAILURES - 1) == 0
    assert await look_and_settle(w, idle(running=1), times=1) == 0
    await w.round()
    await drain(w, 2)
    w.scheduler.engines.clear()
    await w.scheduler.settle()
    assert await w.reserved() == 0


@given(st.lists(st.sampled_from("ggsseckllll"), min_size=5, max_size=60), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_reservations_never_fall_below_what_the_engine_computes(moves: list[str], random: Any) -> None:
    """An honest engine, any traffic: each request it computes keeps a slot reserved; all is free once it is idle."""

    async def play() -> None:
        w = World(engine(slots=4), probe=Probe(a=idle()))
        await w.look()
        await w.round()
        computing: set[str] = set()
        on_its_way: dict[str, float] = {}
        for n, move in enumerate(moves):
            w.clock.at_s += random.choice((0.05, 0.1, 0.2))
            live = list(await w.granted())
            await w.renew(**{s: await w.token(s) for s in live})
            for s, at_s in list(on_its_way.items()):
                if at_s <= w.clock.at_s:
                    del on_its_way[s]
                    computing.add(s)
            arrived = [s for s in live if s in computing]
            if move == "g":
                await w.push(f"s{n}", max_tokens=10)
                await w.round()
                for s in set(await w.granted()) - set(live):
                    on_its_way[s] = w.clock.at_s + random.choice((0.0, 0.1, 0.2))
            elif move == "e" and arrived:  # its answer is complete
                s = random.choice(arrived)
                computing.discard(s)
                await w.finish(s, after_s=0)
            elif move == "c" and arrived:  # its caller goes away, the engine goes on
                await w.store.cancel(random.choice(arrived), "m", client_id=None, now_s=w.clock.at_s, draining=True)
            elif move == "k" and (left := sorted(computing - set(live))):  # the engine ends an abandoned one
                computing.discard(random.choice(left))
            elif move == "l":
                assert w.probe is not None
                w.probe.says["a"] = idle(running=len(computing))
                await w.look()
            elif move == "s":
                await w.scheduler.settle()
            assert await w.reserved() >= len(computing)
        for s in await w.granted():
            await w.finish(s)
        assert await look_and_settle(w, idle(), times=3) == 0

    asyncio.run(play())


# -- engines -------------------------------------------------------------------------------------------------------------
async def test_an_engines_death_and_return_are_published_at_once() -> None:
    """One probe may be lost; after two it gets no more stages, and its stages go elsewhere until it is back."""
    w = World(engine("a"), engine("b"), probe=Probe(a=idle(), b=idle()))
    await w.look()
    await w.round()
    assert w.store.published[-1][0] == ("a", "b")
    assert w.probe is not None
    w.probe.says["a"] = EngineHealth(healthy=False)
    await w.look()
    await w.round(0.01)
    assert w.store.published[-1][0] == ("a", "b")
    await w.look()
    await w.push("1")
    await w.push("2")
    await w.round(0.01)
    assert w.store.published[-1][0] == ("b",)
    assert list((await w.granted()).values()) == ["b"]
    w.probe.says["a"] = idle()
    await w.look()
    await w.round(0.01)
    assert sorted((await w.granted()).values()) == ["a", "b"]


async def test_an_engine_that_was_never_seen_alive_gets_nothing() -> None:
    """It is in the fleet file, but nobody answers."""
    w = World(engine("a"), probe=Probe())
    await w.look()
    await w.round()
    await w.push("1", engines=w.engines)
    await w.round()
    assert await w.granted() == {}


async def test_the_first_publication_knows_who_is_alive() -> None:
    """The loop looks at all engines before it leads: no client sees a fleet with holes that are none."""
    w = World(engine("a"), engine("b"), probe=Probe(a=idle(), b=idle()))
    async with running(w.scheduler):
        await until(lambda: w.store.published)
    assert w.store.published[0][0] == ("a", "b")


async def test_probes_that_hang_or_raise_concern_their_engine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine never answers, another's probe has a bug: both count as dead, the third is served."""
    monkeypatch.setattr(scheduler_module, "PROBE_LIMIT_S", 0.05)
    monkeypatch.setattr(scheduler_module, "PROBE_S", 0.01)
    probe = Probe(a=idle(), b=idle(), c=idle())
    w = World(engine("a"), engine("b"), engine("c"), probe=probe)
    async with running(w.scheduler):
        await until(lambda: w.store.published)
        probe.hangs["a"] = asyncio.Event()
        probe.raises["b"] = RuntimeError("a bug")
        await until(lambda: not w.scheduler.healthy("a") and not w.scheduler.healthy("b"))
        assert w.scheduler.healthy("c")
        await until(lambda: w.store.published[-1][0] == ("c",))
        probe.hangs.pop("a").set()
        probe.raises.clear()
        await until(lambda: w.store.published[-1][0] == ("a", "b", "c"))


async def test_blocks_are_as_large_as_the_engine_says() -> None:
    """Its own metrics know the size of a block; before they are read, and where they are silent, the fleet's word stands."""
    says = idle(kv_tokens=1_000)
    probe = Probe(a=dataclasses.replace(says, kv_block_tokens=128), b=says)
    w = World(engine("a", kv_block_tokens=16), engine("b", kv_block_tokens=16), probe=probe)
    await w.look()
    assert [e.kv_block_tokens for e in w.scheduler.engines.values()] == [128, 16]


def begun(*texts: str) -> str:
    """The hashes of a prompt that begins with these texts."""
    return prompt_blocks({"messages": [{"role": "user", "content": text} for text in texts]}, b"salt")


async def test_a_stage_goes_where_its_prompt_is_cached_and_a_new_leader_knows_it_too() -> None:
    """What was sent to an engine draws what begins alike there; the observation log tells a successor."""
    w = World(engine("a", slots=4), engine("b", slots=4))
    await w.round()
    long, prompt_tokens = "word " * 2_000, 2_500
    await w.push("first", prefix=begun(long), prompt_tokens=prompt_tokens, excluded_engines=("a",))
    await w.round(0.1)
    assert await w.granted() == {"first": "b"}
    await w.push("second", prefix=begun(long, "and then"), prompt_tokens=prompt_tokens)
    await w.round(0.1)
    assert (await w.granted())["second"] == "b"  # else a: it has fewer stages
    (second,) = (r for r in await w.store.running() if r.ticket.stage_id == "second")
    await w.push("third", prefix=begun("other " * 2_000), prompt_tokens=prompt_tokens)
    await w.round(0.1)
    (third,) = (r for r in await w.store.running() if r.ticket.stage_id == "third")
    assert third.engine_id == "a"
    assert second.because["prefill_s"] < 0.2 * third.because["prefill_s"]
    now_s = w.clock.now_s()
    o = dataclasses.replace(observed(second.ticket, "b", 5, now_s, now_s + 1), prefix=second.ticket.prefix)
    await w.store.finish(
        dataclasses.replace(o, cached_tokens=2_432), client_id="c", token=second.token, now_s=now_s + 1
    )
    successor = w.candidate("second")
    await w.round(10 * LEASE_S, successor)
    fresh = Ticket(stage_id="x", client_id="c", model="m", prompt_tokens=prompt_tokens, prefix=begun(long))
    assert successor.cached_tokens([fresh])["x", "b"] > 2_000
    assert ("x", "a") not in successor.cached_tokens([fresh])


async def test_kv_memory_that_the_engine_reports_is_used_and_follows_a_restart() -> None:
    """Where the fleet file says nothing; what it says stands."""
    probe = Probe(a=idle(kv_tokens=100), b=idle(kv_tokens=100))
    w = World(engine("a", kv_bytes_per_token=2), engine("b", kv_bytes=7), probe=probe)
    await w.look()
    assert [e.kv_bytes for e in w.scheduler.engines.values()] == [200, 7]
    probe.says["a"] = idle(kv_tokens=50)
    await w.scheduler._look(w.scheduler.engines["a"])
    assert [e.kv_bytes for e in w.scheduler.engines.values()] == [100, 7]


async def test_an_engine_may_join() -> None:
    """It is published at once and gets stages."""
    w = World()
    await w.round()
    await w.scheduler.add_engine(engine("b", model="other"))
    assert w.store.published[-1][0] == ("a", "b")
    await w.push("1", model="other")
    await w.round()
    assert await w.granted() == {"1": "b"}


# -- bugs and outages ----------------------------------------------------------------------------------------------------
async def test_an_order_that_fails_or_says_nonsense_is_first_come_first_served(caplog: Any) -> None:
    """The user's own function raises for one stage and says NaN for another: told once per kind, all are served."""
    w = World(engine(slots=1))
    await w.round()

    def order(ticket: Ticket, prediction: Prediction, now_s: float) -> float:
        if ticket.role == "raises":
            raise KeyError(ticket.role)
        return math.nan if ticket.role == "nan" else ticket.pushed_at_s

    w.scheduler.policy = Policy(order=order)
    for stage_id, role in (("1", "raises"), ("2", "nan"), ("3", "fine"), ("4", "raises")):
        await w.push(stage_id, role=role)
        w.clock.at_s += 0.1
    served: list[str] = []
    for _ in range(4):
        await w.round()
        (stage_id,) = await w.granted()
        served.append(stage_id)
        await w.finish(stage_id)
    assert served == ["1", "2", "3", "4"]
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert told == ["a bug (the order); the scheduler goes on"] * 2, "a KeyError and a ValueError"


async def test_what_goes_wrong_in_one_part_leaves_the_others(caplog: Any) -> None:
    """One model's heads, one grant, the reaper: each fails for ever, and the other stages are served all the same."""
    w = World(engine(slots=9), engine("b", model="other"))
    await w.round()
    w.store.faults = {n: [RuntimeError(n)] for n in ("heads other", "grant 1", "reap")}
    for _ in range(3):
        for stage_id in ("1", "2", "3"):
            await w.push(stage_id)
        await w.push("4", model="other")
        await w.round(1)
    assert set(await w.granted()) == {"2", "3"}
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 3


@pytest.mark.parametrize("command", ["lead", "incarnation", "publish", "wake"])
@pytest.mark.parametrize("fault", [RuntimeError("a bug"), QueueUnavailable()])
async def test_the_loop_survives(command: str, fault: Exception, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Bugs and outages of the queue end no scheduler; it serves on when they are over."""
    monkeypatch.setattr(scheduler_module, "TICK_S", 0.005)
    w = World()
    w.store.faults[command] = [fault, fault, fault, None]
    async with running(w.scheduler) as task:
        await until(lambda: len(w.store.faults[command]) == 1)
        await w.push("1")
        await until(w.granted)
        assert not task.done()
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == isinstance(fault, RuntimeError)


async def test_a_dead_client_gets_no_grant() -> None:
    """Its waiting stage ends as lost at the moment it would have been granted."""
    w = World()
    await w.round()
    await w.push("1")
    w.clock.at_s += LEASE_S + 1
    w.scheduler._reaped_at_s = w.clock.at_s  # before the reaper comes
    await w.round()
    assert w.statuses("1") == ["lost"]
    assert await w.reserved() == 0


@pytest.mark.parametrize(("policy", "fast"), [("ours", True), ("edf", True), ("ours-nearest", False)])
async def test_a_policy_that_routes_by_itself_leaves_nothing_to_the_fast_path(policy: str, fast: bool) -> None:
    """Its credits are never valid, so that every stage waits for its word; another order alone changes nothing of that."""
    store, clock = Store(), Clock()
    engine = EngineSpec(engine_id="e", url="http://127.0.0.1:1/v1", model="m", slots=1)
    leader = Scheduler(store, [engine], clock=clock, holder="a", policy=LIVE[policy])
    assert await leader.lead()
    _, _, valid_until_s = store.published[-1]
    assert (valid_until_s > clock.at_s) is fast
    ticket = Ticket(stage_id="s", client_id="c", model="m")
    assert (await store.push(ticket, engines=[engine], now_s=clock.at_s) is not None) is fast
    await leader.step()
    assert [r.ticket.stage_id for r in await store.running()] == ["s"]
