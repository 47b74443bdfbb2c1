"""`maestro bench order`: the sample's runs on two engines, first come first served and under Maestro, in one session.

The same arrivals, messages and lengths both times (`demo_input`), deadlines fixed beforehand. Reported: run completion
and deadlines by class, and whether the engine's own order agrees with ours: Kendall's tau over all pairs of stages that
waited on one engine at the same time, of (our moment, the moment the engine began it). The engine gets more grants than
it runs at once (``--overcommit``), so that part of the waiting is in its own queue, where only its priority orders.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Final

from maestro_agents.cli.bench.stack import MODEL
from maestro_agents.cli.bench.stack import stack as make_stack
from maestro_agents.cli.demo_input import MESSAGES, Arrival, arrivals
from maestro_agents.cli.demo_pass import Pass, length_of, sample
from maestro_agents.cli.snapshot import Watch
from maestro_agents.cli.up import Stack
from maestro_agents.client import Client
from maestro_agents.core import Observation, ServiceClass
from maestro_agents.queue.redis import RedisQueue

DEADLINES_S: Final = {ServiceClass.INTERACTIVE: 15.0, ServiceClass.BATCH: 120.0}
"""Fixed beforehand: about three times what a run takes on two idle engines of this size; batch has ample time."""

SLOTS: Final = 4
"""Stages that an engine runs at once (``--max-num-seqs``)."""


def tau(observed: Sequence[Observation]) -> tuple[float, int]:
    """Kendall's tau (ties left out) between our order and the engine's, and how many pairs it rests on.

    A stage waits from its push until the engine begins it (grant + the engine's own queue time). A pair counts where
    both waited at one moment on the engine that served both.
    """
    rows = [(o.engine_id, o.pushed_at_s, o.granted_at_s + o.engine_queue_s, o.priority) for o in observed if o.priority]
    agree = disagree = 0
    for i, (engine, pushed, started, priority) in enumerate(rows):
        for other, pushed2, started2, priority2 in rows[i + 1 :]:
            if engine != other or max(pushed, pushed2) >= min(started, started2):
                continue
            product = (priority - priority2) * (started - started2)
            agree += product > 0
            disagree += product < 0
    pairs = agree + disagree
    return ((agree - disagree) / pairs if pairs else float("nan")), pairs


def quantile(values: Sequence[float], q: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] if ordered else float("nan")


async def one_pass(stack: Stack, plan: Sequence[Arrival], app: Any, look: Callable[[Pass], None]) -> dict[str, Any]:
    """Serve the whole workload under the policy of the scheduler that runs."""
    policy, pool = stack.policy, stack.fleet.pool
    queue = RedisQueue(stack.redis_url, pool=pool)
    served = Pass(policy, plan, queue=queue, watch=Watch(queue, source=pool), app=app, deadlines_s=DEADLINES_S)
    results = await served.run(look)
    position, entries = await queue.read_log("", 20_000)
    del position
    observed = [o for o in entries if isinstance(o, Observation)]
    await queue.close()
    agreement, pairs = tau(observed)
    by_class: dict[str, Any] = {}
    for c in ServiceClass:
        mine = [r for r in results if r.service_class is c]
        took = [r.took_s for r in mine if r.done]
        by_class[c.value] = {
            "runs": len(mine),
            "completed": len(took),
            "in_time": sum(r.met for r in mine),
            "p50_s": quantile(took, 0.5),
            "p95_s": quantile(took, 0.95),
        }
    waits = [o.wait_s for o in observed]
    return {
        "policy": policy,
        "deadlines_s": {c.value: s for c, s in DEADLINES_S.items()},
        "classes": by_class,
        "tau": agreement,
        "tau_pairs": pairs,
        "stages": len(observed),
        "fast": sum(o.fast for o in observed),
        "wait_mean_s": statistics.fmean(waits) if waits else 0.0,
        "engine_queue_mean_s": statistics.fmean([o.engine_queue_s for o in observed]) if observed else 0.0,
        "events": [
            {
                "policy": policy, "engine": o.engine_id, "role": o.role, "class": o.service_class, "priority": o.priority,
                "pushed_at_s": o.pushed_at_s, "granted_at_s": o.granted_at_s, "engine_queue_s": o.engine_queue_s,
                "finished_at_s": o.finished_at_s, "output_tokens": o.output_tokens, "run": o.run_id, "fast": o.fast,
            }
            for o in observed
        ],
        "runs": [{"policy": policy, "index": r.index, "class": r.service_class, "took_s": r.took_s, "met": r.met, "error": r.error} for r in results],
    }  # fmt: skip


async def both(
    stack: Stack, plan: Sequence[Arrival], scale: float, look: Callable[[Pass], None]
) -> list[dict[str, Any]]:
    """Both passes, first come first served first, each in a pool of its own on the same two engines."""

    def lengths(node: str, prompt: str) -> dict[str, Any]:
        wanted = max(1, round(length_of(node, prompt)["min_tokens"] * scale))
        return {"min_tokens": wanted, "ignore_eos": True}

    # The address is never called: the fleet decides. A call that went there by mistake would fail and be counted.
    app = sample("support_triage").build(MODEL, "http://127.0.0.1:9/v1", lengths)
    found: list[dict[str, Any]] = []
    for policy in ("fcfs", "ours"):
        await asyncio.to_thread(stack.start_scheduler, policy=policy, pool=f"order-{policy}")
        Client.configure(redis_url=stack.redis_url, pool=stack.fleet.pool)
        try:
            found.append(await one_pass(stack, plan, app, look))
        finally:
            await asyncio.to_thread(Client.reset)
    return found


def run(
    engine: str, runs: int, seed: int, scale: float, rate: float, overcommit: int, look: Callable[[Pass], None]
) -> list[dict[str, Any]]:
    """Bring the fleet up, serve both passes, take it down."""
    plan = [dataclasses.replace(a, at_s=a.at_s / rate) for a in arrivals(MESSAGES, runs=runs, seed=seed)]
    stack = make_stack(engine, slots=SLOTS + overcommit, max_num_seqs=SLOTS)
    try:
        stack.start(scheduler=False)
        return asyncio.run(both(stack, plan, scale, look))
    finally:
        stack.stop()
