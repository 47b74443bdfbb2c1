"""`maestro scheduler` and `maestro emulate`: one process each, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from maestro_agents.errors import ConfigError, QueueUnavailable
from maestro_agents.fleet import Fleet, load_fleet
from maestro_agents.redis_url import without_password
from maestro_agents.settings import Settings

log = logging.getLogger("maestro")


def scheduler(
    fleet: Annotated[Path | None, typer.Option("--fleet", help="fleet.toml. Default: MAESTRO_FLEET.")] = None,
    redis_url: Annotated[
        str | None, typer.Option("--redis-url", help="Default: that of the fleet file, else MAESTRO_REDIS_URL.")
    ] = None,
    pool: Annotated[str | None, typer.Option("--pool", help="Default: that of the fleet file.")] = None,
    policy: Annotated[str, typer.Option("--policy", help="The order of stages: `ours`, or a baseline.")] = "ours",
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics", metavar="HOST:PORT", help="Serve /metrics, /healthz and /readyz there, e.g. 0.0.0.0:9109."
        ),
    ] = "",
) -> None:
    """Run the scheduler of a pool. One leads, further ones stand by and take over when it dies."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per probe
    settings = Settings.load(redis_url=redis_url)
    path = fleet or settings.fleet
    if path is None:
        raise ConfigError("which fleet? Name it: maestro scheduler --fleet fleet.toml (or MAESTRO_FLEET)")
    whole = load_fleet(path)
    url = redis_url or whole.redis_url or settings.redis_url
    if url is None:
        raise ConfigError("which Redis? Give --redis-url, [redis] url in the fleet file, or MAESTRO_REDIS_URL")
    whole.running()
    check_policy(policy)
    from maestro_agents.queue.redis import reach

    try:
        reach(url, pool=pool or whole.pool)
    except QueueUnavailable as e:
        raise QueueUnavailable(f"{e}. Start it, or let `maestro up` bring one along") from None
    until_stopped(_schedule(whole, url, pool or whole.pool, policy, settings, metrics))


async def _schedule(fleet: Fleet, url: str, pool: str, policy: str, settings: Settings, metrics: str = "") -> None:
    from maestro_agents.policy import LIVE
    from maestro_agents.predict.live import Learner, default_model
    from maestro_agents.queue.redis import RedisClock, RedisQueue
    from maestro_agents.scheduler import Scheduler
    from maestro_agents.tokens import EngineKey
    from maestro_serving.vllm import VllmProbe

    key = EngineKey.of(settings, pool=pool)
    queue = RedisQueue(url, pool=pool, lease_s=settings.lease_s, max_queue=settings.max_queue)
    clock = RedisClock()
    probe = VllmProbe(token=key and (lambda engine_id: key.probe_token(engine_id, now_s=clock.now_s())))
    holder = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    try:
        await clock.sync(queue)
        log.info("pool %s, %d engines, Redis at %s, policy %s", pool, len(fleet.engines), without_password(url), policy)
        found = Scheduler(
            queue,
            fleet.running(),
            clock=clock,
            holder=holder,
            policy=LIVE[policy],
            probe=probe,
            predictor=Learner(default_model(), retrain=settings.retrain),
            lease_s=settings.lease_s,
            key=key,
            tenants=fleet.tenants,
        )
        async with contextlib.AsyncExitStack() as stack:
            if metrics:
                from maestro_serving.health import SchedulerMetrics, telling

                said = SchedulerMetrics(found)
                await stack.enter_async_context(telling(metrics, said.unready, said))
            await found.run()
    finally:
        await probe.close()
        await queue.close()


