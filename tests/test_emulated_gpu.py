"""A GPU that emulated engines share: memory, turns, tiers, and the driver (`maestro_serving.emulated_gpu`, `admin`)."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
import signal

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_agents.core import EngineSpec
from maestro_agents.errors import EngineUnavailable
from maestro_agents.fleet import Launch
from maestro_agents.simulator.engine import Engine, EngineProfile, EngineRequest
from maestro_agents.simulator.hardware import gpus, models, serve
from maestro_serving.admin import OutOfMemoryError
from maestro_serving.drivers import NodeEngine, NodeGpu
from maestro_serving.emulated_driver import EmulatedGpus
from maestro_serving.emulated_gpu import RESERVE_BLOCKS, EmulatedGpu, EngineOnGpu, GpuProcess, Part

BLOCK = 10
SMALL = EngineProfile(
    base_s=1.0,
    prefill_s_per_token=0.0,
    decode_s_per_seq=0.0,
    max_num_seqs=64,
    step_tokens=4096,
    block_size=4,
    num_blocks=16,
    max_model_len=64,
)


class Box:
    """A GPU on a fake clock, and engines on it that a test moves by hand."""

    def __init__(self, usable: int = 5000) -> None:
        self.now_s = 0.0
        self.gpu = EmulatedGpu(usable, clock=lambda: self.now_s)
        self.parts: dict[str, Part] = {}
        self.asleep: set[str] = set()
        self.ended: list = []

    def part(self, name: str, *, fixed: int = 500, limit: int = 400) -> Part:
        return Part(name=name, fixed_bytes=fixed, block_bytes=BLOCK, floor_blocks=SMALL.num_blocks, limit_blocks=limit)

    def start(self, name: str, **about) -> Engine:
        part = self.part(name, **about)
        self.gpu.bring(part, weights=True, kv=True)
        engine = Engine(SMALL, more=lambda wished, needed: self.gpu.more(part, wished, needed))
        self.gpu.run(part, engine)
        self.parts[name] = part
        return engine

    def stop(self, name: str) -> None:
        self.gpu.end(self.parts.pop(name))
        self.asleep.discard(name)

    def sleep(self, name: str) -> None:
        engine = self.parts[name].engine
        for request_id in list(engine._live):
            engine.abort(request_id, self.now_s)
        engine.pause(self.now_s, frozen=False)
        engine.drop_kv(self.now_s)
        self.gpu.leave(self.parts[name], weights=False, kv=True)
        self.asleep.add(name)

    def slept(self, name: str) -> None:
        self.gpu.leave(self.parts[name], weights=True, kv=False)

    def wake(self, name: str) -> None:
        self.gpu.bring(self.parts[name], weights=True, kv=True)
        self.parts[name].engine.resume(self.now_s)
        self.asleep.discard(name)

    def ask(self, name: str, n: int, prompt: int, output: int, prefix=()) -> None:
        request = EngineRequest(request_id=f"{n}", prompt_tokens=prompt, output_tokens=output, prefix=prefix)
        self.parts[name].engine.submit(request, self.now_s)
        self.gpu.settle()

    def until(self, now_s: float) -> None:
        """Let time pass as the pumps of the real process do: every engine at each of its steps."""
        while True:
            next_s = min((p.engine.wake_at_s for p in self.parts.values()), default=math.inf)
            if next_s > now_s:
                break
            self.now_s = max(self.now_s, next_s)
            for part in list(self.parts.values()):
                self.ended += part.engine.step(self.now_s).ended
                self.gpu.settle()
                self.hold()
        self.now_s = now_s

    def hold(self) -> None:
        """The law, from what the engines themselves say."""
        mapped = 0
        for name, part in self.parts.items():
            here = part.fixed_bytes if name not in self.asleep or part.here else 0
            assert part.engine.used_blocks <= part.engine.num_blocks
            mapped += here + part.engine.num_blocks * BLOCK
        assert mapped == self.gpu.mapped_bytes <= self.gpu.usable_bytes
        assert self.gpu.peak_bytes <= self.gpu.usable_bytes
        assert self.gpu.violations == 0


NAMES = st.sampled_from("abcd")
CALLS = st.lists(
    st.tuples(
        st.sampled_from((0.0, 0.5, 3.0, 40.0)),
        st.one_of(
            st.tuples(st.just("start"), NAMES),
            st.tuples(st.just("stop"), NAMES),
            st.tuples(st.just("sleep"), NAMES),
            st.tuples(st.just("slept"), NAMES),
            st.tuples(st.just("wake"), NAMES),
            st.tuples(st.just("limit"), NAMES, st.integers(0, 9000)),
            st.tuples(st.just("ask"), NAMES, st.integers(1, 40), st.integers(1, 24)),
            st.tuples(st.just("burst"), NAMES, st.integers(20, 60)),
        ),
    ),
    max_size=60,
)


def called(box: Box, n: int, call: tuple) -> None:
    """One call of a random walk, where the engine is in a state for it."""
    what, name, *more = call
    there, asleep = name in box.parts, name in box.asleep
    if what == "start" and not there:
        with contextlib.suppress(OutOfMemoryError):
            box.start(name)
    elif what == "wake" and asleep and not box.parts[name].here:
        with contextlib.suppress(OutOfMemoryError):
            box.wake(name)
    elif what == "stop" and there:
        box.stop(name)
    elif what == "sleep" and there and not asleep:
        box.sleep(name)
    elif what == "slept" and asleep:
        box.slept(name)
    elif what == "limit" and there:
        box.gpu.limit(box.parts[name], more[0])
    elif what == "ask" and there and not asleep:
        box.ask(name, n, *more, prefix=((f"p{more[0] % 3}", more[0]),))
    elif what == "burst" and there and not asleep:
        for i in range(more[0]):
            box.ask(name, 1000 * n + i + 1000, 24, 30)


@settings(deadline=None, max_examples=150)
@given(calls=CALLS, usable=st.sampled_from((1400, 2000, 2700)))
def test_memory_is_never_overcommitted_whatever_starts_sleeps_and_asks(calls, usable):
    """Weights, servers and pages that are mapped stay within the GPU after every step of every engine; all requests of those
    that stay awake end.
    """
    box = Box(usable)
    for n, (pause_s, call) in enumerate(calls):
        box.until(box.now_s + pause_s)
        called(box, n, call)
        box.hold()
    box.until(box.now_s + 1e6)
    for name, part in box.parts.items():
        if name not in box.asleep:
            assert (part.engine.num_running, part.engine.num_waiting) == (0, 0)
            assert part.engine.used_blocks == 0


def test_the_check_of_the_law_can_fail():
    """Bytes that are mapped past the ledger are counted as a violation."""
    box = Box(usable=1000)
    engine = box.start("a", fixed=500)
    engine.resize(100, box.now_s)
    box.gpu.settle()
    assert box.gpu.violations == 1


def test_what_does_not_fit_is_refused_and_changes_nothing():
    """A start without room for weights, server and one longest request is out of memory; what is there stays."""
    box = Box(usable=1000)
    box.start("a", fixed=500)
    before = box.gpu.mapped_bytes
    with pytest.raises(OutOfMemoryError, match="out of memory"):
        box.start("b", fixed=500)
    assert (box.gpu.mapped_bytes, box.gpu.refused) == (before, 1)


def test_weights_count_from_the_first_second_of_a_move_to_the_last():
    """Who leaves holds its weights until they have left, its KV no longer; nobody comes before."""
    box = Box(usable=1000)
    box.start("a", fixed=700)
    box.sleep("a")
    assert box.gpu.mapped_bytes == 700
    with pytest.raises(OutOfMemoryError):
        box.start("b", fixed=700)
    box.slept("a")
    box.start("b", fixed=700)
    with pytest.raises(OutOfMemoryError):
        box.wake("a")
    box.stop("b")
    box.wake("a")
    assert box.gpu.mapped_bytes == 700 + SMALL.num_blocks * BLOCK


def test_engines_take_turns():
    """While two serve, each step takes twice its seconds; alone again, its own."""
    alone = Box()
    alone.start("a")
    alone.ask("a", 0, 4, 20)
    alone.until(1000)
    both = Box()
    both.start("a")
    both.start("b")
    both.ask("a", 0, 4, 20)
    both.ask("b", 1, 4, 20)
    both.until(1000)
    (one,) = alone.ended
    first, second = both.ended
    assert one.ended_at_s == pytest.approx(20, abs=1)
    assert first.ended_at_s == pytest.approx(40, abs=2)
    assert second.ended_at_s == pytest.approx(40, abs=2)
    assert both.parts["a"].turns == both.parts["b"].turns == 1


def test_an_engine_uses_memory_that_another_does_not_and_gives_it_back():
    """Its pages grow with its requests beyond an equal part, up to its limit, and shrink when they have ended."""
    box = Box(usable=5000)
    box.start("a", limit=1000)
    box.start("b", limit=1000)
    for n in range(60):
        box.ask("a", n, 16, 8)
    box.until(3)
    used = box.parts["a"].used_bytes
    assert used > (5000 - 2 * 500) / 2
    box.until(1000)
    assert len(box.ended) == 60
    assert box.parts["a"].blocks <= SMALL.num_blocks + RESERVE_BLOCKS
    assert box.parts["a"].engine.preemptions == 0


def test_who_finds_no_page_preempts_its_own_lowest_priority_request():
    """Under shared pressure only the engine that asks preempts, the others' requests stay; all are answered in the end."""
    box = Box(usable=1000 + 100 * BLOCK)
    a, b = box.start("a", limit=1000), box.start("b", limit=1000)
    box.ask("b", 0, 30, 30)
    for n in range(1, 20):
        box.ask("a", n, 16, 40)
    box.until(2000)
    assert a.preemptions > 0
    assert b.preemptions == 0
    assert len(box.ended) == 20
    assert not any(record.aborted for record in box.ended)


