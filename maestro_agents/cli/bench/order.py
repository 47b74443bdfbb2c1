"""`maestro bench order`: the sample's runs on two engines, first come first served and under Maestro, in one session.

In rounds, one pass of each policy per round and the order of the two turned every time. The same arrivals, messages and
lengths in both passes of a round (`demo_input`), deadlines fixed beforehand. Reported: run completion
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
from maestro_agents.cli.demo_report import RunResult
from maestro_agents.cli.snapshot import Watch, percentile
from maestro_agents.cli.up import Stack
from maestro_agents.client import Client
from maestro_agents.core import Observation, ServiceClass
from maestro_agents.queue.redis import RedisQueue

DEADLINES_S: Final = {ServiceClass.INTERACTIVE: 15.0, ServiceClass.BATCH: 120.0}
"""Fixed beforehand: about three times what a run takes on two idle engines of this size; batch has ample time."""

SLOTS: Final = 4
"""Stages that an engine runs at once (``--max-num-seqs``)."""


TOGETHER_S: Final = 0.02


def tau(observed: Sequence[Observation], *, in_engine: bool = False) -> tuple[float, int]:
    """Kendall's tau (ties left out) between our order and the engine's, and how many pairs it rests on.

    A stage waits from its push (``in_engine``: from its grant) until the engine begins it (grant + the engine's own queue
    time). A pair counts where both waited at one moment for the engine that served both. Stages begun within `TOGETHER_S`
    of each other are a tie: an engine begins several in one step, and the moment is known through two clocks.
    """
    rows = [
        (o.engine_id, o.granted_at_s if in_engine else o.pushed_at_s, o.granted_at_s + o.engine_queue_s, o.priority)
        for o in observed
        if o.priority
    ]
    agree = disagree = 0
    for i, (engine, since, begun, priority) in enumerate(rows):
        for other, since2, begun2, priority2 in rows[i + 1 :]:
            if engine != other or max(since, since2) >= min(begun, begun2) or abs(begun - begun2) < TOGETHER_S:
                continue
            product = (priority - priority2) * (begun - begun2)
            agree += product > 0
            disagree += product < 0
    pairs = agree + disagree
    return ((agree - disagree) / pairs if pairs else float("nan")), pairs


def pooled(passes: Sequence[Sequence[Observation]], *, in_engine: bool) -> tuple[float, int]:
    """Tau over several passes, weighted by their pairs."""
    found = [(t, n) for t, n in (tau(observed, in_engine=in_engine) for observed in passes) if n]
    pairs = sum(n for _, n in found)
    return (sum(t * n for t, n in found) / pairs if pairs else float("nan")), pairs


@dataclasses.dataclass(kw_only=True)
class Served:
    """What one policy did, over all its passes."""

    policy: str
    runs: list[RunResult] = dataclasses.field(default_factory=list[RunResult])
    #: Stages by pass: pairs of different passes never waited together.
    passes: list[list[Observation]] = dataclasses.field(default_factory=list[list[Observation]])

    def to_json(self) -> dict[str, Any]:
        """Figures, and the raw events that they are counted from."""
        everywhere, pairs = pooled(self.passes, in_engine=False)
        in_engine, engine_pairs = pooled(self.passes, in_engine=True)
        stages = [o for observed in self.passes for o in observed]
        return {
            "policy": self.policy,
            "deadlines_s": {c.value: s for c, s in DEADLINES_S.items()},
            "classes": {c.value: self._of(c) for c in ServiceClass},
            "tau": everywhere,
            "tau_pairs": pairs,
            "tau_in_engine": in_engine,
            "tau_in_engine_pairs": engine_pairs,
            "stages": len(stages),
            "fast": sum(o.fast for o in stages),
            "wait_mean_s": statistics.fmean(o.wait_s for o in stages) if stages else 0.0,
            "engine_queue_mean_s": statistics.fmean(o.engine_queue_s for o in stages) if stages else 0.0,
            "runs": [
                {"index": r.index, "class": r.service_class, "took_s": r.took_s, "met": r.met, "error": r.error}
                for r in self.runs
            ],
            "events": [
                [
                    {
                        "engine": o.engine_id, "role": o.role, "run": o.run_id, "priority": o.priority, "fast": o.fast,
                        "pushed_at_s": o.pushed_at_s, "granted_at_s": o.granted_at_s, "queued_s": o.engine_queue_s,
                        "finished_at_s": o.finished_at_s, "output_tokens": o.output_tokens,
                    }
                    for o in observed
                ]
                for observed in self.passes
            ],
        }  # fmt: skip

    def _of(self, c: ServiceClass) -> dict[str, Any]:
        mine = [r for r in self.runs if r.service_class is c]
        took = [r.took_s for r in mine if r.done]
        return {
            "runs": len(mine),
            "completed": len(took),
            "in_time": sum(r.met for r in mine),
            "p50_s": percentile(took, 0.5),
            "p95_s": percentile(took, 0.95),
        }


async def one_pass(stack: Stack, plan: Sequence[Arrival], app: Any, into: Served, look: Callable[[Pass], None]) -> None:
    """Serve the whole workload under the policy of the scheduler that runs."""
    pool = stack.fleet.pool
    queue = RedisQueue(stack.redis_url, pool=pool)
    watch = Watch(queue, source=pool)
    served = Pass(into.policy, plan, queue=queue, watch=watch, app=app, deadlines_s=DEADLINES_S)
    into.runs += await served.run(look)
    entries = (await queue.read_log("", 20_000))[1]
    into.passes.append([o for o in entries if isinstance(o, Observation)])
    await queue.close()


async def measure(
    stack: Stack, runs: int, seed: int, scale: float, rate: float, rounds: int, look: Callable[[Pass], None]
) -> list[dict[str, Any]]:
    """Both policies in turn, the first of a round being the second of the next: a machine that drifts favours neither."""

    def lengths(node: str, prompt: str) -> dict[str, Any]:
        wanted = max(1, round(length_of(node, prompt)["min_tokens"] * scale))
        return {"min_tokens": wanted, "ignore_eos": True}

    # The address is never called: the fleet decides. A call that went there by mistake would fail and be counted.
    app = sample("support_triage").build(MODEL, "http://127.0.0.1:9/v1", lengths)
    found = {policy: Served(policy=policy) for policy in ("fcfs", "ours")}
    for n in range(rounds):
        plan = [dataclasses.replace(a, at_s=a.at_s / rate) for a in arrivals(MESSAGES, runs=runs, seed=seed + n)]
        for policy in ("fcfs", "ours") if n % 2 == 0 else ("ours", "fcfs"):
            await asyncio.to_thread(stack.start_scheduler, policy=policy, pool=f"order-{n}-{policy}")
            Client.configure(redis_url=stack.redis_url, pool=stack.fleet.pool)
            try:
                await one_pass(stack, plan, app, found[policy], look)
            finally:
                await asyncio.to_thread(Client.reset)
    return [served.to_json() for served in found.values()]


def run(
    engine: str,
    runs: int,
    seed: int,
    scale: float,
    rate: float,
    rounds: int,
    overcommit: int,
    look: Callable[[Pass], None],
) -> list[dict[str, Any]]:
    """Bring the fleet up, serve all passes, take it down."""
    stack = make_stack(engine, slots=SLOTS + overcommit, max_num_seqs=SLOTS)
    try:
        stack.start(scheduler=False)
        return asyncio.run(measure(stack, runs, seed, scale, rate, rounds, look))
    finally:
        stack.stop()
