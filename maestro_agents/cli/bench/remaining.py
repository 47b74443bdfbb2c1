"""`maestro bench remaining`: how well the rest of a run is known, on recorded runs whose tasks were not learned from.

The sessions of half the tasks teach `Workflows` as the scheduler is taught: by observations and ends of runs, the roles of an
app being its nodes. Then every call of the other half is asked about and held against what its session still did. No
graph is given: recorded sessions have none.
"""

from __future__ import annotations

import csv
import gzip
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from maestro_agents.core import Observation, RunEnd, ServiceClass, Status, Ticket
from maestro_agents.errors import ConfigError
from maestro_agents.simulator.sessions import end_of
from maestro_agents.workflow import Remaining, Workflows

MEASURES: Final = {
    "stages": "calls",
    "output_tokens": "tokens",
    "llm_s": "LLM s",
    "tool_s": "tool s",
    "ends_p": "ends",
}
"""What is predicted (a field of `Remaining`) -> its name and unit. Seconds count in the apps whose calls are all timed."""

TIMED: Final = ("llm_s", "tool_s")
PREDICTORS: Final = ("zero", "global_mean", "app_mean", "role_mean", "ours")
COLUMNS: Final = ("app", "session_id", "task_id", "call_index", "role", "output_tokens", "input_tokens", "start_s", "end_s")  # fmt: skip

Values = tuple[float, ...]
"""One number for each of `MEASURES`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One row: a call of a session."""

    app: str
    session: str
    task: str
    role: str
    visit: int
    input_tokens: int
    output_tokens: int
    #: Seconds of the session's own clock. Where the file has none: as if calls took a second each, without a gap.
    start_s: float
    end_s: float
    timed: bool


Session = tuple[Call, ...]


def read_sessions(path: Path) -> list[Session]:
    """Read a CSV of sessions, gzipped or plain. Raises `ConfigError` that names file, line and what to do."""
    found: defaultdict[tuple[str, str], list[tuple[int, dict[str, str]]]] = defaultdict(list)
    number = 0
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rt", encoding="utf-8") if zipped else path.open(encoding="utf-8") as lines:
            rows = csv.DictReader(lines)
            if missing := [c for c in COLUMNS if c not in (rows.fieldnames or ())]:
                raise ConfigError(f"{path} has no column {missing[0]!r}: sessions need {', '.join(COLUMNS)}")
            for row in rows:
                number = rows.line_num
                if None in row.values():
                    raise ValueError("a row is shorter than the head")
                found[row["app"], row["session_id"]].append((int(row["call_index"]), row))
            sessions = [_session([row for _, row in sorted(rows, key=lambda x: x[0])]) for rows in found.values()]
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}. Name a CSV of sessions, gzipped or not") from e
    except (ValueError, TypeError, EOFError, UnicodeDecodeError, csv.Error) as e:
        raise ConfigError(f"{path}, near line {number}: {e}. Correct it, or write the file again") from e
    if not sessions:
        raise ConfigError(f"{path} holds no calls: give a CSV with one call a row")
    return sessions


def _session(rows: Sequence[Mapping[str, str]]) -> Session:
    timed = all(row["start_s"] and row["end_s"] for row in rows)
    visits: Counter[str] = Counter()
    calls: list[Call] = []
    for n, row in enumerate(rows):
        start_s, end_s = (float(row["start_s"]), float(row["end_s"])) if timed else (float(n), n + 1.0)
        if not 0 <= start_s <= end_s < math.inf:
            raise ValueError(f"session {row['session_id']!r} has a call from {start_s} s to {end_s} s")
        calls.append(
            Call(
                app=row["app"],
                session=row["session_id"],
                task=row["task_id"],
                role=row["role"],
                visit=visits[row["role"]],
                input_tokens=int(row["input_tokens"]),
                output_tokens=int(row["output_tokens"]),
                start_s=start_s,
                end_s=end_s,
                timed=timed,
            )
        )
        visits[row["role"]] += 1
    return tuple(calls)


