"""Workloads made of recorded sessions: which apps, for whom, when they arrive, and by when they must have ended.

What is drawn is drawn by seed, each thing from a generator of its own: with another rate or another burst the same runs come in
the same order. What a composition promises:

- **Tasks**: seeds below `TUNING_SEED` (to report) and seeds from there on (to tune policies on) draw from disjoint halves of the
  tasks, by a hash of the task's id alone, since several apps solve the same tasks. Within an app tasks are dealt like cards, each
  as often as any other (give or take one), and so are a task's sessions. No task makes more than `TASK_SHARE` of the runs where
  the trace is large enough: a mix's weights are cut to that, and what is cut goes to its other apps.
- **Rate**: ``rate_per_s`` times the window is the number of arrivals, exactly. The times come from a recorded process (a stretch
  of it from a place drawn by seed, the recording taken as a ring, scaled to the window), or are Poisson's. Bursts (`Burst`) bend
  the window's time and keep its mean.
- **Deadlines**: one per app and class, a multiple of the median over all sessions of the app (both halves) of the time that one
  takes where nothing waits (`workload.unloaded_s`). Never of the run's own length, seed, rate or half.
- **Left out**: sessions with a prompt and answer longer than a model takes. ``Workload.source`` says how many, and all else here.
- **Fan-out** is composed, since recorded runs are chains: 2 to 6 sessions of an app, of different tasks, run beside each other
  between a planner's call (the first call of another session) and a joining call (its prompt: the planner's and all branches' last
  answers; its answer: the last of that other session), as LangGraph's ``Send`` does it. Its app is called ``fanout_APP``.
"""

from __future__ import annotations

import bisect
import csv
import hashlib
import heapq
import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

from maestro_agents.core import ServiceClass
from maestro_agents.errors import ConfigError
from maestro_agents.simulator.sessions import MAX_GAP_S, Foresight, Session, stages
from maestro_agents.simulator.workload import (
    REFERENCE,
    Reference,
    Run,
    Stage,
    Workload,
    lines_of,
    unloaded_s,
)

TUNING_SEED: Final = 100
"""Seeds from here on draw from the half of the tasks that policies are tuned on."""

TASK_SHARE: Final = 0.01
"""Of a workload's runs, what one task of an app may make at most."""

BRANCHES: Final = (2, 6)
"""Of a composed fan-out, least and most."""

FAN: Final = "fanout_"
JOINED: Final = " + "
"""Between the sessions that a fan-out was made of."""

MAX_MODEL_TOKENS: Final = 32_768
MULTIPLES: Final = {ServiceClass.INTERACTIVE: 3.0, ServiceClass.BATCH: 6.0}
"""Deadlines, in median unloaded times of the app."""

POPULARITY: Final = 1.0
"""Of several models, the n-th gets ``1 / n ** POPULARITY`` of the work of the first (Zipf's law)."""

EVERY_APP: Final = "*"
"""In a mix: each app of the trace that the mix does not name."""

_FANS_FOR_MEDIAN: Final = 201
_INTERACTIVE: Final = ("tau", "ai_hospital")
_BATCH: Final = (
    "auto_code_rover", "captain_agent", "chatdev", "deer_flow", "magentic_one", "moatless", "storm", "swe_agent",
)  # fmt: skip


