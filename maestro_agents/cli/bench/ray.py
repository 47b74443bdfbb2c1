"""`maestro bench ray`: nodes on a Ray cluster of three machines, one of which dies under load; when do its engines serve again?

The cluster is real (a head and two more raylets, all on loopback), its machines have one GPU each that is only counted, and the
engines are emulated. Two nodes are placed, so that one machine is spare. Per trial a batch of runs of the sample workflow (the app
of `faults`) is offered, and a machine that has a node and not the head dies:

* ``raylet``: kill -9 of the machine's raylet alone. What it ran has to end by itself;
* ``machine``: kill -9 of the raylet and of all that it ran, at once, as when the power is cut.

Counted from the kill: until all processes below the raylet have ended, until Ray has a new place for the node, and until its engine
serves from there. Runs are counted as `faults` does: only a stream that was cut after its first byte may end in the SDK's
error. Afterwards the machine is replaced by a new one, which is the next spare.

Ray itself takes a raylet for dead after some missed health checks, 10 to 20 s by its defaults, which are left as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from maestro_agents.cli.bench import faults
from maestro_agents.cli.bench.stack import MODEL
from maestro_agents.cli.up import Stack
from maestro_agents.errors import EngineUnavailable, QueueUnavailable
from maestro_agents.fleet import load_fleet
from maestro_agents.queue.redis import RedisQueue
from maestro_serving.ray_nodes import LoopbackCluster, Placed, RayNodes

KINDS: Final = ("raylet", "machine")
NODES: Final = 2
MACHINES: Final = 3
RUNS: Final = 40
RATE_PER_S: Final = 1.0
"""The batch is offered for longer than Ray needs to notice a death."""

BACK_LIMIT_S: Final = 180.0
GONE_LIMIT_S: Final = 60.0
LOOK_S: Final = 0.1

SPEED: Final = 4.0
FLEET: Final = f"""[[gpu]]
kind = "l4-24g"
nodes = {NODES}
models = ["{MODEL}"]
ray_resource = "GPU"

[[model]]
name = "{MODEL}"
profile = "qwen2.5-7b"
slots = 16
max_model_len = 4096
[model.launch]
kind = "emulator"
args = ["--speed", "{SPEED:g}"]
"""


def below(pid: int) -> dict[int, str]:
    """All processes below one, each with its start, so that a pid given anew is not taken for it. Linux."""
    table: dict[int, tuple[int, str]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            table[int(stat.parent.name)] = (int(fields[1]), fields[19])
    found = {pid}
    new = found
    while new:
        new = {child for child, (parent, _) in table.items() if parent in new} - found
        found |= new
    return {child: table[child][1] for child in found - {pid} if child in table}


def alive(process: int, started: str) -> bool:
    """That very process runs (a zombie does not)."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] not in "ZX" and fields[19] == started


async def trial(
    stack: Stack, cluster: LoopbackCluster, app: faults.App, queue: RedisQueue, kind: str, seed: int
) -> dict[str, Any]:
    """One machine's death under load; what happened."""
    ray = stack.ray
    if ray is None:
        raise EngineUnavailable("this stack has no Ray")
    rng = random.Random(seed)
    before = await asyncio.to_thread(ray.look)
    node_id, placed = rng.choice([(n, p) for n, p in before.items() if p.ray_node and p.ray_node != cluster.head])
    urls = {e.engine_id: e.url for e in await asyncio.to_thread(lambda: stack.engines)}
    counted = {"before": await asyncio.to_thread(ray.resources)}
    raylet = cluster.raylet_pid(placed.ray_node)
    processes = await asyncio.to_thread(below, raylet)
    began = len(app.events)
    app.offer(runs=RUNS, seed=seed, rate_per_s=RATE_PER_S)
    await app.until(lambda: any(e["event"] == "began" for e in app.events[began:]), 30.0)
    await asyncio.sleep(rng.uniform(2.0, 5.0))
    in_flight = {e["run"] for e in app.events[began:] if e["event"] == "began"}
    in_flight -= {e["run"] for e in app.events[began:] if e["event"] == "ended"}
    fault_at_s = time.time()
    for pid in (raylet, *(processes if kind == "machine" else ())):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    gone = asyncio.create_task(_gone(processes, fault_at_s))
    away = asyncio.create_task(_away(queue, node_id, urls, fault_at_s))
    moved_s = await _until(lambda: _elsewhere(ray, node_id, placed), fault_at_s)
    counted["moved"] = await asyncio.to_thread(ray.resources)
    serves_s = await _serves(queue, node_id, urls, fault_at_s)
    done = await app.finish(seed)
    done_at_s = time.time()
    ended = {e["run"]: e for e in app.events[began:] if e["event"] == "ended"}
    errors = [e for e in ended.values() if e["error"]]
    after = [e["at_s"] - fault_at_s for r, e in ended.items() if r in in_flight]
    row: dict[str, Any] = {
        "kind": kind,
        "seed": seed,
        "node": node_id,
        "runs": RUNS,
        "in_flight": len(in_flight),
        "ended": len(ended),
        "all_ended": done and len(ended) == RUNS,
        "ok": sum(not e["error"] for e in ended.values()),
        "cut_streams": sum(e["chunks"] > 0 for e in errors),
        "failed": [{"error": e["error"], "cause": e["cause"]} for e in errors if e["chunks"] == 0],
        "slowest_end_after_fault_s": max(after, default=0.0),
        "processes": len(processes),
        "processes_gone_s": await gone,
        "away_s": await away,
        "moved_s": moved_s,
        "serves_s": serves_s,
        "ledger_zero_after_s": await faults.ledger_zero(queue, since_s=done_at_s),
        "left_in_queue": await faults.left(queue),
    }
    cluster.add()  # nothing runs now, and Ray wants the main thread
    counted["replaced"] = await asyncio.to_thread(ray.resources)
    return {**row, "resources": counted}


