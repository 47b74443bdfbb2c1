"""Clusters with distance between them: measured, lost, found again; and tenants that may not be served everywhere."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_agents import room as room_module
from maestro_agents.cli.doctor import check_clusters
from maestro_agents.cli.snapshot import Watch, cluster_lines
from maestro_agents.client import Pass
from maestro_agents.core import EngineSpec, EngineState, Grant, Observation, Prediction, Refusal, Status, Ticket
from maestro_agents.distance import ALPHA, KEPT_S, NEAR_S, Distances, by_cluster, smoothed
from maestro_agents.errors import ConfigError, NoEngineFits, QueueUnavailable
from maestro_agents.fleet import load_fleet
from maestro_agents.nodes import EngineReport, GpuReport, NodeReport
from maestro_agents.policy import OURS, Snapshot, plan
from maestro_agents.policy.admission import RETURN_DOUBLES_S, RETURN_SLOTS, open_slots
from maestro_agents.policy.placement import by_value
from maestro_agents.ports import Distance
from maestro_agents.predict.speed import EngineSpeeds
from maestro_agents.queue.memory import MemoryQueue
from maestro_agents.queue.redis import RedisClock, RedisQueue
from maestro_agents.room import Room
from maestro_agents.scheduler import Scheduler
from maestro_agents.settings import Settings
from maestro_agents.simulator.gpus import Gpus
from maestro_agents.simulator.hardware import load_sim_fleet
from maestro_agents.simulator.workload import Workload
from maestro_agents.tenants import Tenant, with_residency
from maestro_langgraph import maestro
from maestro_serving.emulator import EmulatedModel, Emulator, EmulatorConfig
from maestro_serving.hosts import load_host
from maestro_serving.vllm import VllmProbe
from tests.stub_openai import StubServer, dead_url, managed, watched_observations
from tests.test_client import app, out, until
from tests.test_monitor import text_of
from tests.test_predict import timed
from tests.test_scheduler import NOW_S, Probe, World, engine, idle

ABROAD = engine("far", cluster="us", slots=4)
HERE = engine("near", cluster="eu", slots=4)
PREDICTED = Prediction(
    output_tokens_mean=10, output_tokens_p50=10, output_tokens_p90=20, output_tokens_p99=30, service_s=1, remaining_s=0
)


def measured(site: str, cluster: str, rtt_s: float, at_s: float = NOW_S) -> Distance:
    return Distance(site=site, cluster=cluster, rtt_s=rtt_s, measured_at_s=at_s)


def ticket(stage_id: str = "s", **more: Any) -> Ticket:
    return Ticket(stage_id=stage_id, client_id="c", model="m", role="r", prompt_tokens=10).evolve(**more)


def planned(*tickets: Ticket, engines: list[EngineState], complete: bool = True) -> dict[str, str]:
    """Stage -> where it goes, or why it is refused."""
    predictions = {t.stage_id: PREDICTED for t in tickets}
    snapshot = Snapshot(tickets=tickets, predictions=predictions, engines=engines, complete=complete)
    made = plan(snapshot, OURS, epoch=1, now_s=NOW_S)
    found = {t.stage_id: g.engine_id for t, g in made.grants}
    return found | {t.stage_id: r.reason for t, r in made.refusals}


# -- measured ------------------------------------------------------------------------------------------------------------
def test_round_trips_are_smoothed_as_tcp_does() -> None:
    """One slow answer moves the estimate by an eighth; what was not reached before begins anew."""
    assert smoothed(0.080, 0.160) == pytest.approx(0.080 + ALPHA * 0.080)
    assert smoothed(math.inf, 0.002) == 0.002
    assert smoothed(0.002, math.inf) == math.inf


def test_what_is_old_is_forgotten() -> None:
    """A minute after the last word of a site nothing is known of it."""
    found = [measured("berlin", "eu", 0.001), measured("berlin", "us", 0.08, NOW_S - KEPT_S - 1)]
    assert by_cluster(found, NOW_S) == {"eu": {"berlin": 0.001}}


class Site:
    """Distances of one site on a queue in memory, with a clock turned by hand."""

    def __init__(self, queue: MemoryQueue | None = None) -> None:
        self.at_s = NOW_S
        self.queue = queue or MemoryQueue()
        self.distances = Distances("berlin", lambda: self.at_s)

    async def look(self, *engines: EngineSpec, after_s: float = 0.0) -> None:
        self.at_s += after_s
        await self.distances.look(self.queue, engines)


@contextlib.asynccontextmanager
async def site(queue: MemoryQueue | None = None) -> AsyncIterator[Site]:
    made = Site(queue)
    try:
        yield made
    finally:
        await made.distances.close()


class Forwarder:
    """The network in front of a server: bytes pass after ``delay_s``, and not at all while it is cut."""

    def __init__(self, to: str, delay_s: float = 0.0) -> None:
        self.to = int(to.rpartition(":")[2].split("/")[0])
        self.delay_s = delay_s
        self.connections = 0
        self._server: asyncio.Server | None = None
        self._port = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def join(self) -> None:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server
        self._server.close()
        for writer in tuple(self._open):
            writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self.to)
            self._open |= {writer, back}
            await asyncio.gather(self._copy(reader, back), self._copy(there, writer), return_exceptions=True)
            self._open -= {writer, back}
        writer.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await asyncio.sleep(self.delay_s)
            writer.write(data)
            await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def network(*servers: Any, delay_s: float = 0.0) -> AsyncIterator[list[Forwarder]]:
    made = [Forwarder(server.url, delay_s) for server in servers]
    for forwarder in made:
        await forwarder.join()
    try:
        yield made
    finally:
        for forwarder in made:
            await forwarder.cut()


@pytest.fixture
def stub() -> Iterator[StubServer]:
    """A server that knows no /health: an answer is an answer."""
    server = StubServer()
    yield server
    server.stop()


async def test_the_network_is_measured_and_shared_with_the_site(stub: StubServer) -> None:
    """The delay of the way is found, whatever the server is; another app of the site reads it and measures nothing."""
    async with network(stub, delay_s=0.02) as (way,), site() as first, site(first.queue) as second:
        far = engine("e", url=way.url, cluster="us", rtt_s=0.5)
        assert first.distances.rtt_s(far) == 0.5
        await first.look(far)
        assert 0.04 <= first.distances.rtt_s(far) < 0.3
        made = way.connections
        await second.look(far)
        assert second.distances.rtt_s(far) == first.distances.rtt_s(far)
        assert way.connections == made
        (said,) = await first.queue.distances()
        assert (said.site, said.cluster, said.measured_at_s) == ("berlin", "us", NOW_S)
        second.at_s += KEPT_S + 1
        assert second.distances.rtt_s(far) == 0.5


async def test_what_is_measured_again_goes_on_from_what_the_last_one_found(stub: StubServer) -> None:
    """A new measurement counts an eighth, also where another app took the one before."""
    async with site() as s:
        await s.queue.tell_distances([measured("berlin", "eu", 8.0), measured("oslo", "eu", 1.0)])
        await s.look(engine("e", url=stub.url, cluster="eu"), after_s=30.0)
        assert s.distances.rtt_s(engine("e", cluster="eu")) == pytest.approx(7.0, abs=0.05)
        assert {d.site: d.rtt_s for d in await s.queue.distances()}["oslo"] == 1.0


async def test_a_cluster_is_reached_where_one_engine_of_it_answers(stub: StubServer) -> None:
    """A dead engine beside a live one is no lost cluster; where none answers, twice, it is, until one does again."""
    dead, live = engine("dead", url=dead_url(), cluster="eu"), engine("live", url=stub.url, cluster="eu")
    async with site() as s:
        await s.look(dead, live)
        assert s.distances.rtt_s(live) < 1.0
        await s.look(dead, after_s=30.0)
        assert s.distances.rtt_s(live) == math.inf
        assert s.distances.reached([live, ABROAD]) == [ABROAD]
        await s.look(dead, live)  # what is not reached is looked at each time
        assert s.distances.rtt_s(live) < 1.0


async def test_distances_are_known_while_the_queue_is_out(stub: StubServer) -> None:
    """In an outage each app measures by itself, and knows what it found."""

    class Out(MemoryQueue):
        async def distances(self) -> Any:
            raise QueueUnavailable

        async def tell_distances(self, distances: Any) -> None:
            raise QueueUnavailable

    async with site(Out()) as s:
        here = engine("e", url=stub.url, cluster="eu", rtt_s=0.9)
        await s.look(here)
        assert s.distances.rtt_s(here) < 0.9


async def test_the_fast_path_is_for_engines_that_are_as_near() -> None:
    """It weighs nothing: where some are farther than others, the planner decides."""
    s = Site()
    s.distances.learn([measured("berlin", "eu", 0.001), measured("berlin", "us", 0.08), measured("oslo", "us", 0.0)])
    beside = engine("beside", cluster="eu2", rtt_s=0.0015 + NEAR_S)
    assert s.distances.alike([HERE, beside]) == [HERE, beside]
    assert s.distances.alike([ABROAD, HERE, beside]) == []
    assert s.distances.alike([ABROAD]) == [ABROAD]
    assert s.distances.alike([]) == []


# -- decided -------------------------------------------------------------------------------------------------------------
async def test_each_site_is_served_where_it_is_near() -> None:
    """Of two engines alike the nearer one gets the stage, by what its own site measured, and the grant says so."""
    w = World(HERE, ABROAD)
    sites = [("berlin", "eu"), ("berlin", "us"), ("ohio", "us"), ("ohio", "eu")]
    await w.store.tell_distances([measured(s, c, 0.001 if n % 2 == 0 else 0.08) for n, (s, c) in enumerate(sites)])
    await w.push("b", site="berlin")
    await w.push("o", site="ohio")
    assert await w.round()
    found = {r.ticket.stage_id: r for r in await w.store.running()}
    assert {s: r.engine_id for s, r in found.items()} == {"b": "near", "o": "far"}
    assert found["o"].because["network_s"] == 0.001


async def test_a_site_that_cannot_reach_a_cluster_gets_no_grants_there() -> None:
    """Its stages wait for room elsewhere; those of others go on there; and after a minute without news it is tried again."""
    w = World(engine("near", cluster="eu"), ABROAD)
    await w.store.tell_distances([measured("berlin", "us", math.inf)])
    for n in range(2):
        await w.push(f"b{n}", site="berlin")
    await w.push("o", site="ohio")
    await w.round()
    placed = {r.ticket.stage_id: r.engine_id for r in await w.store.running()}
    assert placed == {"b0": "near", "o": "far"}
    await w.renew()
    await w.round(after_s=5.0)
    assert len(await w.store.running()) == 2
    w.clock.at_s += KEPT_S
    await w.renew(b0=1, o=2)
    await w.round()
    assert {r.ticket.stage_id for r in await w.store.running()} >= {"b1"}


def test_a_full_cluster_of_one_kind_of_stage_is_not_full_for_others() -> None:
    """A restricted tenant, or a site cut off, that finds no room holds nobody back who may go elsewhere."""
    near = EngineState(spec=dataclasses.replace(HERE, slots=1), reserved_slots=1)
    far = EngineState(spec=dataclasses.replace(ABROAD, closed_to=("acme",)), rtts={"berlin": math.inf})
    waiting = [ticket("acme", tenant="acme"), ticket("cut off", site="berlin"), ticket("z")]
    assert planned(*waiting, engines=[near, far]) == {"z": "far"}


def test_an_engines_speed_is_without_the_network() -> None:
    """Learned speeds are the engine's own: what the network took is a part of the sum already."""
    near, far = EngineSpeeds(), EngineSpeeds()
    spec = engine("e")
    for i in range(200):
        seen = timed(200 + 97 * i % 3000, 50 + 31 * i % 500, prefill=0.0001, decode=0.005)
        late = dataclasses.replace(seen, finished_at_s=seen.finished_at_s + 0.5)
        spec = dataclasses.replace(spec, engine_id=seen.engine_id)
        near.observe(seen)
        far.observe(late, network_s=0.5)
    assert far.of(spec) == pytest.approx(near.of(spec))