def interactive_share(app: str) -> float:
    """Of an app's runs where its mix says nothing: dialogues with a person 1, agents that work alone 0, others a half."""
    name = app.removeprefix(FAN)
    return 1.0 if name.startswith(_INTERACTIVE) else 0.0 if name.startswith(_BATCH) else 0.5


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Which apps run, for whom. Weights need not sum to 1."""

    #: App (or `EVERY_APP`) -> weight; ``fanout_APP``: composed fan-outs of an app's sessions.
    apps: Mapping[str, float]
    #: App -> share of its runs that somebody waits for, where it is not `interactive_share`.
    interactive: Mapping[str, float] = field(default_factory=dict[str, float])
    tenants: Mapping[str, float] = field(default_factory=lambda: {f"tenant-{i}": 1.0 for i in range(1, 6)})
    #: Takes tuning seeds alone.
    tuning: bool = False


_UNEVEN: Final = {"tenant-1": 5.0, "tenant-2": 2.0, "tenant-3": 1.5, "tenant-4": 1.0, "tenant-5": 0.5}
MIXES: Final[Mapping[str, Mix]] = {
    "support": Mix(
        apps={
            "tau2_airline": 3, "tau2_retail": 3, "tau2_telecom": 3, "tau_airline_v1": 2, "tau2_medical_triage": 2,
            "ai_hospital": 4, "moatless_v1": 1, "chatdev": 1, "captain_agent": 1,
        },
        interactive={"ai_hospital": 0.8},
    ),
    "coding": Mix(
        apps={
            "moatless_v1": 3, "moatless_v2": 2, "swe_agent": 3, "auto_code_rover": 3, "chatdev": 1.5,
            "tau2_airline": 2, "tau2_telecom": 2, "ai_hospital": 2,
        },
        interactive={"moatless_v2": 0.3, "swe_agent": 0.3},
    ),
    "research": Mix(
        apps={
            "deer_flow": 2, "storm": 1, "magentic_one": 3, "captain_agent": 4, "chatdev": 2,
            "tau2_retail": 2, "tau2_medical_triage": 2, "tau_airline_v1": 2, "ai_hospital": 2,
        },
        interactive={"deer_flow": 0.3},
        tenants=_UNEVEN,
    ),
    "everything": Mix(apps={EVERY_APP: 1}),
    "fanout": Mix(
        apps={
            "fanout_captain_agent": 3, "fanout_moatless_v1": 2, "fanout_tau2_medical_triage": 2, "captain_agent": 1,
            "tau2_airline": 2, "tau2_telecom": 1, "ai_hospital": 3,
        },
        interactive={"fanout_captain_agent": 0.3},
    ),
    "tune-a": Mix(
        apps={"tau2_airline": 2, "tau_airline_v1": 3, "ai_hospital": 2, "moatless_v1": 2, "swe_agent": 1, "chatdev": 3},
        interactive={"moatless_v1": 0.3},
        tuning=True,
    ),
    "tune-b": Mix(
        apps={
            "tau2_telecom": 2, "tau2_retail": 1, "tau2_medical_triage": 3, "auto_code_rover": 2, "moatless_v2": 3,
            "captain_agent": 3, "magentic_one": 1, "fanout_captain_agent": 1,
        },
        tenants=_UNEVEN,
        tuning=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Burst:
    """For a while arrivals come ``factor`` times as often as the window's mean; in the rest of it less, so that the mean holds."""

    at_s: float
    for_s: float
    factor: float


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """A recorded process: moments in order, in any unit of time. None: Poisson's."""

    name: str
    at: tuple[float, ...]


def read_arrivals(path: Path) -> Arrivals:
    """Read the column ``t_s`` of a CSV file. Raises `ConfigError` with the line that is wrong."""
    at: list[float] = []
    lines = lines_of(path)
    columns = next(lines, (0, ""))[1].strip().split(",")
    if "t_s" not in columns:
        raise ConfigError(f"{path}, line 1 has no column t_s: give a CSV file of arrival times in seconds")
    column = columns.index("t_s")
    for number, line in lines:
        try:
            moment = float(next(csv.reader((line,)))[column])
        except (ValueError, IndexError, csv.Error):
            moment = math.nan
        if not math.isfinite(moment) or (at and moment < at[-1]):
            raise ConfigError(f"{path}, line {number}: t_s is a number of seconds, none smaller than the one before")
        at.append(moment)
    if len(at) < 2 or at[-1] == at[0]:
        raise ConfigError(f"{path} has no two moments: give a CSV file of arrival times in seconds")
    return Arrivals(name=path.name, at=tuple(at))


def tuning_half(task_id: str) -> bool:
    """Whether a task belongs to the half that policies are tuned on."""
    return hashlib.sha256(task_id.encode()).digest()[0] % 2 == 1


