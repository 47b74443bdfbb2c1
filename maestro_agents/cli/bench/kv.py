"""`maestro bench kv`: two models on one GPU whose KV budgets come to more than its memory.

One emulated GPU in a process of its own (`maestro emulate --gpu`), and the real node agent with its ledger and guard. Requests
are admitted as the scheduler admits: what each would need at most is reserved, all reservations of an engine stay within the
budget that the node tells for it, interactive ones first, and nothing is admitted while the node says that its GPU is paused.
Most answers end far before their reservation, some do not. The same requests come at the same moments under every factor.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from maestro_agents.cli.snapshot import percentile
from maestro_agents.errors import EngineUnavailable, MaestroError
from maestro_agents.fleet import Launch
from maestro_agents.nodes import EngineReport
from maestro_agents.queue.memory import MemoryQueue
from maestro_agents.queue.redis import RedisClock
from maestro_agents.simulator.hardware import Served, gpus, models, serve

KIND: Final = "a100-80g"
PROFILES: Final = ("llama-3.1-8b", "qwen3-8b")
LONGEST: Final = 3072
"""Tokens of the longest request: each engine keeps the memory of one."""

RESERVED: Final = 1280
"""Output tokens reserved for each request: few need as many."""

KV_GB: Final = 3.0
SLOTS: Final = 128
FACTORS: Final = (1.0, 1.5, 2.0, 3.05)
"""The last is what arXiv 2606.12950 reports."""

SPEED: Final = 4.0
OVER_S: Final = 2.0
"""Seconds in which all requests arrive."""

LIMIT_S: Final = 240.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request, known in full to nobody who admits."""

    at_s: float
    engine_id: str
    interactive: bool
    prompt_tokens: int
    output_tokens: int


@dataclass(kw_only=True, slots=True)
class Trial:
    """What one factor gave."""

    factor: float
    requests: int
    completed: int = 0
    failed: list[str] = field(default_factory=list[str])
    preemptions: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict[str, list[float]](list))
    #: The levels one after the other, each change once; seconds in each.
    levels: list[str] = field(default_factory=list[str])
    level_s: dict[str, float] = field(default_factory=lambda: defaultdict[str, float](float))
    promised_bytes: int = 0
    kv_bytes: int = 0
    peak_bytes: int = 0
    usable_bytes: int = 0
    violations: int = 0
    took_s: float = 0.0

    def row(self) -> dict[str, Any]:
        """As it is printed."""
        all_s = [s for each in self.seconds.values() for s in each]
        return {
            "factor": self.factor,
            "requests": self.requests,
            "completed": self.completed,
            "failed": self.failed,
            "preemptions": self.preemptions,
            "p50_s": percentile(all_s, 0.5),
            "p95_s": percentile(all_s, 0.95),
            "interactive_p95_s": percentile(self.seconds["interactive"], 0.95),
            "took_s": self.took_s,
            "pauses": sum(b in _PAUSED and a not in _PAUSED for a, b in itertools.pairwise(["normal", *self.levels])),
            "levels": self.levels,
            "level_s": dict(self.level_s),
            "paused_s": sum(self.level_s[level] for level in _PAUSED),
            "promised": self.promised_bytes / self.kv_bytes if self.kv_bytes else 0.0,
            "peak": self.peak_bytes / self.usable_bytes if self.usable_bytes else 0.0,
            "violations": self.violations,
        }


_PAUSED: Final = frozenset({"paused", "preempting"})


def workload(names: Sequence[str], count: int, seed: int) -> list[Request]:
    """Half interactive; answers are short, but one in eight is about as long as what is reserved."""
    rng = random.Random(seed)
    made = [
        Request(
            at_s=rng.uniform(0, OVER_S),
            engine_id=rng.choice(names),
            interactive=rng.random() < 0.5,
            prompt_tokens=rng.randint(200, 1000),
            output_tokens=rng.randint(900, RESERVED) if rng.random() < 0.125 else rng.randint(100, 400),
        )
        for _ in range(count)
    ]
    return sorted(made, key=lambda r: r.at_s)


def served() -> Mapping[str, Served]:
    """The two models, by engine."""
    kind = gpus()[KIND]
    return {f"{p}.0": serve(models()[p], kind, tensor_parallel=1, slots=SLOTS) for p in PROFILES}