def test_limits_may_promise_more_than_there_is():
    """Limits that together exceed the memory are taken, and pages run out only when they are used."""
    box = Box(usable=2000)
    for name in "ab":
        box.start(name, fixed=400, limit=10)
        box.gpu.limit(box.parts[name], 1200)
        assert box.parts[name].limit_blocks == 120
    box.hold()


def test_a_lower_limit_takes_unused_pages_at_once_and_used_ones_as_requests_end():
    """The engine runs on and preempts for growth; when its requests ended it has no more than the limit."""
    box = Box()
    engine = box.start("a", limit=400)
    for n in range(20):
        box.ask("a", n, 32, 20)
    box.until(3)
    had = engine.num_blocks
    box.gpu.limit(box.parts["a"], 20 * BLOCK)
    assert engine.num_blocks < had
    assert engine.num_running > 0
    box.until(2000)
    assert len(box.ended) == 20
    assert engine.num_blocks <= 20


def test_prefixes_stay_while_nobody_needs_their_pages():
    """Pages that hold a prefix are kept, and go to another engine that needs them."""
    box = Box(usable=1000 + 36 * BLOCK)
    a = box.start("a", limit=1000)
    box.start("b", limit=1000)
    for n in range(3):
        box.ask("a", n, 40, 1, prefix=((f"p{n}", 40),))
    box.until(100)
    assert a.kept_blocks == 20  # of three prompts of ten blocks, as far as there was memory
    for n in range(10, 14):
        box.ask("b", n, 40, 1)
    box.until(200)
    assert len(box.ended) == 7
    assert a.kept_blocks < 20
    assert box.parts["b"].engine.preemptions == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_a_paused_engine_goes_on_where_it_was(frozen):
    """Held, nobody is admitted; frozen, those that run stop after their step too; resumed, all is answered."""
    engine = Engine(SMALL)
    for n in range(2):
        engine.submit(EngineRequest(request_id=f"{n}", prompt_tokens=4, output_tokens=10), 0.0)
    engine.step(2.5)
    engine.pause(2.5, frozen=frozen)
    engine.submit(EngineRequest(request_id="late", prompt_tokens=4, output_tokens=2), 3.0)
    ended = engine.step(100.0).ended
    assert [r.request.request_id for r in ended] == ([] if frozen else ["0", "1"])
    assert engine.num_waiting == 1
    assert engine.wake_at_s == math.inf
    engine.resume(100.0)
    records = {r.request.request_id: r for r in (*ended, *engine.step(200.0).ended)}
    assert records["late"].started_at_s == 100.0
    assert records["0"].ended_at_s == (107.0 if frozen else 10.0)


