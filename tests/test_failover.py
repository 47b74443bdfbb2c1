"""The scheduler survives: a standby takes over in time, knows what its predecessor knew, and the predecessor's word is void."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest

from maestro_agents.cli.bench import failover
from maestro_agents.core import EngineSpec, Grant, Observation, ServiceClass, Status, Ticket
from maestro_agents.nodes import EngineReport, GpuReport, NodeReport
from maestro_agents.queue.redis import RedisClock, RedisQueue
from maestro_agents.scheduler import Scheduler

LEASE_S = 2.0
ENGINE = EngineSpec(engine_id="e", url="http://127.0.0.1:1/v1", model="m", slots=2, kv_bytes=10_000)
LIMIT_S = 20.0


@pytest.fixture
async def queue(redis_url: str, pool: str) -> AsyncIterator[RedisQueue]:
    """A pool of this test's own."""
    made = RedisQueue(redis_url, pool=pool, lease_s=LEASE_S)
    yield made
    await made.close()


async def candidate(queue: RedisQueue, name: str, engines: Sequence[EngineSpec] = (ENGINE,)) -> Scheduler:
    """One that may lead; it asks no engine how it is."""
    clock = RedisClock()
    await clock.sync(queue)
    return Scheduler(queue, engines, clock=clock, holder=name, lease_s=LEASE_S)


@contextlib.contextmanager
def running(*schedulers: Scheduler) -> Iterator[list[asyncio.Task[None]]]:
    """Let schedulers run; those that still do are cancelled at the end."""
    tasks = [asyncio.create_task(s.run()) for s in schedulers]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()


