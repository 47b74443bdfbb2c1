"""`maestro bench faults`: kill -9 of the app, the scheduler, an engine, Redis, each many times under load; then count.

Per trial one batch of runs of the sample workflow is offered to an app process that lives (for the app's own death, to a
second one beside it), the fault comes at a seeded random moment, and it is measured:

* every run of a living app ends, and how long after the fault the last one in flight then did;
* how it ended: only a stream that was cut after its first byte may end in the SDK's error, nothing else may fail;
* how long until no reservation is left in the ledger, counted from the end of the work, and for a killed app how long
  until nothing of it is reserved, counted from its death (the larger of the two);
* that nothing waits and nothing is granted in the queue when all has ended.

Redis is restarted empty (no persistence): what it knew comes back from the clients' announcements.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from maestro_agents.cli.bench.stack import MODEL
from maestro_agents.cli.bench.stack import stack as make_stack
from maestro_agents.cli.up import Stack
from maestro_agents.core import Observation
from maestro_agents.errors import QueueUnavailable
from maestro_agents.queue.redis import RedisQueue

KINDS: Final = ("app", "scheduler", "engine", "redis")
NODE_KINDS: Final = (*KINDS, "node")
"""Where engines stand under a node agent, as real vLLM does here, that one is killed too."""

LEASE_S: Final = 5.0
RUNS: Final = 8
RATE_PER_S: Final = 4.0
END_LIMIT_S: Final = 60.0
"""Every run in flight at the fault must have ended by then."""

PATIENCE_S: Final = 120.0


@dataclass(kw_only=True)
class App:
    """A load process and what it says."""

    process: asyncio.subprocess.Process
    events: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    reader: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, redis_url: str, pool: str, scale: float, log: Path) -> App:
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "MAESTRO_REDIS_URL": redis_url,
            "MAESTRO_POOL": pool,
            "MAESTRO_LEASE_S": str(LEASE_S),
            "MAESTRO_MAX_WAIT_S": str(PATIENCE_S),
        }
        with log.open("ab") as err:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "maestro_agents.cli.bench.load", "--model", MODEL, "--scale", str(scale)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=err,
                env=env,
            )
        app = cls(process=process)
        app.reader = asyncio.create_task(app._read())
        await app.until(lambda: any(e["event"] == "ready" for e in app.events), 60.0)
        return app

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.events.append(json.loads(line))
            self.changed.set()
        self.changed.set()

    async def until(self, holds: Callable[[], bool], limit_s: float) -> bool:
        """Wait until something is so; False where it was not within the limit, or the process is gone."""
        give_up_s = time.monotonic() + limit_s
        while not holds():
            left_s = give_up_s - time.monotonic()
            if left_s <= 0 or (self.reader is not None and self.reader.done()):
                return holds()
            self.changed.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self.changed.wait()
            except TimeoutError:
                return holds()
        return True

    def offer(self, *, runs: int, seed: int, rate_per_s: float = RATE_PER_S) -> None:
        """Give it a batch."""
        assert self.process.stdin is not None
        order = {"runs": runs, "rate_per_s": rate_per_s, "seed": seed}
        self.process.stdin.write(json.dumps(order).encode() + b"\n")

    async def finish(self, seed: int) -> bool:
        """Wait until a batch is done."""
        return await self.until(
            lambda: any(e["event"] == "done" and e["seed"] == seed for e in self.events), PATIENCE_S
        )

    async def close(self) -> None:
        """End it by kill -9, and wait until it is gone."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        if self.reader:
            await self.reader  # ends with the process's output


async def trial(stack: Stack, kind: str, seed: int, survivor: App, queue: RedisQueue, scale: float) -> dict[str, Any]:
    """One fault under load; what happened."""
    rng = random.Random(seed)
    began = len(survivor.events)
    victim: App | None = None
    if kind == "app":
        victim = await App.start(stack.redis_url, stack.fleet.pool, scale, stack.logs / "app.log")
        victim.offer(runs=RUNS, seed=seed + 10**6)
    survivor.offer(runs=RUNS, seed=seed)
    await survivor.until(lambda: any(e["event"] == "began" for e in survivor.events[began:]), 30.0)
    await asyncio.sleep(rng.uniform(0.3, 2.5))
    what = f"app ({sum(e['event'] == 'began' for e in victim.events)} runs begun)" if victim else ""
    in_flight = {e["run"] for e in survivor.events[began:] if e["event"] == "began"}
    in_flight -= {e["run"] for e in survivor.events[began:] if e["event"] == "ended"}
    fault_at_s = time.time()
    if victim is not None:
        await victim.close()
    elif kind == "scheduler":
        what = "scheduler"
        await asyncio.to_thread(stack.kill_scheduler)
    elif kind == "engine":
        what = "engine " + rng.choice([e.engine_id for e in stack.engines])
        await asyncio.to_thread(stack.kill_engine, what.split()[1])
    elif kind == "node":
        what = "node " + stack.fleet.nodes[0]
        await asyncio.to_thread(stack.kill_node, stack.fleet.nodes[0])
    else:
        what = "redis"
        await asyncio.to_thread(stack.restart_redis, kill=True)
    gone = asyncio.create_task(victim_gone(queue, f"-{victim.process.pid}-", fault_at_s)) if victim else None
    all_done = await survivor.finish(seed)
    done_at_s = time.time()
    ended = {e["run"]: e for e in survivor.events[began:] if e["event"] == "ended"}
    after = [e["at_s"] - fault_at_s for r, e in ended.items() if r in in_flight]
    errors = [e for e in ended.values() if e["error"]]
    zero_after_s = await ledger_zero(queue, since_s=done_at_s)
    if gone is not None and zero_after_s is not None:
        victim_s = await gone
        zero_after_s = None if victim_s is None else max(zero_after_s, victim_s)
    return {
        "kind": kind,
        "what": what,
        "seed": seed,
        "fault_at_s": fault_at_s,
        "in_flight": len(in_flight),
        "runs": RUNS,
        "ended": len(ended),
        "all_ended": all_done and len(ended) == RUNS,
        "ok": sum(not e["error"] for e in ended.values()),
        "cut_streams": sum(e["chunks"] > 0 for e in errors),
        "failed": [{"error": e["error"], "cause": e["cause"]} for e in errors if e["chunks"] == 0],
        "slowest_end_after_fault_s": max(after, default=0.0),
        "ledger_zero_after_s": zero_after_s,
        "left_in_queue": await left(queue),
    }


