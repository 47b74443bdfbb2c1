"""`maestro up`: Redis, a scheduler and a fleet as child processes, in one command.

`Stack` is the machinery, for the demo, the benches and tests too: it starts things in order, waits until each is ready,
starts again what dies, and leaves nothing behind, however it ends itself (`maestro_agents.guard`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Final, Self, TypeVar

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from maestro_agents import guard
from maestro_agents.cli.serve import check_policy
from maestro_agents.core import EngineSpec
from maestro_agents.errors import ConfigError, EngineUnavailable, MaestroError, QueueUnavailable
from maestro_agents.fleet import Fleet, load_fleet, load_tables, write_fleet
from maestro_agents.ports import Queue
from maestro_agents.queue.embedded import EmbeddedRedis
from maestro_agents.settings import Settings
from maestro_agents.tokens import EngineKey
from maestro_serving.node import DRAIN_S
from maestro_serving.processes import GRACE_S, EngineProcess, engine_command, free_port, kept_pid
from maestro_serving.vllm import VllmProbe

if TYPE_CHECKING:
    from maestro_serving.ray_nodes import RayNodes

FIRST_BACKOFF_S: Final = 0.5
LAST_BACKOFF_S: Final = 30.0
STABLE_S: Final = 60.0
"""After so long a life a death counts as the first again."""

LOOK_EVERY_S: Final = 0.1
SCHEDULER_START_S: Final = 30.0

RAY_LOOK_S: Final = 1.0
RAY_PATIENCE_S: Final = 10.0
"""A node for which Ray has found no machine in this time is not waited for: it comes when there is one."""

T = TypeVar("T")


class Stack:
    """The processes of one pool. Methods block and may be called from any thread; ``notice`` is told what happens.

    ``redis_url``: use that Redis instead of starting one. ``keep``: start again what dies. ``appendonly``: an embedded
    Redis remembers over a restart. ``logs``: where the processes' output goes; a temporary folder where None. ``ray``: the
    address of a Ray cluster that places the nodes of the fleet; here where None.
    ``on_ready``: told ``(part, detail)`` when a part is ready.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        redis_url: str | None = None,
        policy: str = "ours",
        logs: Path | None = None,
        appendonly: bool = False,
        keep: bool = True,
        ray: str | None = None,
        notice: Callable[[str], None] = lambda _line: None,
        on_ready: Callable[[str, str], None] = lambda _part, _detail: None,
    ) -> None:
        self.fleet = fleet
        self.policy = policy
        self.keep = keep
        self._notice = notice
        self._on_ready = on_ready
        self._temporary = Path(tempfile.mkdtemp(prefix="maestro-stack-")) if logs is None else None
        self.logs = logs or self._temporary or Path()
        self._redis = EmbeddedRedis(redis_url or fleet.redis_url, appendonly=appendonly)
        self._engines: dict[str, EngineProcess] = {}
        self._nodes: dict[str, guard.Guarded] = {}
        self._ray_address = ray
        #: The nodes, where Ray has them.
        self.ray: RayNodes | None = None
        self._scheduler: guard.Guarded | None = None
        self._lock = threading.RLock()  # between a keeper that starts things again and a caller that restarts them
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="maestro-stack", daemon=True)
        self._keepers: list[asyncio.Task[None]] = []
        self._stopped = False

    # -- what there is -----------------------------------------------------------------------------------------------
    @property
    def redis_url(self) -> str:
        """Where apps join."""
        if self._redis.url is None:
            raise QueueUnavailable("the stack has no Redis (yet)")
        return self._redis.url

    @property
    def redis_says(self) -> str:
        """Which Redis it is, for people."""
        return self._redis.explain()

    @property
    def engines(self) -> tuple[EngineSpec, ...]:
        """The fleet as it runs; of the engines of nodes, which come and go (`maestro node --status`), those that serve now."""
        return (*self.fleet.running(), *(self._call(self._serving()) if self.fleet.nodes else ()))

    def pids(self) -> dict[str, int]:
        """The processes that run now, by part."""
        found = {"redis": self._redis.pid or 0, "scheduler": self._scheduler.pid if self._scheduler else 0}
        found |= {f"engine {name}": engine.pid for name, engine in self._engines.items()}
        found |= {f"node {name}": node.pid for name, node in self._nodes.items()}
        return {part: pid for part, pid in found.items() if pid}

    # -- start and stop ----------------------------------------------------------------------------------------------
    def start(self, *, redis: bool = True, engines: bool = True, scheduler: bool = True) -> Self:
        """Start the parts asked for, in order, and wait until each is ready. On failure nothing is left behind."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        try:
            if redis:
                self._start_redis()
            if engines:
                self._call(self._start_engines())
                self._start_nodes()
            if scheduler:
                self.start_scheduler()
        except BaseException:
            self.stop()
            raise
        return self

    def start_scheduler(self, *, policy: str | None = None, pool: str | None = None) -> None:
        """Start the scheduler, in place of the one that runs. ``pool``: another than the fleet's; nodes go there with their engines."""
        if pool is not None and pool != self.fleet.pool:
            self.fleet = dataclasses.replace(self.fleet, pool=pool)
            self._move_nodes()
        self.policy = policy or self.policy
        with self._lock:
            first, previous = self._scheduler is None, self._scheduler
            if previous is not None:
                previous.stop()
            self._scheduler = self.spawn_scheduler()
        self._call(self._scheduler_leads())
        self._on_ready("scheduler", f"pool {self.fleet.pool}, policy {self.policy}")
        if first and self.keep:
            self._keep_alive(self._keep("the scheduler", self._scheduler_alive, self._scheduler_again))

    def stop(self) -> None:
        """End everything that was started here. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        with self._lock:
            if self._scheduler is not None:
                self._scheduler.stop()
                self._scheduler = None
            nodes, self._nodes = self._nodes, {}
        enders = [threading.Thread(target=node.stop) for node in nodes.values()]
        for ender in enders:
            ender.start()
        for ender in enders:
            ender.join()
        if self.ray is not None:
            self.ray.stop()
        if self._thread.is_alive():
            with contextlib.suppress(Exception):
                self._call(self._stop_engines())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
        if not self._thread.is_alive():
            self._loop.close()
        self._redis.stop()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    # -- faults ------------------------------------------------------------------------------------------------------
    def kill_scheduler(self) -> int:
        """Kill -9 the scheduler; returns the pid it had. It is started again where the stack keeps things alive."""
        with self._lock:
            if self._scheduler is None:
                raise ConfigError("no scheduler was started here")
            return _kill(self._scheduler.pid)

    def kill_engine(self, engine_id: str) -> int:
        """Kill -9 an engine that was launched here, by a node's agent or without one; returns the pid it had. It comes back."""
        engine = self._engines.get(engine_id)
        folders = (self._nodes_state / node_id / "engines" for node_id in self._nodes)
        pid = engine.pid if engine else next(filter(None, (kept_pid(folder, engine_id) for folder in folders)), 0)
        if not pid:
            raise ConfigError(f"engine {engine_id!r} was not launched here, or does not run")
        return _kill(pid)

    def kill_node(self, node_id: str) -> int:
        """Kill -9 a node's agent; returns the pid it had. Another one takes its servers over."""
        with self._lock:
            node = self._nodes.get(node_id)
        if node is None or not node.pid:
            raise ConfigError(f"node {node_id!r} has no agent here, or it does not run")
        return _kill(node.pid)

    @property
    def _nodes_state(self) -> Path:
        return self.logs / "nodes"

    def restart_redis(self, *, kill: bool = True) -> None:
        """Restart the embedded Redis at the same URL; what it knew is gone unless it is ``appendonly``."""
        with self._lock:
            self._redis.restart(kill=kill)

    # -- parts -------------------------------------------------------------------------------------------------------
    def _start_redis(self) -> None:
        self._redis.start()
        if self._redis.url is None:
            raise ConfigError("no Redis server is here to start: install redis-server, or give the URL of one")
        from maestro_agents.queue.redis import reach

        try:
            reach(self._redis.url, pool=self.fleet.pool)
        except QueueUnavailable as e:
            raise QueueUnavailable(f"{e}. Start it, or name none: then one is started here") from None
        self._on_ready("redis", self._redis.explain())
        if self.keep and self._redis.kind != "url":
            self._keep_alive(self._keep("Redis", self._redis.alive, self._redis.restart))

    async def _start_engines(self) -> None:
        specs = {e.engine_id: e for e in self.fleet.engines}
        urls: dict[str, str] = {}
        for engine_id, launch in self.fleet.launches.items():
            port = launch.port or free_port()
            urls[engine_id] = f"http://127.0.0.1:{port}/v1"
            self._engines[engine_id] = EngineProcess(
                engine_id,
                engine_command(specs[engine_id], launch, port=port),
                url=urls[engine_id],
                log=self.logs / f"engine-{engine_id}.log",
                notice=self._notice,
            )
        self.fleet = self.fleet.adopt(urls)
        failed: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:  # the first failure ends the waiting for the others
                for engine in self._engines.values():
                    group.create_task(self._start_engine(engine))
                for spec in self.fleet.running():
                    if spec.engine_id not in self._engines:
                        group.create_task(self._look_at(spec))
        except* MaestroError as e:
            failed = e.exceptions[0]  # raised in here, some versions of Python would wrap it again
        if failed is not None:
            raise failed from None
        if self.keep:
            for engine in self._engines.values():
                self._keep_alive(engine.keep())

    async def _start_engine(self, engine: EngineProcess) -> None:
        await engine.start()
        self._on_ready(f"engine {engine.engine_id}", engine.url)

    async def _look_at(self, spec: EngineSpec) -> None:
        probe = VllmProbe()
        try:
            healthy = (await probe.probe(spec)).healthy
        finally:
            await probe.close()
        self._on_ready(f"engine {spec.engine_id}", spec.url if healthy else f"{spec.url} does not answer yet")

    def _start_nodes(self) -> None:
        """Start the nodes' agents; each starts its own engines. One that ends before it has reported could never run."""
        if self._ray_address is not None:
            self._start_on_ray(self._ray_address)
            return
        for node_id in self.fleet.nodes:
            with self._lock:
                self._nodes[node_id] = self._spawn_node(node_id)
        if self.fleet.nodes:
            self._call(self._nodes_report())
        for node_id in self.fleet.nodes if self.keep else ():
            alive = functools.partial(self._node_alive, node_id)
            self._keep_alive(self._keep(f"node {node_id}", alive, functools.partial(self._node_again, node_id)))

    def _start_on_ray(self, address: str) -> None:
        """Let Ray place the nodes' agents. One that finds no place is left waiting for it."""
        from maestro_serving.ray_nodes import RayNodes

        if self.fleet.file is None:
            raise ConfigError("--ray places the nodes of a fleet file with [[gpu]]: this one has none")
        settings = Settings.load()
        key = EngineKey.of(settings, pool=self.fleet.pool) and settings.engine_key_file
        self.ray = RayNodes(
            load_tables(self.fleet.file),
            address=address,
            redis_url=self.redis_url,
            pool=self.fleet.pool,
            engine_key=key.read_text(encoding="utf-8").strip() if key else "",
        )
        self.ray.start()
        self._call(self._nodes_report())
        if self.keep:
            self._keep_alive(self._tell_of_ray(self.ray))

    async def _tell_of_ray(self, ray: RayNodes) -> None:
        """Say which machines and nodes come and go, until cancelled."""
        said = ""
        while True:
            try:
                for line in await asyncio.to_thread(ray.news):
                    self._notice(line)
            except Exception as e:  # Ray's own errors have no root of ours, and it may come back
                if not self._stopped and said != (said := f"Ray does not answer: {e}".splitlines()[0]):
                    self._notice(said)
            await asyncio.sleep(RAY_LOOK_S)

    def _spawn_node(self, node_id: str) -> guard.Guarded:
        command = [
            *(sys.executable, "-m", "maestro_agents.cli", "node", "--fleet", str(self.fleet.file), "--node", node_id),
            *("--redis-url", self.redis_url, "--pool", self.fleet.pool, "--state", str(self._nodes_state)),
        ]
        # In order it ends only once its engines have finished what they run.
        log = self.logs / f"node-{node_id}.log"
        return guard.spawn(command, log=log, env=_environment(), grace_s=DRAIN_S + GRACE_S)

    def _node_alive(self, node_id: str) -> bool:
        return node_id in self._nodes and self._nodes[node_id].alive()

    def _node_again(self, node_id: str) -> None:
        self._nodes[node_id].stop()
        self._nodes[node_id] = self._spawn_node(node_id)

    def _move_nodes(self) -> None:
        """Let agents leave their servers to others, which take them over for the pool that is ours now."""
        with self._lock:
            for node_id, node in self._nodes.items():
                os.kill(node.pid, signal.SIGHUP)
                give_up_at = time.monotonic() + GRACE_S
                while node.alive() and time.monotonic() < give_up_at:
                    time.sleep(LOOK_EVERY_S)
                self._node_again(node_id)
        if self._nodes:
            self._call(self._nodes_report())

    async def _nodes_report(self) -> None:
        """Wait until each node has brought up what it starts with, or said why it cannot."""
        from maestro_agents.queue.redis import RedisQueue

        queue = RedisQueue(self.redis_url, pool=self.fleet.pool)
        left = set(self.fleet.nodes)
        began_s = time.monotonic()
        try:
            while left:
                for report in await queue.reports(await queue.server_time_s()):
                    if report.node_id not in left or any(e.tier != "gpu" == e.to for e in report.engines):
                        continue
                    left.discard(report.node_id)
                    awake = [e.spec.engine_id for e in report.engines if e.tier == "gpu"]
                    for e in report.engines:
                        if e.failed:
                            self._notice(f"engine {e.spec.engine_id}: {e.failed}")
                    self._on_ready(
                        f"node {report.node_id}", f"{', '.join(awake) or 'no engine'} of {len(report.engines)}"
                    )
                if self.ray is not None:
                    for node_id, placed in (await asyncio.to_thread(self.ray.look)).items():
                        if node_id in left and placed.ended:
                            raise EngineUnavailable(f"node {node_id} {placed.words()}")
                        if node_id in left and not placed.ray_node and time.monotonic() > began_s + RAY_PATIENCE_S:
                            left.discard(node_id)
                            self._on_ready(f"node {node_id}", placed.words())
                for node_id in left if self.ray is None else ():
                    if not self._node_alive(node_id):
                        raise EngineUnavailable(f"node {node_id} ended: {self._last_words(f'node-{node_id}.log')}")
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            await queue.close()

    async def _serving(self) -> list[EngineSpec]:
        from maestro_agents.queue.redis import RedisQueue

        queue = RedisQueue(self.redis_url, pool=self.fleet.pool)
        try:
            reports = await queue.reports(await queue.server_time_s())
        finally:
            await queue.close()
        return [e.spec for report in reports for e in report.engines if e.tier == e.to == "gpu"]

    def spawn_scheduler(self, name: str = "scheduler") -> guard.Guarded:
        """A scheduler of this pool, its output in ``NAME.log``: where one leads already, a standby. Its caller ends it."""
        fleet_file = self.fleet.file
        if fleet_file is None:
            fleet_file = self.logs / "fleet.toml"
            write_fleet(dataclasses.replace(self.fleet, redis_url=None), fleet_file)
        command = [
            *(sys.executable, "-m", "maestro_agents.cli", "scheduler", "--redis-url", self.redis_url),
            *("--fleet", str(fleet_file), "--policy", self.policy, "--pool", self.fleet.pool),
        ]
        return guard.spawn(command, log=self.logs / f"{name}.log", env=_environment())

    async def _scheduler_leads(self) -> None:
        """Wait until the scheduler has published the fleet."""
        from maestro_agents.queue.redis import RedisQueue

        queue = RedisQueue(self.redis_url, pool=self.fleet.pool)
        give_up_at = time.monotonic() + SCHEDULER_START_S
        try:
            while not await queue.fleet():
                if self.fleet.nodes and not self.fleet.engines and not await self._somebody_serves(queue):
                    return  # nothing to publish yet: who is wanted is brought then
                if self._scheduler is None or not self._scheduler.alive():
                    raise QueueUnavailable(f"the scheduler ended while it started: {self._last_words('scheduler.log')}")
                if time.monotonic() > give_up_at:
                    raise QueueUnavailable(f"the scheduler did not lead within {SCHEDULER_START_S:g} s")
                await asyncio.sleep(LOOK_EVERY_S / 2)
        finally:
            await queue.close()

    @staticmethod
    async def _somebody_serves(queue: Queue) -> bool:
        reports = await queue.reports(time.time())
        return any(e.tier == e.to == "gpu" for report in reports for e in report.engines)

    def _last_words(self, log: str) -> str:
        with contextlib.suppress(OSError, IndexError):
            return (self.logs / log).read_text(errors="replace").splitlines()[-1]
        return "(no log)"

    # -- keeping alive -----------------------------------------------------------------------------------------------
    def _scheduler_alive(self) -> bool:
        return self._scheduler is not None and self._scheduler.alive()

    def _scheduler_again(self) -> None:
        if self._scheduler is not None:
            self._scheduler.stop()
        self._scheduler = self.spawn_scheduler()

    async def _keep(self, part: str, alive: Callable[[], bool], again: Callable[[], None]) -> None:
        """Start a part again whenever it died, later each time, until cancelled."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            began_s = time.monotonic()
            while not self._seen_dead(alive):
                await asyncio.sleep(LOOK_EVERY_S)
            if time.monotonic() - began_s > STABLE_S:
                backoff_s = FIRST_BACKOFF_S
            self._notice(f"{part} ended; it is started again in {backoff_s:g} s (logs: {self.logs})")
            await asyncio.sleep(backoff_s)
            backoff_s = min(LAST_BACKOFF_S, 2 * backoff_s)
            try:
                await asyncio.to_thread(self._unless_alive, alive, again)
            except MaestroError as e:
                self._notice(str(e))
            else:
                self._notice(f"{part} was started again")

    def _seen_dead(self, alive: Callable[[], bool]) -> bool:
        """False also while somebody restarts it on purpose."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return not alive()
        finally:
            self._lock.release()

    def _unless_alive(self, alive: Callable[[], bool], again: Callable[[], None]) -> None:
        with self._lock:
            if not self._stopped and not alive():
                again()

    # -- the loop behind ---------------------------------------------------------------------------------------------
    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _keep_alive(self, work: Coroutine[Any, Any, None]) -> None:
        self._loop.call_soon_threadsafe(lambda: self._keepers.append(self._loop.create_task(work)))

    async def _stop_engines(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(engine.stop() for engine in self._engines.values()))


