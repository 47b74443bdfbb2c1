"""`maestro bench clusters`: engines at three distances from the app, played live under several routings, and the same simulated.

Emulated engines of a fleet file run on this machine, each behind a proxy that carries every byte half of its cluster's round trip
later, both ways and in order (`Links`). Connecting costs nothing beyond that, and bandwidth has no end. Recorded runs are played as in
`bench place`: real Redis, scheduler and client; and by the simulator, with the same fleet, runs and policy.

The live scheduler is not told the distances: what the client measured from its site is what routes. Both plays begin with the same
wrong guess of how fast engines are, and learn. Deadlines and tools of the recorded runs are `FASTER` times shorter: they were set for
20 ms an output token, which these engines do not need.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import selectors
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Self, TypeVar, cast

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from maestro_agents.cli.bench.live_play import (
    LOOK_S,
    WAIT_S,
    Call,
    Live,
    arriving,
    counted,
    difference,
    rows,
    settled,
    simulated,
)
from maestro_agents.cli.simulate.plays import Played, longest_of
from maestro_agents.cli.simulate.tables import WIDTH
from maestro_agents.cli.up import Stack
from maestro_agents.client import Client
from maestro_agents.core import EngineSpec
from maestro_agents.errors import ConfigError, EngineUnavailable
from maestro_agents.fleet import load_fleet
from maestro_agents.policy.routing import seconds
from maestro_agents.queue.redis import RedisQueue
from maestro_agents.scheduler import DISTANCES_S
from maestro_agents.simulator.hardware import SimFleet, load_sim_fleet
from maestro_agents.simulator.workload import Workload, sample, unloaded_s
from maestro_agents.simulator.world import Event, Outage

FLEET: Final = "serving/deploy/fleet.emulated-3clusters.toml"
POLICIES: Final = ("ours", "ours-round-robin", "ours-least-loaded", "ours-nearest")
SITE: Final = "bench"
FASTER: Final = 2.0
RUNS_PER_S: Final = 4 / 3
LONGEST_S: Final = 40.0
"""Runs that would take longer alone, at 20 ms an output token, are left out, and so are deadlines beyond `LONGEST_DEADLINE_S`."""

LONGEST_DEADLINE_S: Final = 130.0
TAIL_S: Final = 45.0
"""Play goes on for so long after the last arrival."""

OUTAGE_S: Final = 15.0
OUTAGE_AT: Final = 0.5
"""Of the arrivals' window, when a cluster is lost."""

AGAIN: Final = 3
"""How often an app makes a call anew whose stream broke (`--outage`)."""

MEASURE_LIMIT_S: Final = 20.0
PARTS: Final = ("network_s", "wait_s", "prefill_s", "decode_s")
CALL: Final = ("stage", "engine", "ready_s", "granted_s", "first_s", "ended_s")
"""What the raw events say of each call, simulated; live, whether it was granted in the push's own round trip, the seconds to its first
byte that the engine has no part in, and `PARTS` as they were predicted (null: it was granted without a prediction)."""

LIVE_CALL: Final = (*CALL, "fast", "away_s", *PARTS)
RUN: Final = ("run", "class", "at_s", "deadline_at_s", "counted", "done_s")
EXAMPLES: Final = 2

T = TypeVar("T")


# -- distance --------------------------------------------------------------------------------------------------------------
class _Way(asyncio.Protocol):
    """One direction of a connection: what comes in here goes out there, so much later. Whoever is told to close does so then, too."""

    def __init__(self, one_way_s: float, met: Callable[[_Way], None]) -> None:
        self.other: _Way | None = None
        self.transport: asyncio.Transport | None = None
        self._one_way_s = one_way_s
        self._met = met
        self._early: list[Callable[[asyncio.Transport], None]] = []
        self._last_at_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._met(self)
        for what in self._early:
            what(self.transport)

    def data_received(self, data: bytes) -> None:
        self._later(lambda to: to.write(data))

    def eof_received(self) -> bool:
        self._later(lambda to: to.write_eof())
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._later(lambda to: to.abort() if exc else to.close())

    def _later(self, what: Callable[[asyncio.Transport], None]) -> None:
        loop = asyncio.get_running_loop()
        self._last_at_s = max(self._last_at_s + 1e-9, loop.time() + self._one_way_s)  # in order
        loop.call_at(self._last_at_s, self._hand, what)

    def _hand(self, what: Callable[[asyncio.Transport], None]) -> None:
        other = self.other
        if other is None:
            return
        if other.transport is None:
            other._early.append(what)
        elif not other.transport.is_closing():
            with contextlib.suppress(OSError, RuntimeError):
                what(other.transport)


