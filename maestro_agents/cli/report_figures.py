"""What `maestro report` counts: the reading of what was recorded, and pure functions from that to JSON-ready figures.

A NaN (a percentile of nothing) becomes None in JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from maestro_agents.cli.snapshot import percentile
from maestro_agents.core import EngineSpec, Observation, RunEnd, ServiceClass, Status
from maestro_agents.errors import ConfigError, WireError
from maestro_agents.simulator import replay
from maestro_agents.simulator.recording import Recording, record

Entry = Observation | RunEnd

FEW_RUNS: Final = 10
"""Ended runs below which nothing is replayed."""

TRUSTED_ERROR: Final = 0.15
"""Share of the observed completion times by which the replay of what happened may be off and still be believed."""

RESAMPLES: Final = 1_000
BUCKETS: Final = 60

SIDES: Final = {"observed": True, "managed": False}


# -- reading -------------------------------------------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Material:
    """What was read."""

    entries: list[Entry] = field(default_factory=list[Entry])
    #: Lines that are no record (cut, no JSON, impossible values), and the first of them.
    bad: int = 0
    first_bad: str = ""
    #: Records that were there already, e.g. in a file and in Redis.
    doubled: int = 0
    _seen: set[str] = field(default_factory=set[str])

    def add(self, entry: Entry) -> None:
        name = f"{entry.run_id} {entry.ended_at_s}" if isinstance(entry, RunEnd) else entry.stage_id
        if name in self._seen:
            self.doubled += 1
            return
        self._seen.add(name)
        self.entries.append(entry)

    def last(self, since_s: float) -> Material:
        """Only the runs that began, and the calls that were pushed, in the last ``since_s`` seconds of the record."""
        newest_s = max((_ended_s(e) for e in self.entries), default=0.0)
        begun = {e.run_id: e.started_at_s for e in self.entries if isinstance(e, RunEnd)}
        kept = [e for e in self.entries if begun.get(e.run_id, _began_s(e)) >= newest_s - since_s]
        return dataclasses.replace(self, entries=kept)


def read_files(paths: Iterable[Path]) -> Material:
    """Read what ``MAESTRO_EVENTS`` wrote. A line that is no record is left out and counted. Raises `ConfigError`."""
    found = Material()
    for path in paths:
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        try:
                            found.add(_entry(line))
                        except WireError as e:
                            found.bad += 1
                            found.first_bad = found.first_bad or f"{path.name}:{number}: {e}"
        except OSError as e:
            raise ConfigError(f"{path}: {e.strerror or e}. Name the file that MAESTRO_EVENTS wrote") from e
    return found


def _entry(line: bytes) -> Entry:
    """One line. Raises `WireError` where it is no record."""
    try:
        kind = json.loads(line)["kind"]
    except (ValueError, KeyError, TypeError):
        raise WireError("not a record (cut in the middle?)") from None
    kinds: Mapping[str, Callable[[bytes], Entry]] = {"stage": Observation.decode, "run": RunEnd.decode}
    if kind not in kinds:
        raise WireError(f"a record of kind {kind!r}, which this version does not know")
    return checked(kinds[kind](line))


def checked(entry: Entry) -> Entry:
    """The entry, if its numbers are numbers. Raises `WireError`."""
    for f in dataclasses.fields(entry):
        value = getattr(entry, f.name)
        if f.name.endswith(("_s", "_tokens")) and (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or math.isnan(value)
            or (math.isinf(value) and f.name != "deadline_at_s")
        ):
            raise WireError(f"{f.name} = {value!r} is no number")
    if not entry.run_id and isinstance(entry, RunEnd):
        raise WireError("the end of a run without its id")
    return entry


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """By the moments at which they began: several processes write one file, and clocks and disks mix their lines."""
    return sorted(entries, key=lambda e: (_began_s(e), e.run_id if isinstance(e, RunEnd) else e.stage_id))


def _began_s(e: Entry) -> float:
    return e.started_at_s if isinstance(e, RunEnd) else e.pushed_at_s


def _ended_s(e: Entry) -> float:
    return e.ended_at_s if isinstance(e, RunEnd) else e.finished_at_s


# -- what was measured -----------------------------------------------------------------------------------------------------
def measured(entries: Sequence[Entry]) -> dict[str, Any]:
    """Runs by class and side, calls by role, and how many were in flight over time."""
    calls = [e for e in entries if isinstance(e, Observation)]
    runs = final_runs(entries)
    began_s = min((_began_s(e) for e in entries), default=0.0)
    ended_s = max((_ended_s(e) for e in entries), default=0.0)
    return {
        "from_s": began_s,
        "to_s": ended_s,
        "runs": len(runs),
        "calls": len(calls),
        "calls_outside_runs": sum(not c.run_id for c in calls),
        "runs_without_end": len({c.run_id for c in calls if c.run_id} - {r.run_id for r in runs}),
        "managed_share": sum(not c.observed for c in calls) / len(calls) if calls else 0.0,
        "classes": {c.value: _class(c, runs, calls) for c in ServiceClass},
        "roles": _roles(calls),
        "in_flight": _in_flight(calls, began_s, ended_s),
    }


def final_runs(entries: Iterable[Entry]) -> list[RunEnd]:
    """Each run's last end; one that only paused has none. It counts as observed where one of its calls was."""
    ends: dict[str, RunEnd] = {}
    observed: set[str] = set()
    for e in entries:
        if isinstance(e, Observation):
            observed |= {e.run_id} if e.observed else set()
        elif e.outcome != "paused" and e.ended_at_s >= ends.get(e.run_id, e).ended_at_s:
            ends[e.run_id] = e
    found = (dataclasses.replace(e, observed=e.observed or e.run_id in observed) for e in ends.values())
    return sorted(found, key=lambda r: (r.started_at_s, r.run_id))


