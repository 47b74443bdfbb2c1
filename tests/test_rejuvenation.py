"""Real servers that leak, under a real agent, scheduler and Redis: each is restarted in time, in turn, and no call fails."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from maestro_agents.client import Client
from maestro_agents.core import EngineSpec, Ticket
from maestro_agents.fleet import Launch
from maestro_agents.policy import ageing
from maestro_agents.queue.redis import RedisClock, RedisQueue
from maestro_agents.scheduler import Scheduler
from maestro_agents.settings import Settings
from maestro_serving import node as node_module
from maestro_serving import vllm_driver
from maestro_serving.drivers import Host, Look, NodeEngine, NodeGpu
from maestro_serving.node import Node
from maestro_serving.vllm_driver import VllmDriver
from tests.scripted_driver import GB, bench, node_engine

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="PSS is read from /proc")

MIB = 2**20
LEAK_BYTES_PER_S = 15 * MIB
MEMORY = 1500 * MIB
"""Of the host, for both servers: they have taken all of it after some forty seconds."""


@pytest.fixture
def leaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that leak, watched by a few blocks of 0.1 s instead of many of 10 s; what a host has left is what ours left it."""
    program = tmp_path / "vllm"
    paths = os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)
    script = Path(__file__).with_name("leaky_vllm.py")
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{paths}" exec "{sys.executable}" "{script}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("MAESTRO_VLLM", str(program))
    monkeypatch.setenv("LEAK_BYTES_PER_S", str(LEAK_BYTES_PER_S))
    monkeypatch.setattr(node_module, "Watch", functools.partial(ageing.Watch, block_s=0.1))
    monkeypatch.setattr(ageing, "LEAST", 24)
    monkeypatch.setattr(vllm_driver, "_MEMORY_EVERY_S", 0.02)
    monkeypatch.setattr(node_module, "BEAT_S", 0.05)


def host_of(state: Path) -> Host:
    """Two cores, one server of the same model on each."""
    gpus = tuple(
        NodeGpu(gpu_id=f"n.{i}", index=i, kind="cpu", memory_bytes=10**9, usable_bytes=10**9, cpu_core=0, state=state)
        for i in range(2)
    )
    engines = tuple(
        NodeEngine(
            spec=EngineSpec(engine_id=f"m.{gpu.gpu_id}", url="", model="m", slots=4, kv_bytes=10**8),
            gpus=(gpu.gpu_id,),
            launch=Launch(kind="vllm"),
            weight_bytes=10**8,
            server_bytes=10**8,
            kv_floor_bytes=10**8,
            sleeps=False,
        )
        for gpu in gpus
    )
    return Host(node_id="n", cluster="local", ram_bytes=10**9, gpus=gpus, engines=engines, at_start=("m.n.0", "m.n.1"))


