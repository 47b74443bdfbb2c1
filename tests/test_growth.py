"""A reservation that a stream outgrows grows with it: from the tap to the ledger, and back to nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

from maestro_agents.client import Client, Pass
from maestro_agents.core import EXTEND_TOKENS, EngineSpec, Observation, Ticket
from maestro_agents.errors import QueueUnavailable
from maestro_agents.queue import memory, redis
from maestro_agents.queue.embedded import EmbeddedRedis
from maestro_agents.queue.redis import RedisQueue
from maestro_agents.simulator.engine import CPU_TINY
from maestro_agents.usage import Usage, Watcher
from maestro_langgraph import maestro
from maestro_serving.emulator import EmulatedModel, Emulator, EmulatorConfig
from tests.stub_openai import managed, watched_observations
from tests.test_client import App, engine, fleet_app, joined, scheduler, until

COVERS = 22
"""Output tokens that every grant of the fast path here is given for: with a prompt of 10, two blocks of 16."""

KV = {"kv_bytes": 100_000, "kv_bytes_per_token": 10, "kv_block_tokens": 16, "slots": 4}
KV_TOML = "kv_bytes = 100000\nkv_bytes_per_token = 10\n"


@pytest.fixture(autouse=True)
def roles_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path reserves `COVERS` output tokens for a role that it has not seen."""
    for module in (memory, redis):
        monkeypatch.setattr(module, "DEFAULT_P99_OUTPUT_TOKENS", float(COVERS))


@pytest.fixture(params=["memory", "redis"])
async def a(request: pytest.FixtureRequest, tmp_path: Path, redis_url: str, pool: str) -> AsyncIterator[App]:
    """An app that schedules itself, and one of a pool; a grant there covers `COVERS` output tokens."""
    if request.param == "memory":
        with fleet_app(tmp_path, "e1", slots=4, more=KV_TOML) as made:
            yield made
        return
    async with scheduler(redis_url, pool, engine("e1", **KV)), joined(redis_url, pool) as made:
        yield made


async def reserved(a: App) -> int:
    """KV bytes in the ledger."""
    return sum((await a.ask(a.room.queue.ledger())).kv_bytes.values())


async def grown(a: App, p: Pass, output_tokens: int) -> int:
    """Let a stream come to so many tokens, and return what the ledger holds once the queue has heard of it."""
    p.grew(output_tokens)
    await a.do(len, "")  # after what that gave the room to do
    await until(lambda: not a.room._tasks)
    return await reserved(a)


async def last(a: App) -> Observation:
    (o,) = [o for o in await a.observations() if isinstance(o, Observation)]
    return o


async def test_a_reservation_grows_by_64_tokens_each_time_its_stream_outgrows_it(a: App) -> None:
    """Prompt and p99 at first, then 64 tokens more at a time; all of it is recorded, and free at the end."""
    p = await a.granted()
    assert p.grant
    assert p.grant.fast
    found = [await grown(a, p, n) for n in (0, 22, 23, 86, 87, 150)]
    assert found == [320, 320, 960, 960, 1600, 1600]
    p.finish(output_tokens=150)
    await a.quiet()
    assert await reserved(a) == 0
    o = await last(a)
    assert (o.kv_reserved_bytes, o.kv_extensions, o.kv_overdrafts, o.kv_bytes_per_token) == (1600, 2, 0, 10)


async def test_one_extension_is_on_its_way_at_a_time(a: App) -> None:
    """What a stream outgrows while the queue has not answered is in the next one, which is larger."""
    p = await a.granted()
    faults = await a.faults()
    gate = faults.before["extend"] = await a.event()
    for n in range(COVERS + 200):
        p.grew(n)
    await until(lambda: "extend" in faults.said)
    assert faults.said.count("extend") == 1
    await a.set(gate)
    await until(lambda: "extend" in faults.done and not a.room._tasks)
    assert await reserved(a) == 10 * (10 + COVERS + EXTEND_TOKENS)
    assert await grown(a, p, COVERS + 200) == 10 * (10 + COVERS + 4 * EXTEND_TOKENS)
    assert faults.said.count("extend") == 2
    p.finish()
    await a.quiet()


async def test_a_reservation_grows_no_further_than_the_callers_bound(a: App) -> None:
    """An answer of at most 50 tokens never takes more than 50; a server that ignores that is not followed."""
    p = await a.granted(max_tokens=50)
    assert await reserved(a) == 320
    assert await grown(a, p, 23) == 10 * 64  # 10 + 50, in whole blocks
    assert await grown(a, p, 51) == 10 * 64
    assert await grown(a, p, 500) == 10 * 64
    p.finish()
    await a.quiet()


async def test_what_the_last_block_holds_is_not_asked_for(tmp_path: Path) -> None:
    """With blocks of 128 tokens the queue hears of every second step."""
    with fleet_app(tmp_path, "e1", more=KV_TOML + "kv_block_tokens = 128\n") as a:
        p = await a.granted()
        faults = await a.faults()
        found = [await grown(a, p, n) for n in (COVERS, 23, 87, 151, 215)]
        assert found == [1280, 1280, 2560, 2560, 3840]
        assert faults.said.count("extend") == p.extensions == 2
        p.finish()
        await a.quiet()