def _class(c: ServiceClass, runs: Sequence[RunEnd], calls: Sequence[Observation]) -> dict[str, Any]:
    mine = [r for r in runs if r.service_class is c]
    called = [o for o in calls if o.service_class is c]
    sides = {side: [r for r in mine if r.observed is is_observed] for side, is_observed in SIDES.items()}
    return {
        **{side: {**_ends(found), **_calls([o for o in called if o.observed is SIDES[side]])} for side, found in sides.items()},
        "difference": _difference(sides["managed"], sides["observed"]),
    }  # fmt: skip


def _ends(runs: Sequence[RunEnd]) -> dict[str, Any]:
    took = [r.ended_at_s - r.started_at_s for r in runs if r.outcome == "done"]
    return {
        "runs": len(runs),
        "outcomes": dict(Counter(r.outcome for r in runs)),
        "in_time": sum(r.met_deadline for r in runs),
        "completion_s": _quantiles(took),
    }


def _calls(calls: Sequence[Observation]) -> dict[str, Any]:
    done = [o for o in calls if o.status is Status.DONE]
    return {
        "calls": len(calls),
        "errors": sum(o.status is Status.FAILED for o in calls),
        "latency_s": _quantiles([o.finished_at_s - o.pushed_at_s for o in done]),
        "prompt_tokens": sum(o.prompt_tokens for o in done),
        "output_tokens": sum(o.output_tokens for o in done),
    }


def _roles(calls: Sequence[Observation]) -> list[dict[str, Any]]:
    """The most expensive first."""
    by_role: defaultdict[tuple[str, str, str], list[Observation]] = defaultdict(list)
    for o in calls:
        by_role[o.role or "(anonymous)", o.model, o.service_class.value].append(o)
    rows = [
        {
            "role": role,
            "model": model,
            "class": c,
            **_calls(found),
            "seconds": sum(o.finished_at_s - o.pushed_at_s for o in found),
            "waited_s": sum(o.wait_s + o.engine_queue_s for o in found),
        }
        for (role, model, c), found in by_role.items()
    ]
    return sorted(rows, key=lambda r: (-r["seconds"], r["role"], r["class"]))


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    return {f"p{q}": none_if_nan(percentile(values, q / 100)) for q in (50, 95, 99)}


def none_if_nan(value: float) -> float | None:
    """As JSON says it."""
    return None if math.isnan(value) else value


def _in_flight(calls: Sequence[Observation], began_s: float, ended_s: float) -> dict[str, Any]:
    """Calls in flight: the most at a time, and the mean in each of `BUCKETS` equal stretches."""
    changes = sorted(c for o in calls for c in ((o.pushed_at_s, 1), (o.finished_at_s, -1)) if o.finished_at_s > 0)
    width_s = max(ended_s - began_s, 1e-9) / BUCKETS
    seconds = [0.0] * BUCKETS
    now = peak = 0
    at_s = began_s
    for moment_s, change in changes:
        while now and at_s < moment_s:
            bucket = min(BUCKETS - 1, int((at_s - began_s) / width_s))
            edge_s = began_s + (bucket + 1) * width_s
            until_s = moment_s if bucket == BUCKETS - 1 else min(moment_s, max(edge_s, math.nextafter(at_s, math.inf)))
            seconds[bucket] += now * (until_s - at_s)
            at_s = until_s
        at_s = moment_s
        now += change
        peak = max(peak, now)
    return {"peak": peak, "bucket_s": width_s, "mean": [s / width_s for s in seconds]}


def _difference(managed: Sequence[RunEnd], observed: Sequence[RunEnd]) -> dict[str, Any] | None:
    """Managed minus observed, each with its 95 % interval; None where a side has fewer than `FEW_RUNS`."""
    if min(len(managed), len(observed)) < FEW_RUNS:
        return None
    shares = bootstrap([r.met_deadline for r in managed], [r.met_deadline for r in observed], _share)
    ours, theirs = (
        [r.ended_at_s - r.started_at_s for r in side if r.outcome == "done"] for side in (managed, observed)
    )
    took = bootstrap(ours, theirs, _p95) if ours and theirs else None
    return {"method": METHOD, "in_time_share": shares, "completion_p95_s": took}


METHOD: Final = f"percentile bootstrap, runs drawn one by one, {RESAMPLES} times"


