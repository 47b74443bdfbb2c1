"""`maestro bench observe`: is what `maestro report` promises what Maestro then keeps? And what does observing cost?

The demo's runs are served by two engines: first in mode ``observe``, each run's calls going straight to one engine
(the runs spread over the engines in turn, as clients with different base URLs do); the report says what Maestro would have
made of them; then Maestro serves them. The report is made twice: with the engines' account of how long each request queued (vLLM
``--enable-per-request-metrics``), and without.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from maestro_agents.cli import report
from maestro_agents.cli.bench.stack import MODEL, emulated
from maestro_agents.cli.bench.stack import stack as make_stack
from maestro_agents.cli.demo_input import MESSAGES, Arrival, arrivals
from maestro_agents.cli.demo_pass import Pass, length_of, sample
from maestro_agents.cli.demo_report import RunResult
from maestro_agents.cli.report_figures import Entry, Material, final_runs, none_if_nan, read_files
from maestro_agents.cli.snapshot import Watch, percentile
from maestro_agents.cli.up import Stack
from maestro_agents.client import Client
from maestro_agents.core import RunEnd, ServiceClass
from maestro_agents.errors import ConfigError, EngineError
from maestro_agents.queue.redis import RedisQueue

SLOTS: Final = 4
LOAD: Final = {"emulator": (1.0, 1.0), "vllm": (0.5, 0.4)}
"""Length of answers and rate of arrivals, relative to the demo's: more than two engines of this kind can serve at once."""

PROMPT: Final = "Answer the customer in one sentence. " * 20


class Spread:
    """One app per engine, a run to each in turn."""

    def __init__(self, apps: Sequence[Any]) -> None:
        self._next = itertools.cycle(apps)

    async def ainvoke(self, *args: Any) -> Any:
        """Serve one run."""
        return await next(self._next).ainvoke(*args)


async def one_pass(
    stack: Stack, mode: str, scale: float, plan: Sequence[Arrival], look: Callable[[Pass], None]
) -> list[RunResult]:
    """Serve the whole workload with the client as it is configured. No pass finds prefixes that another left behind."""

    def lengths(node: str, prompt: str) -> dict[str, Any]:
        wanted = max(1, round(length_of(node, prompt)["min_tokens"] * scale))
        return {"min_tokens": wanted, "ignore_eos": True, "max_tokens": wanted, "cache_salt": mode}

    queue = RedisQueue(stack.redis_url, pool=stack.fleet.pool)
    app = Spread([sample("support_triage").build(MODEL, e.url, lengths) for e in stack.engines])
    try:
        watch = Watch(queue, source=stack.fleet.pool)
        return await Pass(mode, plan, queue=queue, watch=watch, app=app).run(look)
    finally:
        await queue.close()


async def both_passes(
    stack: Stack, scale: float, plan: Sequence[Arrival], events: Path, look: Callable[[Pass], None]
) -> dict[str, list[RunResult]]:
    """Observed, then managed."""
    found: dict[str, list[RunResult]] = {}
    for mode in ("observe", "on"):
        pool = f"observe-{uuid.uuid4().hex[:8]}-{mode}"
        await asyncio.to_thread(stack.start_scheduler, policy="ours", pool=pool)
        Client.configure(redis_url=stack.redis_url, pool=pool, mode=mode, events=events if mode == "observe" else None)
        try:
            found[mode] = await one_pass(stack, mode, scale, plan, look)
        finally:
            await asyncio.to_thread(Client.reset)
    return found


def without_first_run(material: Material) -> Material:
    """Each pass begins with one run to warm up."""
    warm = final_runs(material.entries)[0].run_id
    material.entries = [e for e in material.entries if e.run_id != warm]
    return material


def by_class(results: Sequence[RunResult]) -> dict[str, Any]:
    """What the apps saw."""
    found: dict[str, Any] = {}
    for c in ServiceClass:
        mine = [r for r in results if r.service_class is c]
        took = [r.took_s for r in mine if r.done]
        found[c.value] = {
            "runs": len(mine),
            "in_time": sum(r.met for r in mine),
            "p50_s": none_if_nan(percentile(took, 0.5)),
            "p95_s": none_if_nan(percentile(took, 0.95)),
        }
    return found


