"""Live placement: nodes report, the leader decides by the simulator's own functions, nodes carry out what is wanted."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from maestro_agents.core import EngineSpec, Grant, Observation, RunEnd, ServiceClass, Status, Ticket
from maestro_agents.nodes import EngineReport, GpuReport, NodeReport, Tier, Want, Wanted
from maestro_agents.placer import BACK_OFF_S, GRACE_S, Placer, Waiting
from maestro_agents.policy import LIVE, placement
from maestro_agents.policy.placement import Board
from maestro_agents.ports import EngineHealth, Ledger, Running
from maestro_agents.queue.memory import MemoryQueue
from maestro_agents.queue.redis import RedisQueue
from maestro_agents.scheduler import Scheduler
from maestro_agents.simulator.gpus import Gpus
from maestro_agents.simulator.world import World as Simulated
from maestro_agents.workflow import Workflows
from tests.queues import fresh_redis_queue
from tests.test_client import joined, scheduler
from tests.test_placement import THREE, contended, fleet, watched
from tests.test_scheduler import Clock, Probe

GB = 10**9
LEASE_S = 10.0
WAKE_S = {"gpu": 0.0, "sleeping": 1.5, "dropped": 10.0, "host": 12.0, "disk": 45.0, "remote": 99.0}
LEAVE_S = {"sleeping": 1.5, "dropped": 0.3, "disk": 1.0}
Store = MemoryQueue | RedisQueue


@dataclass
class Server:
    """One engine of a scripted node."""

    spec: EngineSpec
    gpu_id: str
    tier: Tier
    hbm_bytes: int = 30 * GB
    to: Tier = "gpu"
    ready_at_s: float = math.inf
    changed_at_s: float = 0.0
    kv_bytes: int = 0
    want: Want | None = None
    failed: str = ""
    failed_at_s: float = 0.0
    restarts: int = 0
    ageing: str = ""
    exhausted_at_s: float = 0.0

    def __post_init__(self) -> None:
        self.to = self.tier
        self.kv_bytes = 2 * GB if self.tier == "gpu" else 0

    @property
    def in_hbm(self) -> bool:
        return "gpu" in {self.tier, self.to}


@dataclass
class Node:
    """A scripted node agent: keeps `nodes`' rules, on a clock turned by hand. ``broken``: engines whose moves fail."""

    world: World
    node_id: str
    servers: dict[str, Server]
    usable_bytes: int = 40 * GB
    ram_bytes: int = 200 * GB
    level: str = "normal"
    known: str = ""
    wanted: Wanted = field(default_factory=lambda: Wanted(epoch=0))
    broken: set[str] = field(default_factory=set[str])
    wakes: list[str] = field(default_factory=list[str])
    read: list[Wanted] = field(default_factory=list[Wanted])

    async def beat(self) -> None:
        """Read what is wanted, do what can be done by now, report."""
        found = await self.world.queue.wanted(self.node_id, known=self.known, timeout_s=0.0)
        if found is not None:
            self.known, self.wanted = found
            self.read.append(self.wanted)
            for name, s in self.servers.items():
                s.want = self.wanted.engines.get(name)
        now_s = self.world.clock.at_s
        for name, s in self.servers.items():
            if s.to != s.tier and now_s >= s.ready_at_s:
                self._arrive(name, s)
            if s.to == s.tier and s.want is not None:
                await self._carry_out(name, s, s.want)
        for gpu_id in {s.gpu_id for s in self.servers.values()}:
            used = sum(s.hbm_bytes + s.kv_bytes for s in self.servers.values() if s.gpu_id == gpu_id and s.in_hbm)
            assert used <= self.usable_bytes, f"{gpu_id} is over-committed"
        await self.world.queue.report(self.report(), now_s=now_s, ttl_s=3.0)

    def _arrive(self, name: str, s: Server) -> None:
        now_s = self.world.clock.at_s
        if name in self.broken:
            s.failed, s.failed_at_s, s.to, s.want = "out of memory", now_s, s.tier, None  # until it is told anew
            if s.tier != "gpu":
                s.kv_bytes = 0
        else:
            s.tier, s.changed_at_s = s.to, now_s
            s.kv_bytes = s.kv_bytes if s.tier == "gpu" else 0
        s.ready_at_s = math.inf

    async def _carry_out(self, name: str, s: Server, want: Want) -> None:
        now_s = self.world.clock.at_s
        free = self.usable_bytes - sum(
            o.hbm_bytes + o.kv_bytes for o in self.servers.values() if o.gpu_id == s.gpu_id and o.in_hbm
        )
        if want.tier == "gpu" == s.tier:
            assert want.rejuvenation >= s.restarts
            if want.rejuvenation > s.restarts:
                assert self.world.computing(name) == 0, f"{name} restarts while it serves"
                s.restarts, s.ageing, s.exhausted_at_s = want.rejuvenation, "", 0.0
            if want.kv_bytes and (want.kv_bytes <= s.kv_bytes or want.kv_bytes - s.kv_bytes <= free):
                s.kv_bytes = want.kv_bytes
        elif want.tier == "gpu":
            kv = max(want.kv_bytes, GB)
            if s.hbm_bytes + kv <= free:
                self.wakes.append(name)
                s.to, s.kv_bytes, s.ready_at_s = "gpu", kv, now_s + WAKE_S[s.tier]
        elif s.tier == "gpu":
            # The promise that all of this is about: nothing is asked to leave while anything runs there.
            assert self.world.computing(name) == 0, f"{name} is sent to sleep while it serves"
            s.to, s.ready_at_s = want.tier, now_s + LEAVE_S[want.tier]

    def report(self) -> NodeReport:
        asleep = sum(27 * GB for s in self.servers.values() if "sleeping" in {s.tier, s.to})
        gpus = dict.fromkeys(s.gpu_id for s in self.servers.values())
        return NodeReport(
            node_id=self.node_id, at_s=self.world.clock.at_s, ram_bytes=self.ram_bytes, ram_free_bytes=self.ram_bytes - asleep,
            gpus=[GpuReport(gpu_id=g, memory_bytes=self.usable_bytes, usable_bytes=self.usable_bytes, level=self.level) for g in gpus],
            engines=[
                EngineReport(
                    spec=dataclasses.replace(s.spec, url=s.spec.url if s.tier == "gpu" else ""), gpu_id=s.gpu_id, tier=s.tier, to=s.to,
                    hbm_bytes=s.hbm_bytes, weight_bytes=27 * GB, kv_floor_bytes=GB, kv_bytes=s.kv_bytes, elastic="enforced",
                    changed_at_s=s.changed_at_s, wake_s=WAKE_S, leave_s=LEAVE_S, failed=s.failed, failed_at_s=s.failed_at_s,
                    rejuvenation=s.restarts, ageing=s.ageing, exhausted_at_s=s.exhausted_at_s,
                )
                for s in self.servers.values()
            ],
        )  # fmt: skip


