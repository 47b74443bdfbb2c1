"""Releases may differ by one: this release and the one before it (`tests.previous`) in one pool, in every combination."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from maestro_agents import __version__, core, nodes
from maestro_agents.core import EngineSpec, Observation, RunEnd, ServiceClass, Status, Ticket
from maestro_agents.queue.redis import RedisQueue
from maestro_serving.emulator import EmulatedModel, Emulator, EmulatorConfig
from tests import previous
from tests.queues import fresh_redis_queue
from tests.test_queue_machine import BUDGET, LEASE_S, Walk

Release = Literal["old", "new"]
PEER = Path(__file__).parent / "previous" / "peer.py"
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def old_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked release before."""
    return previous.unpacked(tmp_path_factory.mktemp("previous"))


@pytest.fixture(scope="module")
def old(old_path: Path) -> Mapping[str, ModuleType]:
    """Its modules, in this process."""
    names = ("core", "nodes", "queue.redis")
    return dict(zip(names, previous.imported(old_path, *(f"maestro_agents.{n}" for n in names)), strict=True))


# -- what travels --------------------------------------------------------------------------------------------------------
def test_the_wheel_beside_the_tests_is_the_release_before(old: Mapping[str, ModuleType]) -> None:
    """One minor release before this one, small, and its modules are not ours."""
    ours, theirs = (tuple(map(int, v.split("."))) for v in (__version__, previous.VERSION))
    assert (ours[0], ours[1] - 1) == theirs[:2]
    assert previous.WHEEL.stat().st_size < 500_000
    assert old["core"].Ticket is not Ticket


TICKET = Ticket(
    stage_id="s", client_id="c", model="m", run_id="r", workflow="w", node="n", role="a:n", tenant="t", site="east",
    service_class=ServiceClass.BATCH, deadline_at_s=9.5, due_at_s=2.5, prompt_tokens=7, max_tokens=5, choices=2,
    nested=True, excluded_engines=("x",), features=(1.0, 2.0),
)  # fmt: skip
OBSERVATION = Observation(
    stage_id="s", run_id="r", workflow="w", role="a:n", node="n", model="m", engine_id="e", tenant="t", status=Status.DONE,
    service_class=ServiceClass.BATCH, prompt_tokens=7, output_tokens=5, features=(1.0,),
)  # fmt: skip
RUN_END = RunEnd(
    run_id="r", workflow="w", outcome="done", started_at_s=1.0, ended_at_s=2.0, tasks={"n": 1}, moves=(("a", "b", 2),)
)
SPEC = EngineSpec(engine_id="e", url="http://127.0.0.1:1/v1", model="m", closed_to=("t",), hints="vllm", kv_bytes=5)
REPORT = nodes.NodeReport(
    node_id="n", gpus=(nodes.GpuReport(gpu_id="g", memory_bytes=9, usable_bytes=8),),
    engines=(nodes.EngineReport(spec=SPEC, gpu_id="g", tier="sleeping", to="gpu", wake_s={"sleeping": 1.5}),),
)  # fmt: skip
WANTED = nodes.Wanted(epoch=3, engines={"e": nodes.Want(tier="gpu", kv_bytes=7, rejuvenation=1)})
NOUNS = {"core": (TICKET, OBSERVATION, RUN_END, SPEC), "nodes": (REPORT, WANTED)}


def plain(noun: Any) -> Any:
    """A noun of either release as plain values."""
    return json.loads(json.dumps(dataclasses.asdict(noun)))


def within(less: Any, more: Any) -> bool:
    """Every field that one release knows has the value that the other said."""
    if isinstance(less, dict) and isinstance(more, dict):
        return all(k in more and within(v, more[k]) for k, v in less.items())  # pyright: ignore[reportUnknownVariableType]
    if isinstance(less, list) and isinstance(more, list):
        return len(less) == len(more) and all(map(within, less, more))  # pyright: ignore[reportUnknownArgumentType]
    return less == more


