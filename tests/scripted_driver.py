"""Engines for tests of the node agent: they do what they are told, on a GPU whose memory is counted, and fail when asked to."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from maestro_agents.core import EngineSpec
from maestro_agents.errors import EngineUnavailable
from maestro_agents.fleet import Launch
from maestro_agents.nodes import Elastic, EngineReport, Tier, Want, Wanted
from maestro_agents.queue.memory import MemoryQueue
from maestro_serving import node as node_module
from maestro_serving.drivers import Host, Look, NodeEngine, NodeGpu
from maestro_serving.node import Node

GB = 10**9


@dataclass
class Card:
    """A GPU's memory, and every instant at which it was over-committed."""

    usable_bytes: int
    held: dict[str, int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def hold(self, name: str, size: int) -> None:
        self.held[name] = size
        if sum(self.held.values()) > self.usable_bytes:
            self.violations.append(f"{name}: {self.held}")

    def free(self, name: str) -> None:
        self.held.pop(name, None)


class ScriptedDriver:
    """See `maestro_serving.drivers.Driver`. ``calls``: what was asked of it; ``hold``: operations that wait to be let go."""

    def __init__(self, engine: NodeEngine, card: Card, *, elastic: Elastic = "accounted") -> None:
        self.engine, self.card, self.elastic = engine, card, elastic
        self.calls: list[str] = []
        self.hold: dict[str, asyncio.Event] = {}
        self.failures: dict[str, deque[str]] = {}
        self.up = self.healthy = False
        self.level: int | None = None
        self.running = self.waiting = 0
        self.used = -1
        self.limit = engine.kv_floor_bytes
        self.aborted = 0
        self.survivor = False
        self.preserved = 0

    def fail(self, call: str, why: str = "told to fail") -> None:
        self.failures.setdefault(call, deque()).append(why)

    async def _do(self, call: str) -> None:
        self.calls.append(call)
        if call in self.hold:
            await self.hold[call].wait()
        if self.failures.get(call):
            raise EngineUnavailable(self.failures[call].popleft())
        await asyncio.sleep(0)

    def _take(self) -> None:
        kv = self.limit if self.elastic == "enforced" else self.engine.spec.kv_bytes
        self.card.hold(self.engine.engine_id, self.engine.hbm_bytes + kv)

    async def adopt(self) -> str | None:
        if not self.survivor:
            return None
        self.up = self.healthy = True
        if self.level is None:
            self._take()
        return "http://127.0.0.1:1/v1"

    async def start(self) -> str:
        self._take()
        try:
            await self._do("start")
        except BaseException:
            self.card.free(self.engine.engine_id)
            raise
        self.up = self.healthy = True
        self.level = None
        return "http://127.0.0.1:1/v1"

    async def stop(self) -> None:
        self.aborted += self.running
        await self._do("stop")
        self.up = self.healthy = False
        self.level, self.running = None, 0
        self.card.free(self.engine.engine_id)

    async def sleep(self, level: int) -> None:
        self.aborted += self.running
        await self._do(f"sleep {level}")
        self.level = level
        self.card.free(self.engine.engine_id)

    async def wake(self) -> None:
        self._take()
        try:
            await self._do("wake")
        except BaseException:
            self.card.free(self.engine.engine_id)
            raise
        self.level = None

    async def limit_kv(self, kv_bytes: int) -> None:
        await self._do("limit_kv")
        self.limit = kv_bytes
        if self.up and self.level is None:
            held = max(kv_bytes, self.used)
            self.card.hold(self.engine.engine_id, self.engine.hbm_bytes + held)

    async def look(self) -> Look:
        if self.used > self.limit and self.running == 0:
            self.used = self.limit
        if self.up and self.level is None and self.elastic == "enforced":
            self.card.hold(self.engine.engine_id, self.engine.hbm_bytes + max(self.limit, self.used))
        return Look(
            alive=self.up,
            healthy=self.healthy,
            asleep=self.level,
            running=self.running if self.up else -1,
            waiting=self.waiting if self.up else -1,
            kv_used_bytes=self.used if self.up else -1,
        )

    async def close(self) -> None:
        self.calls.append("close")

    def die(self) -> None:
        """Kill -9."""
        self.up = self.healthy = False
        self.level, self.running = None, 0
        self.card.free(self.engine.engine_id)


class Clock:
    """This machine's."""

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()


@dataclass
class Bench:
    """A node of scripted engines under its agent."""

    node: Node
    queue: MemoryQueue
    drivers: dict[str, ScriptedDriver]
    cards: dict[str, Card]
    task: asyncio.Task[None] | None = None

    async def want(self, *, epoch: int = 1, kv: dict[str, int] | None = None, restarts: int = 0, **tiers: Tier) -> None:
        """Say what is wanted, by model."""
        engines = {
            f"{name}.n.0": Want(tier=tier, kv_bytes=(kv or {}).get(name, 0), rejuvenation=restarts)
            for name, tier in tiers.items()
        }
        await self.queue.want("n", Wanted(epoch=epoch, engines=engines))

    async def report(self, name: str) -> EngineReport:
        for report in await self.queue.reports(Clock().now_s()):
            for e in report.engines:
                if e.spec.engine_id == f"{name}.n.0":
                    return e
        raise AssertionError(f"nothing is reported of {name}")

    async def until(self, true: Callable[[], bool], within_s: float = 5.0) -> None:
        async with asyncio.timeout(within_s):
            while not true():
                await asyncio.sleep(0.002)

    async def tells(self, name: str, within_s: float = 5.0, **what: object) -> EngineReport:
        """Wait until the report says so."""
        async with asyncio.timeout(within_s):
            while True:
                with contextlib.suppress(AssertionError):
                    e = await self.report(name)
                    if all(getattr(e, k) == v for k, v in what.items()):
                        return e
                await asyncio.sleep(0.002)

    def there(self, name: str) -> ScriptedDriver:
        return self.drivers[f"{name}.n.0"]


def node_engine(
    name: str,
    *,
    weights_gb: float = 14,
    kv_gb: float = 4,
    floor_gb: float = 0,
    enforced: bool = False,
    files: tuple[Path, ...] = (),
) -> NodeEngine:
    spec = EngineSpec(engine_id=f"{name}.n.0", url="", model=name, kv_bytes=int(kv_gb * GB))
    return NodeEngine(
        spec=spec,
        gpus=("n.0",),
        launch=Launch(kind="vllm"),
        weight_bytes=int(weights_gb * GB),
        server_bytes=2 * GB,
        kv_floor_bytes=int((floor_gb or (1 if enforced else kv_gb)) * GB),
        weight_files=files,
    )


@contextlib.asynccontextmanager
async def bench(
    state: Path,
    *engines: NodeEngine,
    usable_gb: float = 40,
    ram_gb: float = 100,
    elastic: Elastic = "accounted",
    at_start: tuple[str, ...] = (),
    prepare: Callable[[Bench], None] = lambda _bench: None,
    queue: MemoryQueue | None = None,
) -> AsyncIterator[Bench]:
    """An agent that runs until the block ends."""
    card = Card(int(usable_gb * GB))
    gpu = NodeGpu(
        gpu_id="n.0",
        index=0,
        kind="a100-80g",
        memory_bytes=card.usable_bytes,
        usable_bytes=card.usable_bytes,
        state=state,
    )
    host = Host(
        node_id="n", cluster="local", ram_bytes=int(ram_gb * GB), gpus=(gpu,), engines=engines,
        at_start=tuple(f"{name}.n.0" for name in at_start),
    )  # fmt: skip
    drivers: dict[str, ScriptedDriver] = {}

    def driver_of(engine: NodeEngine, gpu: NodeGpu) -> ScriptedDriver:
        drivers[engine.engine_id] = ScriptedDriver(engine, card, elastic=elastic)
        return drivers[engine.engine_id]

    found = queue or MemoryQueue()
    node = Node(host, found, clock=Clock(), driver_of=driver_of, state=state)
    it = Bench(node=node, queue=found, drivers=drivers, cards={"n.0": card})
    prepare(it)
    it.task = asyncio.create_task(node.run())
    try:
        yield it
        assert card.violations == []
        assert not it.task.done() or it.task.cancelled(), it.task
    finally:
        it.task.cancel()
        await asyncio.gather(it.task, return_exceptions=True)
        await node.leave()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats and back-offs of milliseconds."""
    monkeypatch.setattr(node_module, "BEAT_S", 0.01)
    monkeypatch.setattr(node_module, "FIRST_BACKOFF_S", 0.02)
    monkeypatch.setattr(node_module, "LAST_BACKOFF_S", 0.04)