class World:
    """A pool with scripted nodes, a scheduler that is stepped by hand, and an app."""

    def __init__(self, queue: Store) -> None:
        self.clock, self.queue = Clock(), queue
        self.nodes: dict[str, Node] = {}
        self.scheduler = self.candidate("first")
        self.waiting: dict[str, Ticket] = {}
        self.granted: dict[str, Grant] = {}
        self.asked: dict[str, Ticket] = {}

    def candidate(self, holder: str, *, policy: str = "ours", probe: Probe | None = None) -> Scheduler:
        return Scheduler(
            self.queue, (), clock=self.clock, holder=holder, policy=LIVE[policy], probe=probe, lease_s=LEASE_S
        )

    def node(self, node_id: str, *, usable_gb: int = 40, **more: Any) -> Callable[..., Node]:
        """``where``: engine named model.gpu -> the tier it is in."""

        def made(**where: Tier) -> Node:
            servers: dict[str, Server] = {}
            for name, tier in where.items():
                model, _, gpu = name.partition("_")
                spec = EngineSpec(
                    engine_id=f"{model}.{node_id}.{gpu or 0}", url=f"http://{name}.{node_id}/v1", model=model, slots=4,
                    kv_bytes_per_token=1000, max_model_len=100_000,
                )  # fmt: skip
                servers[spec.engine_id] = Server(spec, f"{node_id}.{gpu or 0}", tier)
            self.nodes[node_id] = Node(self, node_id, servers, usable_bytes=usable_gb * GB, **more)
            return self.nodes[node_id]

        return made

    def server(self, engine_id: str) -> Server:
        return next(n.servers[engine_id] for n in self.nodes.values() if engine_id in n.servers)

    def computing(self, engine_id: str) -> int:
        return sum(g.engine_id == engine_id for g in self.granted.values())

    async def push(self, stage_id: str, model: str, **more: Any) -> None:
        t = Ticket(
            stage_id=stage_id, client_id="app", model=model, role=f"r{model}", node=f"r{model}", prompt_tokens=100, max_tokens=100,
            deadline_at_s=self.clock.at_s + 500.0, pushed_at_s=self.clock.at_s, due_at_s=self.clock.at_s,
        ).evolve(**more)  # fmt: skip
        self.asked[stage_id] = t
        places = [e for e in await self.queue.fleet() if e.model == model]
        verdict = await self.queue.push(t, engines=places, now_s=self.clock.at_s)
        if isinstance(verdict, Grant):
            self._take(verdict)
        else:
            self.waiting[stage_id] = t

    def _take(self, grant: Grant) -> None:
        server = self.server(grant.engine_id)
        assert server.tier == "gpu" == server.to, f"{grant.engine_id} got a stage in {server.tier} -> {server.to}"
        self.waiting.pop(grant.stage_id, None)
        self.granted[grant.stage_id] = grant

    async def finish(self, stage_id: str) -> None:
        grant, t = self.granted.pop(stage_id), self.asked[stage_id]
        o = Observation(
            stage_id=stage_id, run_id=t.run_id, workflow=t.workflow, role=t.role, node=t.node, model=t.model, status=Status.DONE,
            engine_id=grant.engine_id, service_class=ServiceClass.INTERACTIVE, tenant="default", prompt_tokens=100, output_tokens=50,
            pushed_at_s=t.pushed_at_s, granted_at_s=grant.granted_at_s, finished_at_s=self.clock.at_s,
        )  # fmt: skip
        assert await self.queue.finish(o, client_id=t.client_id, token=grant.token, now_s=self.clock.at_s)

    async def finish_all(self) -> None:
        for stage_id in list(self.granted):
            await self.finish(stage_id)

    async def step(self, seconds: float = 0.5, *, silent: Sequence[str] = ()) -> None:
        """Time passes; nodes speak, the scheduler has a round, the app hears its verdicts."""
        self.clock.at_s += seconds
        await self.queue.renew(
            "app", {s: g.token for s, g in self.granted.items()} | dict.fromkeys(self.waiting, 0), now_s=self.clock.at_s
        )
        for name, node in self.nodes.items():
            if name not in silent:
                await node.beat()
        if await self.scheduler.lead():
            await self.scheduler.step()
        if {r.ticket.stage_id for r in await self.queue.running()} - self.granted.keys():
            for verdict in await self.queue.verdicts("app", 1.0):
                assert isinstance(verdict, Grant), verdict
                self._take(verdict)
        assert sum([await self.queue.depth(m) for m in {t.model for t in self.waiting.values()}]) == len(self.waiting)

    async def run(self, seconds: float, until: Callable[[], object] | None = None, **more: Any) -> None:
        """Steps, until something holds."""
        for _ in range(round(2 * seconds)):
            if until is not None and until():
                return
            await self.step(**more)
        assert until is None or until(), f"not within {seconds} s"


