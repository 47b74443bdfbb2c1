"""`maestro node`: the agent of one GPU host, until Ctrl-C or SIGTERM; or a look at what all nodes report."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final
from urllib.parse import urlsplit

import typer

from maestro_agents.errors import ConfigError, QueueUnavailable
from maestro_agents.fleet import Fleet, load_fleet
from maestro_agents.nodes import EngineReport, NodeReport, Tier
from maestro_agents.redis_url import without_password
from maestro_agents.settings import Settings

if TYPE_CHECKING:
    from maestro_serving.proxy import Proxy

log = logging.getLogger("maestro")

SHOWN_MOVES: Final = 8
AWAY: Final[Sequence[Tier]] = ("sleeping", "dropped", "host", "disk")


def run(
    fleet: Annotated[
        Path | None, typer.Option("--fleet", help="fleet.toml with [[gpu]]. Default: MAESTRO_FLEET.")
    ] = None,
    node: Annotated[str, typer.Option("--node", help="Which of its nodes this is. Default: the only one.")] = "",
    redis_url: Annotated[
        str | None, typer.Option("--redis-url", help="Default: that of the fleet file, else MAESTRO_REDIS_URL.")
    ] = None,
    state: Annotated[
        Path, typer.Option("--state", help="Folder for logs, learned costs, and which servers are whose.")
    ] = Path("maestro-node"),
    pool: Annotated[str | None, typer.Option("--pool", help="Default: that of the fleet file.")] = None,
    listen: Annotated[
        str,
        typer.Option(
            "--listen",
            metavar="HOST:PORT",
            help="Let clients on other machines reach the engines here, through Envoy and with the scheduler's tokens alone "
            "(docs/security.md), e.g. 0.0.0.0:9000. Default: engines are on loopback.",
        ),
    ] = "",
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics", metavar="HOST:PORT", help="Serve /metrics, /healthz and /readyz there, e.g. 0.0.0.0:9109."
        ),
    ] = "",
    status: Annotated[bool, typer.Option("--status", help="Run nothing: show what all nodes report.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --status: for machines.")] = False,
) -> None:
    """Run the agent of one GPU host: it starts engines, moves models between memory tiers, and reports.

    SIGTERM or Ctrl-C: engines take nothing new, finish what runs, and end. SIGHUP, and kill -9: servers run on for half a minute; an agent that
    comes back takes them over as they are. maestro node --status shows tiers, moves and what they cost.
    """
    settings = Settings.load(redis_url=redis_url)
    path = fleet or settings.fleet
    whole = load_fleet(path) if path is not None else None
    url = redis_url or (whole.redis_url if whole else None) or settings.redis_url
    if url is None:
        raise ConfigError("which Redis? Give --redis-url, [redis] url in the fleet file, or MAESTRO_REDIS_URL")
    name = pool or (whole.pool if whole else settings.pool)
    from maestro_agents.queue.redis import reach

    try:
        reach(url, pool=name)
    except QueueUnavailable as e:
        raise QueueUnavailable(f"{e}. Start it, or let `maestro up` bring one along") from None
    if status:
        _show(asyncio.run(_reports(url, name)), as_json=as_json)
        return
    if whole is None or path is None:
        raise ConfigError("which fleet? Name it: maestro node --fleet fleet.toml (or MAESTRO_FLEET)")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per look
    node_id = node or _only(whole, path)
    folder = state.resolve() / node_id
    with _alone(folder):
        proxy = _proxy(listen, settings, url, name, folder) if listen else None
        asyncio.run(_serve(path, node_id, url, name, folder, proxy, metrics))


def _only(fleet: Fleet, path: Path) -> str:
    if len(fleet.nodes) != 1:
        there = f"it has {', '.join(fleet.nodes)}" if fleet.nodes else "it has no [[gpu]]"
        raise ConfigError(f"which node of {path}? Name it by --node: {there}")
    return fleet.nodes[0]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One agent to a node and state folder. Raises `ConfigError` where another runs."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "agent.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another agent runs this node: end it first, or give a --state other than {folder.parent}"
            ) from None
        yield


def _proxy(listen: str, settings: Settings, url: str, pool: str, folder: Path) -> Proxy:
    """What stands between the engines and clients on other machines. Raises `ConfigError` where it could not check them."""
    from maestro_agents.tokens import HOW, EngineKey
    from maestro_serving.proxy import Listen, Proxy, envoy_program

    where = Listen.read(listen, towards=urlsplit(url).hostname or "")
    key = EngineKey.of(settings, pool=pool)
    if key is None:
        raise ConfigError(
            f"--listen {listen} needs the key that this pool's scheduler signs with: name its file by "
            f"MAESTRO_ENGINE_KEY_FILE, on both (`{HOW}`)"
        )
    envoy_program()
    log.info("clients reach the engines at %s:%d", where.advertised, where.port)
    return Proxy(listen=where, key=key, folder=folder / "proxy")


async def _serve(
    path: Path, node_id: str, url: str, pool: str, folder: Path, proxy: Proxy | None, metrics: str
) -> None:
    from maestro_agents.queue.redis import RedisClock, RedisQueue
    from maestro_serving.drivers import Driver, NodeEngine, NodeGpu
    from maestro_serving.emulated_driver import EmulatedGpus
    from maestro_serving.hosts import load_host
    from maestro_serving.kvcached import KvCached
    from maestro_serving.node import Node
    from maestro_serving.vllm_driver import VllmDriver

    kvcached = KvCached.find()
    host = load_host(path, node_id, folder, elastic=kvcached is not None)
    emulated = EmulatedGpus()

    def driver_of(engine: NodeEngine, gpu: NodeGpu) -> Driver:
        if engine.launch.kind == "emulator":
            return emulated(engine, gpu)
        return VllmDriver(engine, gpu, kvcached=kvcached if gpu.kind != "cpu" and not engine.launch.url else None)

    queue = RedisQueue(url, pool=pool)
    clock = RedisClock()
    ends: list[signal.Signals] = []
    end = asyncio.Event()

    def told(number: signal.Signals) -> None:
        ends.append(number)
        end.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, told, number)
    told_of = contextlib.AsyncExitStack()
    try:
        await clock.sync(queue)
        log.info(
            "node %s of pool %s: %d GPUs, %d engines, Redis at %s",
            *(node_id, pool, len(host.gpus), len(host.engines), without_password(url)),
        )
        if proxy is not None:
            await proxy.start()
        agent = Node(host, queue, clock=clock, driver_of=driver_of, state=folder, proxy=proxy)
        if metrics:
            from maestro_serving.health import NodeMetrics, telling

            found = NodeMetrics(agent)
            await told_of.enter_async_context(telling(metrics, found.unready, found))
        work = asyncio.ensure_future(agent.run())
        ending = asyncio.ensure_future(end.wait())
        await asyncio.wait([work, ending], return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if signal.SIGHUP not in ends and not work.done():
            log.info("ending: engines finish what runs; a second signal ends them at once")
            end.clear()
            draining = asyncio.ensure_future(agent.drain())
            again = asyncio.ensure_future(end.wait())
            await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
            again.cancel()
        crashed = work.done()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        await (agent.leave() if crashed or signal.SIGHUP in ends else agent.close())
        if crashed:
            work.result()
    finally:
        await told_of.aclose()
        await queue.close()


# -- a look --------------------------------------------------------------------------------------------------------------
async def _reports(url: str, pool: str) -> Sequence[NodeReport]:
    from maestro_agents.queue.redis import RedisQueue

    queue = RedisQueue(url, pool=pool)
    try:
        return await queue.reports(await queue.server_time_s())
    finally:
        await queue.close()


def _show(reports: Sequence[NodeReport], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([json.loads(r.encode()) for r in reports], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not reports:
        console.print("no node reports: start one with maestro node --fleet fleet.toml")
    for r in reports:
        asleep = r.ram_bytes - r.ram_free_bytes
        console.print(
            f"node {r.node_id} (cluster {r.cluster}): {_gb(asleep)} of {_gb(r.ram_bytes)} host memory hold sleeping models",
            markup=False,
        )
        tiers: list[Tier] = [t for t in AWAY if any(t in e.wake_s or t in e.leave_s for e in r.engines)]
        for g in r.gpus:
            here = [e for e in r.engines if e.gpu_id == g.gpu_id]
            held = sum(e.hbm_bytes + e.kv_bytes for e in here if "gpu" in {e.tier, e.to})
            console.print(f"\nGPU {g.gpu_id}: {_gb(held)} of {_gb(g.usable_bytes)} taken, {g.level}", markup=False)
            table = Table(box=None, pad_edge=False)
            for heading in ("model", "tier", "HBM GB", "KV GB", "run+wait", *tiers, ""):
                table.add_column(heading, justify="left" if heading in {"model", "tier", ""} else "right")
            for e in here:
                table.add_row(*_row(e, tiers))
            console.print(table)
        console.print("Seconds to the GPU / from it, by tier. * KV memory is accounted, not given back.", style="dim")
        for m in r.moves[-SHOWN_MOVES:]:
            when = time.strftime("%H:%M:%S", time.localtime(m.began_at_s))
            done = m.error or f"{m.took_s:.2f} s, {_gb(m.moved_bytes)}"
            console.print(f"  {when} {m.engine_id}: {m.was} to {m.to}: {done}", markup=False)


def _row(e: EngineReport, tiers: Sequence[Tier]) -> Sequence[str]:
    tier = e.tier if e.to == e.tier else f"{e.tier} > {e.to}"
    kv = f"{max(0, e.kv_used_bytes) / 1e9:.2g}/{e.kv_bytes / 1e9:.2g}{'*' * (e.elastic == 'accounted')}"
    load = f"{e.running}+{e.waiting}" if e.running >= 0 else ""
    note = e.failed or e.ageing or (f"restarted {e.restarts} times" if e.restarts else "")
    hbm = f"{e.hbm_bytes / 1e9:.3g}" if "gpu" in {e.tier, e.to} else ""
    costs = (f"{_s(e.wake_s.get(t))}/{_s(e.leave_s.get(t))}" for t in tiers)
    return (e.spec.model, tier, hbm, kv if hbm else "", load, *costs, note)


def _s(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3g}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