# -- the process -------------------------------------------------------------------------------------------------------
class Passing:
    """A clock of moves: remembers their seconds, and lets them pass when it is told to."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.held = False
        self._go = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if self.held:
            await self._go.wait()

    def go(self) -> None:
        self._go.set()


ABOUT = EngineOnGpu(profile="llama-3.1-8b", model="chat", max_model_len=2048, slots=32, speed=10)
TIERS = serve(models()["llama-3.1-8b"], gpus()["a100-80g"]).tiers


@contextlib.asynccontextmanager
async def running(*names: str, about: EngineOnGpu = ABOUT, hbm_bytes: int = 0):
    """A process with engines, a client of it, and the seconds of its moves."""
    passing = Passing()
    process = GpuProcess("a100-80g", hbm_bytes=hbm_bytes, passes=passing)
    for name in names:
        process.add(name, about)
    urls: asyncio.Queue[str] = asyncio.Queue()
    task = asyncio.create_task(process.serve(port=0, on_ready=urls.put_nowait))
    try:
        async with httpx.AsyncClient(base_url=await urls.get(), timeout=20, trust_env=False) as http:
            yield process, http, passing
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def state(http, name="a"):
    """What the process says of one engine."""
    (found,) = [e for e in (await http.get("/state")).json()["engines"] if e["name"] == name]
    return found


def ask(http, root, tokens=5, **body):
    """Ask an engine for so many tokens."""
    content = {"prompt": "hello", "max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True, **body}
    return http.post(f"{root}/v1/completions", json=content)


async def test_every_tier_takes_the_seconds_of_the_hardware_profile():
    """A start from disk, then from the page cache, sleep and wake at both levels: as the profile says, divided by the speed."""
    async with running("a") as (_, http, passing):
        started = (await http.post("/engines/a/start")).json()
        root = started["url"].removesuffix("/v1")
        assert started["tier"] == "gpu"
        assert (await ask(http, root)).status_code == 200
        await http.post(f"{root}/sleep?level=1&mode=wait")
        asleep = await state(http)
        await http.post(f"{root}/wake_up")
        await http.post(f"{root}/sleep?level=2&mode=wait")
        dropped = await state(http)
        await http.post(f"{root}/wake_up?tags=weights")
        await http.post(f"{root}/collective_rpc", json={"method": "reload_weights"})
        awake = (await http.post(f"{root}/wake_up?tags=kv_cache")).json()
        assert (await http.post("/engines/a/stop")).json()["tier"] == "host"
        with pytest.raises(httpx.ConnectError):
            await http.get(f"{root}/health")
        await http.post("/engines/a/start")
        await http.post("/engines/a/start", json={"from": "remote"})  # it runs: nothing happens
    assert awake["status"] == "awake"
    assert (asleep["tier"], asleep["hbm_bytes"], asleep["host_bytes"]) == ("sleeping", 0, asleep["weight_bytes"])
    assert (dropped["tier"], dropped["hbm_bytes"], dropped["host_bytes"]) == ("dropped", 0, 0)
    expected = (
        *(TIERS.from_disk_s, TIERS.to_sleeping_s, TIERS.from_sleeping_s),
        *(TIERS.discard_s, TIERS.reload_s, TIERS.from_host_s),
    )
    assert passing.seconds == pytest.approx([seconds / 10 for seconds in expected])


async def test_a_move_holds_its_memory_while_it_lasts():
    """From the first second of a start its weights and one request's KV are taken, and its port is closed until it serves."""
    async with running("a", "b", hbm_bytes=20_000_000_000) as (_, http, passing):
        passing.held = True
        start = asyncio.create_task(http.post("/engines/a/start"))
        while not passing.seconds:
            await asyncio.sleep(0)
        coming = await state(http)
        refused = await http.post("/engines/b/start")
        passing.go()
        there = (await start).json()
        whole = (await http.get("/state")).json()
    assert (coming["tier"], coming["to"], coming["url"]) == ("disk", "gpu", "")
    assert coming["hbm_bytes"] == there["hbm_bytes"] > coming["weight_bytes"]
    assert refused.status_code == 409
    assert "out of memory" in refused.json()["error"]
    assert (whole["refused"], whole["violations"]) == (1, 0)