@pytest.fixture(params=["memory", "redis"])
async def world(request: pytest.FixtureRequest, redis_url: str) -> AsyncIterator[World]:
    """A pool on one queue after the other."""
    queue: Store
    if request.param == "memory":
        queue = MemoryQueue(lease_s=LEASE_S)
    else:
        queue = await fresh_redis_queue(redis_url, lease_s=LEASE_S)
    yield World(queue)
    await queue.close()


# -- wake, sleep ---------------------------------------------------------------------------------------------------------
async def test_a_stage_wakes_its_model_and_is_served_there(world: World) -> None:
    """It waits, is not refused, and is granted once its engine is awake."""
    node = world.node("n", usable_gb=80)(a="gpu", b="sleeping")
    await world.step()
    assert [e.engine_id for e in await world.queue.fleet()] == ["a.n.0"]
    await world.push("s", "b")
    await world.run(5, lambda: "s" in world.granted)
    assert world.granted["s"].engine_id == "b.n.0"
    assert node.wakes == ["b.n.0"]


async def test_a_model_sleeps_only_once_nothing_is_reserved_there(world: World) -> None:
    """Its credits go first, running stages end, then its node is told; the model that gets the room wakes after that."""
    node = world.node("n")(a="gpu", b="sleeping")
    await world.step()
    await world.push("running", "a")
    assert "running" in world.granted
    for n in range(20):
        await world.push(f"b{n}", "b")
    await world.run(60, lambda: not world.scheduler.placer.takes("a.n.0"))
    assert await world.queue.fleet() == ()
    await world.push("late", "a")
    await world.run(30)
    assert node.servers["a.n.0"].tier == "gpu" == node.servers["a.n.0"].to
    assert [w.engines["a.n.0"].tier for w in node.read] == ["gpu"] * len(node.read)
    assert "late" in world.waiting
    await world.finish("running")
    await world.run(10, lambda: "b0" in world.granted)
    assert node.servers["a.n.0"].tier == "sleeping"
    while world.waiting or world.granted:
        await world.step()
        await world.finish_all()
    assert node.wakes == ["b.n.0", "a.n.0"]


