"""The queue's promises (`ports.Queue`), held by every implementation: memory, Redis as it is, Redis emulated."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import AsyncIterator

import pytest

from maestro_agents.core import (
    EngineSpec,
    Grant,
    Mode,
    Observation,
    Refusal,
    RunEnd,
    ServiceClass,
    Status,
    Switch,
    Ticket,
    covered_tokens,
    kv_need_bytes,
)
from maestro_agents.nodes import EngineReport, GpuReport, NodeReport, Want, Wanted
from maestro_agents.ports import RETRY_FLOOR_S, Backlog, Distance, Queue
from maestro_agents.queue.memory import MemoryQueue
from maestro_agents.queue.redis import RedisQueue
from maestro_agents.tenants import Tenant
from tests.queues import Roles, fake_redis_queue, fresh_redis_queue

A = EngineSpec(engine_id="a", url="http://127.0.0.1:1/v1", model="m", slots=2, kv_bytes=10_000, kv_bytes_per_token=1)
B = EngineSpec(engine_id="b", url="http://127.0.0.1:2/v1", model="m", slots=1, kv_bytes=10_000, kv_bytes_per_token=1)
NOW = 1_790_000_000.0
LEASE_S = 10.0


@pytest.fixture(params=["memory", "redis", "fakeredis", "tls", "sentinel", "cluster", "roles"])
async def queue(request: pytest.FixtureRequest, redis_url: str) -> AsyncIterator[Queue]:
    """One implementation after the other, Redis in every way that an operator may run it."""
    made: MemoryQueue | RedisQueue | Roles
    if request.param == "memory":
        made = MemoryQueue(lease_s=LEASE_S, max_queue=3)
    elif request.param == "redis":
        made = await fresh_redis_queue(redis_url, lease_s=LEASE_S, max_queue=3)
    elif request.param == "roles":
        made = Roles(request.getfixturevalue("redis_7"), lease_s=LEASE_S, max_queue=3)
    elif request.param in ("tls", "sentinel", "cluster"):
        made = await fresh_redis_queue(request.getfixturevalue(f"{request.param}_url"), lease_s=LEASE_S, max_queue=3)
    else:
        made = fake_redis_queue(lease_s=LEASE_S, max_queue=3)
    yield made
    await made.close()


def ticket(stage_id: str, **changes: object) -> Ticket:
    base = Ticket(
        stage_id=stage_id,
        client_id="app",
        model="m",
        role="r",
        prompt_tokens=100,
        max_tokens=50,
        due_at_s=NOW,
        pushed_at_s=NOW,
    )
    return base.evolve(**changes)


def wish(stage_id: str, engine_id: str = "a", epoch: int = 1, kv_bytes: int = 150) -> Grant:
    return Grant(
        stage_id=stage_id,
        engine_id=engine_id,
        token=0,
        epoch=epoch,
        kv_bytes=kv_bytes,
        priority=7,
        because={"decode_s": 1.5},
    )


def done(t: Ticket, engine_id: str = "a", status: Status = Status.DONE) -> Observation:
    return Observation(
        stage_id=t.stage_id, run_id=t.run_id, workflow="", role=t.role, node="", model=t.model, engine_id=engine_id,
        service_class=ServiceClass.INTERACTIVE, tenant="default", status=status, output_tokens=5,
    )  # fmt: skip


async def led(queue: Queue, *, credit: bool, engines: tuple[EngineSpec, ...] = (A, B)) -> int:
    epoch = await queue.lead("leader", ttl_s=5, now_s=NOW)
    assert epoch is not None
    assert await queue.publish(engines, p99={}, epoch=epoch, valid_until_s=NOW + 1000 if credit else 0.0)
    return epoch


async def empty(queue: Queue) -> bool:
    ledger = await queue.ledger()
    return not ledger.slots and not ledger.kv_bytes


async def test_a_pushed_stage_waits_and_is_first_by_moment(queue: Queue) -> None:
    """Stages wait in the order of their moments, whatever the order of their pushes."""
    await led(queue, credit=False)
    for name, due in (("late", NOW + 2), ("soon", NOW - 1.25), ("mid", NOW + 0.5)):
        assert await queue.push(ticket(name, due_at_s=due), engines=(A, B), now_s=NOW) is None
    heads = await queue.heads("m", 10)
    assert [t.stage_id for t in heads] == ["soon", "mid", "late"]
    assert [t.due_at_s for t in heads] == [NOW - 1.25, NOW + 0.5, NOW + 2]
    assert await queue.depth("m") == 3


async def test_the_fast_path_spends_a_credit_in_the_same_round_trip(queue: Queue) -> None:
    """With valid credits and nobody waiting, the push returns the grant and reserves slot and KV bytes."""
    epoch = await led(queue, credit=True)
    grant = await queue.push(ticket("s"), engines=(A, B), now_s=NOW)
    assert isinstance(grant, Grant)
    assert (grant.engine_id, grant.epoch, grant.kv_bytes, grant.fast) == ("a", epoch, 150, True)
    assert grant.lease_until_s == NOW + LEASE_S
    ledger = await queue.ledger()
    assert (dict(ledger.slots), dict(ledger.kv_bytes)) == ({"a": 1}, {"a": 150})


async def test_the_fast_path_takes_the_engine_with_most_free_slots_and_stops_at_the_last(queue: Queue) -> None:
    """Three slots serve three stages; the fourth waits."""
    await led(queue, credit=True)
    places = [await queue.push(ticket(f"s{i}"), engines=(A, B), now_s=NOW) for i in range(4)]
    assert [p.engine_id if isinstance(p, Grant) else None for p in places] == ["a", "a", "b", None]
    assert await queue.depth("m") == 1


async def test_the_fast_path_keeps_to_the_kv_bytes(queue: Queue) -> None:
    """A stage that does not fit into free KV memory waits, though a slot is free."""
    await led(queue, credit=True, engines=(A,))
    assert isinstance(await queue.push(ticket("big", prompt_tokens=9_900), engines=(A,), now_s=NOW), Grant)
    assert await queue.push(ticket("small"), engines=(A,), now_s=NOW) is None


async def test_the_fast_path_reserves_the_roles_p99(queue: Queue) -> None:
    """The reservation is prompt + p99 of the role, where the caller sets no smaller bound."""
    epoch = await led(queue, credit=True)
    await queue.publish((A,), p99={"m|r": 321.0}, epoch=epoch, valid_until_s=NOW + 1000)
    await queue.publish((A,), p99={"m|other": 9.0}, epoch=epoch, valid_until_s=NOW + 1000)  # only what changed is said
    grant = await queue.push(ticket("s", max_tokens=None), engines=(A,), now_s=NOW)
    assert isinstance(grant, Grant)
    assert grant.kv_bytes == 421


async def test_stale_credits_grant_nothing(queue: Queue) -> None:
    """Credits of an older epoch, or past their time, are not spent."""
    epoch = await led(queue, credit=True)
    assert await queue.push(ticket("late"), engines=(A,), now_s=NOW + 1000) is None
    assert await queue.cancel("late", "m", client_id="app", now_s=NOW, draining=False) is Status.QUEUED
    assert await queue.lead("other", ttl_s=5, now_s=NOW + 6) == epoch + 1
    assert await queue.push(ticket("s"), engines=(A,), now_s=NOW) is None


async def test_nobody_overtakes_a_waiting_stage_on_the_fast_path(queue: Queue) -> None:
    """While a stage of the model waits, a push waits too, though a slot is free."""
    await led(queue, credit=False)
    await queue.push(ticket("first"), engines=(A,), now_s=NOW)
    await led(queue, credit=True)
    assert await queue.push(ticket("second"), engines=(A,), now_s=NOW) is None


async def test_a_nested_stage_is_admitted_at_once(queue: Queue) -> None:
    """Its parent holds a slot until it has run: it waits neither for slots nor behind the ready set."""
    await led(queue, credit=True, engines=(B,))
    assert isinstance(await queue.push(ticket("parent"), engines=(B,), now_s=NOW), Grant)
    await queue.push(ticket("waiting"), engines=(B,), now_s=NOW)
    assert isinstance(await queue.push(ticket("child", nested=True), engines=(B,), now_s=NOW), Grant)


async def test_a_push_is_idempotent(queue: Queue) -> None:
    """Pushing a known stage changes nothing and returns the grant it has."""
    await led(queue, credit=True)
    first = await queue.push(ticket("s"), engines=(A,), now_s=NOW)
    again = await queue.push(ticket("s"), engines=(A,), now_s=NOW + 1)
    assert isinstance(first, Grant)
    assert isinstance(again, Grant)
    assert again.token == first.token
    assert (await queue.ledger()).slots == {"a": 1}


async def test_a_full_queue_refuses(queue: Queue) -> None:
    """The bound is kept, and the refused stage leaves no trace."""
    await led(queue, credit=False)
    for i in range(3):
        assert await queue.push(ticket(f"s{i}"), engines=(A,), now_s=NOW) is None
    refused = await queue.push(ticket("s3"), engines=(A,), now_s=NOW)
    assert isinstance(refused, Refusal)
    assert refused.reason == "full"
    assert await queue.cancel("s3", "m", client_id="app", now_s=NOW, draining=False) is None


async def test_a_grant_reaches_its_client_once(queue: Queue) -> None:
    """The grant of the planner arrives in the inbox with its token, priority and reasons; then the inbox is empty."""
    epoch = await led(queue, credit=False)
    t = ticket("s")
    await queue.push(t, engines=(A,), now_s=NOW)
    given = await queue.grant(wish("s", epoch=epoch), t, now_s=NOW + 1)
    assert given is not None
    (heard,) = await queue.verdicts("app", 1.0)
    assert heard == given
    assert isinstance(heard, Grant)
    assert (heard.priority, heard.because, heard.lease_until_s) == (7, {"decode_s": 1.5}, NOW + 1 + LEASE_S)
    assert not await queue.verdicts("app", 0.01)
    assert await queue.depth("m") == 0


async def test_a_grant_is_refused_by_the_queue_when_it_is_stale(queue: Queue) -> None:
    """An older epoch, a stage that waits no more, a full engine, an unknown engine: nothing changes."""
    epoch = await led(queue, credit=False)
    t = ticket("s")
    await queue.push(t, engines=(A,), now_s=NOW)
    assert await queue.grant(wish("s", epoch=epoch - 1), t, now_s=NOW) is None
    assert await queue.grant(wish("s", "nowhere", epoch=epoch), t, now_s=NOW) is None
    assert await queue.grant(wish("s", epoch=epoch, kv_bytes=20_000), t, now_s=NOW) is None
    assert await queue.grant(wish("s", epoch=epoch), t, now_s=NOW) is not None
    assert await queue.grant(wish("s", epoch=epoch), t, now_s=NOW) is None
    assert (await queue.ledger()).slots == {"a": 1}


async def test_a_stage_of_a_dead_client_is_not_granted(queue: Queue) -> None:
    """The planner meets a stage whose app is gone: it ends as lost."""
    epoch = await led(queue, credit=False)
    t = ticket("s")
    await queue.push(t, engines=(A,), now_s=NOW)
    assert await queue.grant(wish("s", epoch=epoch), t, now_s=NOW + LEASE_S + 1) is None
    assert await queue.depth("m") == 0
    assert await queue.cancel("s", "m", client_id="app", now_s=NOW, draining=False) is Status.LOST


async def test_finish_frees_the_reservation_and_logs_once(queue: Queue) -> None:
    """Only the holder's first word counts."""
    await led(queue, credit=True)
    t = ticket("s")
    grant = await queue.push(t, engines=(A,), now_s=NOW)
    assert isinstance(grant, Grant)
    assert not await queue.finish(done(t), client_id="app", token=grant.token + 1, now_s=NOW)
    assert await queue.finish(done(t), client_id="app", token=grant.token, now_s=NOW)
    assert not await queue.finish(done(t), client_id="app", token=grant.token, now_s=NOW)
    assert await empty(queue)
    position, entries = await queue.read_log("", 10)
    assert [e.stage_id for e in entries if isinstance(e, Observation)] == ["s"]
    assert (await queue.read_log(position, 10))[1] in ((), [])


