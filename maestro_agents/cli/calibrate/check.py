"""Does the emulator with a profile behave as the engine that it was measured on? A load that was not fitted, on both in turn.

Runs of several calls each, some at once, with pauses between, arrive at random moments; half are urgent. Lengths are log-normal.
Each repeat has runs of its own, and both serve the same, the one that begins alternating. What counts is when runs are complete.
The model alone, on a virtual clock, plays them too: between it and the emulator stands the emulator's own work.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from maestro_agents.cli.snapshot import percentile
from maestro_agents.errors import EngineUnavailable
from maestro_agents.simulator.calibration import burst_s
from maestro_agents.simulator.engine import Engine, EngineProfile, EngineRequest
from maestro_serving.load import LoadClient, Sizes, together

GOAL: Final = 0.15
"""How far p50 and p95 of the emulator may be from the engine's."""

LOAD: Final = 0.6
"""Share of what the engine could serve, by its profile, were it never idle."""

WINDOW_S: Final = 20.0
"""Seconds in which the runs of a repeat arrive, about."""

LEAST_RUNS: Final = 30
MOST_RUNS: Final = 400

_QUANTILES: Final = {"p50": 0.5, "p95": 0.95}
_IDLE_LIMIT_S: Final = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Calls that a run makes at once, after a pause."""

    pause_s: float
    calls: tuple[Sizes, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One execution of a program."""

    at_s: float
    steps: tuple[Step, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What one side did with the runs of a repeat."""

    took_s: tuple[float, ...]
    #: Of this process, which sends the load.
    cpu_share: float
    #: The latest that a run was begun after its moment.
    late_s: float

    def quantiles(self) -> dict[str, float]:
        """Of the runs' seconds."""
        return {name: percentile(self.took_s, q) for name, q in _QUANTILES.items()}


@dataclass(kw_only=True)
class Compared:
    """All repeats, by side."""

    passes: dict[str, list[Pass]] = field(default_factory=dict[str, list[Pass]])

    def side(self, name: str) -> dict[str, Any]:
        """Over all runs of all repeats."""
        passes = self.passes[name]
        took = [s for one in passes for s in one.took_s]
        return {
            "runs": len(took),
            "p50_s": percentile(took, 0.5),
            "p95_s": percentile(took, 0.95),
            "generator_cpu_share": statistics.fmean(one.cpu_share for one in passes),
            "generator_late_s": max(one.late_s for one in passes),
            "repeats": [{**one.quantiles(), "cpu_share": one.cpu_share} for one in passes],
        }

    def ratios(self, of: str, to: str) -> dict[str, dict[str, float]]:
        """By quantile: over all runs; and the geometric mean of the repeats' with its 95 % interval (Student's t of the logarithms)."""
        from scipy.stats import t

        found: dict[str, dict[str, float]] = {}
        whole, base = self.side(of), self.side(to)
        for name in _QUANTILES:
            logs = [
                math.log(a.quantiles()[name] / b.quantiles()[name])
                for a, b in zip(self.passes[of], self.passes[to], strict=True)
            ]
            mean, n = statistics.fmean(logs), len(logs)
            half = float(t.ppf(0.975, n - 1)) * statistics.stdev(logs) / math.sqrt(n) if n > 1 else math.inf
            found[name] = {
                "ratio": whole[f"{name}_s"] / base[f"{name}_s"],
                "mean": math.exp(mean),
                "low": math.exp(mean - half),
                "high": math.exp(mean + half) if half < math.inf else math.inf,
            }
        return found


def load(profile: EngineProfile, seed: int) -> list[Run]:
    """Runs that keep an engine of this profile at `LOAD` for `WINDOW_S`, or for so long as `LEAST_RUNS` take."""
    rng = random.Random(seed)
    room = profile.max_model_len
    shapes: list[list[Step]] = []
    work_s = 0.0
    while len(shapes) < LEAST_RUNS or (work_s < LOAD * WINDOW_S and len(shapes) < MOST_RUNS):
        shapes += [_shape(rng, room) for _ in range(10)]
        calls = [c for shape in shapes for step in shape for c in step.calls]
        work_s = burst_s(profile, [(c.prompt_tokens, c.output_tokens) for c in calls])
    window_s = work_s / LOAD
    moments = sorted(rng.uniform(0, window_s) for _ in shapes)
    return [Run(at_s=at_s, steps=tuple(shape)) for at_s, shape in zip(moments, shapes, strict=True)]


def _shape(rng: random.Random, room: int) -> list[Step]:
    priority = rng.choice((-10, 10))
    prompt = rng.lognormvariate(math.log(min(room / 10, 400)), 0.7)
    steps: list[Step] = []
    for number in range(rng.randint(2, 5)):
        calls = [
            Sizes(
                prompt_tokens=max(4, min(round(prompt * rng.uniform(0.8, 1.2)), room // 2)),
                output_tokens=max(3, min(round(rng.lognormvariate(math.log(50), 0.8)), room // 4)),
                priority=priority,
            )
            for _ in range(rng.choice((1, 1, 1, 2, 3)))
        ]
        steps.append(Step(pause_s=rng.expovariate(1 / 0.2) if number else 0.0, calls=tuple(calls)))
        prompt *= 1.3
    return steps


# -- on a server -------------------------------------------------------------------------------------------------------
async def serve(client: LoadClient, runs: Sequence[Run]) -> Pass:
    """Play the runs on a server, which must be idle, until all are complete."""
    give_up_s = time.monotonic() + _IDLE_LIMIT_S
    while any(await client.busy()):
        if time.monotonic() > give_up_s:
            raise EngineUnavailable(f"{client.base} serves others: compare with an engine that nobody else uses")
        await asyncio.sleep(0.1)
    prompts = {id(c): client.prompt(c.prompt_tokens) for run in runs for step in run.steps for c in step.calls}
    begun_s, cpu_s = time.perf_counter(), time.process_time()
    late_s = 0.0

    async def one(run: Run) -> float:
        nonlocal late_s
        await asyncio.sleep(max(0.0, begun_s + run.at_s - time.perf_counter()))
        late_s = max(late_s, time.perf_counter() - begun_s - run.at_s)
        ended_at_s = begun_s + run.at_s
        for step in run.steps:
            if step.pause_s:
                await asyncio.sleep(step.pause_s)
            replies = await together(client.ask(c, prompts[id(c)]) for c in step.calls)
            ended_at_s = max(reply.ended_at_s for reply in replies)
        return ended_at_s - begun_s - run.at_s

    took_s = await together(one(run) for run in runs)
    cpu_share = (time.process_time() - cpu_s) / (time.perf_counter() - begun_s)
    return Pass(took_s=tuple(took_s), cpu_share=cpu_share, late_s=late_s)


async def compare(
    sides: Sequence[tuple[str, LoadClient]], profile: EngineProfile, repeats: int, seed: int, done: Callable[[], None]
) -> Compared:
    """The same runs on each side, in turn."""
    compared = Compared(passes={name: [] for name, _ in sides} | {"model": []})
    for _, client in sides:
        await client.burst([Sizes(prompt_tokens=16, output_tokens=8)] * 4)
    for number in range(repeats):
        runs = load(profile, seed + number)
        for name, client in sides if number % 2 == 0 else sides[::-1]:
            compared.passes[name].append(await serve(client, runs))
            done()
        compared.passes["model"].append(Pass(took_s=tuple(simulated(profile, runs)), cpu_share=0.0, late_s=0.0))
    return compared


# -- on a virtual clock ------------------------------------------------------------------------------------------------
def simulated(profile: EngineProfile, runs: Sequence[Run]) -> list[float]:
    """What each run takes on the model alone."""
    engine = Engine(profile)
    numbers = itertools.count()
    due = [(run.at_s, next(numbers), n, 0) for n, run in enumerate(runs)]
    heapq.heapify(due)
    asked: dict[str, tuple[int, int]] = {}
    missing: dict[int, int] = {}
    took_s = [0.0] * len(runs)
    while due or engine.next_end_s < math.inf:
        now_s = min(due[0][0] if due else math.inf, engine.next_end_s)
        for record in engine.ended(now_s):
            n, step = asked.pop(record.request.request_id)
            missing[n] -= 1
            if missing[n]:
                continue
            if step + 1 == len(runs[n].steps):
                took_s[n] = record.ended_at_s - runs[n].at_s
            else:
                pause_s = runs[n].steps[step + 1].pause_s
                heapq.heappush(due, (record.ended_at_s + pause_s, next(numbers), n, step + 1))
        while due and due[0][0] <= now_s:
            _, _, n, step = heapq.heappop(due)
            calls = runs[n].steps[step].calls
            missing[n] = len(calls)
            for c in calls:
                name = f"{next(numbers):08}"
                asked[name] = (n, step)
                engine.submit(
                    EngineRequest(
                        request_id=name,
                        prompt_tokens=c.prompt_tokens,
                        output_tokens=c.output_tokens,
                        priority=c.priority,
                    ),
                    now_s,
                )
    return took_s