async def test_a_wake_that_fails_is_made_elsewhere_and_not_again_for_a_while(world: World) -> None:
    """The stage is served by the other GPU; the one that failed is tried again after its back-off, which doubles."""
    world.scheduler = world.candidate("first", policy="lru")
    bad = world.node("bad", usable_gb=80)(a="gpu", b="sleeping")
    bad.broken = {"b.bad.0"}
    await world.step()
    await world.push("s", "b")
    await world.run(5, lambda: bad.servers["b.bad.0"].failed)
    await world.run(BACK_OFF_S - 5)
    assert bad.wakes == ["b.bad.0"]
    await world.run(10, lambda: len(bad.wakes) == 2)
    again_at_s = world.clock.at_s
    await world.run(BACK_OFF_S + 10)
    assert len(bad.wakes) == 2
    await world.run(BACK_OFF_S, lambda: len(bad.wakes) == 3)
    assert world.clock.at_s - again_at_s >= 2 * BACK_OFF_S
    good = world.node("good")(b="disk")
    await world.run(60, lambda: "s" in world.granted)
    assert world.granted["s"].engine_id == "b.good.0"
    assert good.wakes == ["b.good.0"]


async def test_a_model_that_could_not_be_put_to_sleep_serves_again(world: World) -> None:
    """It stays where it is and takes stages; who was to have its room is not waited for."""
    node = world.node("n")(a="gpu", b="sleeping")
    node.broken = {"a.n.0"}
    await world.step()
    for n in range(20):
        await world.push(f"b{n}", "b")
    await world.run(60, lambda: node.servers["a.n.0"].failed)
    await world.step()
    assert world.scheduler.placer.takes("a.n.0")
    await world.push("s", "a")
    assert "s" in world.granted
    node.broken = set()
    await world.finish("s")
    await world.run(BACK_OFF_S + 30, lambda: "b0" in world.granted)


async def test_what_a_run_will_call_is_woken_while_its_first_call_still_runs(world: World) -> None:
    """Learned from observations: after ``plan`` comes a call for the other model."""
    node = world.node("n", usable_gb=80)(a="gpu", b="gpu")
    await world.step()
    for i in range(12):
        await world.push(f"{i}.0", "a", run_id=f"r{i}", workflow="w")
        assert f"{i}.0" in world.granted
        await world.step(3.0)
        await world.finish(f"{i}.0")
        await world.push(f"{i}.1", "b", run_id=f"r{i}", workflow="w")
        await world.step(1.0)
        await world.finish(f"{i}.1")
        await world.queue.end_run(
            RunEnd(run_id=f"r{i}", workflow="w", outcome="done", started_at_s=0.0, ended_at_s=world.clock.at_s)
        )
    died = node.servers["b.n.0"]
    died.tier, died.to, died.kv_bytes, died.failed, died.failed_at_s = "disk", "disk", 0, "killed", world.clock.at_s
    died.want = None
    await world.run(BACK_OFF_S + 1)
    assert node.wakes == []
    await world.push("first", "a", run_id="r", workflow="w")
    await world.run(4, lambda: node.wakes)
    assert list(world.granted) == ["first"]
    assert node.wakes == ["b.n.0"]


async def test_a_gpu_that_is_hard_pressed_gets_no_stages(world: World) -> None:
    """Neither grants nor credits while its level is ``paused`` or ``preempting``."""
    node = world.node("n")(a="gpu")
    await world.step()
    for level in ("paused", "preempting"):
        node.level = level
        await world.step()
        assert await world.queue.fleet() == ()
        await world.push(level, "a")
        await world.step()
        assert level in world.waiting
        node.level = "tight"
        await world.step()
        assert level in world.granted


async def test_what_may_be_promised_follows_the_kv_budget(world: World) -> None:
    """The published KV memory is what the engine has, or less as soon as it shall have less."""
    node = world.node("n", usable_gb=80)(a="gpu")
    await world.step()
    (engine,) = await world.queue.fleet()
    assert engine.kv_bytes == node.servers["a.n.0"].kv_bytes
    await world.run(5, lambda: node.servers["a.n.0"].kv_bytes == 50 * GB)
    await world.step()
    (engine,) = await world.queue.fleet()
    assert engine.kv_bytes == 50 * GB