async def test_a_grant_is_its_clients_and_nobody_elses(queue: Queue) -> None:
    """Whoever knows stage id and token of another's grant can neither end it nor move, renew, fetch or grow it."""
    await led(queue, credit=True, engines=(B,))
    t = ticket("s")
    grant = await queue.push(t, engines=(B,), now_s=NOW)
    assert isinstance(grant, Grant)
    thief = t.evolve(client_id="thief")
    before = (await queue.running(), await queue.ledger())
    assert not await queue.finish(done(t, "b"), client_id="thief", token=grant.token, now_s=NOW)
    assert not await queue.requeue(thief, token=grant.token, now_s=NOW, draining=False)
    assert await queue.extend("s", client_id="thief", token=grant.token, kv_bytes=999) is None
    assert await queue.cancel("s", "m", client_id="thief", now_s=NOW, draining=False) is None
    assert await queue.push(thief, engines=(B,), now_s=NOW) is None
    await queue.announce(thief, dataclasses.replace(grant, kv_bytes=1), now_s=NOW)
    renewal = await queue.renew("thief", {"s": grant.token}, now_s=NOW + LEASE_S)
    assert (renewal.gone, renewal.granted) == (("s",), ())
    assert (await queue.running(), await queue.ledger()) == before
    assert not (await queue.read_log("", 10))[1]
    assert await queue.finish(done(t, "b"), client_id="app", token=grant.token, now_s=NOW)
    assert await queue.cancel("s", "m", client_id="thief", now_s=NOW, draining=False) is None
    assert await queue.cancel("s", "m", client_id="app", now_s=NOW, draining=False) is Status.DONE