async def test_an_app_that_schedules_itself_measures_too(stub: StubServer, tmp_path: Path) -> None:
    """Without Redis the scheduler beside the app reads what the app measured."""
    with app(fleet=two_clusters(tmp_path, eu=stub.url, us=dead_url()), site="berlin") as a:
        await a.ask(a.room.ready.wait())
        scheduler = a.room.scheduler
        assert scheduler
        await until(lambda: scheduler._rtts.get("us") == {"berlin": math.inf})
        assert scheduler._rtts["eu"]["berlin"] < 1.0
        (await a.granted()).finish()


async def test_a_call_that_cannot_connect_leaves_the_whole_cluster(
    stub: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no engine of it answers, none of them is tried next; where one does, only the one that failed is left out."""
    monkeypatch.setattr(room_module, "RETRY_S", 10.0)  # it waits so long for the measurement
    monkeypatch.setattr(room_module, "LOOK_S", 600.0)
    path = two_clusters(tmp_path, eu=stub.url, us=dead_url())
    more = f'[[engine]]\nid = "us2"\nmodel = "m"\ncluster = "us"\nurl = "{dead_url()}"\n'
    path.write_text(path.read_text().replace("[[tenant]]", more + "[[tenant]]"))
    with app(fleet=path, site="berlin") as a:
        for lost, excluded in (("us", {"us", "us2"}), ("eu", {"eu"})):
            p = await a.granted(excluded_engines=tuple({"eu", "us", "us2"} - {lost}))
            assert p.grant
            assert p.grant.engine_id == lost
            p.ticket = p.ticket.evolve(excluded_engines=())
            assert p.requeue(engine_down=True)
            await p.wait_async()
            assert set(p.ticket.excluded_engines) == excluded
            p.finish()
            a.room.distances._known.clear()


# -- lost and found ------------------------------------------------------------------------------------------------------
def test_slots_open_by_doubling() -> None:
    """A few at first, twice as many each second, never more than there are."""
    opened = [open_slots(20, n * RETURN_DOUBLES_S) for n in range(6)]
    assert opened == [RETURN_SLOTS, 2 * RETURN_SLOTS, 4 * RETURN_SLOTS, 8 * RETURN_SLOTS, 20, 20]
    assert open_slots(1, 0.0) == 1
    assert open_slots(20, 1e12) == 20


async def crowd(w: World, n: int, **more: Any) -> int:
    """Push so many; how many got their grant at once."""
    said = [await w.push(f"q{w.clock.at_s}-{i}", **more) for i in range(n)]
    return sum(isinstance(verdict, Grant) for verdict in said)


async def test_an_engine_that_comes_back_is_not_stormed() -> None:
    """In its first second it is given no more than a few stages, by planner and fast path alike; then twice as many each second."""
    probe = Probe(a=idle())
    w = World(engine(slots=32), probe=probe)
    await w.look()
    await w.round()
    probe.says.clear()
    for _ in range(2):
        await w.look()
    await w.round()
    assert not await w.store.fleet()
    await crowd(w, 60)
    probe.says["a"] = idle()
    await w.look()
    assert [s.free_slots for s in await w.scheduler.fleet()] == [RETURN_SLOTS]
    seen: list[int] = []
    for _ in range(6):
        for _ in range(4):
            await w.renew()
            await w.round()
            # the planner went first; what it left open is all that the fast path may take
            await crowd(w, 3, engines=w.engines, model="m")
            seen.append(len(await w.store.running()))
            w.clock.at_s += RETURN_DOUBLES_S / 4
    assert seen[:4] == [RETURN_SLOTS] * 4
    assert seen[3::4] == [2, 4, 8, 16, 32, 32]
    assert not w.scheduler._back_at_s


async def test_the_fast_path_alone_obeys_too() -> None:
    """With nobody waiting, credits of a returned engine are few."""
    probe = Probe(a=idle())
    w = World(engine(slots=32), probe=probe)
    for says in ({"a": idle()}, {}, {}, {"a": idle()}):
        probe.says = says
        await w.look()
        await w.round()
    assert await crowd(w, 10, engines=w.engines) == RETURN_SLOTS


async def test_an_engine_that_was_never_dead_is_open_at_once() -> None:
    """At a scheduler's start all slots are open, also those of an engine that takes a while to answer first."""
    probe = Probe()
    w = World(engine(slots=32), probe=probe)
    for says in ({}, {}, {}, {"a": idle()}):
        probe.says = says
        await w.look()
        await w.round()
    assert await crowd(w, 40, engines=w.engines) == 32


def node(*specs: EngineSpec, tier: Any = "gpu") -> NodeReport:
    return NodeReport(
        node_id="n",
        cluster="eu",
        gpus=(GpuReport(gpu_id="n.0", memory_bytes=10**10, usable_bytes=10**10),),
        engines=tuple(EngineReport(spec=s, gpu_id="n.0", tier=tier, to=tier) for s in specs),
    )


async def test_a_node_that_was_silent_is_not_stormed_either() -> None:
    """Its engines count as lost, and open by doubling; those that placement woke do not."""
    probe = Probe(near=idle(), woken=idle())
    w = World(HERE, probe=probe)
    w.scheduler.engines.clear()
    near, woken = dataclasses.replace(HERE, slots=32), dataclasses.replace(HERE, engine_id="woken", slots=32)
    here = node(near)

    async def said(report: NodeReport | None) -> list[int]:
        w.clock.at_s += 5.0
        if report is not None:
            await w.store.report(report, now_s=w.clock.at_s, ttl_s=2.0)
        await w.round()
        for e in w.scheduler._served():
            await w.scheduler._look(e)
        await w.round()
        return [e.slots for e in await w.store.fleet()]

    assert await said(here) == [32]
    assert await said(None) == []
    assert await said(here) == [RETURN_SLOTS]
    asleep = dataclasses.replace(here, engines=(*here.engines, *node(woken, tier="sleeping").engines))
    assert await said(asleep) == [32]
    awake = dataclasses.replace(here, engines=(*here.engines, *node(woken).engines))
    assert await said(awake) == [32, 32]


# -- residency -----------------------------------------------------------------------------------------------------------
WAYS: tuple[dict[str, Any], ...] = ({}, {"nested": True}, {"pinned_engine": "us"})
RULES = """
[[tenant]]
name = "acme"
allow_clusters = ["eu"]
"""


def two_clusters(folder: Path, *, eu: str = "", us: str = "", rules: str = RULES, slots: int = 4) -> Path:
    engines = [
        f'[[engine]]\nid = "{c}"\nmodel = "m"\ncluster = "{c}"\nslots = {slots}\nurl = "{url}"\n'
        for c, url in (("eu", eu), ("us", us))
        if url
    ]
    path = folder / "fleet.toml"
    path.write_text('[[cluster]]\nname = "eu"\n[[cluster]]\nname = "us"\n' + "".join(engines) + rules)
    return path


async def test_a_restricted_tenant_is_served_where_it_may_be(tmp_path: Path) -> None:
    """By the fast path, nested, and pinned to an engine that is closed to it."""
    with app(fleet=two_clusters(tmp_path, eu="http://eu/v1", us="http://us/v1", slots=2)) as a:
        ways: list[dict[str, Any]] = [*WAYS, {"excluded_engines": ("eu",)}]
        for more in ways:
            p = await a.granted(tenant="acme", **more)
            assert p.grant
            assert p.grant.engine_id == "eu"
            p.finish()
        taken = [await a.granted(tenant="acme") for _ in range(2)]
        _, waits = a.waiter(tenant="acme")
        await until(a.depth)
        (await a.granted(tenant="other")).finish()  # there is room, but not for acme
        assert not waits.done()
        for p in taken:
            p.finish()
        assert (await waits).engine_id == "eu"


async def test_a_model_that_a_tenant_may_use_nowhere_is_refused_at_once(tmp_path: Path) -> None:
    """In one clear line, and the call never goes to its own URL; a dead engine where it may go is waited for."""
    with app(fleet=two_clusters(tmp_path, us="http://us/v1")) as a:
        with pytest.raises(NoEngineFits, match=r"tenant 'acme' may not be served anywhere that 'm' is: see allow_cl"):
            await a.granted(tenant="acme")
        (await a.granted(tenant="other")).finish()
    closed = EngineState(spec=dataclasses.replace(ABROAD, closed_to=("acme",)))
    dead = EngineState(spec=HERE, healthy=False)
    assert planned(ticket(tenant="acme"), engines=[closed]) == {"s": "residency"}
    assert planned(ticket(tenant="acme"), engines=[closed, dead]) == {}
    assert planned(ticket(tenant="acme"), engines=[closed], complete=False) == {}


async def test_a_silent_node_is_waited_for() -> None:
    """A tenant whose only allowed node is silent is not told that it may go nowhere."""
    probe = Probe(near=idle(), far=idle())
    w = World(dataclasses.replace(ABROAD, closed_to=("acme",)), probe=probe)
    await w.store.report(node(HERE), now_s=NOW_S, ttl_s=2.0)
    await w.round()
    for e in w.scheduler._served():
        await w.scheduler._look(e)
    await w.round(after_s=5.0)
    assert "near" not in w.scheduler.engines
    await w.push("s", tenant="acme")
    await w.round(after_s=0.2)
    assert await w.store.depth("m") == 1


@pytest.mark.parametrize(
    ("said", "acme", "other"),
    [(None, "fails", "eu us"), ("closed", "fails", "fails"), ("open", "eu", "eu us"), ("original_url", "fails", "own")],
)
async def test_an_outage_lets_a_restricted_tenant_nowhere_else(
    tmp_path: Path, said: str | None, acme: str, other: str
) -> None:
    """Unset it is closed for that tenant, open lets it to allowed engines; its own URL is never taken."""
    path = two_clusters(tmp_path, eu="http://eu/v1", us="http://us/v1")
    with app(fleet=path, outage_after_s=0.05, **({"on_outage": said} if said else {})) as a:
        await out(a)
        for tenant, where in (("acme", acme), ("other", other)):
            for more in WAYS:
                if where == "fails":
                    with pytest.raises(QueueUnavailable, match=r"call was not made"):
                        await a.granted(tenant=tenant, **more)
                    continue
                p = await a.granted(tenant=tenant, **more)
                assert p.engine
                assert p.engine.original if where == "own" else p.engine.engine_id in where.split()
                p.finish()


async def test_an_app_knows_of_rules_before_it_knows_an_engine(redis_url: str, pool: str) -> None:
    """They are published beside the fleet: an outage finds a restricted tenant's app closed, though all engines were dead before."""
    queue, clock = RedisQueue(redis_url, pool=pool), RedisClock()
    await clock.sync(queue)
    rules = [Tenant(name="acme", allow_clusters=("eu",)), Tenant(name="other")]
    dead = EngineReport(spec=ABROAD, gpu_id="g", tier="sleeping", to="sleeping")
    await queue.report(NodeReport(node_id="n", engines=(dead,)), now_s=clock.now_s(), ttl_s=60)
    epoch = await queue.lead("s", ttl_s=0.5, now_s=clock.now_s())
    await queue.publish([], p99={}, epoch=epoch or 0, valid_until_s=0.0, tenants=rules)
    with app(redis_url=redis_url, pool=pool, outage_after_s=0.05) as a:
        await until(lambda: a.room.down_since_s is not None)
        with pytest.raises(QueueUnavailable, match="Tenant 'acme' may be served by engines of certain clusters only"):
            await a.granted(tenant="acme")
        assert (await a.granted(tenant="other")).engine == a.room.original(a.open(tenant="other"))
    await queue.close()


async def test_an_outage_without_an_allowed_engine_fails(tmp_path: Path) -> None:
    """Also where outages are open: there is no engine to go to, and the own URL is none."""
    path = two_clusters(tmp_path, us="http://us/v1")
    with app(fleet=path, outage_after_s=0.05, on_outage="open") as a:
        await out(a)
        with pytest.raises(QueueUnavailable, match="No allowed one is known"):
            await a.granted(tenant="acme")
        assert not a.room.local


async def test_shut_down_sends_nobody_abroad(tmp_path: Path) -> None:
    """Whoever still waits at the end of the process goes to its own URL, but for tenants with rules."""
    with app(fleet=two_clusters(tmp_path, eu="http://eu/v1", us="http://us/v1", slots=1)) as a:
        for tenant in ("acme", "other"):
            await a.granted(tenant=tenant)
        _, mine = a.waiter(tenant="acme")
        _, theirs = a.waiter(tenant="other")
        await until(lambda: len(a.room.waiting) == 2)
        await asyncio.to_thread(a.client.close)
        with pytest.raises(QueueUnavailable, match=r"Maestro was shut down\. Tenant 'acme'"):
            await asyncio.wait_for(mine, 5)
        assert (await asyncio.wait_for(theirs, 5)).original


CLUSTERS = ("eu", "us", "asia")
rule = st.lists(st.sampled_from(CLUSTERS), unique=True, max_size=2)


@settings(max_examples=200, deadline=None)
@given(
    rules=st.dictionaries(st.sampled_from(("a", "b")), rule, min_size=1),
    engines=st.lists(st.tuples(st.sampled_from(CLUSTERS), st.booleans(), st.integers(0, 2)), min_size=1, max_size=6),
    stages=st.lists(
        st.tuples(st.sampled_from(("a", "b", "c")), st.booleans(), st.integers(-1, 5), st.integers(-1, 5)),
        min_size=1,
        max_size=8,
    ),
    reached=st.sets(st.sampled_from(CLUSTERS)),
)
async def test_no_way_leads_to_a_closed_engine(
    rules: dict[str, list[str]],
    engines: list[tuple[str, bool, int]],
    stages: list[tuple[str, bool, int, int]],
    reached: set[str],
) -> None:
    """Whatever the fleet, the rules and the network: neither plan nor fast path nor outage sends a tenant where it may not go."""
    tenants = [Tenant(name=name, allow_clusters=tuple(allowed)) for name, allowed in rules.items()]
    states = [
        EngineState(
            spec=with_residency(engine(f"e{n}", cluster=cluster, slots=2), tenants),
            healthy=healthy,
            reserved_slots=taken,
            rtts={"here": 0.01 if cluster in reached else math.inf},
        )
        for n, (cluster, healthy, taken) in enumerate(engines)
    ]
    specs = {s.spec.engine_id: s.spec for s in states}
    tickets = [
        ticket(
            f"s{n}",
            tenant=tenant,
            nested=nested,
            pinned_engine=f"e{pin}" if pin >= 0 else "",
            excluded_engines=(f"e{not_there}",) if not_there >= 0 else (),
            site="here",
        )
        for n, (tenant, nested, pin, not_there) in enumerate(stages)
    ]
    may = {t.stage_id: {e for e, s in specs.items() if s.cluster in (rules.get(t.tenant) or CLUSTERS)} for t in tickets}
    for stage, where in planned(*tickets, engines=states).items():
        assert where in may[stage] | ({"residency"} if not may[stage] else set())
    room = Room(Settings.load(mode="off", site="here"), "c", specs, tenants)
    now_s = room.clock.now_s()
    room.distances.learn([measured("here", c, 0.01 if c in reached else math.inf, now_s) for c in CLUSTERS])
    queue = MemoryQueue()
    epoch = await queue.lead("x", ttl_s=1e9, now_s=NOW_S)
    await queue.publish(list(specs.values()), p99={}, epoch=epoch or 0, valid_until_s=math.inf)
    for t in tickets:
        grant = await queue.push(t, engines=room._fast_places(t), now_s=NOW_S)
        assert not isinstance(grant, Refusal)
        assert grant is None or (grant.engine_id in may[t.stage_id] and specs[grant.engine_id].cluster in reached)
    for t in tickets:
        p = Pass(room, t, "http://own/v1")
        room._start_locally(p)
        assert p.engine is None or p.engine.engine_id in may[t.stage_id]


# -- a model's clusters --------------------------------------------------------------------------------------------------
MODELS = """
[[gpu]]
kind = "a100-80g"
node = "e"
cluster = "eu"
models = ["chat", "code"]
[[gpu]]
kind = "a100-80g"
node = "u"
cluster = "us"
models = ["code"]
[[model]]
name = "chat"
profile = "llama-3.1-8b"
max_model_len = 8192
allow_clusters = ["eu"]
[[model]]
name = "code"
profile = "qwen3-14b"
max_model_len = 8192
"""


def test_a_models_engines_are_made_where_it_may_be(tmp_path: Path) -> None:
    """Neither a node nor the simulator has an engine of it in another cluster, awake or asleep."""
    path = tmp_path / "fleet.toml"
    path.write_text(MODELS + '[[tenant]]\nname = "acme"\nallow_clusters = ["eu"]\n')
    there = {n: {e.spec.model for e in load_host(path, n, tmp_path).engines} for n in ("e", "u")}
    assert there == {"e": {"chat", "code"}, "u": {"code"}}

    fleet = load_sim_fleet(path)
    possible = Gpus(fleet, Workload(name="w", runs=(), warmup_s=0, window_s=1, horizon_s=1), by_value).engines
    assert Counter((e.spec.model, e.spec.cluster) for e in possible) == {
        ("chat", "eu"): 1,
        ("code", "eu"): 1,
        ("code", "us"): 1,
    }
    assert {e.spec.cluster: e.spec.closed_to for e in (*possible, *fleet.engines)} == {"eu": (), "us": ("acme",)}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (MODELS.replace('models = ["code"]', 'models = ["chat"]'), "model 'chat' may not run in cluster 'us'"),
        (MODELS.replace('["eu"]', '["mars"]'), "there is no cluster 'mars': this fleet has eu, us"),
    ],
)
def test_a_model_outside_its_clusters_is_a_mistake_of_the_file(tmp_path: Path, wrong: str, says: str) -> None:
    """The line says which model, and what it may."""
    path = tmp_path / "fleet.toml"
    path.write_text(wrong)
    with pytest.raises(ConfigError, match=says):
        load_fleet(path)


