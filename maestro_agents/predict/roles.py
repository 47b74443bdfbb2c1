"""Output lengths from online statistics, level by level: what is known of a role without any model.

A stage belongs to an agent (the first part of its role), a role, that role on its model, and the same at its visit of the
node. Each level keeps a window of its latest output lengths, and is shrunk to the level above it: a role that was never seen
is like its agent, an agent that was never seen like everything. One observed task is enough for a useful estimate.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from maestro_agents.core import EngineSpec, Observation, Prediction, RunEnd, Status, Ticket
from maestro_agents.ports import Queue
from maestro_agents.workflow import Remaining, Workflows

WINDOW: Final = 200
"""Latest output lengths of one level that are remembered."""

SHRINK: Final = 3
"""Values of the level above that a level's own window is mixed with."""

MAX_VISIT: Final = 5
"""Visits of a node from this one on are one level."""

MAX_ROLES: Final = 20_000
DEFAULT_OUTPUT_TOKENS: Final = (64, 200, 512)
"""What a stage may write while nothing was ever observed."""


class Stage(Protocol):
    """What a ticket, an observation and a recorded call have in common: all that a prediction may look at."""

    @property
    def model(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def visit(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def features(self) -> tuple[float, ...]: ...
    @property
    def sketch(self) -> str: ...


def levels(stage: Stage) -> tuple[str, str, str, str, str]:
    """The populations that a stage belongs to, widest first: all, its agent, its role, on its model, at its visit."""
    return _levels(stage.model, stage.role, min(stage.visit, MAX_VISIT))


@functools.lru_cache(maxsize=MAX_ROLES)
def _levels(model: str, role: str, visit: int) -> tuple[str, str, str, str, str]:
    on_model = f"{model}|{role}"
    return "", f"{role.partition(':')[0]}:", f"|{role}", on_model, f"{on_model}|{visit}"


def teaches(o: Observation) -> bool:
    """It ended well, and how much it wrote is known."""
    return o.status is Status.DONE and o.output_tokens > 0


class Predicts(Protocol):
    """What the scheduler asks of a predictor. `RoleStatistics` keeps it without a model, `live.Learner` with one."""

    def observe(self, finished: Sequence[Observation]) -> None:
        """Take finished stages, in their order."""
        ...

    def end_run(self, run: RunEnd, workflows: Workflows) -> None:
        """Take the end of a run, all of whose stages were taken. ``workflows`` have not learned of it yet. Raises nothing."""
        ...

    def predict(
        self, tickets: Sequence[Ticket], engines: Mapping[str, EngineSpec], workflows: Workflows
    ) -> dict[str, Prediction]:
        """Predict waiting stages by id. ``engines``: model -> the engine whose speeds count, unloaded."""
        ...

    def changed_p99(self) -> dict[str, float]:
        """p99 output tokens of the roles that changed since the last call: what the fast path reserves."""
        ...

    async def tend(
        self, queue: Queue, *, epoch: int | None, now_s: float, more: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Do what is due besides, in every round; takes no time that is worth a name. ``epoch``: None on a standby.
        ``more``: what else the status shall tell.
        """
        ...


class Lengths(NamedTuple):
    """Mean and quantiles of output tokens."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What one stage will write, in tokens."""

    mean: float
    p50: float
    p90: float
    p99: float
    #: Probability of a tool call or a short answer, NaN where there is no model.
    short_p: float = math.nan
    #: Latest answers of this role on this model that are remembered.
    n: int = 0
    #: What it rests on: ``model VERSION``, ``median(n)`` (the model was worse here), ``role(n)``, ``prior``.
    basis: str = "prior"


def prediction(ticket: Ticket, e: Estimate, engine: EngineSpec, rest: Remaining) -> Prediction:
    """What the scheduler plans by: a waiting stage's estimate, within what its caller allows, and the rest of its run."""
    bound = math.inf if ticket.max_tokens is None else ticket.max_tokens
    mean = min(e.mean, bound)
    return Prediction(
        output_tokens_mean=mean,
        output_tokens_p50=min(e.p50, bound),
        output_tokens_p90=min(e.p90, bound),
        output_tokens_p99=min(e.p99, bound),
        service_s=ticket.prompt_tokens * engine.prefill_s_per_token + mean * engine.decode_s_per_token,
        basis=e.basis,
        **rest.of_prediction(),
    )


def corrected(known: Remaining, rest: Estimate, *, decode_s_per_token: float = 0.0) -> Remaining:
    """What a run still does after a stage, by a model of the tokens that it still writes (`predict.rest`).

    ``known``: what runs mostly do after such a stage. Tokens are the model's median, which orders runs better than a mean: few are
    much longer than most. Calls, prompts and seconds are what is known, times what the model corrects its tokens by; the chance of
    the end is the model's own. Where no tokens are known to follow, LLM seconds are those of the model's at this speed. Where no
    model speaks (``rest`` comes from statistics alone), what is known stays.
    """
    if math.isnan(rest.short_p):
        return known
    more = rest.p50 / known.output_tokens if known.output_tokens else 0.0
    return Remaining(
        stages=known.stages * more,
        output_tokens=rest.p50,
        prompt_tokens=known.prompt_tokens * more,
        llm_s=known.llm_s * more if known.output_tokens else rest.p50 * decode_s_per_token,
        tool_s=known.tool_s * more,
        ends_p=rest.short_p,
        slack_s=known.slack_s,
        n=known.n,
    )


class Window:
    """The latest values of one population, in order of size too."""

    __slots__ = ("_latest", "_told", "ordered")

    def __init__(self) -> None:
        self._latest: deque[float] = deque()
        self.ordered: list[float] = []
        self._told: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.ordered)

    def add(self, value: float) -> None:
        if len(self._latest) == WINDOW:
            del self.ordered[bisect_left(self.ordered, self._latest.popleft())]
        self._latest.append(value)
        insort(self.ordered, value)
        self._told = None

    def told(self) -> tuple[float, ...]:
        """log(1 + p10), (p50), (p90) and (mean) of the window, then how many values it has."""
        if self._told is None:
            p10, p50, p90 = quantiles(self.ordered, (0.1, 0.5, 0.9))
            mean = sum(self.ordered) / len(self.ordered)
            self._told = (math.log1p(p10), math.log1p(p50), math.log1p(p90), math.log1p(mean), float(len(self.ordered)))
        return self._told


def quantiles(ordered: Sequence[float], at: Sequence[float]) -> tuple[float, ...]:
    """Values of an ordered population at the given shares of it; at least that share is no larger."""
    n = len(ordered)
    return tuple(ordered[min(n - 1, max(0, math.ceil(q * n) - 1))] for q in at)


STATISTICS: Final = tuple(
    f"{level}_{what}"
    for level in ("agent", "role", "role_model", "visit")
    for what in ("p10_log", "p50_log", "p90_log", "mean_log", "n")
)
"""What each number of `RoleStatistics.told` is: the log of one plus tokens, and how many values that rests on."""

_NOTHING: Final = (math.nan, math.nan, math.nan, math.nan, 0.0)


class RoleStatistics:
    """Fed by the observation log; asked by the scheduler for every waiting stage."""

    def __init__(self) -> None:
        self._windows: OrderedDict[str, Window] = OrderedDict()
        self._changed: set[str] = set()
        #: Narrowest level -> its lengths, until something new is learned.
        self._cache: dict[str, Lengths] = {}

    def observe(self, finished: Sequence[Observation]) -> None:
        """Take finished stages. Those that did not end well, and those of unknown length, teach nothing."""
        for o in finished:
            if teaches(o):
                self.add(o, o.choice_tokens)

    def end_run(self, run: RunEnd, workflows: Workflows) -> None:
        """Nothing: see `Predicts`."""

    def add(self, stage: Stage, output_tokens: float) -> None:
        """Take the length of an answer."""
        for key in levels(stage):
            self._windows.setdefault(key, Window()).add(output_tokens)
            self._windows.move_to_end(key)
        self._cache.clear()
        self._changed.add(f"{stage.model}|{stage.role}")
        while len(self._windows) > 5 * MAX_ROLES:
            self._windows.popitem(last=False)

    def seen(self, stage: Stage) -> int:
        """How many lengths of this role on this model are remembered."""
        return len(self._windows.get(levels(stage)[3], ()))

    def told(self, stage: Stage) -> tuple[float, ...]:
        """What a model may look at, in the order of `STATISTICS`; NaN where a level has no value yet."""
        out: list[float] = []
        for key in levels(stage)[1:]:
            window = self._windows.get(key)
            out.extend(window.told() if window else _NOTHING)
        return tuple(out)

    def lengths(self, stage: Stage) -> Lengths:
        """Mean and quantiles of a stage's output tokens, each level shrunk to the one above."""
        keys = levels(stage)
        found = self._cache.get(keys[-1])
        if found is None:
            found = self._cache[keys[-1]] = self._lengths(keys)
        return found

    def estimate(self, stage: Stage) -> Estimate:
        """What statistics alone say of a stage."""
        n = self.seen(stage)
        return Estimate(**self.lengths(stage)._asdict(), n=n, basis=f"role({n})" if n else "prior")

    def _lengths(self, keys: Sequence[str]) -> Lengths:
        above: tuple[float, ...] = DEFAULT_OUTPUT_TOKENS
        pool: Sequence[float] = above
        for key in keys:
            window = self._windows.get(key)
            if window is None:
                continue
            pool = sorted([*window.ordered, *above])
            above = quantiles(pool, (0.2, 0.5, 0.9))
        return Lengths(sum(pool) / len(pool), *quantiles(pool, (0.5, 0.9, 0.99)))

    def predict(
        self, tickets: Sequence[Ticket], engines: Mapping[str, EngineSpec], workflows: Workflows
    ) -> dict[str, Prediction]:
        """See `Predicts`."""
        return {t.stage_id: prediction(t, self.estimate(t), engines[t.model], workflows.remaining(t)) for t in tickets}

    async def tend(
        self, queue: Queue, *, epoch: int | None, now_s: float, more: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Nothing: see `Predicts`."""

    def changed_p99(self) -> dict[str, float]:
        """p99 output tokens of the roles that changed since the last call: what the fast path reserves."""
        changed, self._changed = self._changed, set()
        found: dict[str, float] = {}
        for key in changed & self._windows.keys():
            role = key.partition("|")[2]
            found[key] = self._lengths(("", f"{role.partition(':')[0]}:", f"|{role}", key)).p99
        return found