async def test_a_waiting_stage_is_its_clients_and_the_operators(queue: Queue) -> None:
    """Another client can neither withdraw it nor is it told of its grant; an operator, who says so, withdraws it."""
    await led(queue, credit=False)
    await queue.push(ticket("s"), engines=(A,), now_s=NOW)
    assert await queue.cancel("s", "m", client_id="thief", now_s=NOW, draining=False) is None
    assert (await queue.renew("thief", {"s": 0}, now_s=NOW)).gone == ("s",)
    assert await queue.depth("m") == 1
    assert await queue.cancel("s", "m", client_id=None, now_s=NOW, draining=False) is Status.QUEUED
    assert await queue.depth("m") == 0


async def test_the_log_keeps_observations_and_ends_of_runs_in_order(queue: Queue) -> None:
    """A reader that comes back continues where it was; infinities survive."""
    await led(queue, credit=True)
    t = ticket("s")
    grant = await queue.push(t, engines=(A,), now_s=NOW)
    assert isinstance(grant, Grant)
    await queue.finish(done(t), client_id="app", token=grant.token, now_s=NOW)
    run = RunEnd(run_id="r1", workflow="w", outcome="done", started_at_s=NOW, ended_at_s=NOW + 1)
    await queue.end_run(run)
    position, entries = await queue.read_log("", 1)
    assert isinstance(entries[0], Observation)
    assert entries[0].deadline_at_s == math.inf
    assert list((await queue.read_log(position, 10))[1]) == [run]


async def test_a_requeued_stage_waits_again_and_its_old_token_is_void(queue: Queue) -> None:
    """Requeue frees the engine, keeps the stage, and fences the old grant off."""
    await led(queue, credit=True, engines=(A,))
    t = ticket("s")
    grant = await queue.push(t, engines=(A,), now_s=NOW)
    assert isinstance(grant, Grant)
    back = t.evolve(excluded_engines=("a",), attempt=2, due_at_s=NOW + 3)
    assert await queue.requeue(back, token=grant.token, now_s=NOW, draining=False)
    assert not await queue.requeue(back, token=grant.token, now_s=NOW, draining=False)
    assert not await queue.finish(done(t), client_id="app", token=grant.token, now_s=NOW)
    assert await empty(queue)
    (waiting,) = await queue.heads("m", 5)
    assert (waiting.excluded_engines, waiting.attempt, waiting.due_at_s) == (("a",), 2, NOW + 3)


async def test_a_draining_reservation_is_held_until_it_settles(queue: Queue) -> None:
    """Cancelled after its request left: the stage has ended, its memory has not; settled once."""
    await led(queue, credit=True)
    await queue.push(ticket("s"), engines=(A,), now_s=NOW)
    assert await queue.cancel("s", "m", client_id="app", now_s=NOW + 1, draining=True) is Status.GRANTED
    assert (await queue.ledger()).kv_bytes == {"a": 150}
    (left,) = await queue.draining()
    assert (left.engine_id, left.kv_bytes, left.since_s) == ("a", 150, NOW + 1)
    assert await queue.settle(left)
    assert not await queue.settle(left)
    assert await empty(queue)


async def grown(queue: Queue, kv_bytes: int = 214) -> Grant:
    """Stage ``s``, granted by the fast path with 150 bytes and grown since."""
    grant = await queue.push(ticket("s"), engines=(A,), now_s=NOW)
    assert isinstance(grant, Grant)
    assert await queue.extend("s", client_id="app", token=grant.token, kv_bytes=kv_bytes) is True
    return grant


async def test_a_reservation_grows_in_the_record_and_in_the_ledger(queue: Queue) -> None:
    """A total: said twice it counts once, and a smaller one takes nothing back."""
    await led(queue, credit=True)
    grant = await grown(queue)
    for kv_bytes, holds in ((214, 214), (160, 214), (278, 278)):
        assert await queue.extend("s", client_id="app", token=grant.token, kv_bytes=kv_bytes) is True
        (running,) = await queue.running()
        ledger = await queue.ledger()
        assert (running.kv_bytes, dict(ledger.kv_bytes), dict(ledger.slots)) == (holds, {"a": holds}, {"a": 1})


async def test_only_the_holder_of_a_grant_makes_it_grow(queue: Queue) -> None:
    """Another token, a stage that waits, ended or was never there: nothing changes, and the word says so."""
    await led(queue, credit=True, engines=(B,))
    grant = await queue.push(ticket("s"), engines=(B,), now_s=NOW)
    assert isinstance(grant, Grant)
    await queue.push(ticket("waiting"), engines=(B,), now_s=NOW)
    for stage_id, token in (("s", grant.token + 1), ("waiting", 0), ("nobody", 1)):
        assert await queue.extend(stage_id, client_id="app", token=token, kv_bytes=999) is None
    assert (await queue.ledger()).kv_bytes == {"b": 150}
    await queue.finish(done(ticket("s"), "b"), client_id="app", token=grant.token, now_s=NOW)
    assert await queue.extend("s", client_id="app", token=grant.token, kv_bytes=999) is None
    assert await empty(queue)


async def test_a_reservation_grows_past_what_the_engine_has_and_admission_knows(queue: Queue) -> None:
    """The answer streams on, so the ledger says what is true; nothing is granted there until it fits again."""
    epoch = await led(queue, credit=True, engines=(A,))
    grant = await grown(queue, 10_000)
    assert await queue.extend("s", client_id="app", token=grant.token, kv_bytes=10_001) is False
    assert (await queue.ledger()).kv_bytes == {"a": 10_001}
    t = ticket("next", prompt_tokens=0, max_tokens=0)
    assert await queue.push(t, engines=(A,), now_s=NOW) is None
    assert await queue.grant(wish("next", epoch=epoch, kv_bytes=1), t, now_s=NOW) is None
    assert await queue.finish(done(ticket("s")), client_id="app", token=grant.token, now_s=NOW)
    assert await queue.grant(wish("next", epoch=epoch, kv_bytes=1), t, now_s=NOW) is not None


