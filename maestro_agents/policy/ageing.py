"""Does an engine's memory grow without end, when is it full, and which engines to restart before that.

Every LLM serving runtime that was watched for days leaks, host memory at least (arXiv 2606.11916). Whether memory grows is
said by a Mann-Kendall test, how fast by Sen's slope, both over the *least* memory of each block of time: what garbage
collectors and caches give back is in no minimum. A trend counts where

1. the test says so at `ALPHA`, its variance enlarged for autocorrelation,
2. each third of the time watched had a higher floor than the one before (a sawtooth that came down once has not),
3. the later half grew nearly as fast as the earlier one (warm-up flattens), and
4. the memory would be full before `FARSIGHT` times the time watched have passed: a growth that has been seen for ten minutes
   says nothing about tomorrow, and a slow warm-up ends before it has come that far.

About the test. Samples seconds apart resemble each other, and the plain test takes that for a trend: with a correlation of 0.7
it sees one in 39 % of series that have none, instead of 5 %. Hamed & Rao's correction (1998, J. Hydrology 204), which adds up
all autocorrelations that look significant, still does in 23 %; its form with all of them gives negative variances.
Here the errors around Sen's line count as a first-order autoregression and the variance grows by (1 + r) / (1 - r): the limit
of Yue & Wang's correction (2004, Water Resources Management 18), r without its bias (Marriott & Pope 1954); 9 %
remain. ``tests/test_ageing.py`` measures that again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from maestro_agents.nodes import EngineReport, NodeReport

SAMPLE_S: Final = 10.0
"""A block of time at first. Blocks double while the engine lives, up to `LONGEST_S`."""

LONGEST_S: Final = 320.0
"""With `MOST` blocks: what happened eleven hours ago is forgotten."""

MOST: Final = 128
"""Blocks that are kept of one engine's memory."""

LEAST: Final = 60
"""Blocks before anything is said: ten minutes, in which servers warm up."""

ALPHA: Final = 0.01
CONFIDENCE: Final = 0.95
"""Of the interval that is said of the slope."""

FLOOR_RISES: Final = 0.5
"""Least rise of the floor from third to third, as a share of what the slope comes to."""

STEADY: Final = 0.7
"""Least growth of the later half, as a share of the earlier half's."""

FARSIGHT: Final = 3.0
"""How many times the time watched a trend is believed to go on."""

EARLY_S: Final = 2 * 3600.0
"""So long before the earliest predicted exhaustion a restart begins to look for a quiet moment."""

MARGIN: Final = 3.0
MARGIN_S: Final = 600.0
"""At so many times what a restart takes, and at least so many seconds, before it, a restart waits for no quiet moment."""

RESTART_S: Final = 120.0
"""What a restart takes where nobody has measured one."""

QUIET: Final = 0.5
"""Share of the other replicas' slots into which all that a model runs must fit for the moment to be a quiet one."""


# -- samples -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Block:
    """The least and most memory in a stretch of time, and when that began."""

    at_s: float
    low: float
    high: float


