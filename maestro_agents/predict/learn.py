"""The predictor as it lives in the scheduler: a trained model, calibrated and watched by what really came.

Three things learn from every finished stage at once, without training:

* `RoleStatistics`, which the model looks at, and which speak alone where there is no model, or where it does worse;
* `Offsets`: how far the truth lay above each quantile, level by level. They are added to what the model says, so that p90 means
  90 % in each role, also after drift (rolling split-conformal prediction: the quantile of the latest residuals), and so that
  a role the model never saw is met half way after its first task;
* `Errors` of three `EXPERTS` (the model, the model with its offset, the running median) in each agent and role: they are mixed by
  how well they did there lately, and where even that did worse than the median, the median is used (`basis`).
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from maestro_agents.predict.features import usable
from maestro_agents.predict.length import HEADS, LengthModel, Lengths
from maestro_agents.predict.roles import WINDOW, Estimate, RoleStatistics, Stage, levels

OFFSET_SHRINK: Final[Mapping[str, float]] = {"p50": 3.0, "p90": 20.0, "p99": 60.0}
"""Residuals of a level that weigh as much as the level above it: the further out the quantile, the more it takes."""

ERROR_KEEP: Final = 0.98
"""Share of an error's weight that is left after the next one: some 50 stages count."""

ERROR_MIN: Final = 10.0
"""Stages of a role that must have ended before the model is judged there."""

WORSE: Final = 1.05
"""The model is worse where its error is more than so many times the running median's."""

MAX_LEVELS: Final = 100_000