async def test_where_kv_memory_is_unknown_every_growth_fits(queue: Queue) -> None:
    """An engine that says nothing of its KV memory has no bound that could be passed."""
    await led(queue, credit=True, engines=(dataclasses.replace(A, kv_bytes=0),))
    await grown(queue, 10**12)
    assert (await queue.ledger()).kv_bytes == {"a": 10**12}


@pytest.mark.parametrize("end", ["finish", "requeue", "cancel"])
async def test_what_ends_a_grant_frees_all_that_it_had_grown_to(queue: Queue, end: str) -> None:
    """Finished, requeued or cancelled: the ledger is empty afterwards."""
    await led(queue, credit=True)
    grant = await grown(queue)
    if end == "finish":
        assert await queue.finish(done(ticket("s")), client_id="app", token=grant.token, now_s=NOW)
    elif end == "requeue":
        assert await queue.requeue(ticket("s"), token=grant.token, now_s=NOW, draining=False)
    else:
        assert await queue.cancel("s", "m", client_id="app", now_s=NOW, draining=False) is Status.GRANTED
    assert await empty(queue)


@pytest.mark.parametrize("end", ["lose", "requeue", "cancel"])
async def test_all_that_a_reservation_had_grown_to_drains(queue: Queue, end: str) -> None:
    """A killed client, a requeue or a cancellation after the request left: the full amount is held until it settles."""
    await led(queue, credit=True)
    grant = await grown(queue)
    if end == "lose":
        await queue.renew("app", {"s": grant.token}, now_s=NOW + 1)
        assert list(await queue.reap(now_s=NOW + 2 * LEASE_S)) == ["s"]
    elif end == "requeue":
        assert await queue.requeue(ticket("s"), token=grant.token, now_s=NOW, draining=True)
    else:
        assert await queue.cancel("s", "m", client_id="app", now_s=NOW, draining=True) is Status.GRANTED
    (left,) = await queue.draining()
    assert left.kv_bytes == 214
    assert (await queue.ledger()).kv_bytes == {"a": 214}
    assert await queue.settle(left)
    assert await empty(queue)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ({}, {"prompt_tokens": 100, "choices": 3}),
        ({"kv_block_tokens": 16}, {"prompt_tokens": 100}),
        ({"kv_block_tokens": 16}, {"prompt_tokens": 96, "choices": 4, "max_tokens": 17}),
        ({"kv_block_tokens": 16, "max_model_len": 200}, {"prompt_tokens": 190, "choices": 2, "max_tokens": None}),
        ({"kv_block_tokens": 16, "max_model_len": 200}, {"prompt_tokens": 300, "max_tokens": None}),
        ({"kv_window_tokens": 64, "kv_window_bytes_per_token": 5}, {"prompt_tokens": 300}),
        (
            {"kv_block_tokens": 128, "kv_window_tokens": 300, "kv_window_bytes_per_token": 7},
            {"prompt_tokens": 700, "choices": 2},
        ),
    ],
)
async def test_the_fast_path_reserves_whole_blocks_for_every_choice_and_respects_windows(
    queue: Queue, shape: dict[str, int], sizes: dict[str, int | None]
) -> None:
    """What the push script works out is `core.kv_need_bytes`, to the byte."""
    place = dataclasses.replace(A, kv_bytes=100_000, kv_bytes_per_token=7, **shape)
    epoch = await led(queue, credit=True, engines=(place,))
    await queue.publish((place,), p99={"m|r": 40.5}, epoch=epoch, valid_until_s=NOW + 1000)
    t = ticket("s", **sizes)
    grant = await queue.push(t, engines=(place,), now_s=NOW)
    assert isinstance(grant, Grant)
    assert (grant.kv_bytes, grant.output_tokens) == (kv_need_bytes(t, 40.5, place), covered_tokens(t, 40.5, place))


async def test_a_grant_says_how_many_output_tokens_it_covers(queue: Queue) -> None:
    """The planner's number travels with it; the fast path's is its p99, or the caller's or the engine's bound."""
    place = dataclasses.replace(A, slots=9, max_model_len=300)
    epoch = await led(queue, credit=False, engines=(place,))
    t = ticket("planned")
    await queue.push(t, engines=(place,), now_s=NOW)
    given = await queue.grant(dataclasses.replace(wish("planned", epoch=epoch), output_tokens=33), t, now_s=NOW)
    (heard,) = await queue.verdicts("app", 1.0)
    again = await queue.push(t, engines=(), now_s=NOW)
    assert [g.output_tokens for g in (given, heard, again) if isinstance(g, Grant)] == [33, 33, 33]
    await queue.publish((place,), p99={"m|r": 120.5}, epoch=epoch, valid_until_s=NOW + 1000)
    for name, max_tokens, prompt, covers in (
        ("p99", None, 100, 121),
        ("caller", 50, 100, 50),
        ("engine", None, 280, 20),
    ):
        fast = ticket(name, max_tokens=max_tokens, prompt_tokens=prompt)
        for _ in range(2):  # the second time it is known
            grant = await queue.push(fast, engines=(place,), now_s=NOW)
            assert isinstance(grant, Grant)
            assert (grant.output_tokens, grant.kv_bytes, grant.fast) == (covers, prompt + covers, True)


async def test_cancel_says_what_it_found(queue: Queue) -> None:
    """Unknown, waiting, granted, ended: each has its answer, and an ended stage stays as it ended."""
    await led(queue, credit=True, engines=(B,))
    assert await queue.cancel("nobody", "m", client_id="app", now_s=NOW, draining=False) is None
    await queue.push(ticket("granted"), engines=(B,), now_s=NOW)
    await queue.push(ticket("waiting"), engines=(B,), now_s=NOW)
    assert await queue.cancel("waiting", "m", client_id="app", now_s=NOW, draining=False) is Status.QUEUED
    assert await queue.cancel("granted", "m", client_id="app", now_s=NOW, draining=False) is Status.GRANTED
    assert await queue.cancel("granted", "m", client_id="app", now_s=NOW, draining=False) is Status.CANCELLED
    assert await empty(queue)


async def test_an_expired_lease_ends_as_lost_and_drains(queue: Queue) -> None:
    """Nobody renewed: the stage ends, its reservation waits for the engine's word, the holder's word is void."""
    await led(queue, credit=True)
    t = ticket("s")
    grant = await queue.push(t, engines=(A,), now_s=NOW)
    assert isinstance(grant, Grant)
    assert not await queue.reap(now_s=NOW + LEASE_S - 1)
    assert list(await queue.reap(now_s=NOW + LEASE_S + 1)) == ["s"]
    assert not await queue.finish(done(t), client_id="app", token=grant.token, now_s=NOW)
    assert [r.engine_id for r in await queue.draining()] == ["a"]
    assert not await queue.reap(now_s=NOW + LEASE_S + 1)