def _environment() -> dict[str, str]:
    """A child finds what we found, in an editable checkout as in an installed wheel."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def _kill(pid: int) -> int:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return pid


def run(
    fleet: Annotated[Path, typer.Argument(help="The fleet file.")] = Path("fleet.toml"),
    redis_url: Annotated[
        str | None,
        typer.Option("--redis-url", help="Default: the fleet file's, else MAESTRO_REDIS_URL, else embedded."),
    ] = None,
    logs: Annotated[Path, typer.Option("--logs", help="Folder for what the processes say.")] = Path("maestro-logs"),
    policy: Annotated[str, typer.Option("--policy", help="The order of stages: `ours`, or a baseline.")] = "ours",
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Let a Ray cluster place the nodes (docs/ray.md): `auto`, HOST:PORT, or `local` to try it. Default: all here.",
        ),
    ] = None,
) -> None:
    """Start Redis, engines and the scheduler, and start again what dies. Ctrl-C ends them all.

    Engines with [engine.launch] are started, engines with a url are used as they are. A fleet of [[gpu]] has a node agent
    started for each of its nodes, here, or by --ray on the machines of a Ray cluster. The embedded Redis listens on this machine only,
    and so do engines that are started here.
    """
    console = Console(highlight=False)
    settings = Settings.load(redis_url=redis_url)
    whole = load_fleet(fleet)
    check_policy(policy)
    if ray is not None:
        from maestro_serving.ray_nodes import check_address

        check_address(ray)
    url = redis_url or whole.redis_url or settings.redis_url
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # whichever it is, everything ends in order
    columns = (SpinnerColumn(finished_text="✓"), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bars:
        engines = [f"engine {e.engine_id}" for e in whole.engines]
        parts = ["redis", *engines, *(f"node {node_id}" for node_id in whole.nodes), "scheduler"]
        tasks = {part: bars.add_task(f"{part}: starting", total=1) for part in parts}

        def ready(part: str, detail: str) -> None:
            bars.update(tasks[part], description=f"{part}: {detail}", completed=1)

        stack = Stack(whole, redis_url=url, policy=policy, logs=logs, notice=console.print, on_ready=ready, ray=ray)
        try:
            stack.start()
        except KeyboardInterrupt:
            stack.stop()
            raise typer.Exit(130) from None
    try:
        _tell(console, stack)
        ended.wait()
    except KeyboardInterrupt:
        console.print("stopping")
    finally:
        stack.stop()
    console.print("everything has ended")


def _tell(console: Console, stack: Stack) -> None:
    console.print(f"\nLogs: {stack.logs}. Ctrl-C ends it all. Apps and `maestro top` join with:", markup=False)
    lines = [f"export MAESTRO_REDIS_URL={stack.redis_url}"]
    if stack.fleet.pool != "default":
        lines.append(f"export MAESTRO_POOL={stack.fleet.pool}")
    for line in lines:
        console.print(f"  {line}", markup=False, soft_wrap=True)