class Residuals:
    """The latest residuals of one population and one head."""

    __slots__ = ("_latest", "_ordered")

    def __init__(self, values: Sequence[float] = ()) -> None:
        self._latest: deque[float] = deque(values[-WINDOW:])
        self._ordered = sorted(self._latest)

    def __len__(self) -> int:
        return len(self._ordered)

    def add(self, value: float) -> None:
        if len(self._latest) == WINDOW:
            del self._ordered[bisect_left(self._ordered, self._latest.popleft())]
        self._latest.append(value)
        insort(self._ordered, value)

    def quantile(self, level: float) -> float:
        """The conformal quantile: the ``ceil((n + 1) level)``-th smallest, the largest where that is beyond the last."""
        n = len(self._ordered)
        if level == 0.5:  # of a few residuals the middle, not the upper one
            return (self._ordered[(n - 1) // 2] + self._ordered[n // 2]) / 2
        return self._ordered[min(n, math.ceil((n + 1) * level)) - 1]


class Offsets:
    """What is added to each head in logs, by level: all, agent, role, role on its model (`roles.levels`)."""

    def __init__(self, model: LengthModel | None = None) -> None:
        self._levels: OrderedDict[str, dict[str, Residuals]] = OrderedDict()
        #: Role on its model -> what `of` says, until something new is learned.
        self._cache: dict[str, dict[str, float]] = {}
        if model is not None:
            for level, heads in model.residuals.items():
                self._levels[level] = {head: Residuals(values) for head, values in heads.items()}

    def add(self, stage: Stage, above: Mapping[str, float]) -> None:
        """Take what the truth was above the model's heads."""
        self._cache.clear()
        for level in levels(stage)[:-1]:
            heads = self._levels.setdefault(level, {})
            self._levels.move_to_end(level)
            for head, value in above.items():
                heads.setdefault(head, Residuals()).add(value)
        while len(self._levels) > MAX_LEVELS:
            self._levels.popitem(last=False)

    def of(self, stage: Stage) -> dict[str, float]:
        """What to add to each head for this stage."""
        *wider, _ = levels(stage)
        if (known := self._cache.get(wider[-1])) is not None:
            return known
        out = self._cache[wider[-1]] = dict.fromkeys(HEADS, 0.0)
        for level in wider:
            for head, found in self._levels.get(level, {}).items():
                n, shrink = len(found), OFFSET_SHRINK[head]
                if n:
                    out[head] = (n * found.quantile(HEADS[head]) + shrink * out[head]) / (n + shrink)
        return out


EXPERTS: Final = ("raw", "calibrated", "median")
"""Three answers to how long an answer will be: the model's own, the same with its offset, and the running median."""

PRIOR: Final[Mapping[bool, tuple[float, float, float]]] = {True: (1.0, 1.1, 1.8), False: (1.0, 1.0, 1.0)}
"""Errors of the `EXPERTS`, relative to each other, while none was seen: in roles that the model was trained on, in others."""

TRUST: Final = 6.0
"""An expert's weight is its relative error to the power of minus this."""

ERROR_SHRINK: Final = 10.0
"""Stages of a level that weigh as much as the level above it."""


class Errors:
    """Absolute errors of one population, fading: of each expert, the simplest last, and of what was said."""

    __slots__ = ("covered_p90", "experts", "n", "said")

    def __init__(self, experts: int = len(EXPERTS)) -> None:
        self.n = 0.0
        self.experts = [0.0] * experts
        self.said = 0.0
        self.covered_p90 = 0.0

    def add(self, experts: Sequence[float], said: float, *, covered: bool) -> None:
        self.n = ERROR_KEEP * self.n + 1.0
        for i, error in enumerate(experts):
            self.experts[i] += (error - self.experts[i]) / self.n
        self.said += (said - self.said) / self.n
        self.covered_p90 += (float(covered) - self.covered_p90) / self.n

    def towards(self, above: Sequence[float]) -> list[float]:
        """The experts' errors relative to their mean, shrunk to those of the level above."""
        mean = sum(self.experts) / len(self.experts)
        if not mean:
            return list(above)
        return [
            (self.n * e / mean + ERROR_SHRINK * a) / (self.n + ERROR_SHRINK)
            for e, a in zip(self.experts, above, strict=True)
        ]

    @property
    def model_is_worse(self) -> bool:
        """What was said did worse here than the simplest expert (the running median) would have."""
        return self.n >= ERROR_MIN and self.said > WORSE * self.experts[-1]


class Predictor:
    """Predicts waiting stages in batches, learns from finished ones in batches."""

    def __init__(self, model: LengthModel | None = None) -> None:
        self.statistics = RoleStatistics()
        self.errors: OrderedDict[str, Errors] = OrderedDict()
        self.model = model
        self.offsets = Offsets(model)

    # -- predict -----------------------------------------------------------------------------------------------------
    def estimate(self, stages: Sequence[Stage], raw: Lengths | None = None) -> list[Estimate]:
        """What each stage will write: the model, calibrated, where it may speak; else statistics.

        ``raw``: what the model says of ``stages``, where somebody asked it already; all of them are of usable features then.
        """
        out = [self._by_statistics(s) for s in stages]
        at = [i for i, s in enumerate(stages) if usable(s.features)] if self.model is not None else []
        if not at or self.model is None:
            return out
        raw = raw or self.model.predict([stages[i] for i in at], [self.statistics.told(stages[i]) for i in at])
        for row, i in enumerate(at):
            if not self._is_worse(stages[i]):
                out[i] = self._said(stages[i], raw, row, out[i].p50)[0]
        return out

    def _is_worse(self, stage: Stage) -> bool:
        judged = self.errors.get(levels(stage)[3])
        return judged is not None and judged.model_is_worse

    def _by_statistics(self, stage: Stage) -> Estimate:
        found = self.statistics.estimate(stage)
        return dataclasses.replace(found, basis=f"median({found.n})") if self._is_worse(stage) else found

    def _said(self, stage: Stage, raw: Lengths, row: int, median: float) -> tuple[Estimate, tuple[float, float, float]]:
        """The model's estimate, and the experts' medians that are in it, in logs."""
        assert self.model is not None
        add = self.offsets.of(stage)
        own = float(raw.logs["p50"][row])
        experts = (own, own + add["p50"], math.log1p(median))
        weights = self._weights(stage)
        log = sum(w * x for w, x in zip(weights, experts, strict=True))
        p50 = max(1.0, _tokens(log))
        p90 = max(p50, _tokens(float(raw.logs["p90"][row]) + add["p90"]))
        p99 = max(p90, _tokens(float(raw.logs["p99"][row]) + add["p99"]))
        said = Estimate(
            mean=min(float(raw.mean[row]) * math.exp(log - own), p99),
            p50=p50,
            p90=p90,
            p99=p99,
            short_p=float(raw.short_p[row]),
            basis=f"model {self.model.card.version}",
        )
        return said, experts

    def _weights(self, stage: Stage) -> list[float]:
        """How much each expert counts: the less it was wrong lately with this agent, and in this role, the more."""
        assert self.model is not None
        _, agent, _, role, _ = levels(stage)
        errors: Sequence[float] = PRIOR[role in self.model.codes]
        for level in (agent, role):
            if (seen := self.errors.get(level)) is not None:
                errors = seen.towards(errors)
        weights = [max(e, 0.05) ** -TRUST for e in errors]
        return [w / sum(weights) for w in weights]

    # -- learn -------------------------------------------------------------------------------------------------------
    def teach(self, pairs: Sequence[tuple[Stage, int]], *, statistics: bool = True) -> list[Estimate | None]:
        """Take stages with what they wrote, one after another; what the model said of each before that, None where none did.

        Without ``statistics``, which another predictor of this pool keeps for both: into offsets and errors alone. Where the
        model fails they teach the statistics, then it is raised.
        """
        at = [i for i, (s, _) in enumerate(pairs) if usable(s.features)] if self.model is not None else []
        rows = {i: row for row, i in enumerate(at)}
        raw: Lengths | None = None
        failed: Exception | None = None
        if at and self.model is not None:
            try:
                raw = self.model.predict([pairs[i][0] for i in at], [self.statistics.told(pairs[i][0]) for i in at])
            except Exception as e:
                failed = e
        out: list[Estimate | None] = []
        for i, (stage, tokens) in enumerate(pairs):
            out.append(self._judge(stage, tokens, raw, rows[i]) if raw is not None and i in rows else None)
            if statistics:
                self.statistics.add(stage, tokens)
        if failed is not None:
            raise failed
        return out

    def _judge(self, stage: Stage, tokens: int, raw: Lengths, row: int) -> Estimate:
        """Hold what the model says of a stage against what it wrote. Returns what it says."""
        said, experts = self._said(stage, raw, row, self.statistics.lengths(stage).p50)
        wrong = [abs(_tokens(x) - tokens) for x in experts]
        _, agent, _, role, _ = levels(stage)
        for level in (agent, role):
            errors = self.errors.setdefault(level, Errors())
            errors.add(wrong, abs(said.p50 - tokens), covered=tokens <= said.p90)
            self.errors.move_to_end(level)
        while len(self.errors) > MAX_LEVELS:
            self.errors.popitem(last=False)
        log = math.log1p(tokens)
        self.offsets.add(stage, {head: log - float(raw.logs[head][row]) for head in HEADS})
        return said

    def changed_p99(self) -> dict[str, float]:
        """p99 output tokens of the roles that changed since the last call: what the fast path reserves."""
        return self.statistics.changed_p99()

    def status(self) -> list[dict[str, Any]]:
        """Live error by role, where most tokens are missed first: what `maestro predict status` shows."""
        return told_by_role(self.errors, other="median")


def told_by_role(errors: Mapping[str, Errors], *, other: str) -> list[dict[str, Any]]:
    """Errors of roles, where most tokens are missed first. ``other``: what the last expert is called."""
    rows = [
        {
            "role": key.partition("|")[2],
            "model": key.partition("|")[0],
            "n": round(e.n, 1),
            "mae_said": e.said,
            f"mae_{other}": e.experts[-1],
            "covered_p90": e.covered_p90,
            "uses": other if e.model_is_worse else "model",
        }
        for key, e in errors.items()
        if "|" in key
    ]
    return sorted(rows, key=lambda r: -float(r["mae_said"]) * float(r["n"]))


def _tokens(log: float) -> float:
    return math.expm1(min(log, MAX_LOG))


MAX_LOG: Final = 14.0
"""No answer is longer than e to this: a million tokens."""