# -- an outage of the network ----------------------------------------------------------------------------------------------
class Direct:
    """A probe that goes round the network in front of engines: the scheduler sits beside them, the app does not."""

    def __init__(self, urls: dict[str, str]) -> None:
        self.urls = urls
        self.inner = VllmProbe()

    async def probe(self, spec: EngineSpec) -> Any:
        return await self.inner.probe(dataclasses.replace(spec, url=self.urls.get(spec.engine_id, spec.url)))

    async def close(self) -> None:
        await self.inner.close()


@contextlib.asynccontextmanager
async def led(queue: RedisQueue, specs: Sequence[EngineSpec], probe: Any) -> AsyncIterator[Scheduler]:
    clock = RedisClock()
    await clock.sync(queue)
    scheduler = Scheduler(queue, specs, clock=clock, holder="s", probe=probe)
    leader = asyncio.create_task(scheduler.run())
    try:
        await until(queue.fleet)
        yield scheduler
    finally:
        leader.cancel()
        await asyncio.gather(leader, return_exceptions=True)
        await probe.close()
        await queue.close()


@contextlib.asynccontextmanager
async def callers(n: int) -> AsyncIterator[list[Exception]]:
    """So many calls at a time, by way of the SDK, until the end. Those that failed are told."""
    failed: list[Exception] = []
    sdk = openai.AsyncOpenAI(base_url=dead_url(), api_key="x")

    async def call() -> None:
        while True:
            try:
                await sdk.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], max_tokens=8)
            except openai.OpenAIError as e:
                failed.append(e)

    tasks = [asyncio.create_task(call()) for _ in range(n)]
    try:
        yield failed
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "partitioned"])
async def test_calls_go_on_elsewhere_and_a_cluster_is_found_again(
    lost: bool, redis_url: str, pool: str, tmp_path: Path
) -> None:
    """Three clusters, one cut off while calls run, for all or for the app alone: no call fails, and its return is no stampede."""
    config = EmulatorConfig(models=(EmulatedModel(name="m"),), speed=4.0)
    with Emulator(config) as a, Emulator(config) as b, Emulator(config) as c:
        async with network(a, b, c) as ways:
            specs = [engine(e, url=w.url, cluster=e, slots=n) for e, w, n in zip("abc", ways, (2, 2, 8), strict=True)]
            probe: Any = VllmProbe() if lost else Direct({"a": a.url, "b": b.url, "c": c.url})
            queue = RedisQueue(redis_url, pool=pool)
            with managed(tmp_path, {}, redis_url=redis_url, pool=pool, site="here"):
                async with led(queue, specs, probe) as scheduler:
                    maestro.install()
                    with watched_observations() as seen:
                        async with callers(12) as failed:
                            await _cut_and_join(ways[2], queue, scheduler, seen, lost=lost)
                        assert failed == []