async def test_a_wake_without_room_is_refused_and_leaves_the_engine_asleep():
    """As CUDA's out of memory: 500, asleep as before; once there is room it wakes and serves."""
    async with running("a", "b", hbm_bytes=20_000_000_000) as (_, http, _):
        root = (await http.post("/engines/a/start")).json()["url"].removesuffix("/v1")
        await http.post(f"{root}/sleep?level=1&mode=wait")
        assert (await http.post("/engines/b/start")).status_code == 200
        refused = await http.post(f"{root}/wake_up")
        assert (refused.status_code, (await state(http))["tier"]) == (500, "sleeping")
        assert (await http.get(f"{root}/is_sleeping")).json() == {"is_sleeping": True}
        await http.post("/engines/b/stop")
        assert (await http.post(f"{root}/wake_up")).json()["status"] == "awake"
        assert (await ask(http, root)).status_code == 200


async def test_level_2_without_reload_gives_noise_and_says_so():
    """Weights that were dropped are not those of the model until they were read again."""
    async with running("a") as (_, http, _):
        root = (await http.post("/engines/a/start")).json()["url"].removesuffix("/v1")
        told = (await ask(http, root)).json()["choices"][0]["text"]
        await http.post(f"{root}/sleep?level=2")
        too_soon = await http.post(f"{root}/collective_rpc", json={"method": "reload_weights"})
        await http.post(f"{root}/wake_up")
        noise = (await ask(http, root)).json()["choices"][0]["text"]
        garbled = (await state(http))["garbled"]
        await http.post(f"{root}/collective_rpc", json={"method": "reload_weights"})
        again = (await ask(http, root)).json()["choices"][0]["text"]
    assert too_soon.status_code == 500
    assert (noise, garbled) == ("!!!!!", True)
    assert told == again