class Links:
    """Proxies in front of engines, in a thread of their own. Used as a context: none is left behind."""

    def __init__(self) -> None:
        # epoll rounds up to milliseconds, which is a near cluster's whole distance
        self._loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
        self._thread = threading.Thread(target=self._loop.run_forever, name="maestro-links", daemon=True)
        self._servers: dict[str, list[tuple[asyncio.Server, int, Callable[[], asyncio.Protocol]]]] = defaultdict(list)
        self._open: dict[str, set[_Way]] = defaultdict(set)
        self._work: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def add(self, cluster: str, port: int, rtt_s: float) -> int:
        """Stand in front of a port of this machine; the port where it is so far away."""
        return self._call(self._add(cluster, port, rtt_s))

    def cut(self, cluster: str) -> None:
        """Break what is open to a cluster, and refuse what comes."""
        self._call(self._cut(cluster))

    def mend(self, cluster: str) -> None:
        """It can be reached again, where it was."""
        self._call(self._mend(cluster))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _add(self, cluster: str, port: int, rtt_s: float) -> int:
        met = self._open[cluster].add

        def accept() -> asyncio.Protocol:
            client, engine = _Way(rtt_s / 2, met), _Way(rtt_s / 2, met)
            client.other, engine.other = engine, client
            work = self._loop.create_task(self._connect(engine, port))
            self._work.add(work)
            work.add_done_callback(self._work.discard)
            return client

        server = await self._loop.create_server(accept, "127.0.0.1", 0)
        at = int(server.sockets[0].getsockname()[1])
        self._servers[cluster].append((server, at, accept))
        return at

    async def _connect(self, engine: _Way, port: int) -> None:
        try:
            await self._loop.create_connection(lambda: engine, "127.0.0.1", port)
        except OSError:
            if engine.other and engine.other.transport:
                engine.other.transport.abort()

    async def _cut(self, cluster: str) -> None:
        for server, _, _ in self._servers[cluster]:
            server.close()
        for way in self._open[cluster]:
            if way.transport:
                way.transport.abort()
        self._open[cluster].clear()

    async def _mend(self, cluster: str) -> None:
        self._servers[cluster] = [
            (await self._loop.create_server(accept, "127.0.0.1", at), at, accept)
            for _, at, accept in self._servers[cluster]
        ]

    async def _close(self) -> None:
        for work in list(self._work):
            work.cancel()
        for cluster in list(self._servers):
            await self._cut(cluster)
        await asyncio.sleep(0)


# -- what is played --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Bed:
    """A fleet file with emulated engines, for the simulator too, and the runs."""

    file: Path
    fleet: SimFleet
    workload: Workload

    def cluster_of(self, engine_id: str) -> str:
        return self._clusters[engine_id]

    @property
    def _clusters(self) -> dict[str, str]:
        return {e.spec.engine_id: e.spec.cluster for e in self.fleet.engines}

    def rtt_s(self, engine_id: str) -> float:
        """As injected."""
        return self.fleet.clusters[self.cluster_of(engine_id)].rtt_s


