"""`maestro bench failover`: the leader of three schedulers goes under load, many times; what did nobody grant, lose or do twice?

Per trial one batch of runs of the sample workflow (the app of `faults`) is offered, more than the engines can serve at once, so that
stages wait and the planner grants all the time. At a seeded random moment the leader goes:

* ``kill``: kill -9. A new scheduler is started in its place, as a standby.
* ``stop``: SIGSTOP, and SIGCONT once another leads: the old leader wakes up in the middle of what it did.
* ``term``: SIGTERM. It gives leadership back as it ends, and is started again.

Counted from the stages' own records in Redis (each with epoch, fencing token and moment of its grant), and what was asked twice from
the engines' own list of requests, which Redis has no part in:

* the gap: from the last grant of the old leader's planner to the first of the new one's, beside the leadership period (a leader that
  is not heard of for so long is replaced; it renews that 2.5 times a period);
* grants by the fast path in the gap: credits of the old epoch are good until their own time is over or somebody else leads;
* stages that did not end as done; calls that engines got twice (told apart by a hash of the whole prompt, which names run and node);
* grants under an old epoch with a later fencing token than one of a newer epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from maestro_agents import guard
from maestro_agents.cli.bench import faults
from maestro_agents.cli.bench.stack import MODEL
from maestro_agents.cli.bench.stack import stack as make_stack
from maestro_agents.cli.up import Stack
from maestro_agents.core import EngineSpec
from maestro_agents.errors import QueueUnavailable
from maestro_agents.fleet import Fleet
from maestro_agents.queue.redis import RedisQueue
from maestro_serving.emulator import EmulatedModel, Emulator, EmulatorConfig

KINDS: Final = ("kill", "stop", "term")
SCHEDULERS: Final = 3
PERIOD_S: Final = faults.LEASE_S / 2
"""How long a leader that is not heard of keeps leadership (`Scheduler.lead`)."""

PERIODS: Final = 2.0
"""The gap may last so many of these."""

RUNS: Final = 40
RATE_PER_S: Final = 8.0
ENGINES: Final = 2
SPEED: Final = 4.0
"""Of the emulated engines: several grants a second, so that a gap of tenths of one shows."""
START_LIMIT_S: Final = 60.0
LOOK_S: Final = 0.02


@dataclass(kw_only=True)
class Requests:
    """What emulated engines were asked, by a hash of model and messages: nothing of a prompt is kept."""

    seen: list[str] = field(default_factory=list[str])
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, body: bytes) -> None:
        """Note one request. From any thread."""
        asked = json.loads(body)
        text = json.dumps([asked.get("model"), asked.get("messages")], sort_keys=True)
        with self.lock:
            self.seen.append(hashlib.sha256(text.encode()).hexdigest())


@contextlib.contextmanager
def emulated(requests: Requests, logs: Path | None) -> Iterator[Stack]:
    """Redis and engines that say what they are asked; no scheduler."""
    with contextlib.ExitStack() as ends:
        served = EmulatorConfig(models=(EmulatedModel(name=MODEL),), speed=SPEED)
        urls = [ends.enter_context(Emulator(served, on_request=requests.add)).url for _ in range(ENGINES)]
        specs = tuple(EngineSpec(engine_id=f"e{i}", url=url, model=MODEL, slots=4) for i, url in enumerate(urls))
        stack = Stack(Fleet(engines=specs), logs=logs)
        ends.callback(stack.stop)
        yield stack.start(scheduler=False)


@contextlib.contextmanager
def real(kind: str, logs: Path | None) -> Iterator[Stack]:
    """The same with real vLLM, which keeps no list of requests."""
    stack = make_stack(kind, logs=logs)
    try:
        yield stack.start(scheduler=False)
    finally:
        stack.stop()


class Schedulers:
    """Several candidates for one pool's leadership, each a process of its own. Methods block, but for `leader`."""

    def __init__(self, stack: Stack, queue: RedisQueue, n: int = SCHEDULERS) -> None:
        self._stack = stack
        self._queue = queue
        self._n = n
        self._started = 0
        self._logs: dict[int, Path] = {}
        self._running: dict[int, guard.Guarded] = {}

    def fill(self) -> None:
        """Start as many as are missing, and wait until each stands by or leads."""
        self._running = {pid: s for pid, s in self._running.items() if s.alive()}
        while len(self._running) < self._n:
            name, self._started = f"scheduler-{self._started}", self._started + 1
            process = self._stack.spawn_scheduler(name)
            self._running[process.pid] = process
            self._logs[process.pid] = self._stack.logs / f"{name}.log"
        give_up_s = time.monotonic() + START_LIMIT_S
        while not all(b" engines, " in self._logs[pid].read_bytes() for pid in self._running):
            if time.monotonic() > give_up_s or not all(s.alive() for s in self._running.values()):
                raise QueueUnavailable(
                    f"a scheduler did not start within {START_LIMIT_S:g} s (logs: {self._stack.logs})"
                )
            time.sleep(LOOK_S)

    async def leader(self) -> int:
        """The pid of the one that leads, 0 where that is none of ours."""
        parts = (await self._queue.leader()).rsplit("-", 2)  # HOST-PID-RANDOM
        return int(parts[1]) if len(parts) == 3 and int(parts[1]) in self._running else 0

    async def another(self, than: int) -> bool:
        """Wait until another than this one leads; False where nobody took over in time."""
        give_up_s = time.monotonic() + START_LIMIT_S
        while time.monotonic() < give_up_s:
            if await self.leader() not in {0, than}:
                return True
            await asyncio.sleep(LOOK_S)
        return False

    def stop(self) -> None:
        """End all."""
        for pid, process in self._running.items():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)  # a stopped process hears nothing else
            process.stop()