async def test_memory_of_an_engine_that_sleeps_is_not_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asleep it has its weights in host memory: that is no growth. A new server begins a new watch."""
    seen: list[int] = []

    class Watch(ageing.Watch):
        def look(self, now_s: float, **bytes_of: int) -> ageing.Ageing | None:
            seen.append(bytes_of["host_bytes"])
            return super().look(now_s, **bytes_of)

    monkeypatch.setattr(node_module, "Watch", Watch)
    monkeypatch.setattr(node_module, "BEAT_S", 0.01)
    async with bench(tmp_path, node_engine("a"), at_start=("a",)) as it:
        driver, look = it.there("a"), it.there("a").look

        async def looks() -> Look:
            found = await look()
            return dataclasses.replace(found, host_bytes=1 if driver.level is None else 14 * GB)

        monkeypatch.setattr(driver, "look", looks)
        await it.tells("a", tier="gpu")
        await it.until(lambda: seen)
        first = it.node._engines["a.n.0"].memory
        await it.want(a="sleeping")
        await it.tells("a", tier="sleeping")
        asleep = len(seen)
        await it.until(lambda: it.node._engines["a.n.0"].look.host_bytes == 14 * GB)
        await it.want(a="gpu")
        await it.tells("a", tier="gpu", to="gpu")
        await it.until(lambda: len(seen) > asleep)
        assert set(seen) == {1}
        assert it.node._engines["a.n.0"].memory is first
        await it.want(a="gpu", restarts=1)
        await it.tells("a", tier="gpu", rejuvenation=1)
        assert it.node._engines["a.n.0"].memory is not first


@contextlib.asynccontextmanager
async def running(node: Node, scheduler: Scheduler) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(node.run()), asyncio.create_task(scheduler.run())]
    try:
        yield
        for task in tasks:
            assert not task.done(), task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await node.close()


async def calls(client: Client, served: list[str], over: asyncio.Event) -> None:
    """One call after another, until it is over, as the gate makes them: a server that has gone before it was reached is no
    failure, whatever else fails, fails the test.
    """
    async with httpx.AsyncClient(timeout=20, trust_env=False) as http:
        while not over.is_set():
            n = f"s{len(served)}-{id(http)}"
            p = client.open(
                Ticket(stage_id=n, client_id="c", model="m", prompt_tokens=5, max_tokens=8), original_url=""
            )
            assert p is not None
            answer = None
            while answer is None:
                engine = await p.wait_async()
                p.sent()
                body = {"model": "m", "prompt": "Hello", "max_tokens": 8}
                try:
                    answer = await http.post(f"{engine.url}/completions", json=body)
                except httpx.ConnectError:
                    assert p.requeue(engine_down=True)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["finish_reason"] in {"stop", "length"}
            p.first_byte()
            p.finish(output_tokens=8)
            served.append(engine.engine_id)


@pytest.mark.slow
async def test_servers_that_leak_are_restarted_drained_and_in_turn_while_calls_go_on(
    tmp_path: Path, redis_url: str, pool: str, leaky: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watched by their real PSS: both restart before the host's memory is full, one always serves, no call fails."""
    queue, clock = RedisQueue(redis_url, pool=pool), RedisClock()
    await clock.sync(queue)
    most, awake_least, words = [0], [2], dict[str, str]()

    def left() -> int:
        taken = sum(max(0, e.look.host_bytes) for e in node._engines.values() if e.look.alive)
        most[0] = max(most[0], taken)
        return max(0, MEMORY - taken)

    monkeypatch.setattr(node_module, "_available_bytes", left)
    node = Node(host_of(tmp_path), queue, clock=clock, driver_of=VllmDriver, state=tmp_path)
    scheduler = Scheduler(queue, [], clock=clock, holder="s", lease_s=15.0)
    client = Client(Settings.load(redis_url=redis_url, pool=pool, lease_s=15.0))
    served, over = list[str](), asyncio.Event()
    try:
        async with running(node, scheduler), asyncio.timeout(90):
            while {e.tier for e in node.report().engines} != {"gpu"}:
                await asyncio.sleep(0.02)
            callers = [asyncio.create_task(calls(client, served, over)) for _ in range(3)]
            while not all(e.rejuvenation and e.tier == "gpu" for e in node.report().engines):
                said = node.report()
                awake_least[0] = min(awake_least[0], sum(e.tier == "gpu" for e in said.engines))
                words.update({e.spec.engine_id: e.ageing for e in said.engines if e.ageing})
                for caller in callers:
                    if caller.done():
                        await caller
                await asyncio.sleep(0.01)
            before = len(served)
            while len(served) < before + 20:
                await asyncio.sleep(0.01)
            over.set()
            await asyncio.gather(*callers)
    finally:
        over.set()
        await asyncio.to_thread(client.close)
        await queue.close()
    print(f"{len(served)} calls, at most {most[0] / MIB:.0f} of {MEMORY / MIB:.0f} MiB; {words}")
    assert set(served) == {"m.n.0", "m.n.1"}
    assert most[0] < MEMORY
    assert awake_least[0] == 1
    assert all(w.startswith("host memory grows") for w in words.values())
    assert len(words) == 2