async def _cut_and_join(
    way: Forwarder, queue: RedisQueue, scheduler: Scheduler, seen: list[Observation], *, lost: bool
) -> None:
    def served() -> Counter[str]:
        return Counter(o.engine_id for o in seen if o.status is Status.DONE)

    async def rtts() -> dict[str, float]:
        return {d.cluster: d.rtt_s for d in await queue.distances() if d.site == "here"}

    async def gone() -> bool:
        if lost:
            return "c" not in {e.engine_id for e in await queue.fleet()}
        return (await rtts())["c"] == math.inf

    async def empty() -> bool:
        return not (await queue.ledger()).slots.get("c")

    async def known() -> bool:
        return len(await rtts()) == 3

    await until(known)
    await until(lambda: len(served()) == 3)
    await way.cut()
    await until(gone)
    await until(empty)
    before = served()
    await until(lambda: all((served() - before)[e] > 5 for e in "ab"))
    assert served()["c"] == before["c"]
    await way.join()
    if lost:
        await until(lambda: scheduler._back_at_s)
        until_s, most = scheduler._back_at_s["c"] + RETURN_DOUBLES_S, 0
        while True:
            slots = (await queue.ledger()).slots
            if scheduler.clock.now_s() >= until_s:
                break
            most = max(most, slots.get("c", 0))
        assert 0 < most <= RETURN_SLOTS
    await until(lambda: (served() - before)["c"] > 10)