async def test_waiting_stages_of_a_dead_client_are_reaped(queue: Queue) -> None:
    """The dead client's stages leave the ready set; the living client's stay."""
    await led(queue, credit=False)
    await queue.push(ticket("dead"), engines=(A,), now_s=NOW)
    await queue.push(ticket("alive", client_id="other"), engines=(A,), now_s=NOW + LEASE_S)
    assert list(await queue.reap(now_s=NOW + LEASE_S + 1)) == ["dead"]
    assert [t.stage_id for t in await queue.heads("m", 9)] == ["alive"]


async def test_renewal_keeps_stages_and_tells_what_is_gone(queue: Queue) -> None:
    """A renewed lease lives on; an unknown stage is gone; a waiting stage that was granted is named."""
    epoch = await led(queue, credit=True, engines=(B,))
    grant = await queue.push(ticket("held"), engines=(B,), now_s=NOW)
    assert isinstance(grant, Grant)
    t = ticket("waiting")
    await queue.push(t, engines=(B,), now_s=NOW)
    await queue.publish((A, B), p99={}, epoch=epoch, valid_until_s=0.0)
    renewal = await queue.renew("app", {"held": grant.token, "waiting": 0, "nobody": 0}, now_s=NOW + 4)
    assert (renewal.gone, renewal.granted, renewal.epoch, renewal.led) == (("nobody",), (), epoch, True)
    assert not await queue.reap(now_s=NOW + LEASE_S + 1)
    given = await queue.grant(wish("waiting", epoch=epoch), t, now_s=NOW + 5)
    assert given is not None
    renewal = await queue.renew("app", {"held": grant.token + 99, "waiting": 0}, now_s=NOW + 6)
    assert (renewal.gone, renewal.granted, renewal.led) == (("held",), ("waiting",), False)


async def test_announcing_restores_what_a_store_forgot(queue: Queue) -> None:
    """Waiting and granted stages come back as they were, once; tokens that follow are larger."""
    epoch = await led(queue, credit=True)
    held = Grant(stage_id="held", engine_id="a", token=41, epoch=9, kv_bytes=77, output_tokens=7, granted_at_s=NOW)
    for _ in range(2):
        await queue.announce(ticket("held"), held, now_s=NOW)
        await queue.announce(ticket("waiting"), None, now_s=NOW)
    assert (await queue.ledger()).kv_bytes == {"a": 77}
    assert await queue.extend("held", client_id="app", token=41, kv_bytes=141) is True
    assert (await queue.ledger()).kv_bytes == {"a": 141}
    assert [t.stage_id for t in await queue.heads("m", 9)] == ["waiting"]
    given = await queue.grant(wish("waiting", epoch=epoch), ticket("waiting"), now_s=NOW)
    assert given is not None
    assert given.token > 41
    assert await queue.finish(done(ticket("held")), client_id="app", token=41, now_s=NOW)
    (running,) = await queue.running()
    assert (running.ticket.stage_id, running.engine_id, running.token) == ("waiting", "a", given.token)


async def test_announcing_restores_a_grant_that_a_store_forgot(queue: Queue) -> None:
    """A replica that took over a moment too early knows the stage as waiting: it is granted as its client says, not twice."""
    epoch = await led(queue, credit=False)
    await queue.push(ticket("s"), engines=(A,), now_s=NOW)
    held = Grant(stage_id="s", engine_id="a", token=41, epoch=9, kv_bytes=77, granted_at_s=NOW)
    await queue.announce(ticket("s", client_id="thief"), held, now_s=NOW)
    assert (await queue.depth("m"), await empty(queue)) == (1, True)
    for _ in range(2):
        await queue.announce(ticket("s"), held, now_s=NOW)
    assert await queue.depth("m") == 0
    assert (await queue.ledger()).kv_bytes == {"a": 77}
    assert await queue.grant(wish("s", epoch=epoch), ticket("s"), now_s=NOW) is None
    assert await queue.finish(done(ticket("s")), client_id="app", token=41, now_s=NOW)
    assert await empty(queue)


async def test_leadership_is_fenced(queue: Queue) -> None:
    """One leads; another takes over when the time is up, under a higher epoch; the old one's word is void."""
    first = await queue.lead("one", ttl_s=5, now_s=NOW)
    assert first is not None
    assert await queue.lead("two", ttl_s=5, now_s=NOW + 4) is None
    assert await queue.lead("one", ttl_s=5, now_s=NOW + 4) == first
    second = await queue.lead("two", ttl_s=5, now_s=NOW + 10)
    assert second == first + 1
    assert await queue.lead("one", ttl_s=5, now_s=NOW + 10) is None
    assert not await queue.publish((A,), p99={}, epoch=first, valid_until_s=NOW + 99)
    await queue.push(ticket("s"), engines=(A,), now_s=NOW + 11)
    assert await queue.publish((A,), p99={}, epoch=second, valid_until_s=NOW + 99)
    before = await queue.grant(wish("s", epoch=second), ticket("s"), now_s=NOW + 11)
    assert await queue.lead("two", ttl_s=5, now_s=NOW + 11, at_least=second + 5) == second + 5
    await queue.push(ticket("after"), engines=(A,), now_s=NOW + 11)
    after = await queue.grant(wish("after", epoch=second + 5), ticket("after"), now_s=NOW + 11)
    assert before is not None
    assert after is not None
    assert after.token > before.token + 1000, "a store that restarted may have forgotten its last tokens"


async def test_moments_are_rewritten_for_waiting_stages_only(queue: Queue) -> None:
    """A stage that waits no more is not brought back by a new moment."""
    await led(queue, credit=False)
    await queue.push(ticket("x", due_at_s=NOW), engines=(A,), now_s=NOW)
    await queue.push(ticket("y", due_at_s=NOW + 1), engines=(A,), now_s=NOW)
    await queue.cancel("x", "m", client_id="app", now_s=NOW, draining=False)
    await queue.reorder({"x": NOW - 9, "y": NOW + 7}, "m")
    assert [(t.stage_id, t.due_at_s) for t in await queue.heads("m", 9)] == [("y", NOW + 7)]


async def test_a_refusal_reaches_the_client_and_ends_the_stage(queue: Queue) -> None:
    """Refused early: told once, gone from the ready set, terminal."""
    await led(queue, credit=False)
    t = ticket("s")
    await queue.push(t, engines=(A,), now_s=NOW)
    no = Refusal(stage_id="s", reason="deadline", retry_after_s=2.5)
    assert await queue.refuse(no, t, now_s=NOW)
    assert not await queue.refuse(no, t, now_s=NOW)
    assert list(await queue.verdicts("app", 1.0)) == [no]
    assert await queue.cancel("s", "m", client_id="app", now_s=NOW, draining=False) is Status.REFUSED


