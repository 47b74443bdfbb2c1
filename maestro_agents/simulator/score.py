"""Figures of one play, counted from its events as they happen (`world.EVENTS`).

What they mean:

- **counted** runs alone (those that arrived after the warm-up) make up SLO attainment, completion, slowdown, delay and tenants.
  A run that has not ended when play stops has missed its deadline, and has taken until then: a lower bound, no run is left out;
- **slowdown**: seconds that a run took, per second that it takes alone on the fleet's fastest engines (``unloaded_s``);
- **delay** of an interactive stage: seconds from being ready until its grant, all waits together where an engine died;
- **KV**, of stages that ended: *reserved* from grant to end with its extensions, *used* from the engine's start to its end: the prompt,
  and the answer as if it grew evenly from first token to last. Both in byte-seconds of one GPU, prefixes counted for each who has them.
  What a dead engine held was reserved for nothing;
- **throughput** and **batch tokens**: of stages that ended inside the arrival window, over all of it, the warm-up's too;
- **Jain's index** of the tenants' SLO attainments: 1 where all are alike, 1 / tenants where one has all.

Memory: what is in flight, two numbers per counted run, and one per interactive stage of those.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from maestro_agents.core import ServiceClass
from maestro_agents.simulator.world import Event

QUANTILES: Final[Mapping[str, float]] = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
_PERSON: Final = ServiceClass.INTERACTIVE.value
_BATCH: Final = ServiceClass.BATCH.value
_NO_SERVER: Final = frozenset({"host", "disk", "remote"})
"""Tiers from which a server has to be started: a cold start. From the others a model wakes."""


@dataclass(slots=True, eq=False)
class _Run:
    at_s: float
    service_class: str
    tenant: str
    deadline_at_s: float
    counted: bool
    unloaded_s: float


@dataclass(slots=True, eq=False)
class _Stage:
    run: _Run
    #: Since when it waits, or (granted) since when this many bytes are reserved.
    since_s: float
    waited_s: float = 0.0
    granted: bool = False
    kv_bytes: int = 0
    reserved: float = 0.0


class _Group:
    """The counted runs of one class and tenant."""

    def __init__(self) -> None:
        self.met = 0
        self.unended = 0
        self.took_s = array("d")
        self.slowdown = array("d")


class Score:
    """Give every event of a play to `take`, then ask for `figures` and `tenants`."""

    def __init__(self, *, window_s: float) -> None:
        """``window_s``: of the workload."""
        self._window_s = window_s
        self._runs: dict[str, _Run] = {}
        self._stages: dict[str, _Stage] = {}
        self._groups: defaultdict[tuple[str, str], _Group] = defaultdict(_Group)
        self._slack: dict[str, array[float]] = {_PERSON: array("d"), _BATCH: array("d")}
        self._delays = array("d")
        self._longest_s = 0.0
        self._ended = 0
        self._n = {"stages_in_window": 0, "tokens_in_window": 0, "batch_tokens": 0, "preemptions": 0, "extensions": 0}
        self._n |= {"requeues": 0, "refusals": 0, "cold_starts": 0, "wakes": 0, "plans": 0, "grants": 0}
        self._reserved_byte_s = 0.0
        self._used_byte_s = 0.0
        self._takes = {
            "run": self._run, "ready": self._ready, "grant": self._grant, "extend": self._extend, "end": self._end,
            "requeue": self._requeue, "refuse": self._refuse, "done": self._done, "tier": self._tier, "close": self._close,
        }  # fmt: skip

    def take(self, event: Event) -> None:
        """Count an event; those come in the order of time."""
        if (take := self._takes.get(event[0])) is not None:
            take(event)

    # -- events --------------------------------------------------------------------------------------------------------
    def _run(self, e: Event) -> None:
        _, at_s, run, _, service_class, tenant, deadline_at_s, _, counted, unloaded_s = e
        self._runs[run] = _Run(at_s, service_class, tenant, deadline_at_s, counted, unloaded_s)

    def _ready(self, e: Event) -> None:
        self._stages[e[2]] = _Stage(self._runs[e[3]], e[1])

    def _grant(self, e: Event) -> None:
        stage = self._stages[e[2]]
        wait_s = e[1] - stage.since_s
        stage.waited_s += wait_s
        self._longest_s = max(self._longest_s, wait_s)
        stage.granted, stage.since_s, stage.kv_bytes = True, e[1], e[4]

    def _extend(self, e: Event) -> None:
        self._n["extensions"] += 1
        stage = self._stages[e[2]]
        stage.reserved += stage.kv_bytes * (e[1] - stage.since_s)
        stage.since_s, stage.kv_bytes = e[1], e[3]

    def _end(self, e: Event) -> None:
        _, at_s, stage_id, _, started_s, first_s, ended_s, prompt, output, _, preemptions, token_bytes = e
        stage = self._stages.pop(stage_id)
        n = self._n
        self._ended += 1
        self._reserved_byte_s += stage.reserved + stage.kv_bytes * (at_s - stage.since_s)
        self._used_byte_s += token_bytes * (prompt * (ended_s - started_s) + 0.5 * output * (ended_s - first_s))
        n["preemptions"] += preemptions
        if at_s <= self._window_s:
            n["stages_in_window"] += 1
            n["tokens_in_window"] += output
            if stage.run.service_class == _BATCH:
                n["batch_tokens"] += output
        self._delayed(stage)

    def _requeue(self, e: Event) -> None:
        self._n["requeues"] += 1
        stage = self._stages[e[2]]
        self._reserved_byte_s += stage.reserved + stage.kv_bytes * (e[1] - stage.since_s)
        stage.granted, stage.since_s, stage.kv_bytes, stage.reserved = False, e[1], 0, 0.0

    def _refuse(self, e: Event) -> None:
        self._n["refusals"] += 1
        stage = self._stages.pop(e[2])
        self._waited_until(stage, e[1])
        self._delayed(stage)

    def _done(self, e: Event) -> None:
        self._finish(self._runs.pop(e[2]), e[1], ended=True)

    def _tier(self, e: Event) -> None:
        if e[5] == "gpu":
            self._n["cold_starts" if e[4] in _NO_SERVER else "wakes"] += 1

    def _close(self, e: Event) -> None:
        for stage in self._stages.values():
            self._waited_until(stage, e[1])
            self._delayed(stage)
        for run in self._runs.values():
            self._finish(run, e[1], ended=False)
        self._n["plans"], self._n["grants"] = e[4], e[5]

    def _waited_until(self, stage: _Stage, at_s: float) -> None:
        if not stage.granted:
            stage.waited_s += at_s - stage.since_s
            self._longest_s = max(self._longest_s, at_s - stage.since_s)

    def _delayed(self, stage: _Stage) -> None:
        if stage.run.counted and stage.run.service_class == _PERSON:
            self._delays.append(stage.waited_s)

    def _finish(self, run: _Run, at_s: float, *, ended: bool) -> None:
        if not run.counted:
            return
        group = self._groups[run.service_class, run.tenant]
        group.met += ended and at_s <= run.deadline_at_s
        group.unended += not ended
        group.took_s.append(at_s - run.at_s)
        if run.unloaded_s > 0:
            group.slowdown.append((at_s - run.at_s) / run.unloaded_s)
            self._slack[run.service_class].append((run.deadline_at_s - run.at_s) / run.unloaded_s)

    # -- figures -------------------------------------------------------------------------------------------------------
    def figures(self) -> dict[str, float]:
        """Every figure by name, its unit at the end; ``nan`` of what did not happen."""
        every = list(self._groups.values())
        of = {name: [g for (c, _), g in self._groups.items() if c == name] for name in (_PERSON, _BATCH)}
        took = {"": every, f"{_PERSON}_": of[_PERSON], f"{_BATCH}_": of[_BATCH]}
        slowdown = sorted(chain.from_iterable(g.slowdown for g in every))
        delays = sorted(self._delays)
        n, window_s = self._n, self._window_s
        found: dict[str, float] = {
            "runs": sum(len(g.took_s) for g in every),
            "unended": sum(g.unended for g in every),
            "slo": _attained(every),
            "slo_interactive": _attained(of[_PERSON]),
            "slo_batch": _attained(of[_BATCH]),
        }
        for who, groups in took.items():
            seconds = sorted(chain.from_iterable(g.took_s for g in groups))
            found |= {f"completion_{who}{name}_s": quantile(seconds, q) for name, q in QUANTILES.items()}
        found |= {"slowdown_mean": mean(slowdown)}
        found |= {f"slowdown_{name}": quantile(slowdown, q) for name, q in QUANTILES.items()}
        found |= {"delay_interactive_mean_s": mean(delays)}
        found |= {f"delay_interactive_{name}_s": quantile(delays, q) for name, q in QUANTILES.items()}
        found |= {
            "longest_wait_s": self._longest_s,
            "kv_reserved_byte_s": self._reserved_byte_s,
            "kv_used_byte_s": self._used_byte_s,
            "kv_unused_byte_s": self._reserved_byte_s - self._used_byte_s,
            "batch_tokens_in_window": n["batch_tokens"],
            "stages_per_s": n["stages_in_window"] / window_s,
            "output_tokens_per_s": n["tokens_in_window"] / window_s,
            "stages": self._ended,
            "jain": jain([tenant["slo"] for tenant in self.tenants().values()]),
        }
        found |= {
            name: n[name] for name in ("cold_starts", "wakes", "preemptions", "extensions", "requeues", "refusals")
        }
        found |= {name: n[name] for name in ("plans", "grants")}
        found |= {f"slack_{name}": quantile(sorted(slack), 0.5) for name, slack in self._slack.items()}
        return found

    def tenants(self) -> dict[str, dict[str, float]]:
        """By tenant: runs, SLO attainment, p95 completion."""
        found: dict[str, dict[str, float]] = {}
        for name in sorted({tenant for _, tenant in self._groups}):
            groups = [g for (_, tenant), g in self._groups.items() if tenant == name]
            seconds = sorted(chain.from_iterable(g.took_s for g in groups))
            found[name] = {"runs": len(seconds), "slo": _attained(groups), "p95_s": quantile(seconds, 0.95)}
        return found


def _attained(groups: Iterable[_Group]) -> float:
    met = runs = 0
    for g in groups:
        met, runs = met + g.met, runs + len(g.took_s)
    return met / runs if runs else math.nan


def mean(values: Sequence[float]) -> float:
    """``nan`` of none."""
    return math.fsum(values) / len(values) if values else math.nan


def quantile(ordered: Sequence[float], q: float) -> float:
    """Between the two values that stand beside it, as NumPy has it; ``nan`` of none."""
    if not ordered:
        return math.nan
    at = (len(ordered) - 1) * q
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def jain(shares: Sequence[float]) -> float:
    """Jain's fairness index; 1 where all have nothing."""
    squares = sum(x * x for x in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0 if shares else math.nan