def compose(
    recorded: Sequence[Session],
    *,
    mix: Mix,
    rate_per_s: float,
    seed: int = 0,
    name: str = "workload",
    trace: str = "a trace",
    arrivals: Arrivals | None = None,
    bursts: Sequence[Burst] = (),
    window_s: float = 3600.0,
    warmup_s: float | None = None,
    horizon_s: float | None = None,
    models: Sequence[str] = ("small",),
    max_model_tokens: int = MAX_MODEL_TOKENS,
    multiples: Mapping[ServiceClass, float] = MULTIPLES,
    reference: Reference = REFERENCE,
    foreseen: Foresight | None = None,
) -> Workload:
    """Compose a workload. The same arguments, the same workload.

    ``warmup_s``: a sixth of the window where None. ``horizon_s``: the window and the longest deadline, so that each run that
    arrives can still meet its own. With several ``models`` each role gets one, so that their work falls as `POPULARITY` says.
    Raises `ConfigError` where the trace has nothing for this mix and seed, or a number makes no sense.
    """
    half = _half(seed, mix, name)
    warmup_s = window_s / 6 if warmup_s is None else warmup_s
    count = _count(rate_per_s, window_s, warmup_s)
    if not models:
        raise ConfigError("name one model at least")
    of: defaultdict[str, list[Session]] = defaultdict(list)
    for session in recorded:
        if session.longest <= max_model_tokens:
            of[session.app].append(session)
    decks = {
        app: _Deck(
            (s for s in of.get(app.removeprefix(FAN), ()) if tuning_half(s.task_id) == half),
            random.Random(f"{seed} {app}"),
        )
        for app in dict.fromkeys((*mix.apps, *sorted(of)))
    }
    shares = _shares(mix, {app: len(deck) for app, deck in decks.items()}, sorted(of))
    if not shares:
        raise ConfigError(
            f"{trace} has no task for seed {seed} of any app of mix {name!r} ({', '.join(mix.apps)}); it has "
            f"{', '.join(sorted(of)) or 'no session that is short enough'}. Take the mix `everything`, a seed of the other half "
            f"(seeds from {TUNING_SEED} are for tuning) or a larger trace"
        )
    maker = _Maker(models, max_model_tokens, foreseen)
    maker.spread(_asked_s(shares, of, reference))
    at = arrival_times(count, window_s, random.Random(f"{seed} arrivals"), arrivals, bursts)
    apps = random.Random(f"{seed} apps").choices(list(shares), list(shares.values()), k=count)
    tenants = random.Random(f"{seed} tenants").choices(list(mix.tenants), list(mix.tenants.values()), k=count)
    classes, fans = random.Random(f"{seed} classes"), random.Random(f"{seed} fans")
    deadlines: dict[tuple[str, ServiceClass], float] = {}
    runs: list[Run] = []
    for i, (at_s, app, tenant) in enumerate(zip(at, apps, tenants, strict=True)):
        interactive = classes.random() < mix.interactive.get(app, interactive_share(app))
        service_class = ServiceClass.INTERACTIVE if interactive else ServiceClass.BATCH
        if (app, service_class) not in deadlines:
            usual_s = maker.median_s(app, of[app.removeprefix(FAN)], reference)
            deadlines[app, service_class] = round(multiples[service_class] * usual_s, 3)
        session_id, made = maker.draw(app, decks[app], fans)
        runs.append(
            Run(
                run_id=f"r{i}",
                app=app,
                session=session_id,
                at_s=at_s,
                service_class=service_class,
                deadline_s=deadlines[app, service_class],
                stages=made,
                tenant=tenant,
            )
        )
    used = [decks[app] for app in shares]
    drawn = sum(d.drawn for d in used) / max(sum(d.gaps for d in used), 1)
    kept = sum(map(len, of.values()))
    shaped = "".join(f", x{b.factor:g} from {b.at_s:g} s for {b.for_s:g} s" for b in bursts)
    source = (
        f"{trace}, mix {name}, seed {seed} ({'tuning' if half else 'reported'} half of the tasks, {sum(map(len, used))} of them); "
        f"{len(recorded) - kept} of {len(recorded)} sessions left out, longer than {max_model_tokens} tokens; "
        f"arrivals: {arrivals.name if arrivals else 'Poisson'}, {count} in {window_s:g} s{shaped}; deadlines: "
        f"{multiples[ServiceClass.INTERACTIVE]:g}x (interactive) and {multiples[ServiceClass.BATCH]:g}x (batch) the app's median "
        f"unloaded time at {reference.prefill_s:g} s a prompt token and {reference.decode_s:g} s an output token; "
        f"{drawn:.1%} of tool gaps not timed and drawn from timed ones, all at most {MAX_GAP_S:g} s"
    )
    most = max(Counter((run.app, name) for run in runs for name in run.session.split(JOINED)).values())
    source += f"; no session drawn more than {most} times"
    if absent := sorted(set(mix.apps) - set(shares) - {EVERY_APP}):
        source += f"; without {', '.join(absent)}, which the trace or this half of it does not have"
    if any(app.startswith(FAN) for app in shares):
        source += "; fan-outs composed of recorded chains"
    return Workload(
        name=name,
        runs=tuple(runs),
        warmup_s=warmup_s,
        window_s=window_s,
        horizon_s=window_s + max(deadlines.values()) if horizon_s is None else max(horizon_s, window_s),
        tenants=dict(mix.tenants),
        source=source,
    )