async def victim_gone(queue: RedisQueue, mark: str, since_s: float) -> float | None:
    """Seconds after its death until nothing of a killed app is reserved (others go on working meanwhile)."""
    while time.time() < since_s + END_LIMIT_S:
        held = [r for r in await queue.running() if mark in r.ticket.client_id]
        dead = [r for r in await queue.draining() if r.since_s >= since_s]
        if not held and not dead and time.time() > since_s + 1.0:
            return time.time() - since_s
        await asyncio.sleep(0.1)
    return None


async def ledger_zero(queue: RedisQueue, *, since_s: float) -> float | None:
    """Seconds after ``since_s`` at which no reservation was left; None if there still was one after `END_LIMIT_S`."""
    give_up_s = time.time() + END_LIMIT_S
    while time.time() < give_up_s:
        try:
            ledger = await queue.ledger()
            if not ledger.slots and not ledger.kv_bytes and not await queue.draining():
                return max(0.0, time.time() - since_s)
        except QueueUnavailable:
            pass
        await asyncio.sleep(0.1)
    return None


async def left(queue: RedisQueue) -> int:
    """Stages that still wait or are granted."""
    return await queue.depth(MODEL) + len(await queue.running())


async def measure(
    stack: Stack, kinds: tuple[str, ...], times: int, seed: int, scale: float, say: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """All trials, one after the other."""
    queue = RedisQueue(stack.redis_url, pool=stack.fleet.pool)
    survivor = await App.start(stack.redis_url, stack.fleet.pool, scale, stack.logs / "app.log")
    rows: list[dict[str, Any]] = []
    engines = 1 if stack.fleet.nodes else len(stack.fleet.engines)
    try:
        for k, kind in enumerate(kinds):
            for i in range(times):
                await healthy(queue, engines)
                row = await trial(stack, kind, seed + 1000 * k + i, survivor, queue, scale)
                rows.append(row)
                say(row)
                if not row["all_ended"]:  # do not let one failure hide in the next trial
                    await survivor.close()
                    survivor = await App.start(stack.redis_url, stack.fleet.pool, scale, stack.logs / "app.log")
        at, entries = await queue.read_log("", 20_000)
        del at
        observed = [o for o in entries if isinstance(o, Observation)]
        rows.append({"kind": "log", "observations": len(observed), "fast": sum(o.fast for o in observed)})
    finally:
        await survivor.close()
        await queue.close()
    return rows


async def healthy(queue: RedisQueue, engines: int) -> None:
    """Wait until so many engines are up and somebody leads. Of a node's one is enough: a dead one comes back when it is asked for."""
    give_up_s = time.monotonic() + 240.0
    while time.monotonic() < give_up_s:
        try:
            if len(await queue.fleet()) >= engines and (await queue.renew("bench", {}, now_s=time.time())).led:
                return
        except QueueUnavailable:
            pass
        await asyncio.sleep(0.2)
    raise QueueUnavailable("the fleet did not come back within 240 s")


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a kind of fault: the worst of its trials.

    ``kept``: every run ended well, and nothing was left. ``survived``: that, and all reservations were back within two leases.
    """
    found: list[dict[str, Any]] = []
    for kind in NODE_KINDS:
        mine = [r for r in rows if r["kind"] == kind]
        if not mine:
            continue
        zeros = [r["ledger_zero_after_s"] for r in mine]
        kept = all(
            r["all_ended"]
            and not r["failed"]
            and (r["kind"] == "engine" or not r["cut_streams"])
            and r["slowest_end_after_fault_s"] <= END_LIMIT_S
            and r["ledger_zero_after_s"] is not None
            and not r["left_in_queue"]
            for r in mine
        )
        found.append(
            {
                "fault": kind,
                "trials": len(mine),
                "runs": sum(r["runs"] for r in mine),
                "in_flight": sum(r["in_flight"] for r in mine),
                "ended": sum(r["ended"] for r in mine),
                "ok": sum(r["ok"] for r in mine),
                "cut_streams": sum(r["cut_streams"] for r in mine),
                "failed": sum(len(r["failed"]) for r in mine),
                "slowest_end_s": max(r["slowest_end_after_fault_s"] for r in mine),
                "ledger_zero_s": None if None in zeros else max(zeros),
                "left_in_queue": sum(r["left_in_queue"] for r in mine),
                "kept": kept,
                "survived": kept and max(z for z in zeros if z is not None) <= 2 * LEASE_S,
            }
        )
    return found


def run(
    kind_of_engine: str,
    kinds: tuple[str, ...],
    times: int,
    seed: int,
    scale: float,
    logs: Path | None,
    say: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Bring everything up, do all trials, take it down."""
    os.environ["MAESTRO_LEASE_S"] = str(LEASE_S)  # the scheduler's too
    with make_stack(kind_of_engine, logs=logs) as stack:
        return asyncio.run(measure(stack, kinds, times, seed, scale, say))
