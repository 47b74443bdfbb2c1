"""How far a fleet's clusters are from where an app is (``MAESTRO_SITE``): measured, smoothed, and shared with the others there.

One round trip is what a call pays for the network on a connection that is kept alive: the time of a small ``GET /health``, answered by an
engine or by the proxy in front of it. Connecting alone would measure the way to a proxy that accepts at once. A busy engine answers
late, so of a few the fastest counts; then it is smoothed as TCP does (SRTT of RFC 6298, section 2).

The apps of a site measure in turn: whoever finds an entry old measures it and goes on from what the last one found. An app that finds
no engine of a cluster, twice, says that it cannot be reached from there (inf). Everything here runs on the loop of `room.Room`, but
`Distances.rtt_s`, which any thread may ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from maestro_agents.core import EngineSpec
from maestro_agents.errors import QueueUnavailable
from maestro_agents.ports import Distance, Queue

if TYPE_CHECKING:
    import httpx

LOOK_S: Final = 1.0
"""How often an app of a site reads what is known there."""

MEASURE_S: Final = 5.0
"""Age at which what was measured is measured again; up to twice that, by chance, so that the apps of a site seldom do it together."""

KEPT_S: Final = 60.0
"""Age at which it is forgotten: then the fleet file's ``rtt_s`` holds."""

ALPHA: Final = 1 / 8
"""Weight of a new measurement (RFC 6298, section 2.3)."""

PROBES: Final = 4
"""Requests of one measurement to each engine that is asked; the first also pays for the connection, the fastest counts."""

ASKED: Final = 3
"""Engines of a cluster that are asked: one of them may have died a moment ago."""

NEAR_S: Final = 0.005
"""Engines are as near as each other where none is farther than half as far again as the nearest, and this: measurements of the same
way differ by as much."""

PROBE_LIMIT_S: Final = 2.0
"""Who has not answered by then is not reached."""


def smoothed(before_s: float, sample_s: float) -> float:
    """The next smoothed round trip. Nothing to smooth where it was not reached before, or is not now."""
    if not (math.isfinite(before_s) and math.isfinite(sample_s)):
        return sample_s
    return (1 - ALPHA) * before_s + ALPHA * sample_s


def by_cluster(distances: Iterable[Distance], now_s: float) -> dict[str, dict[str, float]]:
    """Cluster -> site -> seconds, of what is not too old."""
    found: dict[str, dict[str, float]] = {}
    for d in distances:
        if now_s - d.measured_at_s <= KEPT_S:
            found.setdefault(d.cluster, {})[d.site] = d.rtt_s
    return found