async def trial(
    kind: str, seed: int, app: faults.App, schedulers: Schedulers, queue: RedisQueue, requests: Requests | None
) -> dict[str, Any]:
    """One change of leaders under load; what happened."""
    rng = random.Random(seed)
    began, began_s = len(app.events), time.time()
    asked_before = len(requests.seen) if requests else 0
    app.offer(runs=RUNS, seed=seed, rate_per_s=RATE_PER_S)
    await busy(queue)
    await asyncio.sleep(rng.uniform(0.0, 1.5))
    old = await schedulers.leader()
    waiting = await queue.depth(MODEL)
    gone_at_s = time.time()
    os.kill(old, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[kind])
    taken = await schedulers.another(old)
    taken_at_s = time.time()
    if kind == "stop":
        await another_grants(queue, since_s=taken_at_s)
        os.kill(old, signal.SIGCONT)
    all_done = await app.finish(seed)
    if kind != "stop":
        await asyncio.to_thread(schedulers.fill)
    ended = [e for e in app.events[began:] if e["event"] == "ended"]
    records = [r for r in await queue.records() if float(r.get("granted_at", 0)) >= began_s]
    asked = Counter(requests.seen[asked_before:]) if requests else None
    return {
        "kind": kind,
        "seed": seed,
        "gone_at_s": gone_at_s,
        "waiting": waiting,
        "taken_over_after_s": taken_at_s - gone_at_s if taken else None,
        **around(records, gone_at_s),
        "runs": RUNS,
        "ended": len(ended),
        "ok": sum(not e["error"] for e in ended),
        "failed": [{"error": e["error"], "cause": e["cause"]} for e in ended if e["error"]],
        "all_ended": all_done and len(ended) == RUNS,
        "stages": len(records),
        "lost": sum(r["status"] != "done" for r in records) + await faults.left(queue),
        "deposed_grants": deposed(records),
        "requests": asked.total() if asked is not None else None,
        "asked_twice": asked.total() - len(asked) if asked is not None else None,
        "past_the_queue": asked.total() - len(records) if asked is not None else None,
        "ledger_zero_after_s": await faults.ledger_zero(queue, since_s=time.time()),
    }


def around(records: Sequence[Mapping[str, str]], gone_at_s: float) -> dict[str, Any]:
    """The gap in the planners' grants around the moment at which the leader went."""
    planned = sorted((float(r["granted_at"]), int(r["epoch"])) for r in records if r["fast"] == "0")
    before = [(at_s, epoch) for at_s, epoch in planned if at_s <= gone_at_s]
    old = before[-1][1] if before else 0
    last_s = max((at_s for at_s, epoch in planned if epoch <= old), default=gone_at_s)
    first_s = min((at_s for at_s, epoch in planned if epoch > old), default=None)
    fast = [float(r["granted_at"]) for r in records if r["fast"] == "1"]
    return {
        "planned": len(planned),
        "gap_s": None if first_s is None else first_s - last_s,
        "fast_in_gap": sum(last_s < at_s < (first_s or 0.0) for at_s in fast),
        "fast": len(fast),
    }


