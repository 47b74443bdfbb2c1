"""Recorded sessions: what real runs of agents asked of LLMs, in numbers, made ready to be played on any fleet.

Two files are read. A CSV, a call a line: ``app, session_id, task_id, call_index, role, model, input_tokens, output_tokens``,
and where known ``parents`` (call indexes between spaces; ``-``: none, it began with the session; empty: unknown) and
``start_s, end_s``. Or calls as JSON lines (`predict.traces`). What is not recorded is filled in like this:

- parents unknown: the call before;
- tool time (between the last parent's end and a call's start) not timed: drawn from the timed calls of the same trace, of its
  kind: an agent that calls ``again`` (its tools ran in between) or the ``next`` agent's turn. The draw depends on the session
  alone, so that a session is the same in every workload. No more than `MAX_GAP_S`: what takes longer is a person;
- the part of a prompt that an engine may have cached: where a prompt is at least as long as that of the same role's call before
  in the session, the conversation went on, and it begins with that prompt and its answer (less one token: something is new).
  Prefixes that different runs have in common (system prompts) are not modelled.
"""

from __future__ import annotations

import csv
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Final, Literal

from maestro_agents.core import Observation, RunEnd
from maestro_agents.errors import ConfigError
from maestro_agents.simulator.workload import Foreseen, Stage, kind_of, lines_of

MAX_GAP_S: Final = 60.0
"""Seconds of tools between two calls, at most: recorded gaps reach hours, where a person stopped and went on."""

Gap = Literal["again", "next"]
Foresight = Mapping[tuple[str, str], Sequence[Foreseen]]
"""What was foreseen of each call of a session, by ``(app, session_id)``."""