async def test_a_model_leaves_kv_memory_to_one_that_wakes_beside_it(world: World) -> None:
    """Its budget shrinks, what it holds beyond is given up, and the other one comes; nothing is over-committed."""
    node = world.node("n", usable_gb=80)(a="gpu", b="sleeping")
    await world.run(5, lambda: node.servers["a.n.0"].kv_bytes == 50 * GB)
    await world.push("s", "b")
    await world.run(10, lambda: "s" in world.granted)
    assert node.servers["a.n.0"].kv_bytes < 20 * GB


# -- faults --------------------------------------------------------------------------------------------------------------
async def test_another_leader_goes_on_where_the_first_one_was(world: World) -> None:
    """In the middle of a swap: nothing is woken or put to sleep twice, and the new leader finishes what was told."""
    node = world.node("n")(a="gpu", b="sleeping")
    await world.step()
    for n in range(20):
        await world.push(f"b{n}", "b")
    await world.run(60, lambda: node.servers["a.n.0"].to == "sleeping")
    first = world.scheduler
    world.scheduler = world.candidate("second")
    await world.run(30, lambda: "b0" in world.granted)
    assert node.wakes == ["b.n.0"]
    assert world.scheduler.epoch > first.epoch
    first.leading, first._led_at_s = True, world.clock.at_s  # it does not know yet
    first.placer._asked_at_s = -math.inf
    before = await world.queue.wanted("n", known="", timeout_s=0.0)
    assert before is not None
    await first.step()
    assert await world.queue.wanted("n", known=before[0], timeout_s=0.0) is None
    assert not first.leading


async def test_who_leads_again_does_not_go_on_from_what_it_wanted_then(world: World) -> None:
    """Meanwhile another leader had a model leave for another one: it stays away."""
    node = world.node("n")(a="gpu", b="sleeping")
    await world.step()
    first, world.scheduler = world.scheduler, world.candidate("second")
    for n in range(20):
        await world.push(f"b{n}", "b")
    while world.waiting or world.granted:
        await world.step()
        await world.finish_all()
    world.scheduler = first
    await world.run(15)
    assert first.leading
    assert node.wakes == ["b.n.0"]
    assert node.wanted.engines["a.n.0"].tier == "sleeping"
    assert [e.engine_id for e in await world.queue.fleet()] == ["b.n.0"]


async def test_an_engine_whose_memory_grows_is_drained_and_restarted(world: World) -> None:
    """It gets nothing more, its stages end, its node is told to restart it, and it serves again."""
    node = world.node("n")(a="gpu")
    await world.step()
    await world.push("running", "a")
    leaky = node.servers["a.n.0"]
    leaky.ageing, leaky.exhausted_at_s = "host memory grows", world.clock.at_s + 60.0
    await world.run(3, lambda: not world.scheduler.placer.takes("a.n.0"))
    await world.run(5)
    assert leaky.restarts == 0
    await world.push("late", "a")
    assert "late" in world.waiting
    await world.finish("running")
    leaky.ageing, leaky.exhausted_at_s = "host memory grows", world.clock.at_s + 60.0
    await world.run(5, lambda: leaky.restarts == 1)
    await world.run(5, lambda: "late" in world.granted)


async def test_an_undecided_closing_is_forgotten_with_its_leader(world: World) -> None:
    """What its node was not told yet the next leader decides anew; until then the engine serves."""
    node = world.node("n")(a="gpu", b="sleeping")
    await world.step()
    await world.push("running", "a")
    for n in range(20):
        await world.push(f"b{n}", "b")
    await world.run(60, lambda: not world.scheduler.placer.takes("a.n.0"))
    world.scheduler = world.candidate("second")
    await world.run(15, lambda: world.scheduler.leading)
    assert all(w.engines["a.n.0"].tier == "gpu" for w in node.read)
    await world.finish("running")
    await world.run(60, lambda: "b0" in world.granted)
    assert node.wakes == ["b.n.0"]


async def test_a_node_that_is_silent_is_dead_and_its_models_are_woken_elsewhere(world: World) -> None:
    """Its engines leave the fleet; after a moment of grace another node gets the model; once it speaks it takes part again."""
    world.node("n1")(a="gpu")
    other = world.node("n2")(a="disk")
    await world.step()
    await world.run(4, lambda: not world.scheduler.engines.get("a.n1.0"), silent=["n1"])
    assert await world.queue.fleet() == ()
    await world.push("s", "a")
    await world.step(silent=["n1"])
    assert other.wakes == []
    await world.run(GRACE_S + 60, lambda: "s" in world.granted, silent=["n1"])
    assert world.granted["s"].engine_id == "a.n2.0"
    await world.step()
    assert {e.engine_id for e in await world.queue.fleet()} == {"a.n1.0", "a.n2.0"}