async def test_the_scheduler_is_woken_by_a_push(queue: Queue) -> None:
    """A push that has to wait wakes the scheduler long before its tick."""
    await led(queue, credit=False)
    await queue.push(ticket("s"), engines=(A,), now_s=NOW)
    import time

    began = time.monotonic()
    await queue.wake(2.0)
    assert time.monotonic() - began < 1.0


async def test_the_fleet_is_published_whole(queue: Queue) -> None:
    """Clients read back the engines as the scheduler gave them."""
    await led(queue, credit=True)
    assert list(await queue.fleet()) == [A, B]


async def test_a_workflow_is_described_once(queue: Queue) -> None:
    """The first description of a fingerprint stands; an unknown one has none."""
    await queue.describe("w", '{"nodes": []}')
    await queue.describe("w", "something else")
    assert await queue.described("w") == '{"nodes": []}'
    assert await queue.described("x") is None


async def test_a_cancelled_reader_ends_though_its_answer_came_at_the_same_moment() -> None:
    """`asyncio.wait_for` of Python 3.11 can forget a cancellation; a task that reads in a loop must end all the same."""

    class Forgetful:
        async def zcard(self, _key: str) -> int:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
            return 7

    queue = fake_redis_queue()
    queue._redis = Forgetful()  # the race itself cannot be made to order
    reader = asyncio.create_task(queue.depth("m"))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader


async def test_what_is_only_observed_is_in_the_log_and_nowhere_else(queue: Queue) -> None:
    """An observation without a stage is read back as it was said; nothing is reserved, nothing waits."""
    seen = dataclasses.replace(done(ticket("s"), "m@http://own/v1"), observed=True, output_estimated=True)
    await queue.observe(seen)
    _, entries = await queue.read_log("", 10)
    assert list(entries) == [seen]
    assert await empty(queue)
    assert await queue.depth("m") == 0


async def test_the_switch_stays_as_it_was_turned(queue: Queue) -> None:
    """Mode, who, when and why are read back; a pool whose switch nobody turned is on."""
    assert await queue.switch() == Switch()
    for mode in (Mode.OFF, Mode.OBSERVE, Mode.ON):
        turned = Switch(mode=mode, by="alice@host", at_s=1_790_000_000.5, reason="slow since noon: see the log")
        await queue.set_switch(turned)
        assert await queue.switch() == turned


async def test_a_switch_that_was_lost_is_put_back_and_one_that_was_turned_is_not(queue: Queue) -> None:
    """What a client knew comes after whatever an operator said since, also that it is on again."""
    known = Switch(mode=Mode.OFF, by="app")
    await queue.set_switch(known, if_lost=True)
    assert await queue.switch() == known
    await queue.set_switch(Switch(by="alice"))
    await queue.set_switch(known, if_lost=True)
    assert await queue.switch() == Switch(by="alice")


async def test_a_gateway_key_counts_until_it_is_removed(queue: Queue) -> None:
    """What is kept of keys comes back by digest; a removed one does not, and removing it again says so."""
    await queue.add_api_key("d1", '{"tenant":"acme"}')
    await queue.add_api_key("d2", "{}")
    assert await queue.api_keys() == {"d1": '{"tenant":"acme"}', "d2": "{}"}
    assert await queue.remove_api_key("d2")
    assert not await queue.remove_api_key("d2")
    assert await queue.api_keys() == {"d1": '{"tenant":"acme"}'}


# -- trained models ------------------------------------------------------------------------------------------------------
async def test_a_model_rules_from_its_publication_and_the_last_three_are_kept(queue: Queue) -> None:
    """Version, file and card come back as they were given; the oldest of four is forgotten; what is known is not sent."""
    assert await queue.model("") is None
    assert await queue.models() == {}
    for n in range(4):
        assert await queue.publish_model(f"v{n}", card=f'{{"n":{n}}}', data=bytes([0, 255, n]), epoch=0)
    assert await queue.model("v2") == ("v3", b"\x00\xff\x03")
    assert await queue.model("v3") is None
    assert list((await queue.models()).items()) == [("v3", '{"n":3}'), ("v2", '{"n":2}'), ("v1", '{"n":1}')]


async def test_a_kept_model_can_rule_again_and_one_that_is_not_kept_cannot(queue: Queue) -> None:
    """Going back keeps the card and the order of the others; an unknown version changes nothing; empty files are models."""
    await queue.publish_model("v1", card="{}", data=b"", epoch=0)
    await queue.publish_model("v2", card='{"n":2}', data=b"two", epoch=0)
    assert await queue.publish_model("v1", card="ignored", data=None, epoch=None)
    assert await queue.model("v2") == ("v1", b"")
    assert list((await queue.models()).items()) == [("v1", "{}"), ("v2", '{"n":2}')]
    assert not await queue.publish_model("v0", card="{}", data=None, epoch=None)
    assert list(await queue.models()) == ["v1", "v2"]


async def test_a_deposed_leader_publishes_no_model(queue: Queue) -> None:
    """A model is published under the leader's epoch; an operator needs none; one that is too large is refused."""
    old = await queue.lead("first", ttl_s=5, now_s=NOW)
    new = await queue.lead("second", ttl_s=5, now_s=NOW + 6)
    assert old is not None
    assert not await queue.publish_model("v1", card="{}", data=b"one", epoch=old)
    assert await queue.models() == {}
    assert await queue.publish_model("v1", card="{}", data=b"one", epoch=new)
    with pytest.raises(ValueError, match="at most"):
        await queue.publish_model("v2", card="{}", data=bytes(16 * 2**20 + 1), epoch=new)


async def test_what_the_predictor_tells_of_itself_is_read_as_it_was_told(queue: Queue) -> None:
    """The last word counts; nothing is an empty text."""
    assert not await queue.predictor_status()
    await queue.set_predictor_status('{"a":1}')
    await queue.set_predictor_status('{"a":2}')
    assert await queue.predictor_status() == '{"a":2}'


# -- nodes ---------------------------------------------------------------------------------------------------------------
def account(node_id: str, at_s: float = NOW) -> NodeReport:
    engine = EngineReport(spec=A, gpu_id="g", tier="sleeping", to="gpu", hbm_bytes=5, wake_s={"sleeping": 1.5})
    return NodeReport(
        node_id=node_id, at_s=at_s, engines=(engine,), gpus=(GpuReport(gpu_id="g", memory_bytes=9, usable_bytes=8),)
    )