def flooded(workload: Workload, tenant: str, factor: int, seed: int = 0) -> Workload:
    """The same workload with one tenant sending ``factor`` times as many runs: its own again, at other moments.

    Every run of the others, and every one that it had, stays as it is. Raises `ConfigError` where it has none.
    """
    own = [run for run in workload.runs if run.tenant == tenant]
    if not own or factor < 1:
        raise ConfigError(
            f"{tenant!r} cannot flood {workload.name} {factor} times: name a tenant with runs, and 1 or more"
        )
    rng = random.Random(f"{seed} flood")
    more = [
        replace(run, run_id=f"{run.run_id}+{i}", at_s=rng.uniform(0.0, workload.window_s) * (1 - 1e-9))
        for i in range(1, factor)
        for run in own
    ]
    more.sort(key=lambda run: run.at_s)
    return replace(
        workload,
        runs=tuple(heapq.merge(workload.runs, more, key=lambda run: run.at_s)),
        source=f"{workload.source}; {tenant} floods: {factor} times its runs",
    )


def arrival_times(
    count: int, window_s: float, rng: random.Random, recorded: Arrivals | None = None, bursts: Sequence[Burst] = ()
) -> list[float]:
    """So many moments in order, from 0 to before ``window_s``. Raises `ConfigError` where bursts leave no time for others."""
    if recorded is None:  # Poisson's, given their number
        even = sorted(rng.random() for _ in range(count))
    else:
        ring, n = recorded.at, len(recorded.at)
        turn_s = (ring[-1] - ring[0]) * n / (n - 1)
        first = rng.randrange(n)
        taken = [ring[i % n] + i // n * turn_s for i in range(first, first + count + 1)]
        span_s = taken[-1] - taken[0]
        even = [(t - taken[0]) / span_s if span_s else i / count for i, t in enumerate(taken[:-1])]
    bend = bent(window_s, bursts)
    return [min(round(bend(share), 6), math.nextafter(window_s, 0.0)) for share in even]


def bent(window_s: float, bursts: Sequence[Burst]) -> Callable[[float], float]:
    """From a share of the arrivals to the moment by which it has come."""
    ordered = sorted(bursts, key=lambda b: b.at_s)
    calm_s = window_s - sum(b.for_s for b in ordered)
    calm = window_s - sum(b.factor * b.for_s for b in ordered)
    apart = all(a.at_s + a.for_s <= b.at_s for a, b in pairwise(ordered))
    inside = all(b.at_s >= 0 and b.for_s > 0 and b.factor >= 0 and b.at_s + b.for_s <= window_s for b in ordered)
    if not apart or not inside or calm < 0 or (calm_s <= 0) != (calm <= 0):
        raise ConfigError(
            f"bursts must lie apart, within the window of {window_s:g} s, and bring less than all of its runs: shorten them, or "
            "make the window longer"
        )
    rate = calm / calm_s if calm_s > 0 else 0.0
    moments, shares = [0.0], [0.0]
    for b in ordered:
        for until, each in ((b.at_s, rate), (b.at_s + b.for_s, b.factor)):
            shares.append(shares[-1] + (until - moments[-1]) * each / window_s)
            moments.append(until)
    moments.append(window_s)
    shares.append(1.0)

    def moment(share: float) -> float:
        i = min(bisect.bisect_right(shares, share), len(shares) - 1)
        width = shares[i] - shares[i - 1]
        return moments[i - 1] + (moments[i] - moments[i - 1]) * ((share - shares[i - 1]) / width if width else 0.0)

    return moment


def _half(seed: int, mix: Mix, name: str) -> bool:
    tuning = seed >= TUNING_SEED
    if seed < 0 or (mix.tuning and not tuning):
        raise ConfigError(
            f"mix {name!r} does not take seed {seed}: it is for tuning, and its seeds begin at {TUNING_SEED}"
            if mix.tuning
            else f"seed {seed}: it is a number from 0"
        )
    return tuning


def _count(rate_per_s: float, window_s: float, warmup_s: float) -> int:
    if not (0 < window_s < math.inf and 0 <= warmup_s < window_s):
        raise ConfigError(
            f"a warm-up of {warmup_s:g} s and a window of {window_s:g} s: the window is the longer, and above 0"
        )
    if not 0.5 <= rate_per_s * window_s < math.inf:
        raise ConfigError(f"{rate_per_s:g} runs a second make no run in {window_s:g} s: raise the rate or the window")
    return round(rate_per_s * window_s)


def _asked_s(
    shares: Mapping[str, float], of: Mapping[str, Sequence[Session]], reference: Reference
) -> dict[str, float]:
    """Seconds of calls that each role asks for in a mean run of the mix."""
    asked: defaultdict[str, float] = defaultdict(float)
    for app, share in shares.items():
        found = of[app.removeprefix(FAN)]
        times = sum(BRANCHES) / 2 if app.startswith(FAN) else 1.0
        for session in found:
            for stage in stages(session, str):
                asked[stage.role] += share * times / len(found) * reference.call_s(stage)
    return asked


def _shares(mix: Mix, tasks: Mapping[str, int], apps: Sequence[str]) -> dict[str, float]:
    """The share of the runs of each app that has tasks: its weight, cut where its tasks would come too often."""
    weights = {app: w for app, w in mix.apps.items() if w > 0 and app != EVERY_APP}
    for app in apps if mix.apps.get(EVERY_APP) else ():
        weights.setdefault(app, mix.apps[EVERY_APP])
    weights = {app: w for app, w in weights.items() if tasks.get(app)}
    caps = {app: TASK_SHARE * tasks[app] for app in weights}
    if sum(caps.values()) <= 1.0:  # a small trace: each task as often as any other
        return caps
    cut: dict[str, float] = {}
    while True:
        room, rest = 1.0 - sum(cut.values()), {a: w for a, w in weights.items() if a not in cut}
        total = sum(rest.values())
        over = [app for app, w in rest.items() if w / total * room > caps[app]]
        if not over:
            return {app: cut.get(app, w / total * room) for app, w in weights.items()}
        cut.update((app, caps[app]) for app in over)


class _Deck:
    """An app's sessions: tasks dealt in shuffled rounds, and of a task its sessions in turn."""

    def __init__(self, of: Iterable[Session], rng: random.Random) -> None:
        self._by_task: defaultdict[str, list[Session]] = defaultdict(list)
        for session in of:
            self._by_task[session.task_id].append(session)
        for found in self._by_task.values():
            rng.shuffle(found)
        self._rng = rng
        self._turns: Counter[str] = Counter()
        self._round: list[str] = []
        #: Gaps of what was dealt, and those of them that were not measured.
        self.gaps = self.drawn = 0

    def __len__(self) -> int:
        """Tasks."""
        return len(self._by_task)

    def deal(self, count: int = 1) -> list[Session]:
        """The next sessions, of different tasks as long as there are so many."""
        if len(self._round) < count:
            again = list(self._by_task)
            self._rng.shuffle(again)
            left = set(self._round)  # what the last round still has comes first, and not a second time at once
            self._round = [t for t in again if t in left] + [t for t in again if t not in left] + self._round
        found: list[Session] = []
        for _ in range(min(count, len(self._round))):
            task = self._round.pop()
            of = self._by_task[task]
            found.append(of[self._turns[task] % len(of)])
            self._turns[task] += 1
            self.gaps += sum(bool(c.after) for c in found[-1].calls)
            self.drawn += sum(bool(c.after) and not c.timed for c in found[-1].calls)
        return found


class _Maker:
    """Makes runs of sessions, the same stages of the same session."""

    def __init__(self, models: Sequence[str], max_model_tokens: int, foreseen: Foresight | None) -> None:
        self._models, self._max_tokens, self._foreseen = models, max_model_tokens, foreseen or {}
        self._weights = [1 / n**POPULARITY for n in range(1, len(models) + 1)]
        self._model_of: dict[str, str] = {}
        self._made: dict[tuple[str, str, str], tuple[Stage, ...]] = {}

    def spread(self, asked_s: Mapping[str, float]) -> None:
        """Give each role a model, the one that lacks most of its share; ``asked_s``: what each role asks for."""
        lacking = [w / sum(self._weights) * sum(asked_s.values()) for w in self._weights]
        for role, seconds in sorted(asked_s.items(), key=lambda kv: (-kv[1], kv[0])):
            most = max(range(len(lacking)), key=lambda m: (lacking[m], -m))
            lacking[most] -= seconds
            self._model_of[role] = self._models[most]

    def model_of(self, role: str) -> str:
        """The model of a role; one that only a fan-out has gets its own by its name."""
        if role not in self._model_of:
            self._model_of[role] = random.Random(role).choices(self._models, self._weights)[0]
        return self._model_of[role]

    def of(self, session: Session) -> tuple[Stage, ...]:
        key = session.app, session.session_id, session.task_id
        if key not in self._made:
            said = self._foreseen.get((session.app, session.session_id))
            self._made[key] = stages(session, self.model_of, said)
        return self._made[key]

    def draw(self, app: str, deck: _Deck, rng: random.Random) -> tuple[str, tuple[Stage, ...]]:
        """The next run of an app: the name of its session (of a fan-out: of all), and its stages."""
        if not app.startswith(FAN):
            (session,) = deck.deal()
            return session.session_id, self.of(session)
        head, *branches = deck.deal(1 + rng.randint(*BRANCHES))
        made = fan_out(app, self.of(head), [self.of(b) for b in branches or [head]], self.model_of, self._max_tokens)
        return JOINED.join(s.session_id for s in (head, *branches)), made

    def median_s(self, app: str, of: Sequence[Session], reference: Reference) -> float:
        """Seconds that half of an app's sessions take where nothing waits."""
        if not app.startswith(FAN):
            return statistics.median(unloaded_s(self.of(s), reference) for s in of)
        rng = random.Random(f"median of {app}")
        deck = _Deck(of, rng)
        return statistics.median(unloaded_s(self.draw(app, deck, rng)[1], reference) for _ in range(_FANS_FOR_MEDIAN))


def fan_out(
    app: str,
    head: Sequence[Stage],
    branches: Sequence[Sequence[Stage]],
    model_of: Callable[[str], str],
    max_model_tokens: int = MAX_MODEL_TOKENS,
) -> tuple[Stage, ...]:
    """A planner's call, the branches beside each other, and a call that joins them. A role's visits count in its own branch."""
    first, last = head[0], head[-1]
    role = f"{app}:planner"
    found = [replace(first, role=role, model=model_of(role), after=(), gap_s=0.0)]
    leaves: list[int] = []
    for branch in branches:
        at = len(found)
        parents = {p for stage in branch for p in stage.after}
        leaves += [at + i for i in range(len(branch)) if i not in parents]
        found += [
            replace(
                stage,
                after=tuple(at + p for p in stage.after) or (0,),
                shares=at + stage.shares if stage.shares >= 0 else -1,
            )
            for stage in branch
        ]
    role = f"{app}:join"
    read = first.prompt_tokens + sum(found[i].output_tokens for i in leaves)
    joining = Stage(
        role=role,
        model=model_of(role),
        prompt_tokens=max(min(read, max_model_tokens - last.output_tokens), 1),
        output_tokens=last.output_tokens,
        after=tuple(leaves),
        foreseen=last.foreseen,
    )
    found.append(joining)
    return tuple(_foreseen(found, branches))


def _foreseen(found: Sequence[Stage], branches: Sequence[Sequence[Stage]]) -> Iterator[Stage]:
    """Each stage with what follows in the fan-out, by what was foreseen of its parts.

    Branches are taken to go in step; before the plan is made nobody knows how many there will be, only how many there mostly are.
    """
    joining = found[-1]
    said = joining.foreseen
    if said is None or any(stage.foreseen is None for stage in found):
        yield from found
        return

    last = [found[i].foreseen for i in joining.after]
    answers = sum(f.output_tokens_mean for f in last if f is not None)

    def after(at: int, times: float = 1.0) -> dict[str, float]:
        """What branches still do once each has done its stages up to ``at``, and the join."""
        still = [b[at] for b in branches if at < len(b)] if at >= 0 else [b[0] for b in branches]
        each = [s.foreseen for s in still if s.foreseen is not None]
        own = 1 if at < 0 else 0  # the first stages themselves lie ahead, too
        return {
            "stages": times * sum(f.stages + own for f in each) + 1,
            "output_tokens": times * sum(f.output_tokens + own * f.output_tokens_mean for f in each)
            + said.output_tokens_mean,
            "prompt_tokens": times * sum(f.prompt_tokens for f in each)
            + own * times * sum(s.prompt_tokens for s in still)
            + found[0].prompt_tokens
            + answers,
            "tool_s": max((f.tool_s for f in each), default=0.0),
            "ends_p": 0.0,
        }

    nothing = {"stages": 0.0, "output_tokens": 0.0, "prompt_tokens": 0.0, "tool_s": 0.0, "ends_p": 1.0}
    places = [i for branch in branches for i in range(len(branch))]
    ahead = [after(-1, sum(BRANCHES) / 2 / len(branches)), *map(after, places), nothing]
    for stage, still in zip(found, ahead, strict=True):
        assert stage.foreseen is not None
        yield replace(stage, foreseen=replace(stage.foreseen, **still))