async def trial(
    factor: float, requests: Sequence[Request], state: Path, ended: Callable[[], None] = lambda: None
) -> Trial:
    """Serve all requests under one factor."""
    from maestro_serving.drivers import Host, NodeEngine, NodeGpu
    from maestro_serving.emulated_driver import EmulatedGpus
    from maestro_serving.load import LoadClient, Sizes
    from maestro_serving.node import Node

    about = served()
    usable = int(sum(s.weight_bytes + s.server_bytes for s in about.values()) + KV_GB * 1e9)
    gpu = NodeGpu(
        gpu_id="n.0", index=0, kind=KIND, memory_bytes=usable, usable_bytes=usable, state=state, kv_factor=factor
    )
    engines: list[NodeEngine] = []
    for name, s in about.items():
        block_bytes = s.kv_bytes // s.profile.num_blocks
        floor_bytes = -(-LONGEST // s.profile.block_size) * block_bytes
        spec = s.spec(name)
        engines.append(
            NodeEngine(
                spec=type(spec)(
                    engine_id=name,
                    url="",
                    model=name,
                    slots=SLOTS,
                    kv_bytes=s.kv_bytes,
                    kv_bytes_per_token=block_bytes // s.profile.block_size,
                    max_model_len=LONGEST,
                ),
                gpus=(gpu.gpu_id,),
                launch=Launch(kind="emulator", args=("--speed", f"{SPEED:g}")),
                weight_bytes=s.weight_bytes,
                server_bytes=s.server_bytes,
                kv_floor_bytes=floor_bytes,
                served=s,
            )
        )
    host = Host(node_id="n", cluster="local", ram_bytes=0, gpus=(gpu,), engines=tuple(engines), at_start=tuple(about))
    node = Node(host, MemoryQueue(), clock=RedisClock(), driver_of=EmulatedGpus(), state=state)
    found = Trial(factor=factor, requests=len(requests))
    running = asyncio.create_task(node.run())
    try:
        async with asyncio.timeout(LIMIT_S):
            while any(e.tier != "gpu" for e in node.report().engines):
                _check(running)
                await asyncio.sleep(0.1)
            found.kv_bytes = node.ledgers[gpu.gpu_id].kv_bytes
            async with contextlib.AsyncExitStack() as stack:
                clients = {
                    e.spec.engine_id: await stack.enter_async_context(
                        LoadClient(e.spec.url, model=e.spec.engine_id, timeout_s=LIMIT_S)
                    )
                    for e in node.report().engines
                }

                async def ask(r: Request) -> None:
                    sizes = Sizes(
                        prompt_tokens=r.prompt_tokens, output_tokens=r.output_tokens, priority=0 if r.interactive else 1
                    )
                    began_s = time.perf_counter()
                    try:
                        await clients[r.engine_id].ask(sizes)
                        found.completed += 1
                        waited_s = time.perf_counter() - began_s
                        found.seconds["interactive" if r.interactive else "batch"].append(waited_s + waits_s.pop(r))
                    except MaestroError as e:
                        found.failed.append(str(e))
                    ended()

                waits_s: dict[Request, float] = {}
                await _admit(node, requests, ask, waits_s, found, running)
                state_now = await _state(node)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await node.close()
    found.violations = int(state_now["violations"]) + int(state_now["refused"])
    found.peak_bytes, found.usable_bytes = int(state_now["peak_bytes"]), int(state_now["usable_bytes"])
    found.preemptions = sum(int(e["preemptions"]) for e in state_now["engines"])
    return found


async def _admit(
    node: Any,
    requests: Sequence[Request],
    ask: Callable[[Request], Any],
    waits_s: dict[Request, float],
    found: Trial,
    running: asyncio.Task[None],
) -> None:
    """Send each request when its reservation fits, until all have ended; keep the levels that the node went through."""
    began_s = seen_s = time.perf_counter()
    coming, waiting = list(requests), list[Request]()
    asked: dict[asyncio.Task[None], Request] = {}
    while coming or waiting or asked:
        _check(running)
        now_s = time.perf_counter()
        report = node.report()
        level = report.gpus[0].level
        found.level_s[level] += now_s - seen_s
        seen_s = now_s
        if not found.levels or found.levels[-1] != level:
            found.levels.append(level)
        while coming and coming[0].at_s <= now_s - began_s:
            waiting.append(coming.pop(0))
        specs = {e.spec.engine_id: e for e in report.engines}
        found.promised_bytes = max(found.promised_bytes, sum(e.spec.kv_bytes for e in report.engines))
        reserved: Counter[str] = Counter()
        for r in asked.values():
            reserved[r.engine_id] += _reservation(r, specs[r.engine_id])
        full: set[str] = set()
        for r in sorted(waiting, key=lambda r: (not r.interactive, r.at_s)):
            e = specs[r.engine_id]
            fits = reserved[r.engine_id] + _reservation(r, e) <= e.spec.kv_bytes
            if level in _PAUSED or r.engine_id in full or not fits:
                full.add(r.engine_id)  # nobody overtakes who waits for memory
                continue
            waiting.remove(r)
            reserved[r.engine_id] += _reservation(r, e)
            waits_s[r] = now_s - began_s - r.at_s
            asked[asyncio.create_task(ask(r))] = r
        done, _ = await asyncio.wait(asked, timeout=0.02) if asked else (set[asyncio.Task[None]](), None)
        if not asked:
            await asyncio.sleep(0.02)
        for task in done:
            task.result()
            del asked[task]
    found.took_s = time.perf_counter() - began_s


def _reservation(r: Request, e: EngineReport) -> int:
    return (r.prompt_tokens + RESERVED) * e.spec.kv_bytes_per_token


def _check(running: asyncio.Task[None]) -> None:
    if running.done():
        running.result()
        raise EngineUnavailable("the node agent has ended")


async def _state(node: Any) -> Mapping[str, Any]:
    """What the emulated GPU's process says of its memory."""
    driver = next(iter(node._engines.values())).driver
    return await driver._process.ask("GET", "/state")


def run(
    factors: Sequence[float], count: int, seed: int, ended: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Each factor on a fresh GPU, the same requests."""
    requests = workload(list(served()), count, seed)
    rows: list[dict[str, Any]] = []
    for factor in factors:
        with TemporaryDirectory(prefix="maestro-kv-") as folder:
            rows.append(asyncio.run(trial(factor, requests, Path(folder), ended)).row())
    return rows