def emulate(
    model: Annotated[
        list[str] | None, typer.Option("--model", help="A model to serve; may be repeated. With --gpu: NAME=PROFILE.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            help="The models share a GPU of this kind, each at a port of its own (docs/emulator.md), e.g. a100-80g.",
        ),
    ] = None,
    hbm_gb: Annotated[
        float, typer.Option(min=0, help="With --gpu: memory for weights, servers and KV. 0: as that kind has.")
    ] = 0,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="0: any free port; it is printed. With --gpu: what starts and stops engines."
        ),
    ] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    profile: Annotated[
        str,
        typer.Option(
            help="How fast it is: `cpu-tiny`, `gpu`, MODEL@GPU, e.g. llama-3.1-8b@a100-80g (docs/hardware.md), or the file of "
            "`maestro calibrate`."
        ),
    ] = "cpu-tiny",
    speed: Annotated[float, typer.Option(min=0.001, help="How many times faster than its profile.")] = 1.0,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Requests in a batch.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Longest prompt + output, in tokens.")] = None,
    max_num_queued_reqs: Annotated[
        int | None, typer.Option(min=1, help="Requests in the server above which it answers 503.")
    ] = None,
    scheduling_policy: Annotated[
        str | None,
        typer.Option(help="`priority` or `fcfs`. Default: the profile's, `priority` where it was not measured."),
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="Key that /v1 asks for.")] = None,
    dev_mode: Annotated[
        bool,
        typer.Option("--dev-mode", envvar="VLLM_SERVER_DEV_MODE", help="Also /sleep, /wake_up, /pause and their like."),
    ] = False,
) -> None:
    """Run an emulated vLLM server: the same API, metrics and queueing, timing from a model, answers that are filler.

    Several on one emulated GPU: maestro emulate --gpu a100-80g --model chat=llama-3.1-8b --model code=qwen3-14b --max-model-len 8192
    """
    if gpu is not None:
        return _emulate_gpu(
            gpu,
            model or [],
            port=port,
            host=host,
            hbm_bytes=int(hbm_gb * 1e9),
            speed=speed,
            slots=max_num_seqs or 0,
            max_model_len=max_model_len or 0,
            max_num_queued_reqs=max_num_queued_reqs or 0,
        )
    from maestro_agents.simulator.engine import Scheduling
    from maestro_agents.simulator.hardware import named_profile
    from maestro_serving.emulator import EmulatedModel, EmulatorConfig, serve

    base = named_profile(profile)
    if scheduling_policy is not None and scheduling_policy not in set(Scheduling):
        raise ConfigError(f"there is no scheduling policy {scheduling_policy!r}: known are {', '.join(Scheduling)}")
    changes: dict[str, Any] = {
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
        "max_queued": max_num_queued_reqs,
        "scheduling": scheduling_policy and Scheduling(scheduling_policy),
    }
    try:
        engine = dataclasses.replace(base, **{k: v for k, v in changes.items() if v is not None})
        models = tuple(EmulatedModel(name=name, profile=engine) for name in model or ["tiny"])
        config = EmulatorConfig(models=models, speed=speed, api_key=api_key, dev_mode=dev_mode)
    except ValueError as e:
        raise ConfigError(str(e)) from None
    names = ", ".join(m.name for m in models)

    def ready(url: str) -> None:
        print(f"emulating {names} at {url} (no GPU, no model: timing and filler)", flush=True)

    try:
        asyncio.run(serve(config, host=host, port=port, on_ready=ready))
    except OSError as e:
        raise ConfigError(f"cannot listen on {host}:{port}: {e.strerror or e}. Choose another --port, or 0") from None


def _emulate_gpu(kind: str, named: list[str], *, port: int, host: str, hbm_bytes: int, **about: Any) -> None:
    """Several engines on one emulated GPU; those that are named run from the start and share its KV memory."""
    from maestro_serving.admin import OutOfMemoryError
    from maestro_serving.emulated_gpu import EngineOnGpu, GpuProcess

    process = GpuProcess(kind, hbm_bytes=hbm_bytes, host=host)
    for n, said in enumerate(named):
        name, _, profile = said.partition("=")
        process.add(name, EngineOnGpu(profile=profile or name, port=port + n + 1 if port else 0, **about))

    async def run() -> None:
        try:
            await process.start_all()
        except OutOfMemoryError as e:
            raise ConfigError(f"{e}: fewer models, a smaller --max-model-len, or a larger GPU") from None

        def ready(url: str) -> None:
            print(f"emulating a {kind} at {url} (no GPU, no model: timing and filler)", flush=True)
            for engine in process.engines.values():
                print(f"  {engine.name} at {engine.url}", flush=True)

        await process.serve(port=port, on_ready=ready)

    try:
        asyncio.run(run())
    except OSError as e:
        raise ConfigError(f"cannot listen on {host}: {e.strerror or e}. Choose another --port, or 0") from None


def check_policy(name: str) -> None:
    """Raise `ConfigError` where there is no such order: before anything is started under it."""
    from maestro_agents.policy import LIVE

    if name not in LIVE:
        raise ConfigError(f"there is no policy {name!r}: known are {', '.join(LIVE)}")


def until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Run until done, or until SIGINT or SIGTERM, which end it in its own order and quietly."""

    async def body() -> None:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(body())
