"""`maestro bench scale`: what a decision costs as the fleet and the queue grow, in the simulator's path to `policy.plan`.

The fleet: engines in three clusters, each with the same work to do. The queue: so many runs that are all ready at once, on four
engines. Timed is choosing and granting, on this machine; engines, tools and the clock are emulated.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from typing import Any, Final

from maestro_agents.policy import OURS
from maestro_agents.simulator.hardware import SimCluster, SimEngine, SimFleet, gpus, models, serve
from maestro_agents.simulator.workload import Workload, sample
from maestro_agents.simulator.world import World

FLEETS: Final = (4, 16, 64, 256, 1000)
QUEUES: Final = (10, 100, 1_000, 10_000)
CLUSTERS: Final = {"near": 0.001, "region": 0.02, "far": 0.08}
RUNS_PER_ENGINE: Final = 8
WINDOW_S: Final = 30.0


class _Timed(World):
    deciding_s = 0.0

    def _plan(self, model: str) -> None:
        began_s = time.perf_counter()
        super()._plan(model)
        self.deciding_s += time.perf_counter() - began_s


def fleet_of(engines: int) -> SimFleet:
    """So many A100 with an 8B model each, in turn in three clusters."""
    served = serve(models()["llama-3.1-8b"], gpus()["a100-80g"], slots=24)
    clusters = {name: SimCluster(name=name, rtt_s=rtt_s) for name, rtt_s in CLUSTERS.items()}
    made: list[SimEngine] = []
    for n in range(engines):
        cluster = list(CLUSTERS)[n % len(CLUSTERS)]
        spec = dataclasses.replace(served.spec(f"e{n}", model="small"), cluster=cluster, rtt_s=CLUSTERS[cluster])
        made.append(SimEngine(spec=spec, profile=served.profile, gpus=(f"e{n}",)))
    return SimFleet(clusters=clusters, engines=tuple(made))


def workload_of(runs: int, window_s: float, horizon_s: float) -> Workload:
    """Runs of the package's sample, again and again, arriving at random."""
    rng, base = random.Random(0), sample()
    at = sorted(rng.uniform(0, window_s) for _ in range(runs))
    drawn = (base.runs[i % len(base.runs)] for i in range(runs))
    made = tuple(dataclasses.replace(r, run_id=f"r{i}", at_s=s) for i, (r, s) in enumerate(zip(drawn, at, strict=True)))
    return dataclasses.replace(base, runs=made, warmup_s=0.0, window_s=window_s, horizon_s=horizon_s)


def measure(engines: int, runs: int, window_s: float, horizon_s: float) -> dict[str, Any]:
    """Play it and time the decisions."""
    world = _Timed(workload_of(runs, window_s, horizon_s), fleet_of(engines), OURS, tell=lambda _event: None)
    began_s = time.perf_counter()
    world.play()
    wall_s = time.perf_counter() - began_s
    return {
        "engines": engines,
        "runs": runs,
        "decisions": world.grants,
        "us_per_decision": 1e6 * world.deciding_s / max(1, world.grants),
        "us_per_stage_in_all": 1e6 * wall_s / max(1, world.grants),
    }


def run(fleets: Sequence[int] = FLEETS, queues: Sequence[int] = QUEUES) -> dict[str, Any]:
    """Both series."""
    return {
        "fleet": [measure(n, RUNS_PER_ENGINE * n, WINDOW_S, 60.0) for n in fleets],
        "queue": [measure(4, 4 * 24 + q, 0.1, 60.0) for q in queues],
        "label": "emulated; times of this machine",
    }