def bed(file: Path, *, runs: int, seed: int) -> Bed:
    """Raises `ConfigError` where the file is none of emulated engines of one model, or no recorded run fits them."""
    found = load_sim_fleet(file)
    declared = EngineSpec(engine_id="", url="", model="")
    engines = tuple(
        dataclasses.replace(
            e,
            spec=dataclasses.replace(
                e.spec,
                rtt_s=found.clusters[e.spec.cluster].rtt_s,
                prefill_s_per_token=declared.prefill_s_per_token,
                decode_s_per_token=declared.decode_s_per_token,
            ),
        )
        for e in found.engines
    )
    longest = longest_of(found)
    if len(longest) != 1 or found.models:
        raise ConfigError(f"{file}: this bench wants [[engine]] tables of one model, each with an emulator to launch")
    ((model, most),) = longest.items()
    recorded = [
        r
        for r in sample().runs
        if r.deadline_s <= LONGEST_DEADLINE_S
        and unloaded_s(r.stages) <= LONGEST_S
        and all(s.prompt_tokens + s.output_tokens < most for s in r.stages)
    ]
    if not recorded:
        raise ConfigError(f"{file}: no recorded run is as short as {most} tokens: a larger max_model_len")
    window_s = runs / RUNS_PER_S
    workload = Workload(
        name=f"everything, {len(found.clusters)} clusters",
        runs=arriving(recorded, lambda _run, _stage: model, runs=runs, window_s=window_s, seed=seed, speed=FASTER),
        warmup_s=window_s / 8,
        window_s=window_s,
        horizon_s=window_s + TAIL_S,
        source=f"{sample().source}; {runs} of {len(recorded)} runs that fit in order of seed {seed}; deadlines {FASTER:g} times shorter",
    )
    return Bed(file=file, fleet=dataclasses.replace(found, engines=engines), workload=workload)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One policy, live and simulated."""

    policy: str
    plays: Mapping[str, Played]
    events: Mapping[str, Sequence[Event]]
    calls: Sequence[Call]
    #: Cluster -> seconds there and back, as the scheduler had it from the client's site at the end.
    measured_s: Mapping[str, float]
    checks: Mapping[str, Any]


def trial(on: Bed, policy: str, folder: Path, look: Callable[[], None], outages: Sequence[Outage] = ()) -> Trial:
    """Play the runs under one policy, live and in the simulator; each play has engines of its own, with nothing in their caches."""
    sim, sim_events = simulated(on.workload, on.fleet, policy, outages)
    alone_s = {e[2]: e[9] for e in sim_events if e[0] == "run"}
    notes: list[str] = []
    with contextlib.ExitStack() as parts:
        engines = Stack(load_fleet(on.file), logs=folder / "engines", keep=False, notice=notes.append)
        parts.callback(engines.stop)
        engines.start(redis=False, scheduler=False)
        links = parts.enter_context(Links())
        fleet = dataclasses.replace(engines.fleet, launches={}, engines=tuple(_distant(engines.engines, links, on)))
        stack = parts.enter_context(Stack(fleet, policy=policy, logs=folder, keep=False, notice=notes.append))
        Client.configure(redis_url=stack.redis_url, pool=fleet.pool, site=SITE, max_wait_s=WAIT_S)
        parts.callback(Client.reset)
        live = Live(on.workload, lambda run: alone_s[run.run_id], again=AGAIN if outages else 0)
        played, measured_s, ledger = asyncio.run(_live(stack, live, links, on, outages, look))
    ended = sum(e[0] == "done" for e in live.events)
    return Trial(
        policy=policy,
        plays={"live": played, "simulated": sim},
        events={"live": live.events, "simulated": sim_events},
        calls=live.calls,
        measured_s=measured_s,
        checks={
            "runs": len(on.workload.runs),
            "ended": ended,
            "failed": live.failed,
            "cut_streams": live.cut,
            "calls": len(live.calls),
            "fast": sum(c.grant.fast for c in live.calls),
            "reserved_at_end": ledger["reserved"],
            "ledger_zero_after_s": ledger["after_s"],
            "notes": notes,
        },
    )


def _distant(engines: Sequence[EngineSpec], links: Links, on: Bed) -> Iterator[EngineSpec]:
    """The engines as they are reached through their links; how far they are is not told."""
    for e in engines:
        port = int(e.url.rpartition(":")[2].partition("/")[0])
        there = links.add(e.cluster, port, on.rtt_s(e.engine_id))
        yield dataclasses.replace(e, url=f"http://127.0.0.1:{there}/v1", rtt_s=0.0)


async def _live(
    stack: Stack, live: Live, links: Links, on: Bed, outages: Sequence[Outage], look: Callable[[], None]
) -> tuple[Played, Mapping[str, float], Mapping[str, Any]]:
    queue = RedisQueue(stack.redis_url, pool=stack.fleet.pool)
    lost: list[asyncio.Task[None]] = []
    try:
        await _measured(queue, set(on.fleet.clusters))
        lost += [asyncio.create_task(_lose(links, o)) for o in outages]
        await live.play(look)
        wall_s = live.now_s()
        measured_s = {d.cluster: d.rtt_s for d in await queue.distances() if d.site == SITE}
        ledger = await settled(queue)
    finally:
        for task in lost:
            task.cancel()
        await asyncio.gather(*lost, return_exceptions=True)
        await queue.close()
    live.events.sort(key=lambda e: (e[1], e[0] == "close"))
    return counted(on.workload, live.events, wall_s), measured_s, ledger


async def _measured(queue: RedisQueue, clusters: set[str]) -> None:
    """Wait until the scheduler can know how far every cluster is. Raises `EngineUnavailable`."""
    give_up_at_s = time.monotonic() + MEASURE_LIMIT_S
    while not clusters <= {d.cluster for d in await queue.distances() if math.isfinite(d.rtt_s)}:
        if time.monotonic() > give_up_at_s:
            raise EngineUnavailable(
                f"the network to {', '.join(sorted(clusters))} was not measured in {MEASURE_LIMIT_S:g} s"
            )
        await asyncio.sleep(LOOK_S)
    await asyncio.sleep(DISTANCES_S)  # it reads them so often


async def _lose(links: Links, outage: Outage) -> None:
    """Play must begin now."""
    await asyncio.sleep(outage.from_s)
    await asyncio.to_thread(links.cut, outage.cluster)
    await asyncio.sleep(outage.to_s - outage.from_s)
    await asyncio.to_thread(links.mend, outage.cluster)


# -- both plays, told ------------------------------------------------------------------------------------------------------
def run(
    on: Bed,
    policies: Sequence[str],
    *,
    seed: int,
    outage: bool = False,
    look: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Play all policies in turn, each on engines, Redis and scheduler of its own. ``look`` is called whenever a run has ended live.

    ``outage``: `ours` once more, and the cluster with the most places is lost for `OUTAGE_S` in the middle.
    """
    done = [_in_folder(on, policy, look) for policy in policies]
    slots: dict[str, int] = defaultdict(int)
    for e in on.fleet.engines:
        slots[e.spec.cluster] += e.spec.slots
    lost: dict[str, Any] | None = None
    if outage:
        at_s = on.workload.window_s * OUTAGE_AT
        gone = Outage(cluster=max(slots, key=lambda c: slots[c]), from_s=at_s, to_s=at_s + OUTAGE_S)
        again = _in_folder(on, "ours", look, (gone,))
        lost = {**dataclasses.asdict(gone), **_told(again, on, seed)}
    return {
        "label": "emulated",
        "seed": seed,
        "workload": {
            "name": on.workload.name,
            "source": on.workload.source,
            "runs": len(on.workload.runs),
            "stages": sum(len(r.stages) for r in on.workload.runs),
            "arrivals_per_s": RUNS_PER_S,
            "window_s": on.workload.window_s,
            "horizon_s": on.workload.horizon_s,
        },
        "fleet": {
            "name": on.file.name,
            "clusters": {c.name: {"rtt_s": c.rtt_s, "slots": slots[c.name]} for c in on.fleet.clusters.values()},
            "engines": {e.spec.engine_id: e.spec.cluster for e in on.fleet.engines},
        },
        "policies": {each.policy: _told(each, on, seed) for each in done},
        "outage": lost,
        "fields": {"runs": RUN, "simulated": CALL, "live": LIVE_CALL},
    }