async def test_a_woken_engine_is_looked_at_before_it_gets_a_stage(world: World) -> None:
    """At once, by the running scheduler; what was known of its former server does not count."""
    node = world.node("n", usable_gb=80)(a="gpu", b="sleeping")
    probe = Probe(**{"a.n.0": EngineHealth(healthy=True)})
    world.scheduler = world.candidate("first", probe=probe)
    await node.beat()
    task = asyncio.create_task(world.scheduler.run())
    try:
        await until(lambda: world.scheduler.leading and world.scheduler.takes("a.n.0"))
        await world.push("s", "b")
        while node.servers["b.n.0"].tier != "gpu":
            world.clock.at_s += 0.5
            await node.beat()
            await asyncio.sleep(0.01)
        await until(lambda: world.scheduler.placer.takes("b.n.0"))
        assert not world.scheduler.takes("b.n.0")
        assert await world.queue.depth("b") == 1
        probe.says["b.n.0"] = EngineHealth(healthy=True)
        await until(lambda: world.scheduler.takes("b.n.0"))
        async with asyncio.timeout(10):
            while await world.queue.depth("b"):
                world.clock.at_s += 0.1
                await world.queue.renew("app", {"s": 0}, now_s=world.clock.at_s)
                await node.beat()
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


async def test_an_app_waits_for_a_model_that_no_engine_has_ever_served(redis_url: str, pool: str) -> None:
    """A node could serve it: the call does not pass by to its own URL, and goes to the engine once that is awake."""
    queue = RedisQueue(redis_url, pool=pool, lease_s=LEASE_S)
    async with scheduler(redis_url, pool) as leader, joined(redis_url, pool) as app:
        world = World(queue)
        node = world.node("n")(m="sleeping")
        world.clock.at_s = leader.clock.now_s()
        await node.beat()
        waiting, task = app.waiter("s", model="m")
        while not waiting.grant:
            world.clock.at_s = leader.clock.now_s()
            await node.beat()
            await asyncio.sleep(0.05)
        assert (await task).engine_id == "m.n.0"
        waiting.finish()
        await until(lambda: not app.room.held)
    await queue.close()