async def test_choices_grow_together(a: App) -> None:
    """Two answers to one prompt: what both have written counts, and each gets half of every step."""
    p = await a.granted(choices=2)
    assert p.grant
    assert (p.grant.output_tokens, await reserved(a)) == (2 * COVERS, 10 * 2 * 32)
    assert await grown(a, p, 2 * COVERS) == 10 * 2 * 32
    assert await grown(a, p, 2 * COVERS + 1) == 10 * 2 * 64
    p.finish()
    await a.quiet()


async def test_what_finds_no_free_memory_is_reserved_all_the_same_and_counted(a: App) -> None:
    """The stream goes on, so the ledger passes what the engine has, and the observation says how often."""
    p = await a.granted()
    q = await a.granted(prompt_tokens=9_946)
    assert await reserved(a) == 320 + 99_680
    assert await grown(a, p, 23) == 960 + 99_680
    q.finish()
    await until(lambda: len(a.room.held) == 1)
    assert await grown(a, p, 87) == 1600
    p.finish()
    await a.quiet()
    told = {
        o.stage_id: (o.kv_extensions, o.kv_overdrafts) for o in await a.observations() if isinstance(o, Observation)
    }
    assert told == {p.ticket.stage_id: (2, 1), q.ticket.stage_id: (0, 0)}


async def test_a_grant_after_a_requeue_begins_anew(a: App) -> None:
    """The grown reservation is given back whole, and the next grant grows from what it was itself given."""
    p = await a.granted()
    assert await grown(a, p, 23) == 960
    assert p.requeue(engine_down=False, answered=True)
    async with asyncio.timeout(10):
        await p.wait_async()
    grant = p.grant
    assert grant
    assert await reserved(a) == grant.kv_bytes
    assert await grown(a, p, grant.output_tokens + 1) == grant.kv_bytes + 10 * EXTEND_TOKENS
    p.finish()
    await a.quiet()
    assert await reserved(a) == 0
    assert (await last(a)).kv_extensions == 1


async def test_an_extension_that_comes_after_the_end_changes_nothing(a: App) -> None:
    """Its stage is over, or its grant is another one: the ledger stays as it was."""
    p = await a.granted()
    grant = p.grant
    assert grant
    p.finish()
    await a.quiet()
    p.grew(1_000)
    p.grant = dataclasses.replace(grant, kv_bytes=10**6)
    p.ended = False
    await a.ask(a.room.extend(p, grant.token))
    assert await reserved(a) == 0


async def test_where_nothing_is_known_nothing_grows(tmp_path: Path) -> None:
    """An engine without known KV memory, the caller's own URL, a call that is only observed: no word to anybody."""
    with fleet_app(tmp_path, "e1", "e2") as a:
        p = await a.granted()
        observed = Pass.observed(a.room, p.ticket.evolve(stage_id="seen"), "http://own/v1")
        local = a.open("local")
        a.room.abandon(local)
        faults = await a.faults()
        for each in (p, observed, local):
            before = each.grant
            each.grew(10**9)
            assert before is not None
            assert each.grant is before
        p.finish()
        await a.quiet()
        assert "extend" not in faults.said
        assert (await last(a)).kv_extensions == 0


async def test_an_extension_that_redis_missed_is_told_when_it_is_back(a: App) -> None:
    """One word waits for it, whatever the stream has outgrown since, and it names the sum."""
    p = await a.granted()
    faults = await a.faults()
    faults.raises["extend"] = QueueUnavailable("Redis does not answer.")
    p.grew(23)
    await until(lambda: a.room.unsent)
    for n in range(24, 500):
        p.grew(n)
    assert len(a.room.unsent) == 1
    del faults.raises["extend"]
    await until(lambda: not a.room.unsent)
    assert await reserved(a) == 960
    assert await grown(a, p, 500) == 10 * (10 + COVERS + 8 * EXTEND_TOKENS)
    p.finish()
    await a.quiet()
    assert await reserved(a) == 0


async def test_a_redis_that_forgot_is_told_the_grown_amount(pool: str) -> None:
    """Kill -9 and an empty start: what is announced is what the stage holds by now, and the end frees all of it."""
    with EmbeddedRedis() as server:
        if server.url is None:
            pytest.skip("no Redis server here")
        url = server.url
        async with scheduler(url, pool, engine("e1", **KV)), joined(url, pool, outage_after_s=30) as a:
            p = await a.granted()
            assert await grown(a, p, 23) == 960
            await asyncio.to_thread(functools.partial(server.restart, kill=True))

            async def announced() -> bool:
                with contextlib.suppress(QueueUnavailable):
                    return await reserved(a) > 0
                return False

            await until(announced)
            assert await reserved(a) == 960
            assert await grown(a, p, 87) == 1600
            p.finish()
            await a.quiet()
            assert await reserved(a) == 0


