"""What a scheduler or a node agent says of itself over HTTP: ``/healthz``, ``/readyz`` and ``/metrics`` (``--metrics HOST:PORT``).

For Kubernetes' probes and Prometheus. It reads what the process knows already: no scrape asks Redis or an engine. Names and
numbers, no text of a prompt; and no key is needed, so keep it on a network of your own (docs/kubernetes.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from maestro_agents import __version__
from maestro_agents.errors import ConfigError
from maestro_serving.emulator import listen, server_of

if TYPE_CHECKING:
    from maestro_agents.scheduler import Scheduler
    from maestro_serving.node import Node

HEARD_S: Final = 10.0
"""A process whose queue was not heard for so long is not ready."""


@contextlib.asynccontextmanager
async def telling(where: str, unready: Callable[[], str], metrics: Collector) -> AsyncIterator[str]:
    """Serve at ``HOST:PORT`` meanwhile; yields the URL. ``unready``: why it is not ready, "" where it is.

    Raises `ConfigError` where it cannot listen there.
    """
    address = urlsplit(f"//{where}")
    try:
        host, port = address.hostname or "", address.port
    except ValueError:
        host, port = "", None
    if not host or port is None:
        raise ConfigError(f"--metrics {where}: it looks like 0.0.0.0:9109, or 127.0.0.1:9109")
    try:
        listener = listen(host, port)
    except OSError as e:
        raise ConfigError(f"--metrics {where}: it cannot be listened on ({e.strerror}): name another port") from None
    registry = CollectorRegistry()
    registry.register(metrics)

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        why = unready()
        return PlainTextResponse(f"{why}\n" if why else "ok\n", status_code=503 if why else 200)

    async def scrape(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app = Starlette(routes=[Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", scrape)])
    ready = asyncio.Event()
    with listener:
        server = server_of(app, ready.set, signals=False)
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        try:
            await ready.wait()
            found = listener.getsockname()
            yield f"http://{f'[{found[0]}]' if ':' in found[0] else found[0]}:{found[1]}"
        finally:
            server.should_exit = server.force_exit = True
            await asyncio.gather(serving, return_exceptions=True)


class SchedulerMetrics(Collector):
    """Of a scheduler, as it sees its pool; a standby says little more than that it is one."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def unready(self) -> str:
        """A standby is ready: it reads the log and would lead. One that cannot hear its queue is not."""
        heard_s = self._scheduler.clock.now_s() - self._scheduler.heard_at_s
        return (
            ""
            if heard_s < HEARD_S
            else f"the queue was not heard for {heard_s:.0f} s"
            if math.isfinite(heard_s)
            else "the queue was not heard yet"
        )

    def collect(self) -> Iterable[Metric]:
        """At a scrape."""
        s = self._scheduler
        yield _info()
        yield GaugeMetricFamily(
            "maestro_scheduler_leader", "1 where it leads its pool, 0 where it stands by.", value=float(s.leading)
        )
        yield GaugeMetricFamily("maestro_scheduler_epoch", "Of the leadership it had last.", value=float(s.epoch))
        yield CounterMetricFamily("maestro_scheduler_grants", "Stages that it granted an engine.", value=s.decisions)
        if not s.leading:
            return
        waiting = GaugeMetricFamily("maestro_queue_waiting_stages", "Stages that wait, by model.", labels=["model"])
        for model, n in s.waiting().items():
            waiting.add_metric([model], n)
        names = ("engine", "model", "cluster")
        up = GaugeMetricFamily("maestro_engine_takes_stages", "1 where it is healthy and awake.", labels=names)
        slots = GaugeMetricFamily("maestro_engine_slots", "Stages that it runs at a time.", labels=names)
        held = GaugeMetricFamily("maestro_engine_reserved_slots", "Of them reserved, draining ones too.", labels=names)
        reserved = s.reserved_slots()
        for spec in s.engines.values():
            if spec.original:
                continue
            of = (spec.engine_id, spec.model, spec.cluster)
            up.add_metric(of, float(s.takes(spec.engine_id)))
            slots.add_metric(of, spec.slots)
            held.add_metric(of, reserved.get(spec.engine_id, 0))
        yield from (waiting, up, slots, held)


class NodeMetrics(Collector):
    """Of a node agent: what it reports."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def unready(self) -> str:
        """It is ready while its reports arrive."""
        told_s = self._node.clock.now_s() - self._node.told_at_s
        return (
            ""
            if told_s < HEARD_S
            else f"no report was taken for {told_s:.0f} s"
            if math.isfinite(told_s)
            else "it has not reported yet"
        )

    def collect(self) -> Iterable[Metric]:
        """At a scrape."""
        r = self._node.report()
        yield _info()
        node = r.node_id
        memory = GaugeMetricFamily("maestro_gpu_memory_bytes", "That the GPU has.", labels=["node", "gpu"])
        usable = GaugeMetricFamily("maestro_gpu_usable_bytes", "That engines may take.", labels=["node", "gpu"])
        held = GaugeMetricFamily("maestro_gpu_held_bytes", "Held by weights, servers and KV.", labels=["node", "gpu"])
        for g in r.gpus:
            memory.add_metric([node, g.gpu_id], g.memory_bytes)
            usable.add_metric([node, g.gpu_id], g.usable_bytes)
            held.add_metric([node, g.gpu_id], g.held_bytes)
        names = ["node", "engine", "model"]
        tier = GaugeMetricFamily("maestro_engine_tier", "1 for the tier its weights are in.", labels=[*names, "tier"])
        kv = GaugeMetricFamily("maestro_engine_kv_bytes", "KV memory that it may use.", labels=names)
        used = GaugeMetricFamily("maestro_engine_kv_used_bytes", "KV memory that it uses.", labels=names)
        starts = CounterMetricFamily("maestro_engine_restarts", "Times its server was started again.", labels=names)
        for e in r.engines:
            of = [node, e.spec.engine_id, e.spec.model]
            tier.add_metric([*of, e.tier], 1)
            kv.add_metric(of, e.kv_bytes)
            used.add_metric(of, e.kv_used_bytes)
            starts.add_metric(of, e.restarts)
        yield from (memory, usable, held, tier, kv, used, starts)


def _info() -> Metric:
    info = GaugeMetricFamily("maestro_build_info", "Always 1; which version this is.", labels=["version"])
    info.add_metric([__version__], 1)
    return info