@pytest.mark.parametrize(
    ("module", "noun"), [(m, n) for m, ns in NOUNS.items() for n in ns], ids=lambda x: type(x).__name__
)
def test_what_travels_is_read_by_the_other_release_and_what_is_new_in_it_is_left_out(
    old: Mapping[str, ModuleType], module: str, noun: Any
) -> None:
    """Ticket, observation, run's end, engine, a node's report and its orders: both ways, and with a field of tomorrow in them."""
    mine, theirs = type(noun), getattr(old[module], type(noun).__name__)
    read = theirs.decode(noun.encode())
    assert within(plain(read), plain(noun))
    assert within(plain(read), plain(mine.decode(read.encode())))
    body = noun.encode()
    body = body if isinstance(body, dict) else json.loads(body)
    tomorrow: Any = {**body, "of_tomorrow": {"a": [1]}}
    for cls in (mine, theirs):
        read = cls.decode(tomorrow if mine is EngineSpec else json.dumps(tomorrow))
        assert within(plain(read), plain(noun))


def test_a_grant_says_nothing_that_the_release_before_cannot_read(old: Mapping[str, ModuleType]) -> None:
    """Its client builds a `Grant` or `Refusal` of whatever fields it is told: one that it does not know would be lost on it."""
    for name in ("Grant", "Refusal"):
        known = {f.name for f in dataclasses.fields(getattr(old["core"], name))}
        assert {f.name for f in dataclasses.fields(getattr(core, name))} <= known, name