# -- the same board ------------------------------------------------------------------------------------------------------
class Shadow:
    """A placer beside a simulation: told by reports, tickets, leases and observations what the simulator knows by itself."""

    def __init__(self, policy: str, path: Path, *, gpus: int) -> None:
        self.workflows = Workflows()
        self.placer = Placer(cast("Any", self), self._live, self.workflows)
        self.place = LIVE[policy].place
        self.waiting: set[str] = set()
        self.jobs: dict[str, Any] = {}
        self.held: dict[str, tuple[float, str]] = {}
        self.compared = 0
        self.actions: list[placement.Action] = []
        self.simulated = Simulated(
            contended(24), fleet(path, THREE, gpus=gpus), watched(self._decide, lambda b, now_s: None), tell=self._hear
        )
        self.simulated.play()

    # What the placer asks of its queue.
    async def reports(self, now_s: float) -> list[NodeReport]:
        del now_s
        found: list[NodeReport] = []
        for node in {id(g.node): g.node for g in self._gpus._gpus.values()}.values():
            gpus = [g for g in self._gpus._gpus.values() if g.node is node]
            found.append(
                NodeReport(
                    node_id=node.sim.node_id, ram_free_bytes=node.ram_free_bytes,
                    gpus=[GpuReport(gpu_id=g.gpu_id, memory_bytes=g.usable_bytes, usable_bytes=g.usable_bytes) for g in gpus],
                    engines=[self._engine(s) for g in gpus for s in g.slots.values()],
                )
            )  # fmt: skip
        return found

    async def wanted(self, *_: Any, **__: Any) -> None:
        return None

    @property
    def _gpus(self) -> Gpus:
        assert self.simulated._gpus
        self.workflows._follows = (
            self.simulated._gpus._follows
        )  # live it is learned when the call that followed has ended
        return self.simulated._gpus

    def _engine(self, s: Any) -> EngineReport:
        tiers = s.served.tiers
        drains = s.to != "gpu" == s.tier and s.use.running
        return EngineReport(
            spec=s.sim.spec, gpu_id=s.gpu.gpu_id, tier=s.tier, to=s.tier if drains else s.to, hbm_bytes=s.hbm_bytes,
            weight_bytes=s.served.weight_bytes, kv_floor_bytes=s.floor_bytes, kv_bytes=s.kv_bytes, changed_at_s=s.changed_at_s,
            wake_s={"sleeping": tiers.from_sleeping_s, "dropped": tiers.reload_s, "disk": tiers.from_disk_s},
            leave_s={"sleeping": tiers.to_sleeping_s, "dropped": tiers.discard_s},
        )  # fmt: skip

    def _hear(self, e: tuple[Any, ...]) -> None:
        if e[0] == "ready":
            self.waiting.add(e[2])
        elif e[0] == "grant":
            self.waiting.discard(e[2])
            self.held[e[2]] = (e[1], e[3])
            self._tell(e[1])
        elif e[0] == "end":
            granted_at_s, engine_id = self.held.pop(e[2])
            job = self.jobs[e[2]]
            o = Observation(
                stage_id=e[2], run_id=job.ticket.run_id, workflow=job.ticket.workflow, role=job.ticket.role, node=job.ticket.node,
                model=job.ticket.model, engine_id=engine_id, service_class=ServiceClass.BATCH, tenant="t", status=Status.DONE,
                visit=job.ticket.visit, pushed_at_s=job.ticket.pushed_at_s, granted_at_s=granted_at_s, finished_at_s=e[1],
            )  # fmt: skip
            self.placer.observe(o, e[1])
        elif e[0] == "done":
            self.placer.observe(
                RunEnd(run_id=e[2], workflow="app", outcome="done", started_at_s=0.0, ended_at_s=e[1]), e[1]
            )

    @property
    def _jobs(self) -> Mapping[str, Any]:
        waiting = [j for q in self.simulated._queues.values() for _, _, j in q]
        running = [j for p in self.simulated._places for j in p.jobs.values()]
        return {j.ticket.stage_id: j for j in (*waiting, *running)}

    def _tell(self, now_s: float) -> tuple[Waiting, Ledger]:
        """What the queue knows now."""
        self.jobs |= self._jobs  # one that is about to be granted is in no queue
        jobs = self.jobs
        self.placer._running = [
            Running(ticket=jobs[s].ticket, engine_id=engine, token=1, kv_bytes=0, granted_at_s=at_s, lease_until_s=0.0)
            for s, (at_s, engine) in self.held.items()
        ]
        slots = {s.sim.spec.engine_id: s for s in self._gpus._slots}
        ledger = Ledger(
            slots={e: s.use.running for e, s in slots.items()},
            kv_bytes={e: s.use.reserved_bytes for e, s in slots.items()},
        )
        here = [jobs[s] for s in self.waiting if s in jobs]
        waiting = Waiting(tickets=[j.ticket for j in here], predictions={j.ticket.stage_id: j.prediction for j in here})
        self.placer._asked_at_s = now_s
        self.placer.told_of(waiting, ledger, lambda new: {t.stage_id: jobs[t.stage_id].prediction for t in new}, now_s)
        return waiting, ledger

    def _live(self, board: Board, now_s: float) -> list[placement.Action]:
        raise AssertionError

    def _decide(self, simulated: Board, now_s: float) -> list[placement.Action]:
        """The simulator asks: make the live board for the same moment, and compare."""
        look = self.placer.look(now_s, leading=True)
        with contextlib.suppress(StopIteration):
            look.send(None)
        waiting, ledger = self._tell(now_s)
        live = self.placer.board(waiting, [], now_s)
        there = _seen(simulated, lambda x: pytest.approx(x, rel=0.05, abs=0.05))
        for key, seen in _seen(live, lambda x: x).items():
            assert seen == there.pop(key), (now_s, key)
        assert not there
        actions = self.place(live, now_s)
        assert actions == self.place(simulated, now_s)
        self.compared += 1
        self.actions += actions
        for action in actions:
            self.placer._do(action, now_s)
        for seat in self.placer._seats.values():
            seat.told = seat.told or not ledger.slots[seat.engine_id]
        return actions