def deposed(records: Sequence[Mapping[str, str]]) -> int:
    """Grants under an older epoch than one that was given before (fencing tokens say which was)."""
    newest = found = 0
    for _, epoch in sorted((int(r["token"]), int(r["epoch"])) for r in records if "token" in r):
        found += epoch < newest
        newest = max(newest, epoch)
    return found


async def busy(queue: RedisQueue) -> None:
    """Wait until stages wait for engines: from then on the planner grants."""
    give_up_s = time.monotonic() + START_LIMIT_S
    while await queue.depth(MODEL) < 2 * ENGINES:
        if time.monotonic() > give_up_s:
            raise QueueUnavailable("the load was too light: no stage had to wait")
        await asyncio.sleep(LOOK_S)


async def another_grants(queue: RedisQueue, *, since_s: float) -> None:
    """Wait until a stage was granted after this moment, or until none waits."""
    give_up_s = time.monotonic() + faults.LEASE_S
    while time.monotonic() < give_up_s and await queue.depth(MODEL):
        if any(r.granted_at_s > since_s for r in await queue.running()):
            return
        await asyncio.sleep(LOOK_S)


async def measure(
    stack: Stack,
    kinds: Sequence[str],
    times: int,
    seed: int,
    scale: float,
    requests: Requests | None,
    say: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """All trials, one after the other."""
    queue = RedisQueue(stack.redis_url, pool=stack.fleet.pool)
    schedulers = Schedulers(stack, queue)
    rows: list[dict[str, Any]] = []
    try:
        await asyncio.to_thread(schedulers.fill)
        await faults.healthy(queue, ENGINES)
        app = await faults.App.start(stack.redis_url, stack.fleet.pool, scale, stack.logs / "app.log")
        try:
            for k, kind in enumerate(kinds):
                for i in range(times):
                    await faults.healthy(queue, ENGINES)
                    row = await trial(kind, seed + 1000 * k + i, app, schedulers, queue, requests)
                    rows.append(row)
                    say(row)
                    if not row["all_ended"]:  # do not let one failure hide in the next trial
                        return rows
        finally:
            await app.close()
    finally:
        await asyncio.to_thread(schedulers.stop)
        await queue.close()
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a kind. ``kept``: nothing lost or done twice, and every gap shorter than `PERIODS` leadership periods."""
    found: list[dict[str, Any]] = []
    for kind in KINDS:
        mine = [r for r in rows if r["kind"] == kind]
        if not mine:
            continue
        gaps = [r["gap_s"] for r in mine if r["gap_s"] is not None]
        taken = [r["taken_over_after_s"] for r in mine if r["taken_over_after_s"] is not None]
        counts = {
            name: None if any(r[name] is None for r in mine) else sum(r[name] for r in mine)
            for name in (
                "runs",
                "ok",
                "stages",
                "lost",
                "deposed_grants",
                "asked_twice",
                "past_the_queue",
                "fast_in_gap",
            )
        }
        clean = not any(counts[n] for n in ("lost", "deposed_grants", "asked_twice", "past_the_queue"))
        found.append(
            {
                "fault": kind,
                "trials": len(mine),
                **counts,
                "gap_median_s": statistics.median(gaps) if gaps else None,
                "gap_longest_s": max(gaps, default=None),
                "taken_over_median_s": statistics.median(taken) if taken else None,
                "taken_over_longest_s": max(taken, default=None),
                "kept": clean
                and counts["ok"] == counts["runs"]
                and len(gaps) == len(taken) == len(mine)
                and max(gaps) < PERIODS * PERIOD_S
                and all(r["ledger_zero_after_s"] is not None for r in mine),
            }
        )
    return found


def run(
    engine: str,
    kinds: Sequence[str],
    times: int,
    seed: int,
    scale: float,
    logs: Path | None,
    say: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Bring everything up, do all trials, take it down."""
    os.environ["MAESTRO_LEASE_S"] = str(faults.LEASE_S)  # the schedulers' too
    requests = Requests() if engine == "emulator" else None
    with emulated(requests, logs) if requests else real(engine, logs) as stack:
        return asyncio.run(measure(stack, kinds, times, seed, scale, requests, say))