# -- the queue -----------------------------------------------------------------------------------------------------------
class MixedWalk(Walk):
    """The walk of `test_queue_machine`, where now this release speaks to Redis and now the one before: one state for both."""

    redis_url = ""
    previous: Mapping[str, ModuleType]
    old: Any

    def _made(self) -> RedisQueue:
        self.speaks_old = False
        queue = self.loop.run_until_complete(fresh_redis_queue(self.redis_url, lease_s=LEASE_S, max_queue=4))
        pool = queue._prefix.split("{")[1].split("}")[0]
        self.old = self.previous["queue.redis"].RedisQueue(self.redis_url, pool=pool, lease_s=LEASE_S, max_queue=4)
        return queue

    @rule(old=st.booleans())
    def the_other_speaks(self, old: bool) -> None:
        self.speaks_old = old

    def both(self, command: str, *args: Any, **kwargs: Any) -> Any:
        if command == "waiting" or "at_most" in kwargs:
            return None  # counted by tenant: the release before pushes without that
        if command == "publish":
            kwargs = {
                k: v for k, v in kwargs.items() if k not in {"tenants", "backlog"}
            }  # as for a fleet without [[tenant]]
        if not self.speaks_old or self._is_new(command, kwargs) or self._is_bound_only_now(command, args, kwargs):
            return super().both(command, *args, **kwargs)
        expected = self.loop.run_until_complete(getattr(self.spec, command)(*args, **kwargs))
        kwargs.pop("client_id", None)  # the release before does not say who speaks
        actual = self.loop.run_until_complete(getattr(self.old, command)(*map(self._theirs, args), **kwargs))
        normal: Callable[[Any], Any] = sorted if command == "reap" else self._plain
        assert within(normal(actual), normal(expected)), (command, args, kwargs)
        return expected

    def _is_new(self, command: str, kwargs: Mapping[str, Any]) -> bool:
        """The release before has no such command, or cannot be asked this of it."""
        theirs = getattr(self.old, command, None)
        return theirs is None or bool(set(kwargs) - {"client_id"} - set(inspect.signature(theirs).parameters))

    def _is_bound_only_now(self, command: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """What the release before heeds, or does not: a client that does not hold the stage; a grant of one that waits."""
        of = lambda stage: self.tickets[stage].client_id if stage in self.tickets else None  # noqa: E731
        if command == "announce":
            return args[1] is not None and self.spec.status(args[0].stage_id) is not None
        if command == "renew":
            return any(of(stage) != args[0] for stage in args[1])
        if command in {"push", "requeue"}:
            return args[0].client_id != of(args[0].stage_id)
        stage = getattr(args[0], "stage_id", args[0]) if args else None
        return "client_id" in kwargs and kwargs["client_id"] not in (None, of(stage))

    def _theirs(self, value: Any) -> Any:
        """A noun of ours as it comes out on the other side."""
        if isinstance(value, tuple):
            return tuple(map(self._theirs, value))
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return value
        module = self.previous["nodes" if type(value).__module__ == nodes.__name__ else "core"]
        cls: Any = getattr(module, type(value).__name__, None)
        if cls is None:
            cls = getattr(self.previous["queue.redis"], type(value).__name__)
        return cls.decode(value.encode()) if hasattr(cls, "decode") else cls(**dataclasses.asdict(value))

    @staticmethod
    def _plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [MixedWalk._plain(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
        return plain(value) if dataclasses.is_dataclass(value) else value

    def teardown(self) -> None:
        self.loop.run_until_complete(self.old.close())
        super().teardown()


@pytest.mark.timeout(300)
def test_both_releases_say_their_own_scripts_to_the_same_keys(redis_url: str, old: Mapping[str, ModuleType]) -> None:
    """A random walk in which each step is spoken by either release: what each finds is what the specification says."""

    class Mixed(MixedWalk):
        pass

    Mixed.redis_url, Mixed.previous = redis_url, old
    run_state_machine_as_test(Mixed, settings=settings(max_examples=20, **BUDGET))  # type: ignore[arg-type]


# -- further apart than promised -----------------------------------------------------------------------------------------
async def test_a_ticket_of_an_unknown_version_is_passed_over_and_said_once(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One clear line says which versions meet and what to do; whoever waits beside it, or runs, is served as ever."""
    queue = await fresh_redis_queue(redis_url)
    t = Ticket(stage_id="known", client_id="app", model="m")
    await queue.push(t, engines=(), now_s=1.0)
    later = core.WIRE_VERSION + 1
    body = t.encode().replace(f'"v":{core.WIRE_VERSION}', f'"v":{later}').replace("known", "later")
    await queue.push(t.evolve(stage_id="later"), engines=(), now_s=1.0)
    await queue._redis.hset(queue._stage("later"), "ticket", body)
    for _ in range(2):
        assert [found.stage_id for found in await queue.heads("m", 9)] == ["known"]
    assert await queue.running() == []
    (said,) = [r.getMessage() for r in caplog.records]
    assert f"ticket version {later} is not understood (this is {core.WIRE_VERSION}): upgrade the older side" in said
    await queue.close()


async def test_a_verdict_with_words_of_tomorrow_is_understood(redis_url: str) -> None:
    """A scheduler of the next release may tell a client more than it knows of."""
    queue = await fresh_redis_queue(redis_url)
    grant = {"stage_id": "s", "engine_id": "e", "epoch": 1, "kv_bytes": 5, "of_tomorrow": [1]}
    refusal = {"refusal": {"stage_id": "t", "reason": "of tomorrow", "retry_after_s": 1.5, "of_tomorrow": 1}}
    await queue._redis.rpush(queue._inbox("app"), f"7 {json.dumps(grant)}", f"0 {json.dumps(refusal)}")
    given, refused = await queue.verdicts("app", 1.0)
    assert (given.stage_id, getattr(given, "token", None)) == ("s", 7)
    assert (refused.stage_id, getattr(refused, "retry_after_s", None)) == ("t", 1.5)
    await queue.close()


# -- processes -----------------------------------------------------------------------------------------------------------
LEASE_OF_PROCESSES_S = 3.0


@dataclasses.dataclass(kw_only=True)
class Mixed:
    """A pool whose apps and schedulers are processes of either release, on one Redis and one emulated engine of two slots."""

    queue: RedisQueue
    env: Mapping[Release, Mapping[str, str]]
    folder: Path
    processes: dict[str, asyncio.subprocess.Process] = dataclasses.field(default_factory=dict)
    heard: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    readers: list[asyncio.Task[None]] = dataclasses.field(default_factory=list)

    async def _start(self, name: str, release: Release, *command: str) -> asyncio.subprocess.Process:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = await asyncio.create_subprocess_exec(
                sys.executable,
                *command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**self.env[release]},
                cwd=self.folder,
            )
        return self.processes[name]

    async def app(self, release: Release) -> str:
        """Start an app; returns what it is called."""
        process = await self._start(name := f"app-{release}", release, str(PEER))
        self.readers.append(asyncio.create_task(self._listen(name, process)))
        ready = await self.event(name, "ready")
        assert ready["version"] == (previous.VERSION if release == "old" else __version__)
        return name

    async def _listen(self, name: str, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            self.heard.append({"app": name, **json.loads(line)})

    async def scheduler(self, release: Release, *, leads: bool = True) -> str:
        """Start a scheduler, and wait until it leads, or stands by; returns what it is called."""
        name = f"scheduler-{release}-{len(self.processes)}"
        command = ("-m", "maestro_agents.cli", "scheduler", "--fleet", str(self.folder / "fleet.toml"))
        await self._start(name, release, *command)

        async def ready() -> bool:
            return "engine e is alive" in (self.folder / f"{name}.log").read_text()

        await self.until(ready, f"{name} has looked at the engine")
        if leads:
            await self.led_by(name)
        return name

    async def led_by(self, name: str) -> None:
        """Wait until this scheduler leads and has published its fleet."""
        pid = self.processes[name].pid

        async def leads() -> bool:
            return f"-{pid}-" in await self.queue.leader() and bool(await self.queue.fleet())

        await self.until(leads, f"{name} leads")

    async def end(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """End a process."""
        process = self.processes[name]
        if process.returncode is None:
            process.send_signal(number)
        await process.wait()

    def tell(self, app: str, do: str, **more: str) -> None:
        """Tell an app what a stage of it does."""
        stdin = self.processes[app].stdin
        assert stdin is not None
        stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")

    async def event(self, app: str, event: str, **more: str) -> dict[str, Any]:
        """The next event of an app; none is heard twice."""

        def found() -> dict[str, Any] | None:
            wanted = {"app": app, "event": event, **more}
            return next((e for e in self.heard if wanted.items() <= e.items()), None)

        async def there() -> bool:
            return found() is not None

        await self.until(there, f"{app} says {event} {more}")
        said = found()
        assert said is not None
        self.heard.remove(said)
        return said

    async def until(self, holds: Callable[[], Any], what: str) -> None:
        """Wait until something is so."""
        try:
            async with asyncio.timeout(LIMIT_S):
                while not await holds():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            logs = {f.name: f.read_text()[-1500:] for f in self.folder.glob("*.log")}
            raise AssertionError(f"not within {LIMIT_S} s: {what}; heard {self.heard}; {logs}") from None

    async def ended(self, stage: str, status: Status = Status.DONE) -> None:
        """Wait until a stage has ended so."""

        async def so() -> bool:
            return await self.queue.status(stage) is status

        await self.until(so, f"{stage} is {status}")

    async def a_life(self, app: str, stage: str) -> None:
        """Three stages of a run on an engine that runs two: by the fast path, by the planner, back and again; then the run ends."""
        names = [f"{stage}-{n}" for n in range(3)]
        for name in names[:2]:
            self.tell(app, "open", stage=name, run=stage)
            await self.event(app, "granted", stage=name)
        self.tell(app, "open", stage=names[2], run=stage)
        await self.until(functools.partial(self.queue.depth, "m"), f"{names[2]} waits")
        self.tell(app, "finish", stage=names[0])
        planned = await self.event(app, "granted", stage=names[2])
        assert not planned["fast"]
        self.tell(app, "requeue", stage=names[2])
        again = await self.event(app, "granted", stage=names[2])
        assert again["token"] > planned["token"]
        for name in names[1:]:
            self.tell(app, "finish", stage=name)
        for name in names:
            await self.ended(name)
        self.tell(app, "end_run", run=stage)

        async def told() -> bool:
            entries = (await self.queue.read_log("", 1000))[1]
            done = {e.stage_id for e in entries if isinstance(e, Observation)}
            return done >= set(names) and any(isinstance(e, RunEnd) and e.run_id == stage for e in entries)

        await self.until(told, f"the log tells of run {stage}")
        await self.nothing_left()

    async def nothing_left(self) -> None:
        """Nothing waits, runs, drains or is reserved."""

        async def empty() -> bool:
            ledger = await self.queue.ledger()
            left = await self.queue.depth("m"), await self.queue.running(), await self.queue.draining()
            return not (ledger.slots or ledger.kv_bytes or any(left))

        await self.until(empty, "nothing is left")


@asynccontextmanager
async def mixed(redis_url: str, pool: str, old_path: Path, folder: Path) -> AsyncIterator[Mixed]:
    """A pool without apps and schedulers yet."""
    async with AsyncExitStack() as ends:
        engine = ends.enter_context(Emulator(EmulatorConfig(models=(EmulatedModel(name="m"),))))
        (folder / "fleet.toml").write_text(
            f'pool = "{pool}"\n[redis]\nurl = "{redis_url}"\n[[engine]]\nid = "e"\nmodel = "m"\nurl = "{engine.url}"\nslots = 2\n'
        )
        queue = RedisQueue(redis_url, pool=pool)
        ends.push_async_callback(queue.close)
        base = {k: v for k, v in os.environ.items() if not k.startswith("MAESTRO_")}
        base |= {"MAESTRO_REDIS_URL": redis_url, "MAESTRO_POOL": pool, "MAESTRO_LEASE_S": str(LEASE_OF_PROCESSES_S)}
        base |= {"MAESTRO_OUTAGE_AFTER_S": str(LIMIT_S)}  # a change of leaders is none, however busy the machine is
        new_path = os.pathsep.join(p for p in sys.path if p)
        env: dict[Release, Mapping[str, str]] = {
            "old": {**base, "PYTHONPATH": str(old_path)},
            "new": {**base, "PYTHONPATH": new_path},
        }
        found = Mixed(queue=queue, env=env, folder=folder)
        try:
            yield found
        finally:
            for name, process in found.processes.items():
                if process.returncode is None:
                    process.kill()
                    await process.wait()
                del name
            await asyncio.gather(*found.readers)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("app", "scheduler"), [("old", "new"), ("new", "old")])
async def test_an_app_of_one_release_is_served_by_a_scheduler_of_the_other(
    redis_url: str, pool: str, old_path: Path, tmp_path: Path, app: Release, scheduler: Release
) -> None:
    """Fast path, planner, requeue, finish and the run's end, each as its own release says it; nothing is left reserved."""
    async with mixed(redis_url, pool, old_path, tmp_path) as pool_of_both:
        await pool_of_both.scheduler(scheduler)
        await pool_of_both.a_life(await pool_of_both.app(app), "life")


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_pool_is_upgraded_while_it_works_and_taken_back(
    redis_url: str, pool: str, old_path: Path, tmp_path: Path
) -> None:
    """Apps of both releases go on while leadership goes from old to new to old; a stage granted under one ends under the next."""
    async with mixed(redis_url, pool, old_path, tmp_path) as p:
        leader = await p.scheduler("old")
        apps = [await p.app("old"), await p.app("new")]
        epochs: list[int] = []
        for turn, release in enumerate(("new", "old", "new")):
            for app in apps:
                await p.a_life(app, f"{app}-{turn}")
            for app in apps:  # held over the change of leaders, and one that waits meanwhile
                p.tell(app, "open", stage=f"{app}-{turn}-held")
                epochs.append((await p.event(app, "granted", stage=f"{app}-{turn}-held"))["epoch"])
            for app in apps:
                p.tell(app, "open", stage=f"{app}-{turn}-waits")
            await p.until(lambda: _is(p.queue.depth("m"), 2), "two wait")
            standby = await p.scheduler(release, leads=False)
            await p.end(leader, signal.SIGKILL if turn % 2 else signal.SIGTERM)
            await p.led_by(leader := standby)
            for app in apps:
                p.tell(app, "finish", stage=f"{app}-{turn}-held")
                await p.ended(f"{app}-{turn}-held")
            for app in apps:
                granted = await p.event(app, "granted", stage=f"{app}-{turn}-waits")
                assert granted["epoch"] > epochs[-1]
                p.tell(app, "finish", stage=f"{app}-{turn}-waits")
                await p.ended(f"{app}-{turn}-waits")
            await p.nothing_left()
        assert epochs == sorted(epochs)


async def _is(found: Any, wanted: int) -> bool:
    return await found == wanted