def _in_folder(on: Bed, policy: str, look: Callable[[], None], outages: Sequence[Outage] = ()) -> Trial:
    with TemporaryDirectory(prefix="maestro-clusters-") as folder:
        return trial(on, policy, Path(folder), look, outages)


def _told(each: Trial, on: Bed, seed: int) -> dict[str, Any]:
    """All of a trial that is printed or kept."""
    found = rows(each.policy, each.plays, seed)
    for row in found:
        ends = [e for e in each.events[row["played"]] if e[0] == "end"]
        rtts = [on.rtt_s(e[3]) for e in ends]
        row["shares"] = {c: sum(on.cluster_of(e[3]) == c for e in ends) / max(1, len(ends)) for c in on.fleet.clusters}
        row["network_mean_s"] = statistics.fmean(rtts) if rtts else None
    live = found[0]
    live["away_mean_s"] = statistics.fmean(c.away_s for c in each.calls) if each.calls else None
    return {
        "rows": found,
        "difference": difference(each.plays["live"], each.plays["simulated"]),
        "measured_rtt_s": dict(each.measured_s),
        "routing": routing_table(each.calls, on),
        "examples": _examples(each.calls, on),
        "checks": dict(each.checks),
        "runs": {name: _runs(events) for name, events in each.events.items()},
        "calls": {
            "live": [_call(c) for c in each.calls],
            "simulated": _calls(each.events["simulated"]),
        },
    }