async def until(holds: Callable[[], Any]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(LIMIT_S):
        while not holds():
            await asyncio.sleep(0.005)


def ticket(stage_id: str) -> Ticket:
    return Ticket(stage_id=stage_id, client_id="app", model="m", role="r", prompt_tokens=100, max_tokens=50, tenant="t")


def observed(t: Ticket, output_tokens: int, at_s: float) -> Observation:
    return Observation(
        stage_id=t.stage_id, run_id="r", workflow="", role=t.role, node="", model="m", engine_id="e", tenant="t",
        service_class=ServiceClass.BATCH, status=Status.DONE, prompt_tokens=100, output_tokens=output_tokens,
        pushed_at_s=at_s - 2, granted_at_s=at_s - 1, finished_at_s=at_s,
    )  # fmt: skip


async def dies(scheduler: Scheduler, task: asyncio.Task[None]) -> None:
    """As kill -9 would have it: not another word to the queue."""
    scheduler.leading = False
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_standby_takes_over_within_two_leadership_periods(queue: RedisQueue) -> None:
    """The leader says nothing more; the standby leads, and serves who waits, before two of its periods are over."""
    first, second = await candidate(queue, "first"), await candidate(queue, "second")
    with running(first) as (leader,):
        await until(lambda: first.leading)
        with running(second):
            await dies(first, leader)
            began_s = first.clock.now_s()
            await until(lambda: second.leading)
            assert second.clock.now_s() - began_s < 2 * LEASE_S / 2
            assert second.epoch > first.epoch
            verdict = await queue.push(ticket("s"), engines=(ENGINE,), now_s=second.clock.now_s())
            assert isinstance(verdict, Grant)
            assert verdict.epoch == second.epoch


async def test_a_leader_that_ends_in_order_does_not_keep_the_standby_waiting(queue: RedisQueue) -> None:
    """It gives leadership back: the standby need not wait until that expires, which takes three tenths of a lease at least."""
    first, second = await candidate(queue, "first"), await candidate(queue, "second")
    with running(first) as (leader,):
        await until(lambda: first.leading)
        with running(second):
            await until(lambda: first.clock.now_s() - first._led_at_s < 0.02)  # else its time might be over anyway
            leader.cancel()
            await asyncio.gather(leader, return_exceptions=True)
            began_s = first.clock.now_s()
            await until(lambda: second.leading)
            assert second.clock.now_s() - began_s < 0.3 * LEASE_S


async def test_a_standby_that_is_cancelled_leaves_the_leader_alone(queue: RedisQueue) -> None:
    """Only who leads has leadership to give back."""
    first, second = await candidate(queue, "first"), await candidate(queue, "second")
    with running(first):
        await until(lambda: first.leading)
        with running(second) as (standby,):
            await until(lambda: second.heard_at_s > 0)
            standby.cancel()
            await asyncio.gather(standby, return_exceptions=True)
        assert await queue.leader() == "first"
        assert (await queue.renew("app", {}, now_s=first.clock.now_s())).led


async def test_a_new_leader_knows_what_the_queue_knows(queue: RedisQueue) -> None:
    """Statistics come back from the log, reservations from the ledger, and what is wanted of a node stands, under its epoch."""
    first, second = await candidate(queue, "first"), await candidate(queue, "second")
    now_s = first.clock.now_s()
    slept = EngineReport(
        spec=EngineSpec(engine_id="n", url="http://127.0.0.1:2/v1", model="m"), gpu_id="g", tier="gpu", to="gpu"
    )
    gpu = GpuReport(gpu_id="g", memory_bytes=9, usable_bytes=8)
    await queue.report(NodeReport(node_id="node", at_s=now_s, gpus=(gpu,), engines=(slept,)), now_s=now_s, ttl_s=60.0)
    for n in range(30):
        await queue.observe(observed(ticket(f"seen-{n}"), 77, now_s))
    assert await first.lead()
    await first.step()
    held = await queue.push(ticket("held"), engines=(ENGINE,), now_s=first.clock.now_s())
    assert isinstance(held, Grant)
    told = await queue.wanted("node", known="", timeout_s=0.0)
    assert told is not None
    first.leading = False
    assert await queue.lead("first", ttl_s=-1.0, now_s=first.clock.now_s())  # dead for longer than its time
    await second.step()
    assert await second.lead()
    assert second.epoch > first.epoch
    await second.step()
    for one in (first, second):
        predicted = one.predict([ticket("next").evolve(max_tokens=None)])["next"]
        assert predicted.output_tokens_p50 == pytest.approx(77, rel=0.2)
    (engine,) = (e for e in await second.fleet() if e.spec.engine_id == "e")
    assert (engine.reserved_slots, engine.reserved_kv_bytes) == (1, held.kv_bytes)
    again = await queue.wanted("node", known="", timeout_s=0.0)
    assert again is not None
    assert (again[1].engines, again[1].epoch) == (told[1].engines, second.epoch)
    done = observed(ticket("held"), 5, now_s)
    assert await queue.finish(done, client_id="app", token=held.token, now_s=second.clock.now_s())


async def test_a_leader_that_was_stopped_wakes_up_to_find_its_word_void(queue: RedisQueue) -> None:
    """In the middle of a round, with a plan in its hands: none of it is carried out, nothing published, no node told."""
    first, second = await candidate(queue, "first"), await candidate(queue, "second")
    assert await first.lead()
    assert await queue.publish([ENGINE], p99={}, epoch=first.epoch, valid_until_s=0.0)  # nothing goes by the fast path
    assert await queue.push(ticket("s"), engines=(ENGINE,), now_s=first.clock.now_s()) is None
    plan = await first.decide()
    assert [t.stage_id for t, _ in plan.grants] == ["s"]
    assert await queue.lead("first", ttl_s=-1.0, now_s=first.clock.now_s())  # it is stopped for longer than its time
    assert await second.lead()
    await first.act(plan)
    await first.publish()
    assert not first.leading
    assert (await queue.ledger()).slots == {}
    assert await queue.depth("m") == 1
    await second.step()
    (given,) = await queue.verdicts("app", 1.0)
    assert isinstance(given, Grant)
    assert given.epoch == second.epoch


# -- the bench -----------------------------------------------------------------------------------------------------------
def record(token: int, epoch: int, granted_at_s: float, *, fast: bool = False) -> dict[str, str]:
    return {"token": str(token), "epoch": str(epoch), "granted_at": str(granted_at_s), "fast": str(int(fast))}


def test_the_bench_finds_grants_under_an_epoch_that_is_over() -> None:
    """Fencing tokens say which grant came first, whatever clocks say."""
    fine = [record(1, 1, 5.0), record(3, 2, 4.0), record(2, 1, 9.0)]
    assert failover.deposed(fine) == 0
    assert failover.deposed([*fine, record(4, 1, 1.0)]) == 1


def test_the_bench_measures_the_gap_between_two_planners() -> None:
    """From the old one's last grant to the new one's first; the fast path's in between are counted apart."""
    found = failover.around(
        [record(1, 1, 9.5), record(2, 1, 10.0), record(3, 1, 10.5, fast=True), record(4, 2, 12.0), record(5, 2, 12.1)],
        10.1,
    )
    assert (found["gap_s"], found["fast_in_gap"]) == (2.0, 1)
    assert failover.around([record(1, 1, 9.5)], 10.0)["gap_s"] is None


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", failover.KINDS)
def test_no_stage_is_lost_or_served_twice_when_the_leader_goes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three real schedulers, a real app under load, emulated engines that count what they are asked: once each."""
    monkeypatch.setenv("MAESTRO_LEASE_S", "5")  # the bench sets it: put back afterwards
    rows: list[dict[str, Any]] = failover.run("emulator", (kind,), 1, 7, 0.3, None, lambda _row: None)
    (found,) = failover.summary(rows)
    assert found["kept"], rows