_NEEDED: Final = ("app", "session_id", "task_id", "call_index", "role", "model", "input_tokens", "output_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of a session."""

    role: str
    prompt_tokens: int
    output_tokens: int
    #: Places in the session of the calls that it waited for.
    after: tuple[int, ...]
    gap_s: float
    #: ``gap_s`` was measured; else drawn, or 0 because the call began with its session.
    timed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One recorded run of one task, in the order of its calls."""

    app: str
    session_id: str
    task_id: str
    calls: tuple[Call, ...]

    @property
    def longest(self) -> int:
        """Tokens of its longest prompt with its answer."""
        return max(c.prompt_tokens + c.output_tokens for c in self.calls)


@dataclass(kw_only=True, slots=True)
class _Row:
    """A call as recorded."""

    index: int
    role: str
    prompt_tokens: int
    output_tokens: int
    #: Call indexes; None: unknown.
    parents: tuple[int, ...] | None
    start_s: float | None
    end_s: float | None


def sessions(path: Path) -> list[Session]:
    """Read recorded sessions, in the order in which they stand. Raises `ConfigError` with the line that is wrong."""
    kind = kind_of(path)
    if kind == "workload":
        raise ConfigError(f"{path} is a workload already: play it, or name the trace that it was made of")
    rows = _of_csv(path) if kind == "sessions" else _of_calls(path)
    linked = {key: _linked(path, key[0], key[1], found) for key, found in rows.items()}
    pool: dict[Gap, list[float]] = {"again": [], "next": []}
    for calls in linked.values():
        for _, kind_of_gap, gap_s in calls:
            if kind_of_gap is not None and gap_s is not None:
                pool[kind_of_gap].append(gap_s)
    return [
        Session(app=app, session_id=name, task_id=task, calls=_filled(app, name, calls, pool))
        for (app, name, task), calls in linked.items()
    ]


def stages(
    session: Session, model_of: Callable[[str], str], foreseen: Sequence[Foreseen] | None = None
) -> tuple[Stage, ...]:
    """The stages of a session, each on the model of its role (``app:role``)."""
    found: list[Stage] = []
    last: dict[str, int] = {}
    visits: defaultdict[str, int] = defaultdict(int)
    for i, call in enumerate(session.calls):
        role = f"{session.app}:{call.role}"
        shares = last.get(role, -1)
        if shares >= 0 and found[shares].prompt_tokens > call.prompt_tokens:
            shares = -1
        before = found[shares] if shares >= 0 else None
        found.append(
            Stage(
                role=role,
                model=model_of(role),
                prompt_tokens=call.prompt_tokens,
                output_tokens=call.output_tokens,
                after=call.after,
                gap_s=call.gap_s,
                shares=shares,
                shared_tokens=min(before.prompt_tokens + before.output_tokens, call.prompt_tokens - 1) if before else 0,
                visit=visits[role],
                foreseen=foreseen[i] if foreseen else None,
            )
        )
        last[role] = i
        visits[role] += 1
    return tuple(found)


_Rows = dict[tuple[str, str, str], list[_Row]]
_Linked = tuple[Call, Gap | None, float | None]


def _of_csv(path: Path) -> _Rows:
    rows: defaultdict[tuple[str, str, str], list[_Row]] = defaultdict(list)
    numbered = lines_of(path)
    _, head = next(numbered)
    at = 1

    def text() -> Iterable[str]:
        nonlocal at
        for number, line in numbered:
            at = number
            yield line

    try:
        reader = csv.DictReader(chain((head,), text()), strict=True)
        if missing := [name for name in _NEEDED if name not in (reader.fieldnames or ())]:
            raise _Wrong(f"no column {', '.join(missing)}")
        for fields in reader:
            key = (_word(fields, "app"), _word(fields, "session_id"), _word(fields, "task_id"))
            rows[key].append(
                _Row(
                    index=_whole(fields, "call_index"),
                    role=_word(fields, "role"),
                    prompt_tokens=_whole(fields, "input_tokens"),
                    output_tokens=_whole(fields, "output_tokens"),
                    parents=_parents(fields.get("parents")),
                    start_s=_seconds(fields, "start_s"),
                    end_s=_seconds(fields, "end_s"),
                )
            )
    except (_Wrong, csv.Error) as e:
        raise ConfigError(f"{path}, line {at}: {e}. Correct or remove the line") from e
    if not rows:
        raise ConfigError(f"{path} holds no calls: give a trace with a call a line")
    return rows


def _of_calls(path: Path) -> _Rows:
    from maestro_agents.predict.traces import read_calls  # numpy comes with it

    rows: defaultdict[tuple[str, str, str], list[_Row]] = defaultdict(list)
    for c in read_calls(path):
        for name, value in (("ts_start", c.ts_start), ("ts_end", c.ts_end)):
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"{path}: {name} of call {c.call_index} of session {c.session_id!r} is {value}")
        rows[c.app, c.session_id, c.task_id].append(
            _Row(
                index=c.call_index,
                role=c.role,
                prompt_tokens=c.input_tokens,
                output_tokens=c.output_tokens,
                parents=c.parents,
                start_s=c.ts_start,
                end_s=c.ts_end,
            )
        )
    return rows


class _Wrong(Exception):
    """What is wrong with a line."""


def _word(fields: Mapping[str, Any], name: str) -> str:
    if not (value := fields.get(name)):
        raise _Wrong(f"it has no {name}")
    return str(value)


def _whole(fields: Mapping[str, Any], name: str) -> int:
    value = _word(fields, name)
    if not (value.isascii() and value.isdigit()):
        raise _Wrong(f"{name} is {value!r}, but it is a whole number from 0")
    return int(value)


def _seconds(fields: Mapping[str, Any], name: str) -> float | None:
    if not (value := fields.get(name)):
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise _Wrong(f"{name} is {value!r}, but it is seconds, or empty")
    return seconds


def _parents(value: str | None) -> tuple[int, ...] | None:
    if not value:
        return None
    try:
        return () if value == "-" else tuple(int(p) for p in value.split())
    except ValueError:
        raise _Wrong(f"parents is {value!r}, but it is call indexes between spaces, - or empty") from None


def _linked(path: Path, app: str, session: str, rows: list[_Row]) -> list[_Linked]:
    """Each call with what it waited for; which kind of gap lies before it (None: it began with the session), and how long."""
    rows.sort(key=lambda r: r.index)
    place = {row.index: i for i, row in enumerate(rows)}
    if len(place) < len(rows):
        raise ConfigError(f"{path}: session {session!r} of {app} has a call_index twice: each of its calls has its own")
    began_s = min((r.start_s for r in rows if r.start_s is not None), default=None)
    found: list[_Linked] = []
    for i, row in enumerate(rows):
        named = None if row.parents is None else [place[p] for p in row.parents if p in place]
        if named is not None and any(p >= i for p in named):
            raise ConfigError(
                f"{path}: call {row.index} of session {session!r} of {app} names itself or a later call among its parents"
            )
        if named is None or (row.parents and not named):  # unknown, or none of them was recorded
            named = [i - 1] if i else []
        after = tuple(sorted(set(named)))
        kind: Gap | None = None
        if after:
            kind = "again" if any(rows[p].role == row.role for p in after) else "next"
        ends = [rows[p].end_s for p in after] or [began_s]
        gap_s = None
        if row.start_s is not None and None not in ends:
            gap_s = min(max(row.start_s - max(e for e in ends if e is not None), 0.0), MAX_GAP_S)
            gap_s = round(gap_s, 3)
        call = Call(
            role=row.role,
            prompt_tokens=max(row.prompt_tokens, 1),
            output_tokens=max(row.output_tokens, 1),
            after=after,
            gap_s=gap_s or 0.0,
            timed=gap_s is not None,
        )
        found.append((call, kind, gap_s))
    return found


def _filled(app: str, session: str, linked: list[_Linked], pool: Mapping[Gap, Sequence[float]]) -> tuple[Call, ...]:
    """A session's calls with a gap each, drawn where none was measured."""
    rng = random.Random(f"gaps of {app} {session}")
    return tuple(
        replace(call, gap_s=rng.choice(pool[kind])) if gap_s is None and kind is not None and pool[kind] else call
        for call, kind, gap_s in linked
    )


def end_of(log: Sequence[Observation], *, started_at_s: float, ended_at_s: float) -> RunEnd:
    """What the observation log would hold of a run's end, whose calls are these, one after the other."""
    roles = Counter(o.role for o in log)
    moves = Counter(pairwise(["__start__", *(o.role for o in log), "__end__"]))
    return RunEnd(
        run_id=log[0].run_id,
        workflow=log[0].workflow,
        outcome="done",
        started_at_s=started_at_s,
        ended_at_s=ended_at_s,
        tasks=roles,
        calls=roles,
        moves=tuple((a, b, n) for (a, b), n in moves.items()),
    )
