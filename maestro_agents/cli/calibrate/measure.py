"""What is played on an engine to learn its profile, and the fit.

Sizes come first: how many requests run at once, how long a step may be, in which order they are taken. Then rounds of bursts,
each burst once a round, so that a machine that drifts or is disturbed for a while harms all alike. A decode step is the
difference between two bursts that differ only in the length of their answers: what else there is cancels. The costs are
fitted to the medians over the rounds, by non-negative least squares of relative errors, on the steps that the engine model makes
of each burst.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from maestro_agents.errors import ConfigError, EngineUnavailable
from maestro_agents.simulator.calibration import Residual, amounts
from maestro_agents.simulator.engine import COSTS, EngineProfile, Scheduling
from maestro_serving.load import Described, LoadClient, Sizes

OUTLIER: Final = 4.0
"""A repeat is an outlier from so many median distances off the median on (and 5 % of it)."""

STEP_TOKENS: Final = 2048
"""Tokens in a step where the engine does not count them (vLLM's own default)."""

MOST_SEQS: Final = 1024
"""More requests at once are not tried."""

SURE: Final = 0.02
"""What repeats that agree to the last digit still may be off: a burst counts by 1 / (this + its spread)."""

SHORT: Final = 16
_PREFILLED: Final = 16_384
"""Prompt tokens of a burst, at most: on a small machine they take longer than all else."""

_DECODED: Final = 96
"""Tokens by which two bursts differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Burst:
    """Requests, (prompt, output) tokens each, that are sent at once; where ``less`` is given, what they take beyond those."""

    what: str
    requests: tuple[tuple[int, int], ...]
    less: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The result."""

    profile: EngineProfile
    latency_s: float
    residuals: tuple[Residual, ...]
    #: Outliers: (what, seconds, median).
    outliers: tuple[tuple[str, float, float], ...]

    @property
    def spread(self) -> float:
        """Median over all that was measured of how far repeats are from each other."""
        return statistics.median(one.spread for one in self.residuals)


# -- sizes -------------------------------------------------------------------------------------------------------------
async def find_sizes(client: LoadClient, said: Described) -> EngineProfile:
    """A profile whose sizes are the engine's; its costs are not known yet."""
    if not said.max_model_len or not said.block_size or not said.kv_tokens:
        raise EngineUnavailable(
            f"{client.base} does not say how long a request may be (/v1/models) or how its KV cache is laid out "
            "(vllm:cache_config_info in /metrics): only a vLLM server can be measured"
        )
    num_blocks = said.kv_tokens // said.block_size
    longest = min(said.max_model_len, num_blocks * said.block_size)
    if longest < 8 * SHORT:
        raise EngineUnavailable(f"{client.base} takes {longest} tokens a request: too few to measure")
    await client.burst([Sizes(prompt_tokens=SHORT, output_tokens=8)] * 4)  # whatever comes only once
    seqs = await _max_num_seqs(client, num_blocks)
    return EngineProfile(
        max_num_seqs=seqs,
        step_tokens=max(seqs, await _step_tokens(client, longest, num_blocks * said.block_size)),
        block_size=said.block_size,
        num_blocks=num_blocks,
        max_model_len=longest,
        scheduling=await _scheduling(client, seqs),
    )


async def _max_num_seqs(client: LoadClient, num_blocks: int) -> int:
    """Send ever more at once, until some wait: as many as run then."""
    together = 16
    while True:
        most = waited = 0
        burst = asyncio.ensure_future(client.burst([Sizes(prompt_tokens=SHORT, output_tokens=_DECODED)] * together))
        while not burst.done():
            running, waiting = await client.busy()
            most = max(most, running)
            waited = max(waited, waiting if running == most else 0)
            await asyncio.wait([burst], timeout=0.02)
        await burst
        if (waited and most < together) or together >= min(MOST_SEQS, num_blocks):
            return most
        together *= 2


async def _step_tokens(client: LoadClient, longest: int, kv_tokens: int) -> int:
    """Have it compute long prompts only, more than fit a step, and see how full its steps get."""
    prompt = longest - 2
    count = max(2, min(kv_tokens // longest, -(-32_768 // prompt)))
    before = await client.step_sizes()
    await client.burst([Sizes(prompt_tokens=prompt, output_tokens=1)] * count)
    after = await client.step_sizes()
    if not before:
        return STEP_TOKENS
    below = 0.0
    grown: list[float] = []
    for bound in sorted(after):
        steps = after[bound] - before.get(bound, 0.0)
        if steps > below:
            grown.append(bound)
        below = steps
    return int(grown[-1]) if grown and grown[-1] < float("inf") else STEP_TOKENS


async def _scheduling(client: LoadClient, seqs: int) -> Scheduling:
    """Fill the engine, let two wait, the less urgent first: who is taken first?"""
    filling = asyncio.ensure_future(client.burst([Sizes(prompt_tokens=SHORT, output_tokens=_DECODED)] * seqs))
    try:
        while not filling.done() and (await client.busy())[0] < seqs:
            await asyncio.sleep(0.005)
        late = asyncio.ensure_future(client.ask(Sizes(prompt_tokens=SHORT, output_tokens=8, priority=9)))
        while not filling.done() and (await client.busy())[1] < 1:
            await asyncio.sleep(0.005)
        soon = [
            asyncio.ensure_future(client.ask(Sizes(prompt_tokens=SHORT, output_tokens=_DECODED, priority=-9)))
            for _ in range(seqs)
        ]
        by_priority = (await late).ended_at_s > min([(await one).ended_at_s for one in soon])
    finally:
        await filling
    return Scheduling.PRIORITY if by_priority else Scheduling.FCFS


# -- bursts ------------------------------------------------------------------------------------------------------------
def bursts(sizes: EngineProfile) -> list[Burst]:
    """What one round plays."""
    longest = sizes.max_model_len
    found = [
        Burst(what=f"prompt of {tokens} tokens", requests=((tokens, 1),))
        for tokens in _spread(SHORT, min(longest - 2, 8192))
    ]
    more = min(_DECODED, longest // 4)
    together = sorted({*(1 << n for n in range(sizes.max_num_seqs.bit_length())), sizes.max_num_seqs})
    lengths = [(SHORT, f"{more} steps of {{}} short requests", together)]
    long = min(longest - more - 8, 4096)
    most = min(sizes.max_num_seqs, sizes.num_blocks // -(-(long + more + 8) // sizes.block_size))
    most = min(most, max(_PREFILLED // long, 1))
    if most:
        lengths.append((long, f"{more} steps of {{}} requests of {long} tokens", sorted({1, most})))
    for prompt, what, counts in lengths:
        found += [
            Burst(what=what.format(n), requests=((prompt, 8 + more),) * n, less=((prompt, 8),) * n) for n in counts
        ]
    crowd = sizes.max_num_seqs + min(2 * sizes.max_num_seqs, 64)
    found.append(Burst(what=f"{crowd} short requests", requests=((SHORT, more // 2),) * crowd))
    medium = max(2 * SHORT, min(512, longest // 2, _PREFILLED // crowd))
    found.append(Burst(what=f"{crowd} requests of {medium} tokens", requests=((medium, 8),) * crowd))
    return found


def _spread(least: int, most: int, count: int = 6) -> list[int]:
    """Numbers between two, each the same factor above the last."""
    return sorted({round(least * (most / least) ** (n / (count - 1))) for n in range(count)})


async def play(
    client: LoadClient, plan: Sequence[Burst], rounds: int, done: Callable[[], None]
) -> dict[str, list[float]]:
    """By burst, what it took in each round."""
    took: dict[str, list[float]] = {burst.what: [] for burst in plan}
    for number in range(rounds):
        for burst in plan if number % 2 == 0 else plan[::-1]:
            whole, less = _sizes(burst.requests), _sizes(burst.less)
            first_s = await client.burst(less) if less else 0.0
            took[burst.what].append(await client.burst(whole) - first_s)
            done()
    return took


def _sizes(requests: Sequence[tuple[int, int]]) -> list[Sizes]:
    return [Sizes(prompt_tokens=prompt, output_tokens=output) for prompt, output in requests]


# -- the fit -----------------------------------------------------------------------------------------------------------
def fit(sizes: EngineProfile, plan: Sequence[Burst], took: Mapping[str, Sequence[float]]) -> Fit:
    """The costs that make the model's seconds of each burst come closest to what was measured, as shares of it."""
    import numpy as np
    from scipy import optimize

    medians = {burst.what: statistics.median(took[burst.what]) for burst in plan}
    if wrong := [what for what, median_s in medians.items() if median_s <= 0]:
        raise ConfigError(
            f"{wrong[0]}: longer answers took no longer. The machine is too noisy to measure anything: try again"
        )
    rows: list[list[float]] = []
    for burst in plan:
        whole = amounts(sizes, burst.requests)
        less = amounts(sizes, burst.less) if burst.less else dict.fromkeys(COSTS, 0.0)
        rows.append([*(whole[name] - less[name] for name in COSTS), 0.0 if burst.less else 1.0])
    table = np.array(rows)
    seconds = np.array([medians[burst.what] for burst in plan])
    scale = np.abs(table).max(axis=0)
    scale[scale == 0] = 1.0
    spreads = [_spread_of(took[burst.what]) for burst in plan]
    weights = np.array([1 / (SURE + spread) for spread in spreads])
    least_squares: Any = optimize
    solution = least_squares.nnls(table / scale * (weights / seconds)[:, None], weights)[0] / scale
    solution[0] = max(solution[0], 1e-6)  # a step takes some time
    costs: list[float] = solution.tolist()
    fitted: list[float] = (table @ solution).tolist()
    residuals = tuple(
        Residual(what=burst.what, measured_s=medians[burst.what], fitted_s=fitted_s, spread=spread)
        for burst, fitted_s, spread in zip(plan, fitted, spreads, strict=True)
    )
    outliers = tuple(
        (one.what, s, one.measured_s)
        for one in residuals
        for s in took[one.what]
        if abs(s / one.measured_s - 1) > max(OUTLIER * one.spread, 0.05)
    )
    return Fit(
        profile=dataclasses.replace(sizes, **dict(zip(COSTS, costs, strict=False))),
        latency_s=costs[-1],
        residuals=residuals,
        outliers=outliers,
    )


def _spread_of(repeats: Sequence[float]) -> float:
    """Median distance from the median, as a share of it."""
    median_s = statistics.median(repeats)
    return statistics.median(abs(s - median_s) for s in repeats) / median_s


async def prefix_hit(client: LoadClient, sizes: EngineProfile) -> bool:
    """Whether a prompt that was just answered is found in the prefix cache."""
    prompt = client.prompt(min(sizes.max_model_len - 2, 4 * sizes.block_size + SHORT))
    asked = Sizes(prompt_tokens=len(prompt), output_tokens=1)
    await client.ask(asked, prompt)
    return (await client.ask(asked, prompt)).cached_tokens > 0