def test_every_chunk_of_a_stream_tells_how_many_tokens_have_passed() -> None:
    """Pieces of the answer are counted, about one a token, or its bytes where pieces are long; the rest adds nothing."""
    told: list[int] = []

    class Call:
        def first_byte(self) -> None: ...
        def grew(self, output_tokens: int) -> None:
            told.append(output_tokens)

        def finish(self, usage: Usage, *, ok: bool) -> None: ...
        def cancel(self) -> None: ...

    def event(**delta: str) -> bytes:
        return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"

    first = event(role="assistant", content="") + event(content="I")
    for legible in (True, False):
        watcher = Watcher(Call(), events=True, hide_usage=True, legible=legible)
        for chunk in (
            first[:30],
            first[30:],
            b": ping\n\n",
            event(reasoning_content='"so" '),
            event(content="word " * 40),
        ):
            watcher.feed(chunk)
    assert told == [0, 1, 1, 2, 41]


# -- through LangGraph, with an emulated engine ---------------------------------------------------------------------------
ANSWER = 200
"""Tokens of an answer."""


class State(TypedDict, total=False):
    out: str


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    """An engine that writes a token in some 5 ms."""
    with Emulator(EmulatorConfig(models=(EmulatedModel(name="stub", profile=CPU_TINY),))) as running:
        yield running


def streamed(emulator: Emulator) -> Iterator[str]:
    """A graph of one node, whose answer streams."""
    llm = ChatOpenAI(model="stub", base_url=emulator.url, api_key="k", max_retries=0, streaming=True)
    graph = StateGraph(State)
    graph.add_node("r", lambda _: {"out": llm.invoke(f"[[tokens={ANSWER}]]").text})
    graph.add_edge(START, "r")
    for chunk, _ in maestro.wrap(graph.compile()).stream({}, stream_mode="messages"):
        yield chunk.text


async def test_a_streamed_answer_of_a_graph_grows_its_reservation_and_gives_it_back(
    emulator: Emulator, tmp_path: Path
) -> None:
    """The ledger, looked at with every piece: it rises by 64 tokens at a time, covers what was written, ends at 0."""
    with managed(tmp_path, {"a": emulator.url}, more=KV_TOML), watched_observations() as seen:
        queue: Any = Client.current()._room.queue
        looks = await asyncio.to_thread(lambda: [queue._kv_bytes["a"] for _ in streamed(emulator)])
        steps = {after - before for before, after in pairwise(dict.fromkeys(x for x in looks if x))}
        assert steps
        assert not any(step % (10 * EXTEND_TOKENS) for step in steps)
        await until(lambda: seen)
        (o,) = seen
        assert o.output_tokens == ANSWER
        assert o.kv_extensions >= 2
        assert o.kv_reserved_bytes > 10 * ANSWER
        assert queue._kv_bytes["a"] == 0


def test_a_ticket_says_whether_its_answer_streams(emulator: Emulator, tmp_path: Path, tickets: list[Ticket]) -> None:
    """Only what is watched on its way can grow: an answer that comes whole is none, and begins with more."""
    with managed(tmp_path, {"a": emulator.url}, more=KV_TOML):
        llm = ChatOpenAI(model="stub", base_url=emulator.url, api_key="k", max_retries=0)
        maestro.install()
        llm.invoke("[[tokens=3]]")
        list(llm.stream("[[tokens=3]]"))
    assert [t.streams for t in tickets] == [False, True]


async def test_a_stream_never_waits_for_redis(emulator: Emulator, pool: str) -> None:
    """Redis hangs while an answer streams: all of it comes all the same, and what was outgrown is told afterwards."""
    with EmbeddedRedis() as server:
        if server.pid is None or server.url is None:
            pytest.skip("no Redis server here")
        place = EngineSpec(engine_id="a", url=emulator.url, model="stub", **KV)
        settings = {"redis_url": server.url, "pool": pool, "lease_s": 60.0}
        async with scheduler(server.url, pool, place):
            with managed(Path(), {}, **settings), watched_observations() as seen:
                answer = await asyncio.to_thread(stopped_while_streaming, emulator, server.pid)
                assert len("".join(answer)) > 3 * ANSWER
                queue = RedisQueue(server.url, pool=pool)
                await until(lambda: seen)
                (o,) = seen
                assert o.output_tokens == ANSWER
                assert o.kv_extensions
                await until(lambda: told(queue))
                await queue.close()


def stopped_while_streaming(emulator: Emulator, redis_pid: int) -> list[str]:
    """The pieces of an answer during which Redis hangs, from the first on to the last."""
    pieces: list[str] = []
    try:
        for piece in streamed(emulator):
            if not pieces:
                os.kill(redis_pid, signal.SIGSTOP)
            pieces.append(piece)
    finally:
        os.kill(redis_pid, signal.SIGCONT)
    return pieces


async def told(queue: RedisQueue) -> bool:
    """The end of the stage has come, and with it all that was reserved is free."""
    _, entries = await queue.read_log("", 10)
    return bool(entries) and not (await queue.ledger()).kv_bytes