async def test_kv_memory_follows_its_limit_while_requests_run():
    """A limit through the control port holds at once; the engine's KV use is told relative to it."""
    async with running("a") as (process, http, _):
        root = (await http.post("/engines/a/start")).json()["url"].removesuffix("/v1")
        floor = (await state(http))["kv_floor_bytes"]
        limited = (await http.post("/engines/a/limit_kv", json={"kv_bytes": 2 * floor})).json()
        asked = [asyncio.create_task(ask(http, root, 1000, prompt="word " * 900)) for _ in range(8)]
        while (await state(http))["running"] < 2:
            await asyncio.sleep(0)
        seen = await state(http)
        answers = await asyncio.gather(*asked)
        preempted = (await state(http))["preemptions"]
        bad = await http.post("/engines/a/limit_kv", json={})
    assert limited["kv_limit_bytes"] == 2 * floor
    assert floor <= seen["kv_bytes"] <= 2 * floor
    assert {a.status_code for a in answers} == {200}
    assert preempted > 0
    assert process.gpu.violations == 0
    assert bad.status_code == 400


# -- the driver --------------------------------------------------------------------------------------------------------
@pytest.fixture
async def driver_of(tmp_path):
    """Makes drivers of engines on one emulated GPU; all are stopped in the end."""
    made = []
    factory = EmulatedGpus()
    gb = 1_000_000_000
    gpu = NodeGpu(
        gpu_id="n.0", index=0, kind="a100-80g", memory_bytes=65 * gb, usable_bytes=60 * gb, state=tmp_path / "state"
    )

    def make(name="a", *, factory=factory, **changes):
        served = serve(models()["llama-3.1-8b"], gpus()["a100-80g"], slots=8)
        spec = EngineSpec(engine_id=name, url="", model="chat", slots=8, max_model_len=2048)
        engine = NodeEngine(
            spec=spec,
            gpus=("n.0",),
            launch=Launch(kind="emulator", args=("--speed", "1000")),
            weight_bytes=served.weight_bytes,
            server_bytes=served.server_bytes,
            kv_floor_bytes=2048 * 131072,
            served=served,
        )
        driver = factory(dataclasses.replace(engine, **changes), gpu)
        made.append(driver)
        return driver

    yield make
    for driver in made:
        await driver.stop()
        await driver.close()