def _share(met: Sequence[float]) -> float:
    return sum(met) / len(met)


def _p95(values: Sequence[float]) -> float:
    return percentile(values, 0.95)


def bootstrap(
    a: Sequence[float], b: Sequence[float], statistic: Callable[[Sequence[float]], float]
) -> dict[str, float]:
    """``statistic(a) - statistic(b)`` and its 95 % interval (percentile bootstrap, seeded: the same twice)."""
    rng = random.Random(0)
    drawn = sorted(statistic(rng.choices(a, k=len(a))) - statistic(rng.choices(b, k=len(b))) for _ in range(RESAMPLES))
    return {
        "value": statistic(a) - statistic(b),
        "low": drawn[int(0.025 * RESAMPLES)],
        "high": drawn[int(0.975 * RESAMPLES) - 1],
    }


# -- what would have been gained -------------------------------------------------------------------------------------------
def too_few(entries: Sequence[Entry]) -> str:
    """Why nothing is replayed; "" where there is enough."""
    runs, calls = final_runs(entries), [e for e in entries if isinstance(e, Observation)]
    if len(runs) < FEW_RUNS:
        return f"{len(runs)} ended runs are too few to say what would have been gained: at least {FEW_RUNS} are needed"
    if not {c.run_id for c in calls} & {r.run_id for r in runs}:
        return "no call belongs to one of the runs: what would have been gained cannot be said"
    return ""


async def gained(
    entries: Sequence[Entry],
    *,
    slots: int = 0,
    fleet: Sequence[EngineSpec] = (),
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Replay the record first come first served and under Maestro. ``tick`` is called twice per call."""
    recording = replay.calibrated(record(entries, slots=slots, fleet=fleet))
    played = {
        "fcfs": await replay.first_come(recording, tick=tick),
        "maestro": await replay.maestro(recording, tick=tick),
    }
    calls = [s.seen for run in recording.runs for s in run.stages]
    was = "fcfs" if sum(o.observed for o in calls) * 2 >= len(calls) else "maestro"
    called = {o.run_id for o in calls}
    counted = [e for e in final_runs(entries) if e.run_id in called and e.observed is (was == "fcfs")]
    classes: dict[str, Any] = {}
    for c in ServiceClass:
        ends = [e for e in counted if e.service_class is c]
        found: dict[str, Any] = {"observed": _came_to(ends, {e.run_id: e.ended_at_s for e in ends})}
        found |= {name: _came_to(ends, outcome.ended_at_s) for name, outcome in played.items()}
        found["error"] = _error(ends, played[was].ended_at_s)
        classes[c.value] = found
    errors = [c["error"] for c in classes.values() if c["error"] is not None]
    return {
        "was": was,
        "classes": classes,
        "error": _error(counted, played[was].ended_at_s),
        "trusted": bool(errors) and max(errors) <= TRUSTED_ERROR,
        "trusted_error": TRUSTED_ERROR,
        "waited_share": _waited(recording),
        "managed_share": sum(not o.observed for o in calls) / len(calls),
        "fleet_known": bool(fleet),
        "engines": [
            {"engine": e.engine_id, "model": e.model, "slots": e.slots, "slots_from": e.slots_from, "calls": e.stages,
             "slowdown": e.slowdown, "pace_s_per_token": e.pace_s, "work_from": e.basis}
            for e in recording.engines.values()
        ],
        "left_out": recording.left_out,
        "completion_s": {
            "observed": _took(counted, {e.run_id: e.ended_at_s for e in counted}),
            **{name: _took(counted, outcome.ended_at_s) for name, outcome in played.items()},
        },
    }  # fmt: skip


def _came_to(ends: Sequence[RunEnd], ended_at_s: Mapping[str, float]) -> dict[str, Any]:
    return _ends([dataclasses.replace(e, ended_at_s=ended_at_s[e.run_id]) for e in ends])


def _took(ends: Sequence[RunEnd], ended_at_s: Mapping[str, float]) -> dict[str, list[float]]:
    """Seconds of each run that ended well, by class, sorted."""
    return {
        c.value: sorted(
            ended_at_s[e.run_id] - e.started_at_s for e in ends if e.service_class is c and e.outcome == "done"
        )
        for c in ServiceClass
    }


def _error(ends: Sequence[RunEnd], ended_at_s: Mapping[str, float]) -> float | None:
    """By what share of the observed completion times the replay of what happened is off: mean over mean."""
    took = sum(e.ended_at_s - e.started_at_s for e in ends)
    return sum(abs(ended_at_s[e.run_id] - e.ended_at_s) for e in ends) / took if took > 0 else None


def _waited(recording: Recording) -> float:
    """Share of the calls' time that was neither work nor company: what another order could change at all."""
    stages = [s for run in recording.runs for s in run.stages]
    took_s = sum(s.seen.finished_at_s - s.seen.pushed_at_s for s in stages)
    return max(0.0, 1.0 - sum(s.work_s for s in stages) / took_s) if took_s > 0 else 0.0