# -- shown ---------------------------------------------------------------------------------------------------------------
async def test_top_shows_clusters_and_how_far_they_are() -> None:
    """Engines alive, slots and each site's round trip; one that no site reaches, or without engines, stands out; one alone is no news."""
    queue = MemoryQueue()
    epoch = await queue.lead("s", ttl_s=1e6, now_s=0.0)
    specs = [HERE, dataclasses.replace(HERE, engine_id="near2"), dataclasses.replace(ABROAD, rtt_s=0.5)]
    await queue.publish(specs, p99={}, epoch=epoch or 0, valid_until_s=0.0)
    watch = Watch(queue, source="here", now_s=lambda: NOW_S)
    unmeasured = await watch.snapshot()
    assert {c.cluster: (c.engines, c.file_rtt_s, c.rtts) for c in unmeasured.clusters} == {
        "eu": (2, 0.0, {}),
        "us": (1, 0.5, {}),
    }
    assert "500.0 ms (fleet file)" in text_of(unmeasured, width=100, height=40)
    await queue.tell_distances([measured("berlin", "eu", 0.0012), measured("ohio", "eu", 0.09)])
    await queue.tell_distances([measured("berlin", "us", math.inf), measured("berlin", "asia", 0.2)])
    shown = text_of(await watch.snapshot(), width=100, height=40)
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in shown.splitlines() if line.strip()}
    assert rows["eu"] == "2 0/8 berlin 1.2 ms, ohio 90.0 ms"
    assert rows["us"] == "1 0/4 berlin unreachable"
    assert rows["asia"] == "0 0/0 berlin 200.0 ms"
    await queue.publish([HERE], p99={}, epoch=epoch or 0, valid_until_s=0.0)
    assert cluster_lines([HERE], await queue.ledger(), [], NOW_S) == ()


async def test_doctor_says_which_cluster_is_cut_off(redis_url: str, pool: str) -> None:
    """From where, and that its apps are served elsewhere; one that nobody measures says how to."""
    queue, clock = RedisQueue(redis_url, pool=pool), RedisClock()
    await clock.sync(queue)
    epoch = await queue.lead("s", ttl_s=60, now_s=clock.now_s())
    await queue.publish([HERE, ABROAD, engine("x", cluster="asia")], p99={}, epoch=epoch or 0, valid_until_s=0.0)
    now_s = clock.now_s()
    await queue.tell_distances([measured("berlin", "eu", 0.001, now_s), measured("berlin", "us", math.inf, now_s)])
    await queue.close()
    found = await asyncio.to_thread(check_clusters, Settings.load(redis_url=redis_url, pool=pool))
    said = {f.name: (f.status, f.detail, f.remedy) for f in found}
    assert said["cluster eu"] == ("ok", "1 engine alive, 1.0 ms from berlin", "")
    assert said["cluster us"][:2] == ("note", "1 engine alive, unreachable from berlin")
    assert "apps of berlin are served elsewhere" in said["cluster us"][2]
    assert "MAESTRO_SITE" in said["cluster asia"][2]