async def test_a_driver_moves_an_engine_through_its_tiers(driver_of):
    """Start, both sleeps and wakes, stop: each is true when it returns, and the looks say so."""
    driver = driver_of()
    assert not (await driver.look()).alive
    await driver.limit_kv(4_000_000_000)
    url = await driver.start()
    up = await driver.look()
    assert (up.alive, up.healthy, up.asleep, up.running, up.waiting) == (True, True, None, 0, 0)
    assert up.device_bytes > driver._engine.hbm_bytes
    async with httpx.AsyncClient(trust_env=False) as http:
        assert (await http.get(f"{url}/models")).json()["data"][0]["id"] == "chat"
        for level in (1, 2):
            await driver.sleep(level)
            down = await driver.look()
            assert (down.asleep, down.device_bytes) == (level, 0)
            assert down.host_bytes == (driver._engine.weight_bytes if level == 1 else 0)
            await driver.wake()
            assert (await driver.look()).asleep is None
        told = await http.post(f"{url}/completions", json={"model": "chat", "prompt": "x", "max_tokens": 4})
        assert told.json()["choices"][0]["text"] != "!!!!"
    await driver.stop()
    assert not (await driver.look()).alive


async def test_engines_of_one_gpu_share_a_process_that_ends_with_the_last(driver_of):
    """What does not fit beside the first is refused with the reason, and the process is gone when all have stopped."""
    one, other, third, fourth = (driver_of(name) for name in "abcd")
    await one.start()
    await asyncio.gather(other.start(), third.start())
    pid = one._process._kept.pid
    assert other._process._kept.pid == pid
    with pytest.raises(EngineUnavailable, match="out of memory"):
        await fourth.start()
    await one.stop()
    await fourth.start()
    for driver in (other, third, fourth):
        await driver.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_an_agent_that_comes_back_takes_over_what_runs(driver_of):
    """The engines of a process whose agent went are found as they are, asleep or awake."""
    first = driver_of("a")
    url = await first.start()
    await first.sleep(1)
    second = driver_of("a", factory=EmulatedGpus())
    assert await second.adopt() == url
    assert (await second.look()).asleep == 1
    await second.wake()
    assert await driver_of("b", factory=EmulatedGpus()).adopt() is None


async def test_a_killed_process_is_seen_and_started_anew(driver_of):
    """Kill -9 of the emulated GPU: its engines are dead to the looks, and the next start brings another."""
    driver = driver_of()
    await driver.start()
    os.kill(driver._process._kept.pid, signal.SIGKILL)
    while (await driver.look()).alive:
        await asyncio.sleep(0.01)
    await driver.start()
    assert (await driver.look()).alive


async def test_what_cannot_be_emulated_is_refused_in_one_line(driver_of):
    """A model without a profile, one on two GPUs, a speed that is none."""
    for changes in (
        {"served": None},
        {"gpus": ("n.0", "n.1")},
        {"launch": Launch(kind="emulator", args=("--speed", "fast"))},
    ):
        with pytest.raises(EngineUnavailable, match="engine a: "):
            await driver_of(**changes).start()