async def test_a_node_is_known_by_its_last_report_until_that_expires(queue: Queue) -> None:
    """Each of many nodes has one account, whole as it was said; a silent node is forgotten, and comes back when it speaks."""
    names = [f"node {n:02}" for n in range(20)]
    for name in names:
        await queue.report(account(name), now_s=NOW, ttl_s=5.0)
    await queue.report(account(names[3], NOW + 3), now_s=NOW + 3, ttl_s=5.0)
    found = await queue.reports(NOW + 4)
    assert [r.node_id for r in found] == names
    assert found[0] == NodeReport.decode(account(names[0]).encode())
    assert (found[3].at_s, found[3].engines[0].spec, found[3].engines[0].wake_s) == (NOW + 3, A, {"sleeping": 1.5})
    assert [r.node_id for r in await queue.reports(NOW + 5)] == [names[3]]
    await queue.report(account("late", NOW + 9), now_s=NOW + 9, ttl_s=5.0)
    assert [r.node_id for r in await queue.reports(NOW + 9)] == ["late"]


async def test_the_scheduler_is_woken_by_a_report(queue: Queue) -> None:
    """What a node says is looked at long before the tick."""
    await queue.wake(0.01)
    await queue.report(account("n"), now_s=NOW, ttl_s=5.0)
    async with asyncio.timeout(1.0):
        await queue.wake(2.0)


async def test_what_is_wanted_of_a_node_is_read_once_for_each_version(queue: Queue) -> None:
    """The latest wish is there at once for whoever does not know it; saying it again is nothing new; nodes are apart."""
    first = Wanted(epoch=1, engines={"a": Want(tier="gpu", kv_bytes=7), "b": Want(tier="sleeping")})
    assert await queue.wanted("n", known="", timeout_s=0.01) is None
    assert await queue.want("n", first)
    found = await queue.wanted("n", known="", timeout_s=0.01)
    assert found is not None
    version, wanted = found
    assert wanted == first
    assert await queue.want("n", first)
    assert await queue.wanted("n", known=version, timeout_s=0.01) is None
    assert await queue.wanted("other", known="", timeout_s=0.01) is None
    last = Wanted(epoch=1, engines={"a": Want(tier="dropped", rejuvenation=2)})
    assert await queue.want("n", Wanted(epoch=1))
    assert await queue.want("n", last)
    for known in (version, "", "never heard of"):
        found = await queue.wanted("n", known=known, timeout_s=0.01)
        assert found is not None
        assert found[1] == last
        assert found[0] != version


async def test_an_older_epoch_wants_nothing_of_a_node(queue: Queue) -> None:
    """A deposed leader's wish changes nothing; the new leader's same wish is a new version."""
    old = await queue.lead("first", ttl_s=5, now_s=NOW)
    assert old is not None
    assert await queue.want("n", Wanted(epoch=old, engines={"a": Want(tier="gpu")}))
    before = await queue.wanted("n", known="", timeout_s=0.01)
    new = await queue.lead("second", ttl_s=5, now_s=NOW + 6)
    assert before is not None
    assert new is not None
    assert not await queue.want("n", Wanted(epoch=old, engines={"a": Want(tier="disk")}))
    assert await queue.wanted("n", known=before[0], timeout_s=0.01) is None
    assert await queue.want("n", Wanted(epoch=new, engines={"a": Want(tier="gpu")}))
    after = await queue.wanted("n", known=before[0], timeout_s=0.01)
    assert after is not None
    assert after[1].epoch == new


async def test_a_node_that_waits_hears_a_new_wish_at_once(queue: Queue) -> None:
    """Long before its patience is over, and so does every other reader."""
    await queue.want("n", Wanted(epoch=1))
    known = await queue.wanted("n", known="", timeout_s=1.0)
    assert known is not None
    readers = [asyncio.create_task(queue.wanted("n", known=known[0], timeout_s=60.0)) for _ in range(2)]
    await asyncio.sleep(0)
    async with asyncio.timeout(1.5):
        assert await queue.want("n", Wanted(epoch=2))
        for found in await asyncio.gather(*readers):
            assert found is not None
            assert found[1].epoch == 2


async def test_a_stage_that_waits_for_a_sleeping_model_is_lost_with_its_app(queue: Queue) -> None:
    """No engine of its model is in the published fleet, a node names one that sleeps."""
    await led(queue, credit=False, engines=(B,))
    asleep = dataclasses.replace(account("n"), engines=(EngineReport(spec=dataclasses.replace(A, model="asleep"), gpu_id="g", tier="disk", to="disk"),))  # fmt: skip
    await queue.report(asleep, now_s=NOW, ttl_s=99.0)
    await queue.push(ticket("s", model="asleep"), engines=(), now_s=NOW)
    assert list(await queue.reap(now_s=NOW + LEASE_S + 1)) == ["s"]
    assert await queue.depth("asleep") == 0


ACME = Tenant(name="acme", weight=2.0, allow_clusters=("local",), max_stages=2, max_waiting=2)
CALM = Tenant(name="calm|1", max_waiting=2)


async def with_tenants(queue: Queue, *tenants: Tenant, backlog: Backlog | None = None) -> int:
    epoch = await queue.lead("leader", ttl_s=5, now_s=NOW)
    assert epoch is not None
    said = {"p99": {}, "epoch": epoch, "valid_until_s": NOW + 1000, "backlog": backlog or Backlog()}
    assert await queue.publish((A, B), tenants=tenants, **said)  # type: ignore[arg-type]
    return epoch


async def test_tenants_are_read_as_they_were_published_and_a_stale_leader_changes_nothing(queue: Queue) -> None:
    """Everybody reads the leader's last word; one who was followed by another has none."""
    assert list(await queue.tenants()) == []
    old = await with_tenants(queue, ACME, CALM)
    assert list(await queue.tenants()) == [ACME, CALM]
    assert await queue.lead("other", ttl_s=5, now_s=NOW + 6) == old + 1
    assert not await queue.publish((), p99={}, epoch=old, valid_until_s=0.0, tenants=())
    assert list(await queue.tenants()) == [ACME, CALM]
    assert await queue.publish((A,), p99={}, epoch=old + 1, valid_until_s=0.0)
    assert list(await queue.tenants()) == []


async def test_a_metered_tenant_has_no_fast_path_and_others_keep_theirs(queue: Queue) -> None:
    """What it may start the scheduler knows; its nested stage is admitted at once all the same."""
    await with_tenants(queue, ACME, CALM)
    assert await queue.push(ticket("waits", tenant="acme", model="n"), engines=(A,), now_s=NOW) is None
    assert await queue.depth("n") == 1
    assert isinstance(await queue.push(ticket("nested", tenant="acme", nested=True), engines=(A,), now_s=NOW), Grant)
    assert isinstance(await queue.push(ticket("calm", tenant="calm|1"), engines=(A, B), now_s=NOW), Grant)
    assert isinstance(await queue.push(ticket("other"), engines=(A, B), now_s=NOW), Grant)