def halves(sessions: Sequence[Session], seed: int) -> tuple[list[Session], list[Session]]:
    """Split by task: one half of each app's tasks teaches, the other asks. A task of several apps is on one side in all."""
    apps: defaultdict[str, set[str]] = defaultdict(set)
    for session in sessions:
        apps[session[0].task].add(session[0].app)
    groups: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for task in sorted(apps):
        groups[tuple(sorted(apps[task]))].append(task)
    rng = random.Random(seed)
    asked: set[str] = set()
    for _, tasks in sorted(groups.items()):
        rng.shuffle(tasks)
        asked.update(tasks[: len(tasks) // 2])
    taught = [s for s in sessions if s[0].task not in asked]
    rng.shuffle(taught)  # the order in which runs end is no part of what is known
    return taught, [s for s in sessions if s[0].task in asked]


def truth(session: Session) -> Iterator[tuple[Call, Values]]:
    """Every call with what its session still did. Recorded sessions are chains: a call follows the one before it."""
    stages = output_tokens = 0
    llm_s = tool_s = 0.0
    found: list[tuple[Call, Values]] = []
    for n in range(len(session) - 1, -1, -1):
        call = session[n]
        if n + 1 < len(session):
            after = session[n + 1]
            stages, output_tokens = stages + 1, output_tokens + after.output_tokens
            llm_s, tool_s = llm_s + after.end_s - after.start_s, tool_s + max(0.0, after.start_s - call.end_s)
        found.append((call, (stages, output_tokens, llm_s, tool_s, float(stages == 0))))
    yield from reversed(found)


# -- predictors ----------------------------------------------------------------------------------------------------------
Predictor = Callable[[Call], Values]


def ours(sessions: Iterable[Session]) -> Predictor:
    """`Workflows`, taught by the log of these sessions."""
    known = Workflows()
    for n, session in enumerate(sessions):
        for entry in log(session, run_id=str(n)):
            if isinstance(entry, RunEnd):
                known.end_run(entry)
            else:
                known.observe(entry)
    asked: dict[tuple[str, str, int], Values] = {}

    def predict(call: Call) -> Values:
        key = (call.app, call.role, call.visit)
        if key not in asked:
            asked[key] = _values(
                known.remaining(
                    Ticket(
                        stage_id="s", client_id="bench", model="m", run_id="r", workflow=call.app, node=call.role, role=call.role,
                        visit=call.visit,
                    )
                )
            )  # fmt: skip
        return asked[key]

    return predict


def _values(found: Remaining) -> Values:
    return tuple(getattr(found, name) for name in MEASURES)


def log(session: Session, *, run_id: str) -> list[Observation | RunEnd]:
    """What the observation log would hold of a session: each call when it ended, then the end of the run."""
    calls = [
        Observation(
            stage_id=f"{run_id}-{n}",
            run_id=run_id,
            workflow=call.app,
            role=call.role,
            node=call.role,
            model="m",
            engine_id="e",
            service_class=ServiceClass.BATCH,
            tenant="t",
            status=Status.DONE,
            visit=call.visit,
            step=n + 1,
            prompt_tokens=call.input_tokens,
            output_tokens=call.output_tokens,
            pushed_at_s=call.start_s,
            granted_at_s=call.start_s,
            finished_at_s=call.end_s,
        )
        for n, call in enumerate(session)
    ]
    return [*calls, end_of(calls, started_at_s=session[0].start_s, ended_at_s=session[-1].end_s)]


def mean_of(sessions: Iterable[Session], key: Callable[[Call], object], otherwise: Predictor) -> Predictor:
    """The mean over the calls with the same key; where there is none, what ``otherwise`` says."""
    sums: dict[object, list[float]] = {}
    counts: Counter[object] = Counter()
    for session in sessions:
        for call, values in truth(session):
            total = sums.setdefault(key(call), [0.0] * len(MEASURES))
            counts[key(call)] += 1
            for n, value in enumerate(values):
                total[n] += value

    def predict(call: Call) -> Values:
        found = key(call)
        return tuple(x / counts[found] for x in sums[found]) if found in sums else otherwise(call)

    return predict


def predictors(sessions: Sequence[Session]) -> dict[str, Predictor]:
    """All of `PREDICTORS`, taught by the same sessions."""

    def zero(_call: Call) -> Values:
        return (0.0,) * len(MEASURES)

    everything = mean_of(sessions, lambda _: "", zero)
    app = mean_of(sessions, lambda c: c.app, everything)
    role = mean_of(sessions, lambda c: (c.app, c.role), app)
    return dict(zip(PREDICTORS, (zero, everything, app, role, ours(sessions)), strict=True))


# -- the second model ------------------------------------------------------------------------------------------------------
SECOND: Final = {
    "workflows": "means of node and visit",
    "median": "medians of role and visit",
    "model": "the second model",
}
"""What says how many tokens a run still writes (a field of `foresight.Rest`) -> its name: `Workflows` alone; the second predictor
while it has no model; with it."""


def second(trace: Path, texts: Path | None, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """How much the model of what runs still write, which the scheduler trains on its own traffic, adds to `Workflows`.

    Cross-fitted by task, as `foresight.foresee` does it. By predictor: mean absolute error in tokens, its mean over apps, and
    Kendall's tau, the share of pairs of calls in their right order less that of those in the wrong one.
    """
    import numpy as np

    from maestro_agents.cli.predict.metrics import kendall
    from maestro_agents.simulator.foresight import FOLDS, rests

    found = rests(trace, texts, progress=progress)
    truth = np.array([r.truth for r in found], dtype=np.float64)
    apps = np.array([r.app for r in found])
    rows: list[dict[str, Any]] = []
    for name in SECOND:
        said = np.array([float(getattr(r, name)) for r in found])
        off = np.abs(said - truth)
        taus = [kendall(truth[apps == app], said[apps == app]) for app in np.unique(apps)]
        rows.append(
            {
                "predictor": name,
                "mae": float(off.mean()),
                "mae_mean_of_apps": float(np.mean([off[apps == app].mean() for app in np.unique(apps)])),
                "tau": kendall(truth, said),
                "tau_mean_of_apps": float(np.mean([t for t in taus if t is not None])),
            }
        )
    return {"calls": len(found), "folds": FOLDS, "rows": rows}


# -- the measurement -------------------------------------------------------------------------------------------------------
def run(path: Path, seeds: int, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Mean absolute error (Brier score of ``ends_p``) by app, measure and predictor, over seeds 0 to ``seeds - 1``.

    ``overall``: over the calls of all apps. ``tick`` is called once per seed.
    """
    sessions = read_sessions(path)
    timed = {s[0].app for s in sessions} - {s[0].app for s in sessions if not s[0].timed}
    errors: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    asked: Counter[str] = Counter()
    for seed in range(seeds):
        taught, unseen = halves(sessions, seed)
        known = predictors(taught)
        for session in unseen:
            app = session[0].app
            groups = (app, "", *(("timed",) if app in timed else ()))
            for call, values in truth(session):
                asked.update(groups)
                for name, predictor in known.items():
                    for measure, guess, value in zip(MEASURES, predictor(call), values, strict=True):
                        error = (guess - value) ** 2 if measure == "ends_p" else abs(guess - value)
                        for group in groups:
                            errors[group, measure, name] += error
        tick()

    if not asked:
        raise ConfigError(f"{path}: no app has two tasks, one to learn from and one to ask about. Give more sessions")

    def table(group: str) -> dict[str, dict[str, float]]:
        return {
            m: {p: errors[group, m, p] / asked[group] for p in PREDICTORS}
            for m in MEASURES
            if group in timed or group == "timed" or m not in TIMED
        }

    overall = table("timed" if asked["timed"] else "") | table("")
    apps = Counter(s[0].app for s in sessions)
    return {
        "file": path.name,
        "split": "task, half and half",
        "seeds": list(range(seeds)),
        "measures": dict(MEASURES),
        "overall": {"calls_asked": asked[""], "errors": overall},
        "apps": [
            {
                "app": app,
                "sessions": n,
                "tasks": len({s[0].task for s in sessions if s[0].app == app}),
                "timed": app in timed,
                "calls_asked": asked[app],
                "errors": table(app) if asked[app] else {},
            }
            for app, n in sorted(apps.items())
        ],
    }