class Distances:
    """The network from one site to the clusters of a fleet, as one app of it knows it."""

    def __init__(self, site: str, now_s: Callable[[], float]) -> None:
        self.site = site
        self._now_s = now_s
        self._known: dict[str, Distance] = {}
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._http: httpx.AsyncClient | None = None

    def rtt_s(self, engine: EngineSpec) -> float:
        """Seconds to an engine's cluster and back: measured, or what the fleet file says. inf: it cannot be reached from here."""
        return self._fresh().get(engine.cluster, engine.rtt_s)

    def reached(self, engines: Iterable[EngineSpec]) -> list[EngineSpec]:
        """Those that can be reached from here, as far as is known."""
        fresh = self._fresh()
        return [e for e in engines if math.isfinite(fresh.get(e.cluster, e.rtt_s))]

    def alike(self, engines: Iterable[EngineSpec]) -> list[EngineSpec]:
        """Those of `reached`, where they are all about as near; else none: what distance is worth is a decision, and the planner's."""
        fresh = self._fresh()
        reached = [(rtt_s, e) for e in engines if math.isfinite(rtt_s := fresh.get(e.cluster, e.rtt_s))]
        limit_s = 1.5 * min((rtt_s for rtt_s, _ in reached), default=0.0) + NEAR_S
        return [e for _, e in reached] if all(rtt_s <= limit_s for rtt_s, _ in reached) else []

    def _fresh(self) -> dict[str, float]:
        """Cluster -> seconds, of what is known and not too old."""
        since_s = self._now_s() - KEPT_S
        return {c: d.rtt_s for c, d in tuple(self._known.items()) if d.measured_at_s >= since_s}

    def learn(self, distances: Iterable[Distance]) -> None:
        """Take what was measured at this site, where it is newer."""
        for d in distances:
            known = self._known.get(d.cluster)
            if d.site == self.site and (known is None or d.measured_at_s >= known.measured_at_s):
                self._known[d.cluster] = d

    async def look(self, queue: Queue, engines: Iterable[EngineSpec]) -> None:
        """Read what the site's other apps measured, and measure what is old. Goes on alone where the queue is out."""
        with contextlib.suppress(QueueUnavailable):
            self.learn(await queue.distances())
        clusters: dict[str, list[EngineSpec]] = {}
        for e in engines:
            if not e.original and e.url:
                clusters.setdefault(e.cluster, []).append(e)
        await asyncio.gather(
            *(self._measured(queue, c, there, doubted=False) for c, there in clusters.items() if self._is_old(c))
        )

    async def doubt(self, queue: Queue, engines: Iterable[EngineSpec], cluster: str) -> None:
        """A call could not connect to this cluster: measure it now. One more failure is enough."""
        there = [e for e in engines if e.cluster == cluster and not e.original and e.url]
        if there:
            await self._measured(queue, cluster, there, doubted=True)

    async def close(self) -> None:
        """Release connections."""
        if self._http is not None:
            await self._http.aclose()

    def _is_old(self, cluster: str) -> bool:
        d = self._known.get(cluster)
        if d is None or not math.isfinite(d.rtt_s):
            return True
        return self._now_s() - d.measured_at_s > MEASURE_S * random.uniform(1.0, 2.0)

    async def _measured(self, queue: Queue, cluster: str, engines: Sequence[EngineSpec], *, doubted: bool) -> None:
        """Return when this cluster has been measured. Who asks meanwhile waits for the same measurement."""
        task = self._under_way.get(cluster)
        if task is None or task.done():
            task = asyncio.create_task(self._measure(queue, cluster, engines, doubted=doubted))
            self._under_way[cluster] = task
        await asyncio.shield(task)

    async def _measure(self, queue: Queue, cluster: str, engines: Sequence[EngineSpec], *, doubted: bool) -> None:
        sample_s = await self._sample(engines)
        if not math.isfinite(sample_s) and not doubted:
            sample_s = await self._sample(engines)
        known = self._known.get(cluster)
        rtt_s = smoothed(known.rtt_s if known else math.inf, sample_s)
        found = Distance(site=self.site, cluster=cluster, rtt_s=rtt_s, measured_at_s=self._now_s())
        self.learn([found])
        with contextlib.suppress(QueueUnavailable):
            await queue.tell_distances([found])

    async def _sample(self, engines: Sequence[EngineSpec]) -> float:
        asked = random.sample(engines, min(ASKED, len(engines)))
        return min(await asyncio.gather(*map(self._round_trip, asked)))

    async def _round_trip(self, engine: EngineSpec) -> float:
        """The fastest of a few; inf where none was answered. An answer counts whatever it says, but for one of a proxy that found nobody."""
        import httpx  # slow to import, and an app without a site never needs it

        if self._http is None:
            self._http = httpx.AsyncClient()  # through the proxies of the environment, as calls go
        at = urlsplit(engine.url)
        best_s = math.inf
        try:
            async with asyncio.timeout(PROBE_LIMIT_S):
                for _ in range(PROBES):
                    began_s = time.perf_counter()
                    answer = await self._http.get(f"{at.scheme}://{at.netloc}/health")
                    if answer.status_code >= 500:
                        return math.inf
                    best_s = min(best_s, time.perf_counter() - began_s)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError):
            pass
        return best_s