async def test_a_tenant_has_no_more_waiting_than_it_may(queue: Queue) -> None:
    """Over all models, refused at the push with the leader's word for when to come again; others and nested ones pass."""
    await with_tenants(queue, ACME, CALM, backlog=Backlog(tenants={"acme": 12.5}))
    for name, model in (("s1", "m"), ("s2", "n")):
        assert await queue.push(ticket(name, tenant="acme", model=model), engines=(), now_s=NOW) is None
    refused = await queue.push(ticket("s3", tenant="acme", model="o"), engines=(), now_s=NOW)
    assert refused == Refusal(stage_id="s3", reason="quota", retry_after_s=12.5)
    assert await queue.push(ticket("nested", tenant="acme", nested=True), engines=(), now_s=NOW) is None
    for tenant in ("calm|1", "calm", "acm", "acme2"):
        assert await queue.push(ticket(f"of {tenant}", tenant=tenant, model=tenant), engines=(), now_s=NOW) is None
    found = await queue.waiting(["acme", "calm|1", "calm", "nobody"])
    assert dict(found) == {"acme": 2, "calm|1": 1, "calm": 1, "nobody": 0}


async def test_what_waits_no_more_makes_room_for_its_tenant(queue: Queue) -> None:
    """Granted, withdrawn, refused, lost; and one that is queued again counts again."""
    epoch = await with_tenants(queue, ACME)

    async def waiting() -> int:
        return (await queue.waiting(["acme"]))["acme"]

    t = [ticket(f"s{i}", tenant="acme", model=f"m{i % 2}") for i in range(4)]
    for one in t[:2]:
        await queue.push(one, engines=(), now_s=NOW)
    given = await queue.grant(wish("s0", epoch=epoch), t[0], now_s=NOW)
    assert given is not None
    assert await waiting() == 1
    assert await queue.requeue(t[0], token=given.token, now_s=NOW, draining=False)
    assert await waiting() == 2
    assert await queue.cancel("s0", "m0", client_id="app", now_s=NOW, draining=False) is Status.QUEUED
    assert await waiting() == 1
    assert await queue.refuse(Refusal(stage_id="s1", reason="deadline", retry_after_s=1.0), t[1], now_s=NOW)
    assert await waiting() == 0
    await queue.announce(t[2], None, now_s=NOW)
    assert await queue.push(t[3], engines=(), now_s=NOW) is None
    assert await waiting() == 2
    assert await queue.grant(wish("s2", epoch=epoch), t[2], now_s=NOW + LEASE_S + 1) is None, "its app is dead"
    assert await waiting() == 1


async def test_a_full_queue_says_when_to_come_again(queue: Queue) -> None:
    """As long as the leader thinks that what waits will take, and never less than the floor."""
    await with_tenants(queue, backlog=Backlog(models={"m": 42.0, "n": 0.01}))
    for model, again_s in (("m", 42.0), ("n", RETRY_FLOOR_S), ("unknown", RETRY_FLOOR_S)):
        for i in range(3):
            assert await queue.push(ticket(f"{model}{i}", model=model), engines=(), now_s=NOW) is None
        refused = await queue.push(ticket(f"{model}3", model=model), engines=(), now_s=NOW)
        assert refused == Refusal(stage_id=f"{model}3", reason="full", retry_after_s=again_s)


async def test_heads_show_a_few_of_some_tenants_and_the_others_behind_them(queue: Queue) -> None:
    """However many of one tenant come first, the first n of the others are seen, in order; nested stages are nobody's."""
    await with_tenants(queue)
    queue.max_queue = 1000  # type: ignore[attr-defined]
    for i in range(20):
        await queue.push(ticket(f"a{i:02}", tenant="acme", due_at_s=NOW + i), engines=(), now_s=NOW)
    await queue.push(ticket("nested", tenant="acme", due_at_s=NOW + 50, nested=True), engines=(), now_s=NOW)
    for i in range(3):
        await queue.push(ticket(f"b{i}", tenant="b", due_at_s=NOW + 100 + i), engines=(), now_s=NOW)
    for _ in range(2):  # asked again it knows whose they are
        found = await queue.heads("m", 3, at_most={"acme": 2, "b": 9})
        assert [t.stage_id for t in found] == ["a00", "a01", "nested", "b0", "b1", "b2"]
    assert [t.stage_id for t in await queue.heads("m", 2, at_most={"acme": 0})] == ["nested", "b0"]


async def test_usage_is_counted_once(queue: Queue) -> None:
    """A part of the log that was counted, and the word of a leader that was followed by another, change nothing."""
    epoch = await led(queue, credit=False)
    assert (await queue.charged_to(), dict(await queue.usage("2026-11-01"))) == ("", {})
    days = {"2026-11-01": {"x": 3, "y": 1}, "2026-11-02": {"x": 5}}
    assert await queue.charge(days, after="", to="1-0", epoch=epoch)
    assert not await queue.charge(days, after="", to="1-0", epoch=epoch)
    assert not await queue.charge(days, after="1-0", to="2-0", epoch=epoch - 1)
    assert await queue.charged_to() == "1-0"
    assert await queue.charge({"2026-11-01": {"x": 2}}, after="1-0", to="2-0", epoch=epoch)
    assert await queue.charge({}, after="2-0", to="3-0", epoch=epoch), "nothing to count is counted, too"
    assert dict(await queue.usage("2026-11-01")) == {"x": 5, "y": 1}
    assert dict(await queue.usage("2026-11-02")) == {"x": 5}
    assert await queue.charged_to() == "3-0"


async def test_the_last_word_on_each_distance_is_kept(queue: Queue) -> None:
    """Per site and cluster; one that cannot be reached is as good a word as any, and moments keep their digits."""
    far = Distance(site="berlin", cluster="us", rtt_s=0.0801234567, measured_at_s=NOW + 0.125)
    near = Distance(site="berlin", cluster="eu", rtt_s=0.001, measured_at_s=NOW)
    other = Distance(site="ohio", cluster="eu", rtt_s=0.09, measured_at_s=NOW)
    assert list(await queue.distances()) == []
    await queue.tell_distances([far, near])
    await queue.tell_distances([])
    await queue.tell_distances([other])
    assert {(d.site, d.cluster): d for d in await queue.distances()} == {
        ("berlin", "us"): far,
        ("berlin", "eu"): near,
        ("ohio", "eu"): other,
    }
    lost = dataclasses.replace(far, rtt_s=math.inf, measured_at_s=NOW + 5)
    await queue.tell_distances([lost])
    assert lost in await queue.distances()
    assert len(await queue.distances()) == 3