def _seen(board: Board, near: Callable[[float], object]) -> dict[object, object]:
    """A board without the order of things; what is learned, or waits for a clock, as ``near`` has it."""
    residents: dict[object, object] = {
        (g.gpu_id, r.model): (
            r.tier, r.to, r.hbm_bytes, r.ram_bytes, r.kv_floor_bytes, r.kv_bytes, r.reserved_bytes, r.running, r.changed_at_s,
            near(r.drain_s), r.wake_s, r.sleep_s, r.drop_s, r.holds_parent, near(r.busy),
        )
        for g in board.gpus for r in g.residents
    }  # fmt: skip
    demands: dict[object, object] = {
        d.model: (
            d.waiting, near(d.waited_s), d.oldest_at_s, d.due_at_s, d.late, near(d.late_waited_s), near(d.stages_per_s),
            near(d.work), [near(in_s) for in_s, _ in sorted(d.foreseen)], [near(n) for _, n in sorted(d.foreseen)],
        )
        for d in board.demands.values()
    }  # fmt: skip
    return residents | demands | {g.gpu_id: (g.usable_bytes, g.ram_free_bytes, g.promised) for g in board.gpus}


@pytest.mark.parametrize("policy", ["ours", "lru"])
def test_the_live_board_is_the_simulators(policy: str, tmp_path: Path) -> None:
    """Told only what nodes report and the queue knows, the same board and the same actions come out at every question."""
    shadow = Shadow(policy, tmp_path, gpus=2)
    assert shadow.compared > 50
    assert {type(a) for a in shadow.actions} >= {placement.Wake, placement.Sleep}


# -- a random walk -------------------------------------------------------------------------------------------------------
class Walk(RuleBasedStateMachine):
    """Whatever apps, nodes and leaders do: the assertions of the scripted nodes and of `World` hold, and no stage is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.world = World(MemoryQueue(lease_s=LEASE_S))
        self.world.node("n1")(a="gpu", b="sleeping", c="disk")
        self.world.node("n2", usable_gb=80)(a="disk", b="gpu", c="sleeping")
        self.silent: set[str] = set()
        self.pushed = 0
        self.leaders = 0

    @rule(model=st.sampled_from("abc"), n=st.integers(1, 12))
    def push(self, model: str, n: int) -> None:
        for _ in range(n):
            self.pushed += 1
            self.loop.run_until_complete(self.world.push(f"s{self.pushed}", model))

    @rule(steps=st.integers(1, 8), seconds=st.sampled_from([0.3, 1.0, 5.0]))
    def time_passes(self, steps: int, seconds: float) -> None:
        for _ in range(steps):
            self.loop.run_until_complete(self.world.step(seconds, silent=sorted(self.silent)))

    @rule(n=st.integers(1, 8))
    def some_finish(self, n: int) -> None:
        for stage_id in list(self.world.granted)[:n]:
            self.loop.run_until_complete(self.world.finish(stage_id))

    @rule(node=st.sampled_from(["n1", "n2"]), level=st.sampled_from(["normal", "normal", "paused"]))
    def is_pressed(self, node: str, level: str) -> None:
        self.world.nodes[node].level = level

    @rule(node=st.sampled_from(["n1", "n2"]), broken=st.sets(st.sampled_from("abc")))
    def moves_fail(self, node: str, broken: set[str]) -> None:
        self.world.nodes[node].broken = {f"{m}.{node}.0" for m in broken}

    @rule(node=st.sampled_from(["n1", "n2"]), silent=st.booleans())
    def falls_silent(self, node: str, silent: bool) -> None:
        (self.silent.add if silent else self.silent.discard)(node)

    @rule()
    def another_leads(self) -> None:
        self.leaders += 1
        self.world.scheduler = self.world.candidate(f"leader {self.leaders}")

    @invariant()
    def no_stage_is_lost(self) -> None:
        finished = sum(1 for s in self.world.asked if s not in self.world.granted and s not in self.world.waiting)
        assert finished + len(self.world.granted) + len(self.world.waiting) == self.pushed

    def teardown(self) -> None:
        async def all_is_served() -> None:
            w = self.world
            for node in w.nodes.values():
                node.broken, node.level = set(), "normal"
            for _ in range(900):
                if not (w.waiting or w.granted):
                    return
                await w.step(1.0)
                await w.finish_all()
            raise AssertionError(f"{len(w.waiting)} stages wait for ever")

        self.loop.run_until_complete(all_is_served())
        self.loop.close()


def test_whatever_happens_no_stage_is_lost_nor_granted_to_an_engine_that_sleeps() -> None:
    """Pushes, ends, pressed GPUs, moves that fail and leaders that change, at random; then all is served in the end."""
    run_state_machine_as_test(
        Walk,
        settings=settings(
            max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), stateful_step_count=30
        ),
    )  # type: ignore[arg-type]