def _elsewhere(ray: RayNodes, node_id: str, was: Placed) -> bool:
    return ray.look()[node_id].ray_node not in {"", was.ray_node}


async def _until(true: Callable[[], bool], since_s: float) -> float | None:
    """Seconds until something is so; None where it was not within `BACK_LIMIT_S`."""
    while time.time() < since_s + BACK_LIMIT_S:
        if await asyncio.to_thread(true):
            return time.time() - since_s
        await asyncio.sleep(LOOK_S)
    return None


async def _gone(processes: Mapping[int, str], since_s: float) -> float | None:
    """Seconds until none of them runs; None where one still did after `GONE_LIMIT_S`."""
    while time.time() < since_s + GONE_LIMIT_S:
        if not any(alive(pid, started) for pid, started in processes.items()):
            return time.time() - since_s
        await asyncio.sleep(LOOK_S)
    return None


async def _at(queue: RedisQueue, node_id: str) -> dict[str, str]:
    """The engines of a node that serve now, with their URLs."""
    with contextlib.suppress(QueueUnavailable):
        reports = await queue.reports(await queue.server_time_s())
        here = [e for r in reports if r.node_id == node_id for e in r.engines]
        return {e.spec.engine_id: e.spec.url for e in here if e.tier == e.to == "gpu"}
    return {}


async def _away(queue: RedisQueue, node_id: str, urls: Mapping[str, str], since_s: float) -> float | None:
    """Seconds until no engine of the node that died counts as serving."""
    while time.time() < since_s + BACK_LIMIT_S:
        if not any(urls.get(e) == url for e, url in (await _at(queue, node_id)).items()):
            return time.time() - since_s
        await asyncio.sleep(LOOK_S)
    return None


async def _serves(queue: RedisQueue, node_id: str, urls: Mapping[str, str], since_s: float) -> float | None:
    """Seconds until the node's engines serve from another address."""
    while time.time() < since_s + BACK_LIMIT_S:
        now = await _at(queue, node_id)
        if now and all(urls.get(e) != url for e, url in now.items()):
            return time.time() - since_s
        await asyncio.sleep(LOOK_S)
    return None


async def measure(
    stack: Stack, cluster: LoopbackCluster, kinds: tuple[str, ...], times: int, seed: int, say: Callable[[Any], None]
) -> list[dict[str, Any]]:
    """All trials, one after the other."""
    queue = RedisQueue(stack.redis_url, pool=stack.fleet.pool)
    app = await faults.App.start(stack.redis_url, stack.fleet.pool, 0.4, stack.logs / "app.log")
    rows: list[dict[str, Any]] = []
    try:
        for k, kind in enumerate(kinds):
            for i in range(times):
                await faults.healthy(queue, NODES)
                row = await trial(stack, cluster, app, queue, kind, seed + 1000 * k + i)
                rows.append(row)
                say(row)
    finally:
        await app.close()
        await queue.close()
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a kind of death: the worst of its trials. ``kept``: no run or stage was lost, and the engines came back elsewhere."""
    found: list[dict[str, Any]] = []
    for kind in dict.fromkeys(r["kind"] for r in rows):
        mine = [r for r in rows if r["kind"] == kind]
        worst = {
            name: None if any(r[name] is None for r in mine) else max(r[name] for r in mine)
            for name in ("processes_gone_s", "away_s", "moved_s", "serves_s", "ledger_zero_after_s")
        }
        counts = {name: sum(r[name] for r in mine) for name in ("runs", "in_flight", "ended", "ok", "cut_streams")}
        lost = sum(r["runs"] - r["ended"] + r["left_in_queue"] for r in mine)
        failed = sum(len(r["failed"]) for r in mine)
        kept = not lost and not failed and None not in worst.values()
        found.append(
            {"kind": kind, "trials": len(mine), **counts, "failed": failed, "lost": lost, **worst, "kept": kept}
        )
    return found


def run(
    kinds: tuple[str, ...],
    times: int,
    seed: int,
    logs: Path | None,
    look: Callable[[str], None],
    say: Callable[[Any], None],
) -> dict[str, Any]:
    """Bring a cluster and a stack up, do all trials, take them down. ``look`` is told how the start goes."""
    os.environ["MAESTRO_LEASE_S"] = str(faults.LEASE_S)  # the scheduler's too
    with TemporaryDirectory(prefix="maestro-ray-") as folder, contextlib.ExitStack() as ends:
        ends.enter_context(contextlib.redirect_stdout(sys.stderr))  # Ray prints what it has to say of a death
        file = Path(folder, "fleet.toml")
        file.write_text(FLEET, encoding="utf-8")
        cluster = LoopbackCluster(MACHINES, {"CPU": 1.0, "GPU": 1.0}, say=look)
        ends.callback(cluster.stop)
        stack = Stack(
            load_fleet(file),
            logs=logs,
            ray=cluster.address,
            on_ready=lambda part, detail: look(f"{part}: {detail}"),
        )
        ends.callback(stack.stop)
        stack.start()
        rows = asyncio.run(measure(stack, cluster, kinds, times, seed, say))
    return {
        "label": "emulated",
        "machines": MACHINES,
        "nodes": NODES,
        "speed": SPEED,
        "seed": seed,
        "lease_s": faults.LEASE_S,
        "rate_per_s": RATE_PER_S,
        "summary": summary(rows),
        "trials": rows,
    }