def routing_table(calls: Sequence[Call], on: Bed) -> list[dict[str, Any]]:
    """By cluster: calls, how many were granted without a prediction (the fast path), and the means of what the others were granted
    for, by part; beside their sum what these took from grant to end.
    """
    found: list[dict[str, Any]] = []
    for cluster in on.fleet.clusters:
        here = [c for c in calls if on.cluster_of(c.grant.engine_id) == cluster]
        told = [c for c in here if set(c.grant.because) == set(PARTS)]
        row: dict[str, Any] = {"cluster": cluster, "calls": len(here), "fast": sum(c.grant.fast for c in here)}
        row["because"] = {p: statistics.fmean(c.grant.because[p] for c in told) for p in PARTS} if told else None
        row["predicted_s"] = statistics.fmean(seconds(c.grant.because) for c in told) if told else None
        row["took_s"] = statistics.fmean(c.ended_at_s - c.granted_at_s for c in told) if told else None
        row["away_s"] = statistics.fmean(c.away_s for c in here) if here else None
        found.append(row)
    return found


def _examples(calls: Sequence[Call], on: Bed) -> list[dict[str, Any]]:
    """A few grants of each cluster, from the second half: speeds have been learned by then."""
    found: list[dict[str, Any]] = []
    late = sorted(calls, key=lambda c: c.granted_at_s)[len(calls) // 2 :]
    for cluster in on.fleet.clusters:
        told = [c for c in late if c.grant.because and on.cluster_of(c.grant.engine_id) == cluster]
        found += [
            {
                "stage": c.stage_id,
                "engine": c.grant.engine_id,
                "cluster": cluster,
                "because": dict(c.grant.because),
                "sum": seconds(c.grant.because),
                "took_s": c.ended_at_s - c.granted_at_s,
            }
            for c in told[:EXAMPLES]
        ]
    return found


def _runs(events: Sequence[Event]) -> list[list[Any]]:
    done = {e[2]: e[1] for e in events if e[0] == "done"}
    return [[e[2], e[4], _short(e[1]), _short(e[6]), e[8], _short(done.get(e[2]))] for e in events if e[0] == "run"]


def _calls(events: Sequence[Event]) -> list[list[Any]]:
    ready: dict[str, float] = {}
    granted: dict[str, float] = {}
    found: list[list[Any]] = []
    for e in events:
        match e[0]:
            case "ready":
                ready[e[2]] = e[1]
            case "grant":
                granted[e[2]] = e[1]
            case "end":
                found.append([e[2], e[3], *map(_short, (ready[e[2]], granted[e[2]], e[5], e[1]))])
            case _:
                pass
    return found


def _call(c: Call) -> list[Any]:
    parts = [_short(c.grant.because.get(p), 4) for p in PARTS]
    at = map(_short, (c.ready_at_s, c.granted_at_s, c.first_byte_at_s, c.ended_at_s))
    return [c.stage_id, c.grant.engine_id, *at, int(c.grant.fast), _short(c.away_s, 4), *parts]


def _short(x: float | None, digits: int = 3) -> float | None:
    return None if x is None else round(x, digits)


def show(found: Mapping[str, Any]) -> None:
    """Live and simulated rows of each policy; why `ours` went where; what was measured of the distances."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    clusters = found["fleet"]["clusters"]
    far = ", ".join(f"{n} {1000 * c['rtt_s']:g} ms, {c['slots']} places" for n, c in clusters.items())
    table = Table(
        box=SIMPLE_HEAD, title=f"{found['workload']['runs']} runs on {found['fleet']['name']} ({far}): emulated"
    )
    heads = (
        "policy",
        "played",
        "SLO %",
        "interactive",
        "batch",
        "run p50 s",
        "p95 s",
        "delay s",
        *clusters,
        "network ms",
    )
    for name in heads:
        table.add_column(name, justify="left" if name in {"policy", "played"} else "right", no_wrap=True)
    shown = dict(found["policies"])
    if lost := found["outage"]:
        shown[f"ours, {lost['cluster']} lost"] = lost
    for policy, told in shown.items():
        for row in told["rows"]:
            table.add_row(
                policy, row["played"], *(_share(row[f]) for f in ("slo", "slo_interactive", "slo_batch")),
                *(_number(row[f]) for f in ("completion_p50_s", "completion_p95_s", "delay_interactive_mean_s")),
                *(_share(row["shares"][c]) for c in clusters), _number(row["network_mean_s"], 1000.0),
                end_section=row["played"] != "live",
            )  # fmt: skip
    console.print(table)
    told = next(iter(found["policies"].values()))
    policy = next(iter(found["policies"]))
    why = Table(box=SIMPLE_HEAD, title=f"where {policy} went, and why: means of what was predicted")
    for name in ("cluster", "calls", "at once", "network s", "wait s", "prefill s", "decode s", "sum s", "took s"):
        why.add_column(name, justify="left" if name == "cluster" else "right")
    for row in told["routing"]:
        parts = [row["because"][p] if row["because"] else None for p in PARTS]
        cells = (_number(x, digits=3) for x in (*parts, row["predicted_s"], row["took_s"]))
        why.add_row(row["cluster"], str(row["calls"]), str(row["fast"]), *cells)
    console.print(why)
    for e in told["examples"]:
        sum_s = " + ".join(f"{part.removesuffix('_s')} {s:.3f}" for part, s in e["because"].items())
        console.print(
            f"  {e['stage']} to {e['engine']}: {sum_s} = {e['sum']:.3f} s; took {e['took_s']:.3f} s", markup=False
        )
    console.print(
        "delay: of interactive stages, from ready to grant. network: mean of the injected round trips of the calls. at once: granted in "
        "the push's own round trip, by free places and without a prediction. took: from grant to last token.",
        markup=False,
    )
    for name, each in shown.items():
        c, measured = each["checks"], each["measured_rtt_s"]
        said = ", ".join(f"{cluster} {1000 * s:.1f} ms" for cluster, s in measured.items()) or "none (the file's)"
        console.print(
            f"  {name}: runs ended {c['ended']}/{c['runs']}, failed {len(c['failed'])}, streams cut {c['cut_streams']}, granted at once "
            f"{c['fast']}/{c['calls']}; round trips measured: {said}",
            markup=False,
        )
    console.print(f"Workload: {found['workload']['source']}. Seed {found['seed']}.", markup=False)


def _share(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.1f}"


def _number(x: float | None, times: float = 1.0, digits: int = 1) -> str:
    return "-" if x is None else f"{times * x:.{digits}f}"