def promises(gain: dict[str, Any]) -> dict[str, Any]:
    """The report's two replays by class, in the words of `by_class`."""

    def of(way: str) -> dict[str, Any]:
        return {
            name: {
                "runs": c[way]["runs"],
                "in_time": c[way]["in_time"],
                "p50_s": c[way]["completion_s"]["p50"],
                "p95_s": c[way]["completion_s"]["p95"],
            }
            for name, c in gain["classes"].items()
        }

    return {"replayed": of("fcfs"), "promised": of("maestro")}


async def overhead(url: str, calls: int) -> dict[str, Any]:
    """Milliseconds that observing adds to a call: pairs of one plain and one observed call, the order changing."""
    from maestro_langgraph import gate, maestro

    made = sample("one_call")
    plain = made.graph(MODEL, url, max_tokens=1).compile()
    ours = maestro.wrap(made.graph(MODEL, url, max_tokens=1).compile())
    took_ms: dict[bool, list[float]] = {False: [], True: []}
    for n in range(calls + 20):
        for observed in (False, True) if n % 2 else (True, False):
            gate.install() if observed else gate.uninstall()
            began_s = time.perf_counter()
            await (ours if observed else plain).ainvoke({"question": f"{PROMPT} {n}"})
            if n >= 20:  # the first ones open connections
                took_ms[observed].append((time.perf_counter() - began_s) * 1e3)
    gate.install()
    added = [a - b for a, b in zip(took_ms[True], took_ms[False], strict=True)]
    return {
        "calls": calls,
        "plain_ms": {"p50": statistics.median(took_ms[False]), "p99": percentile(took_ms[False], 0.99)},
        "observed_ms": {"p50": statistics.median(took_ms[True]), "p99": percentile(took_ms[True], 0.99)},
        "added_ms": {
            "p50": statistics.median(added),
            "p99": percentile(took_ms[True], 0.99) - percentile(took_ms[False], 0.99),
        },
    }


def run(
    engine: str,
    runs: int,
    seed: int,
    calls: int,
    look: Callable[[Pass], None],
    say: Callable[[str], None],
    events: Path | None = None,
) -> dict[str, Any]:
    """Both passes and the report between them, then the cost of observing. ``events``: keep the record there."""
    if engine not in LOAD:
        raise ConfigError(f"--engine {engine!r}: {' or '.join(LOAD)}")
    scale, rate = LOAD[engine]
    plan = [dataclasses.replace(a, at_s=a.at_s / rate) for a in arrivals(MESSAGES, runs=runs, seed=seed)]
    with tempfile.TemporaryDirectory(prefix="maestro-observe-") as folder:
        file = events or Path(folder, "events.jsonl")
        file.unlink(missing_ok=True)
        fast = {"profile": "gpu", "args": ("--speed", "2")} if engine == "emulator" else {}
        stack = make_stack(engine, slots=SLOTS, **fast)
        try:
            say("starting Redis and two engines")
            stack.start(scheduler=False)
            results = asyncio.run(both_passes(stack, scale, plan, file, look))
        finally:
            stack.stop()
        say("playing the record again")
        told = without_first_run(read_files([file]))
        found = {"told": gain_of(told), "untold": gain_of(Material(entries=[muted(e) for e in told.entries]))}
        say("measuring what observing costs a call")
        with emulated(engines=1, profile="gpu", slots=64, args=("--speed", "50")) as stack:
            Client.configure(redis_url=stack.redis_url, pool="cost", mode="observe", events=Path(folder, "cost.jsonl"))
            try:
                cost = asyncio.run(overhead(stack.engines[0].url, calls))
            finally:
                Client.reset()
    return {
        "observed": by_class(results["observe"]),
        "kept": by_class(results["on"]),
        **{name: {**promises(gain), "gain": gain} for name, gain in found.items()},
        "cost": cost,
    }


def gain_of(material: Material) -> dict[str, Any]:
    """What `maestro report` makes of a record. Raises `EngineError` where too little was recorded."""
    gain = report.figures(material)["gain"]
    if gain is None:
        raise EngineError("too few runs were recorded to be played again: ask for more --runs")
    return gain


def muted(entry: Entry) -> Entry:
    """The entry as it is where the engine does not say how long a request queued: vLLM as it comes."""
    if isinstance(entry, RunEnd):
        return entry
    return dataclasses.replace(entry, engine_queue_s=0.0, engine_ttft_s=0.0)
