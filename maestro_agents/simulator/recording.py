"""What was observed, made ready to be played again: who followed whom in a run, and what each call cost by itself.

A stage's latency is its wait in the engine, its work, and what company in the same batch added to that. The three are
told apart by the best account there is of when the engine began with it:

``engine``   the engine says how long the request queued (vLLM ``--enable-per-request-metrics``);
``stream``   the answer was streamed: the engine began about one unloaded time to first byte before the first byte;
``tokens``   else: its tokens, at the speed of the quarter of the calls that had least company.

An engine is an (engine id, model) pair: what shares a server under another model's name is not seen as shared.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from maestro_agents.core import EngineSpec, Observation, RunEnd

STREAM_S: Final = 0.02
"""An answer whose last byte came this much after its first was streamed."""

QUEUED_S: Final = 0.02
"""What an engine says to have queued for less than this began at once."""

TOLD_SHARE: Final = 0.8
"""Share of an engine's calls whose beginning must be known for its slots to be read from them."""

FIT_FROM: Final = 20
"""Calls below which nothing is said about what company costs."""

TRIMS: Final = 3
"""How often the slower half is dropped before a speed is believed: where most calls queued, the fast ones tell it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Follows:
    """When something becomes due: ``gap_s`` after the last end of the stages ``after`` (the run's start where none)."""

    after: tuple[int, ...]
    gap_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One call of a recorded run."""

    seen: Observation
    #: Key of the engine that served it, in `Recording.engines`.
    engine: str
    due: Follows
    #: Seconds on that engine with no queue and no company.
    work_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One recorded run. A call outside any run is a run of one stage without an end."""

    run_id: str
    started_at_s: float
    stages: tuple[Stage, ...]
    #: None where nobody said that it ended: its calls are load, and nothing more is counted of it.
    end: RunEnd | None = None
    ends: Follows = Follows(after=(), gap_s=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """One engine as the recording shows it."""

    engine_id: str
    model: str
    slots: int
    #: Where ``slots`` comes from, for people.
    slots_from: str
    #: A batch of n takes 1 + slowdown x (n - 1) times as long for each of its members.
    slowdown: float
    #: Seconds of work per output token, to compare engines of one model by.
    pace_s: float
    #: Where the work of most of its stages comes from: ``engine``, ``stream``, ``tokens``.
    basis: str
    stages: int

    @property
    def key(self) -> str:
        return f"{self.engine_id} {self.model}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """Runs in order of arrival, and the engines that served them."""

    runs: tuple[Run, ...]
    engines: Mapping[str, Engine]
    #: What could not be used, by reason.
    left_out: Mapping[str, int]


@dataclass(slots=True)
class _Span:
    """When an engine had a stage, as far as it is known."""

    seen: Observation
    sent_s: float
    started_s: float
    basis: str
    work_s: float = 0.0

    @property
    def ended_s(self) -> float:
        return self.seen.finished_at_s


def record(entries: Iterable[Observation | RunEnd], *, slots: int = 0, fleet: Sequence[EngineSpec] = ()) -> Recording:
    """Make a recording. ``fleet`` (by engine id or URL), else ``slots``, says how many an engine runs at a time; else it
    is read from the calls, where an engine's own account or streams show it. 0 in `Engine.slots` means that they do not:
    see `replay.calibrated`.
    """
    left_out: Counter[str] = Counter()
    stages: defaultdict[str, list[Observation]] = defaultdict(list)
    ends: dict[str, RunEnd] = {}
    for entry in entries:
        if isinstance(entry, RunEnd):
            if entry.ended_at_s < entry.started_at_s:
                left_out["runs that ended before they began"] += 1
            elif entry.outcome != "paused" and entry.ended_at_s >= ends.get(entry.run_id, entry).ended_at_s:
                ends[entry.run_id] = entry
        elif entry.finished_at_s <= 0 or not (entry.granted_at_s or entry.pushed_at_s):
            left_out["calls that no engine began"] += 1
        elif not entry.pushed_at_s <= max(entry.granted_at_s, entry.pushed_at_s) <= entry.finished_at_s:
            left_out["calls that ended before they began"] += 1
        else:
            stages[entry.run_id or f"call {entry.stage_id}"].append(entry)
    spans: defaultdict[tuple[str, str], list[_Span]] = defaultdict(list)
    for o in (o for found in stages.values() for o in found):
        sent_s = max(o.granted_at_s, o.pushed_at_s)
        spec = _named(o.engine_id, fleet)
        spans[spec.engine_id if spec else o.engine_id, o.model].append(_Span(o, sent_s, sent_s, ""))
    engines: dict[str, Engine] = {}
    served: dict[str, tuple[str, float]] = {}
    for (engine_id, _), found in spans.items():
        engine = _engine(engine_id, found, slots=slots, fleet=fleet)
        engines[engine.key] = engine
        served |= {s.seen.stage_id: (engine.key, s.work_s) for s in found}
    names = [*ends, *(name for name in stages if name not in ends)]
    runs = [_run(name, stages.get(name, []), ends.get(name), served) for name in names]
    return Recording(
        runs=tuple(sorted(runs, key=lambda r: (r.started_at_s, r.run_id))), engines=engines, left_out=dict(left_out)
    )


def _named(engine_id: str, fleet: Sequence[EngineSpec]) -> EngineSpec | None:
    """The engine of the fleet that a call names: by its id, or, where the call was only observed, by its URL."""
    return next((e for e in fleet if e.engine_id == engine_id or (e.url and e.url in engine_id)), None)


def _run(name: str, seen: list[Observation], end: RunEnd | None, served: Mapping[str, tuple[str, float]]) -> Run:
    seen = sorted(seen, key=lambda o: (o.pushed_at_s, o.stage_id))
    started_at_s = end.started_at_s if end else min(o.run_started_at_s or o.pushed_at_s for o in seen)
    stages = tuple(
        Stage(
            seen=o,
            engine=served[o.stage_id][0],
            due=_follows(seen, o.pushed_at_s, started_at_s),
            work_s=served[o.stage_id][1],
        )
        for o in seen
    )
    ends = _follows(seen, end.ended_at_s, started_at_s) if end else Follows(after=(), gap_s=0.0)
    return Run(run_id=name, started_at_s=started_at_s, stages=stages, end=end, ends=ends)


def _follows(seen: Sequence[Observation], at_s: float, started_at_s: float) -> Follows:
    """What a moment of a run followed: the stages that had ended by then and that no later one of those had followed.

    In LangGraph a superstep waits for all of the one before, so this is what it waited for. Where branches run beside each
    other without waiting, a chance order is taken for a dependency: the replay then keeps it.
    """
    before = [n for n, o in enumerate(seen) if o.finished_at_s <= at_s and o.pushed_at_s < at_s]
    latest_s = max((seen[n].pushed_at_s for n in before), default=-math.inf)
    after = tuple(n for n in before if seen[n].finished_at_s > latest_s)
    return Follows(
        after=after, gap_s=max(0.0, at_s - max((seen[n].finished_at_s for n in after), default=started_at_s))
    )


# -- engines -------------------------------------------------------------------------------------------------------------
def _engine(engine_id: str, spans: list[_Span], *, slots: int, fleet: Sequence[EngineSpec]) -> Engine:
    """Find out when each stage began and what it cost by itself (written into ``spans``), and what the engine is like."""
    told = _find_starts(spans)
    slowdown = _slowdown([s for s in spans if s.basis != "tokens"])
    _find_work(spans, slowdown)
    found, source = _slots(spans, told=told)
    spec = _named(engine_id, fleet)
    if spec is not None:
        found, source = spec.slots, "the fleet"
    elif slots:
        found, source = slots, "--slots"
    paces = [s.work_s / s.seen.output_tokens for s in spans if s.seen.output_tokens > 0]
    return Engine(
        engine_id=engine_id,
        model=spans[0].seen.model,
        slots=found,
        slots_from=source,
        slowdown=slowdown,
        pace_s=statistics.median(paces) if paces else 0.0,
        basis=Counter(s.basis for s in spans).most_common(1)[0][0],
        stages=len(spans),
    )


def _find_starts(spans: list[_Span]) -> bool:
    """When the engine began with each. True: it is known of most of them."""
    streamed = [
        s.seen.first_byte_at_s - s.sent_s for s in spans if s.seen.finished_at_s - s.seen.first_byte_at_s > STREAM_S
        and s.seen.first_byte_at_s >= s.sent_s
    ]  # fmt: skip
    first_byte_s = sorted(streamed)[len(streamed) // 10] if streamed else 0.0
    for s in spans:
        o = s.seen
        if o.engine_ttft_s > 0 or o.engine_queue_s > 0:
            queued_s = o.engine_queue_s if o.engine_queue_s > QUEUED_S else 0.0
            s.started_s, s.basis = min(s.sent_s + queued_s, s.ended_s), "engine"
        elif s.sent_s <= o.first_byte_at_s < o.finished_at_s - STREAM_S:
            s.started_s, s.basis = max(s.sent_s, o.first_byte_at_s - first_byte_s), "stream"
        else:
            s.basis = "tokens"
    unknown = [s for s in spans if s.basis == "tokens"]
    if unknown:
        per_prompt_s, per_output_s = _speed(spans)
        for s in unknown:
            took_s = per_prompt_s * s.seen.prompt_tokens + per_output_s * s.seen.output_tokens
            s.started_s = max(s.sent_s, s.ended_s - took_s)
    return len(unknown) <= (1 - TOLD_SHARE) * len(spans)


def _speed(spans: Sequence[_Span]) -> tuple[float, float]:
    """Seconds per prompt token and per output token, of calls that hardly waited: least squares over the quarter with
    the least company, then again and again over the half of those that was fastest for its tokens.
    """
    company = _company(spans, [s.sent_s for s in spans], lambda n: n - 1.0)
    shares = [c / max(s.ended_s - s.sent_s, 1e-9) for c, s in zip(company, spans, strict=True)]
    few = sorted(zip(shares, (s.sent_s for s in spans), spans, strict=True), key=lambda x: x[:2])
    few = few[: max(len(spans) // 4, min(len(spans), FIT_FROM))]
    rows = [(float(s.seen.prompt_tokens), float(s.seen.output_tokens), s.ended_s - s.sent_s) for *_, s in few]
    speed = _least_squares(rows)
    for _ in range(TRIMS):
        rows.sort(key=lambda row: row[2] / max(row[0] * speed[0] + row[1] * speed[1], 1e-9))
        rows = rows[: max(len(rows) // 2, min(len(rows), FIT_FROM // 2))]
        speed = _least_squares(rows)
    return speed


def _least_squares(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """(a, b) of ``seconds = a x prompt + b x output``, neither below zero."""
    pp, oo = sum(p * p for p, _, _ in rows), sum(n * n for _, n, _ in rows)
    po = sum(p * n for p, n, _ in rows)
    ps, os = sum(p * s for p, _, s in rows), sum(n * s for _, n, s in rows)
    det = pp * oo - po * po
    if det > 0:
        prompt_s, output_s = (ps * oo - os * po) / det, (os * pp - ps * po) / det
        if prompt_s >= 0 and output_s >= 0:
            return prompt_s, output_s
    return (0.0, os / oo) if oo else (ps / pp if pp else 0.0, 0.0)


def _slowdown(spans: Sequence[_Span]) -> float:
    """What one more stage beside it costs a stage, as a share: a line through seconds per token over company."""
    long = statistics.median(s.seen.output_tokens for s in spans) if spans else 0
    company = _company(spans, [s.started_s for s in spans], lambda n: n - 1.0)
    points = [
        (c / (s.ended_s - s.started_s), (s.ended_s - s.started_s) / s.seen.output_tokens)
        for c, s in zip(company, spans, strict=True)
        if s.seen.output_tokens >= max(long, 1) and s.ended_s > s.started_s
    ]
    if len(points) < FIT_FROM or len({round(x, 6) for x, _ in points}) < 2:
        return 0.0
    slope, alone = statistics.linear_regression([x for x, _ in points], [y for _, y in points])
    return max(0.0, slope / alone) if alone > 0 else 0.0


def _find_work(spans: Sequence[_Span], slowdown: float) -> None:
    """The work of each: its time in the batch, less what company took of it."""
    work = _company(spans, [s.started_s for s in spans], lambda n: 1.0 / (1.0 + slowdown * (n - 1)))
    for s, seconds in zip(spans, work, strict=True):
        s.work_s = seconds if s.basis != "tokens" else s.ended_s - s.started_s


def _company(spans: Sequence[_Span], began_s: Sequence[float], weight: Callable[[int], float]) -> list[float]:
    """For each stage the integral of ``weight(stages in the batch)`` over its time there."""
    moments = sorted([(b, 1) for b in began_s] + [(s.ended_s, -1) for s in spans])
    times: list[float] = []
    total: list[float] = []
    n, at_s, sum_s = 0, moments[0][0] if moments else 0.0, 0.0
    for moment_s, change in moments:
        sum_s += (moment_s - at_s) * weight(n) if n else 0.0
        n, at_s = n + change, moment_s
        times.append(moment_s)
        total.append(sum_s)

    def until(moment_s: float) -> float:
        return total[bisect.bisect_left(times, moment_s)]

    return [until(s.ended_s) - until(b) for s, b in zip(spans, began_s, strict=True)]


def _slots(spans: Sequence[_Span], *, told: bool) -> tuple[int, str]:
    """How many the engine runs at a time: what it mostly ran while others queued there; 0 where nothing shows it."""
    if not told:
        return 0, ""
    known = [s for s in spans if s.basis != "tokens"]
    changes: list[tuple[float, int, int]] = []
    for s in known:
        changes += [(s.started_s, 1, 0), (s.ended_s, -1, 0)]
        if s.started_s - s.sent_s > QUEUED_S:
            changes += [(s.sent_s, 0, 1), (s.started_s, 0, -1)]
    running = queued = 0
    at_s = 0.0
    held: defaultdict[int, float] = defaultdict(float)
    peak = 1
    for moment_s, ran, waited in sorted(changes):
        if queued:
            held[running] += moment_s - at_s
        running, queued, at_s = running + ran, queued + waited, moment_s
        peak = max(peak, running)
    if held:
        return max(1, max(held, key=lambda n: (held[n], n))), "what it ran while calls queued there"
    return peak, "the most it ran at a time (it was never seen full)"