class Samples:
    """An engine's memory over the life of its process, in bounded memory. Use a new one for a new process."""

    def __init__(self, *, block_s: float = SAMPLE_S, longest_s: float = LONGEST_S) -> None:
        self.block_s = block_s
        self._longest_s = longest_s
        self._blocks: dict[int, tuple[float, float]] = {}

    def add(self, at_s: float, value: float) -> None:
        """Note a value. Moments never go backwards."""
        self._keep(self._blocks, int(at_s // self.block_s), value, value)
        if len(self._blocks) > MOST:
            if 2 * self.block_s <= self._longest_s:
                self.block_s *= 2
                wider: dict[int, tuple[float, float]] = {}
                for n, (low, high) in self._blocks.items():
                    self._keep(wider, n // 2, low, high)
                self._blocks = wider
            else:
                del self._blocks[next(iter(self._blocks))]

    @property
    def blocks(self) -> Sequence[Block]:
        """Oldest first, without the one that is not over yet."""
        return [Block(n * self.block_s, low, high) for n, (low, high) in self._blocks.items()][:-1]

    @staticmethod
    def _keep(blocks: dict[int, tuple[float, float]], n: int, low: float, high: float) -> None:
        was = blocks.get(n, (low, high))
        blocks[n] = (min(was[0], low), max(was[1], high))


# -- the trend ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Trend:
    """What the test says of a series. ``low_per_s``, ``high_per_s``: the slope's interval at `CONFIDENCE`."""

    #: Two-sided, corrected for autocorrelation.
    p: float
    slope_per_s: float
    low_per_s: float
    high_per_s: float
    #: The line's value at the last moment.
    level: float
    #: Lag-one autocorrelation of what is left of the series beside the line.
    correlation: float
    span_s: float
    #: Floors rise from third to third, and the later half grows as well.
    lasting: bool

    @property
    def grows(self) -> bool:
        return self.p <= ALPHA and self.low_per_s > 0.0 and self.lasting


def trend(series: Sequence[tuple[float, float]]) -> Trend:
    """Test (moment, value) pairs for a trend, oldest first, at least ten. Needs SciPy, so it is for servers."""
    import numpy as np
    import scipy.stats

    stats: Any = scipy.stats
    at_s, values = (np.array(column, dtype=np.float64) for column in zip(*series, strict=True))
    if np.ptp(values) == 0.0:
        return Trend(
            p=1.0,
            slope_per_s=0.0,
            low_per_s=0.0,
            high_per_s=0.0,
            level=float(values[-1]),
            correlation=0.0,
            span_s=float(at_s[-1] - at_s[0]),
            lasting=False,
        )
    slope = float(stats.theilslopes(values, at_s).slope)
    beside = stats.rankdata(values - slope * at_s)
    beside -= beside.mean()
    n = len(values)
    r = float(beside[1:] @ beside[:-1] / (beside @ beside)) if np.any(beside) else 0.0
    r = min(0.97, max(0.0, (n * r + 1) / (n - 4)))
    wider = math.sqrt((1 + r) / (1 - r))
    z = float(stats.norm.isf(max(stats.kendalltau(at_s, values).pvalue, 1e-300) / 2)) / wider
    # SciPy's interval is z(confidence) standard deviations of independent errors wide on each side: ask for `wider` times that.
    reach = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * wider
    sen = stats.theilslopes(values, at_s, alpha=min(1 - 1e-15, float(2 * stats.norm.cdf(reach) - 1)))
    half, third = n // 2, n // 3
    earlier, later = (stats.theilslopes(values[h], at_s[h]).slope for h in (slice(None, half), slice(half, None)))
    floors = [float(values[k * third : (k + 1) * third].min()) for k in range(3)]
    least = FLOOR_RISES * slope * (at_s[-1] - at_s[0]) / 3
    return Trend(
        p=float(2 * stats.norm.sf(z)),
        slope_per_s=slope,
        low_per_s=float(sen.low_slope),
        high_per_s=float(sen.high_slope),
        level=float(np.median(values - slope * at_s) + slope * at_s[-1]),
        correlation=r,
        span_s=float(at_s[-1] - at_s[0]),
        lasting=bool(min(b - a for a, b in itertools.pairwise(floors)) >= least and later >= STEADY * earlier),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Ageing:
    """Why an engine is to be restarted: in words, and when its memory is full at the earliest (the slope's upper bound)."""

    exhausted_at_s: float
    words: str


def ageing(what: str, samples: Samples, *, limit: float, now_s: float) -> Ageing | None:
    """Judge one kind of memory (``what``, e.g. ``host memory``) of an engine, in bytes; None while nothing is wrong.

    ``limit``: bytes that it can have before something fails. Full is when the most that was seen above the line meets it.
    """
    blocks = samples.blocks
    if len(blocks) < LEAST:
        return None
    found = trend([(b.at_s, b.low) for b in blocks])
    if not found.grows:
        return None
    end_s = blocks[-1].at_s
    above = max(b.high - (found.level - found.slope_per_s * (end_s - b.at_s)) for b in blocks)
    left = max(0.0, limit - found.level - above)
    soonest_s = max(0.0, left / found.high_per_s - (now_s - end_s))
    if soonest_s > FARSIGHT * found.span_s:
        return None
    per_h = [_size(s * 3600) for s in (found.slope_per_s, found.low_per_s, found.high_per_s)]
    chance = "< 0.001" if found.p < 0.001 else f"= {found.p:.3f}"
    return Ageing(
        exhausted_at_s=now_s + soonest_s,
        words=f"{what} grows {per_h[0]} an hour ({per_h[1]} to {per_h[2]}; p {chance} over {_hours(found.span_s)}): "
        f"full in {_hours(soonest_s)} at the earliest",
    )


class Watch:
    """One engine's host and device memory, over the life of its server. Use a new one for a new server."""

    def __init__(self, *, block_s: float = SAMPLE_S) -> None:
        self._samples = {"host memory": Samples(block_s=block_s), "device memory": Samples(block_s=block_s)}
        self._judged: dict[str, float] = {}
        self._found: dict[str, Ageing] = {}

    def look(
        self, now_s: float, *, host_bytes: int, host_left_bytes: int, device_bytes: int = -1, device_left_bytes: int = 0
    ) -> Ageing | None:
        """Note what it has now, and what it could have beyond that; return what is more pressing, if anything is.

        Bytes below 0 are not known. Call it while the engine is awake: a sleeping one has its weights in host memory. Costs
        milliseconds, once in a block of time.
        """
        seen = (("host memory", host_bytes, host_left_bytes), ("device memory", device_bytes, device_left_bytes))
        for what, value, left in seen:
            samples = self._samples[what]
            if value >= 0:
                samples.add(now_s, value)
            if value >= 0 and now_s - self._judged.get(what, -math.inf) >= samples.block_s:
                self._judged[what] = now_s
                found = ageing(what, samples, limit=value + max(0, left), now_s=now_s)
                if found:
                    self._found[what] = found
                else:
                    self._found.pop(what, None)
        return min(self._found.values(), key=lambda a: a.exhausted_at_s, default=None)


def _size(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 2**10:.3g} KiB"


def _hours(value_s: float) -> str:
    return f"{value_s / 3600:.1f} h" if value_s >= 3600 else f"{value_s / 60:.1f} min"


# -- the decision ------------------------------------------------------------------------------------------------------
def rejuvenate(
    reports: Collection[NodeReport], *, waiting: Mapping[str, int], pending: Collection[str] = (), now_s: float
) -> list[str]:
    """Which engines to restart now; the most pressing first.

    ``waiting``: stages that wait, by model. ``pending``: engines whose restart was asked for and is not over. Promises:

    - one engine of a model at a time, and none while another of it is on its way to a GPU;
    - never the last awake replica while stages wait for its model;
    - from `EARLY_S` before the earliest exhaustion in a quiet moment only (nobody waits, and what the model runs fits
      into half of the others' slots); from `MARGIN` restarts or `MARGIN_S` before it, at once.

    Draining is the caller's: an engine gets no more stages, and restarts when it has none left.
    """
    engines = [e for report in reports for e in report.engines]
    busy = {e.spec.model for e in engines if e.spec.engine_id in pending or e.tier != "gpu" == e.to}
    chosen: list[str] = []
    for e in sorted(engines, key=lambda e: (e.exhausted_at_s, e.spec.engine_id)):
        model, left_s = e.spec.model, e.exhausted_at_s - now_s
        if not e.exhausted_at_s or left_s > EARLY_S or not _awake(e) or model in busy:
            continue
        others = [o for o in engines if o.spec.model == model and _awake(o) and o is not e]
        waits = waiting.get(model, 0) > 0
        if waits and not others:
            continue
        runs = sum(o.spec.slots if o.running < 0 else o.running for o in (e, *others))
        quiet = not waits and runs <= QUIET * sum(o.spec.slots for o in others)
        if quiet or left_s <= margin_s(e):
            chosen.append(e.spec.engine_id)
            busy.add(model)
    return chosen


def margin_s(engine: EngineReport) -> float:
    """How long before the earliest exhaustion of its memory an engine's restart cannot wait."""
    took_s = max((*engine.wake_s.values(), RESTART_S * (not engine.wake_s))) + max(engine.leave_s.values(), default=0.0)
    return max(MARGIN_S, MARGIN * took_s)


def _awake(engine: EngineReport) -> bool:
    return engine.tier == "gpu" == engine.to
